"""Clips: probing, reading and writing, one frame at a time.

All work is done by the ffmpeg program that imageio-ffmpeg brings, run with argument lists. Its `read_frames` and
`write_frames` generators are not used: they hide ffmpeg's exit status, so that a clip that breaks in the middle or a
full disk looks like success, and they kill the encoder when Ctrl-C comes while a frame is being handed over.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import floor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import IO, Protocol

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from skyreels_v3.errors import UserError, shown
from skyreels_v3.media.files import check_readable, partial_name, publish, temporary_name
from skyreels_v3.media.image import cover_crop

logger = logging.getLogger(__name__)

# Containers that are taken as a clip. Pictures, text and playlists (which may name other files and addresses) are not.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,webp_anim,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,ivf,obu,flv,"
    "asf,ogg,nut,mxf,dv,mjpeg,yuv4mpegpipe,wtv,rm"
)
# Containers that are taken as sound: those of a clip, for its sound track, and those that hold nothing else.
SOUND_CONTAINERS = CONTAINERS + ",mp3,wav,flac,aac,aiff,w64,au,caf,amr,ac3,eac3,tta,ape,wv"
# Only from containers with an index: recordings of a broadcast stream may begin and end in the middle of a packet.
TRUNCATED = re.compile(r"partial file|ended prematurely|moov atom not found|/(mov|avi)[^]]*\] corrupt input packet")
UNKNOWN_TIME = -(2**63)  # ffmpeg's "no timestamp"
DISCARDED = 0x4  # packet flag: decoded but not shown, as an edit list says

# A track in ffmpeg's description of a file, with its metadata.
TRACK = re.compile(r"^  Stream #0:(\d+)\S*: (Video|Audio): (.*(?:\n {4,}.*)*)", re.MULTILINE)
FIRST = {"Video": "V", "Audio": "a"}  # specifiers of a kind of tracks
PICTURE = re.compile(r", (\w+)(?:\((.*?)\))?, (\d+)x(\d+)(?:,? \[?SAR (\d+):(\d+))?")  # format, its details, size
COLOURS = re.compile(r"([\w-]+)/([\w-]+)/([\w-]+)")  # matrix, primaries, transfer function
MAX_FRAME_PIXELS = 40_000_000  # 8K has 35 million
MAX_CLIP_SECONDS = 4 * 3600  # all of a clip is decoded for its end

# Non-square pixels are stretched to square ones; where they are square, the picture only changes its pixel format.
SCALE = "scale=w='max(1,round(iw*sar))':h=ih:flags=bicubic+accurate_rnd+full_chroma_int"
TO_RGB = f"{SCALE},setsar=1,format=rgb24"
TO_RGB_ON_WHITE = (
    f"{SCALE},setsar=1,format=rgba,split[a][b];[a]lutrgb=r=255:g=255:b=255:a=255[white];[white][b]overlay=format=rgb,"
    "format=rgb24"
)
WITH_ALPHA = re.compile(r"yuva|gbrap|rgba|bgra|argb|abgr|ya\d|pal8|ayuv|vuya")  # pixel formats
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # the default ones leave alpha out
HD_HEIGHT = 720  # from here on a clip that does not tell its matrix has BT.709's, as players have it
INTERLACED = re.compile("top first|bottom first|top coded first|bottom coded first")
HDR = {"arib-std-b67": "HLG", "smpte2084": "PQ"}
WIDE_PRIMARIES = ("bt2020", "smpte431", "smpte432")
# To BT.709's primaries and transfer function by way of linear light, of which 1 is the white of SDR at 203 cd/m2
# (ITU-R BT.2408). HDR's highlights, to 1000 cd/m2, are bent into the last fifth; below it nothing changes.
TO_LINEAR = "zscale=transfer=linear:npl=203,format={linear},zscale=primaries=bt709"
TONE_MAP = "tonemap=mobius:param=0.8:desat=0:peak=4.926"
TO_SDR = "zscale=transfer=bt709,format={whole}"
TO_YUV = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp,format=yuv420p,"
    "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
)
CRF = 16  # x264's constant quality: 0 is lossless, 18 is usually called visually lossless
PRESET = "medium"
AAC_BITS = "256k"  # a second; the encoder takes less where the sample rate allows no more
# Samples one after the other from time 0, as `audio.read_audio` hands them to the model: a track that begins late or
# has gaps in its timestamps must not run away from the lips.
FROM_ZERO = "asetpts=N/SR/TB"
SURROUND = re.compile(r" Hz, (?!mono|stereo|[12] channels)")  # in the description of a track
LIMITER = "alimiter=limit=0.98:level=0:latency=1"  # no make-up gain, and no delay by its look-ahead
# In floating point, where ffmpeg does not turn the sum down to what the loudest possible one would need.
DOWNMIX = f"aformat=sample_fmts=fltp:channel_layouts=stereo,{LIMITER}"
WHOLE_NUMBERS = "aformat=sample_fmts=s32:channel_layouts=mono|stereo"  # clip what float files have beyond [-1, 1]
SOUND_FADE = 0.01  # s, at the end of a clip's sound
METADATA_BYTES = 1 << 20  # that are read
COMMENT_BYTES = 120_000  # one argument of a Linux program may have 128 KiB
PNG_COMPRESSION = 3  # of 9; higher levels take much longer for a few percent
FRAMES_AHEAD = 16  # frames that may wait to be written while the next ones are made: 44 MB at 1280 x 720
ERROR_LINES = 5
TRIAL_SECONDS = 10.0  # for ffmpeg to encode a tiny frame
HAS_OPEN_FILES = Path("/proc/self/fd").is_dir()  # names by which a process opens its files anew: Linux


@dataclass(frozen=True)
class ClipInfo:
    """What is known of a clip without decoding it.

    `width` and `height` are as displayed: after rotation, in square pixels. `fps` is the clip's own (mean) rate,
    `start` the time of its first frame in the file and `seconds` the length of its video. `frames` is the number of
    frames that `read_frames` gives at the wanted rate; it can be off by one where a container does not say how long the
    last frame is shown.
    """

    path: Path
    width: int
    height: int
    fps: float
    seconds: float
    frames: int
    start: float = 0.0
    has_sound: bool = False


def probe(path: Path, flag: str, fps: int, say: Callable[[str], object] = logger.warning) -> ClipInfo:
    """Look at a clip: reads the packets' timestamps and decodes one frame.

    Args:
        fps: the rate at which its frames will be read.
        say: called with what the user should know of the clip.

    Raises:
        UserError: `path` is not a complete, decodable video file.
    """
    check_readable(path, flag)
    track = _video_track(path)
    if track.too_large:
        reason = f"{shown(path)} has frames of more than {MAX_FRAME_PIXELS // 10**6} million pixels"
        raise UserError(flag, f"{reason}; scale it down to 3840 x 2160 at most")
    times = _packet_times(path, track, flag)
    try:
        height, width = next(_decode(track, None, ["-frames:v", "1"])).shape[:2]
    except (RuntimeError, StopIteration) as error:
        if "No such filter: 'zscale'" in str(error):
            reason = (
                f"{shown(path)} is HDR or of a wide gamut, for which {shown(get_ffmpeg_exe())} has no zscale filter"
            )
            raise UserError(flag, f"{reason}; unset IMAGEIO_FFMPEG_EXE, or convert the clip to SDR BT.709") from error
        raise UserError(flag, f"{shown(path)}: no frame can be decoded; convert it to an H.264 mp4 file") from error
    start, end = times[0][0], times[-1][1]
    seconds = float(end - start)
    if seconds > MAX_CLIP_SECONDS:
        raise UserError(flag, f"{shown(path)} is {seconds:.0f} s long; cut it to {MAX_CLIP_SECONDS} s at most")
    for note in track.notes:
        say(f"{shown(path)} {note}")
    return ClipInfo(
        path=path,
        width=width,
        height=height,
        fps=len(times) / seconds if seconds else 0.0,
        seconds=seconds,
        frames=max(0, _round_half_up(end * fps) - _round_half_up(start * fps)),
        start=float(start),
        has_sound=track.has_sound,
    )


def read_frames(path: Path, fps: int) -> Iterator[np.ndarray]:
    """The frames of a clip at `fps` frames a second, each uint8 [H, W, 3] as displayed; one in memory at a time.

    Output frame n is the last source frame whose timestamp, in units of 1/fps and rounded, is not after n. So a clip
    of that rate is read frame by frame, others lose or repeat frames and keep their speed. Colours are BT.709's,
    whatever the clip's are; interlaced fields become frames; transparent parts become white.

    Raises:
        RuntimeError: ffmpeg fails.
    """
    return _decode(_video_track(path), fps)


def last_frames(
    path: Path, fps: int, count: int, flag: str, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """The last `count` frames of a clip at `fps` frames a second, uint8 [count, H, W, 3]; no more are held in memory.

    Args:
        progress: called with 1 after each frame that was read, like the `update` of a tqdm bar.

    Raises:
        UserError: the clip has fewer frames, or pictures of several sizes.
    """
    kept: deque[np.ndarray] = deque(maxlen=count)
    for frame in read_frames(path, fps):
        kept.append(frame)
        if progress is not None:
            progress(1)
    if len(kept) < count:
        raise too_short(path, flag, fps, count, len(kept))
    if len({frame.shape for frame in kept}) > 1:
        raise UserError(flag, f"{shown(path)} changes its picture size on the way; convert it to one size first")
    return np.stack(kept)


def too_short(path: Path, flag: str, fps: int, needed: int, frames: int) -> UserError:
    """The error for a clip of `frames` frames where `needed` are needed."""
    return UserError(
        flag,
        f"{shown(path)} is too short: {needed} frames at {fps} frames a second ({needed / fps:.2f} s) are needed, it "
        f"has {frames}; give a longer clip",
    )


def resized(frames: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """Frames scaled to cover `height` x `width` and cropped, uint8 [height, width, 3]; those of that size unchanged."""
    for frame in frames:
        if frame.shape[:2] == (height, width):
            yield frame
        else:
            yield np.asarray(cover_crop(Image.fromarray(frame), height, width))


def write_video(
    frames: Iterable[np.ndarray],
    path: Path,
    *,
    height: int,
    width: int,
    fps: int,
    comment: str,
    audio: Path | ClipInfo | None = None,
    workspace: Path | None = None,
) -> Path:
    """Encode frames, uint8 [height, width, 3], as they come: H.264, yuv420p, BT.709, index in front.

    The file gets its name when it is complete, and another one if the name was taken meanwhile. When `frames` raises,
    what there is is kept as `<stem>.partial.mp4` and the exception goes on.

    Args:
        frames: asked for the next one while up to `FRAMES_AHEAD` wait to be encoded; so a frame must not be changed
            after it was given.
        height, width: even numbers.
        comment: the file's comment, for what made it.
        audio: a sound file, or a clip for its sound track, that `audio.probe_audio` has accepted. It is heard from the
            first frame on as AAC, at its own sample rate (the nearest that AAC has) and in its own channels (more than
            two are mixed to stereo), cut or filled with silence to the length of the frames; in a partial file
            likewise. Or a clip whose frames come first: its sound is heard with them, as the timestamps say.
        workspace: a folder of the same file system for the unfinished file; that of `path` if there is none.

    Returns:
        The path of the file, `path` unless that was taken.

    Raises:
        RuntimeError: there are no frames, or ffmpeg fails. When only the sound could not be added, the silent frames
            are kept as a partial file; a clip's sound that could not be added is only a warning.
    """
    if len(comment.encode()) > COMMENT_BYTES:
        raise ValueError(f"comment of more than {COMMENT_BYTES} bytes")
    temporary = temporary_name((workspace or path.parent) / path.name)
    return _deliver(frames, _VideoSink(temporary, height, width, fps, comment, audio), path)


def read_comment(path: Path) -> str:
    """The comment of a file that `write_video` made, of a folder by `write_frame_folder`, or of a file in that.

    Empty if there is none.

    Raises:
        OSError, RuntimeError, ValueError: it is none of these, or says too much.
    """
    if path.is_dir() or path.suffix.lower() == ".png":
        try:
            with Image.open(path / "00000.png" if path.is_dir() else path, formats=["PNG"]) as picture:
                return str(picture.info.get("comment", ""))
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path} is no frame of ours") from error
    arguments = [*_input(path, CONTAINERS), "-c", "copy", "-t", "0", "-f", "ffmetadata", "pipe:1"]
    with _reading(arguments) as stream:
        text = stream.read(METADATA_BYTES).decode(errors="replace")
        if stream.read(1):
            raise RuntimeError(f"{path} has more than {METADATA_BYTES} bytes of metadata")
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else ""


def write_frame_folder(
    frames: Iterable[np.ndarray], folder: Path, *, comment: str, workspace: Path | None = None
) -> Path:
    """Write frames, uint8 [H, W, 3], as they come to 00000.png, 00001.png, ... in a new folder, lossless.

    Frames, names and interruptions as in `write_video`: the folder gets its name at the end, or `<name>.partial`. Every
    file carries `comment` in a PNG text chunk of that name, so that a frame copied elsewhere still tells what made it.
    """
    temporary = temporary_name((workspace or folder.parent) / folder.name)
    return _deliver(frames, _FolderSink(temporary, comment), folder)


class _Sink(Protocol):
    """Where frames go: a temporary file or folder that grows by `add`."""

    temporary: Path
    added: int  # complete frames so far
    is_folder: bool

    def add(self, frame: np.ndarray) -> None: ...

    def finish(self) -> None:
        """Make `temporary` complete; once more is harmless. Raises RuntimeError if that fails."""

    def discard(self) -> None:
        """End what is under way and remove what is left of `temporary`; once more is harmless."""


def _deliver(frames: Iterable[np.ndarray], sink: _Sink, final: Path) -> Path:
    """Put all frames into the sink and its file under the name `final`; on an exception what there is as a partial."""
    writer = _Writer(sink)
    try:
        for number, frame in enumerate(frames):
            if number == 0:
                sink.temporary.parent.mkdir(parents=True, exist_ok=True)
            writer.add(frame)
        writer.wait()
        writer.check()
        sink.finish()
        if not sink.added:
            raise RuntimeError(f"{final}: there are no frames to write")
        final.parent.mkdir(parents=True, exist_ok=True)
        return publish(sink.temporary, final)
    except BaseException:
        writer.wait()
        _keep_partial(sink, final)
        raise
    finally:
        writer.discard()


class _Writer:
    """Adds frames to a sink in a thread of its own, so that the next frames are made while one is written.

    A frame must not be changed after `add`. The first error of the sink ends the writing: what it has then are whole
    frames, in order. The sink may be used directly after `wait`.
    """

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self._error: BaseException | None = None
        # simple queues, because an interrupt cannot leave one of their operations half done
        self._frames: SimpleQueue[np.ndarray | None] = SimpleQueue()  # None: no more
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(FRAMES_AHEAD):
            self._room.put(None)
        self._writing = Lock()  # until the end of the thread, whose `join` returns too early after an interrupted one
        self._writing.acquire()
        Thread(target=self._write, name="frame writer", daemon=True).start()

    def add(self, frame: np.ndarray) -> None:
        """Hand over a frame; waits while too many do. Raises the sink's error."""
        self._frames.put(frame)  # before waiting: an interrupt then does not cost the frame
        self._room.get()
        self.check()

    def check(self) -> None:
        """Raise the sink's error, if there was one."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until all frames are written, or one cannot be; once more is harmless."""
        self._frames.put(None)
        with self._writing:
            pass

    def discard(self) -> None:
        """Give up the frames that wait, end the thread, and remove what is left of the sink."""
        self._error = self._error or RuntimeError("given up")
        self._sink.discard()  # ends a write that hangs, with its process
        self.wait()
        self._sink.discard()  # what that write may have begun meanwhile

    def _write(self) -> None:
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            # ffmpeg inherits this: Ctrl-C in the terminal must not end it before it is in its own session
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while (frame := self._frames.get()) is not None:
            try:
                if self._error is None:
                    self._sink.add(frame)
            except BaseException as error:
                self._error = error
            self._room.put(None)
        self._writing.release()


def _keep_partial(sink: _Sink, final: Path) -> None:
    """Publish what an interrupted run has written. Only logs its own failures: the first exception matters more."""
    if not sink.added:
        return
    try:
        sink.finish()
        path = publish(sink.temporary, partial_name(final, sink.is_folder))
        logger.warning("not finished; the first %d frames are in %s", sink.added, path)
    except (RuntimeError, OSError) as error:
        logger.debug("nothing could be kept of %s: %s", final, error)


class _VideoSink:
    """An ffmpeg process that encodes the raw frames it gets. It is started by the first frame.

    The sound is added to the finished file, by another process. So its length is known, no process waits for two
    inputs at once, and sound that cannot be encoded does not cost the frames.
    """

    is_folder = False

    def __init__(
        self, temporary: Path, height: int, width: int, fps: int, comment: str, audio: Path | ClipInfo | None
    ) -> None:
        self.temporary = temporary
        self.added = 0
        self._fps = fps
        self._comment = comment
        self._audio = audio  # None as soon as it is in the file, or cannot get there
        self._shape = (height, width, 3)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by discard
        self._process: subprocess.Popen[bytes] | None = None
        self._command = ffmpeg_command(
            ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
            + ["-vf", TO_YUV, "-c:v", "libx264", "-crf", str(CRF), "-preset", PRESET, "-movflags", "+faststart"]
            + ["-metadata", f"comment={comment}", "-f", "mp4", "-y"]
        )
        self._file: IO[bytes] | None = None

    def add(self, frame: np.ndarray) -> None:
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ValueError(f"frame {self.added} is {frame.dtype} {frame.shape}, not uint8 {self._shape}")
        if self._process is None:
            self._process = self._start()
        try:
            _pipe(self._process.stdin).write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            self.finish()  # ffmpeg has ended, which it does only when it fails
            raise RuntimeError("ffmpeg ended early") from None
        self.added += 1

    def _start(self) -> subprocess.Popen[bytes]:
        """The encoder, at work on an open file, which lives on where somebody removes its folder meanwhile."""
        self._file = self.temporary.open("x+b")
        number = self._file.fileno()
        target, kept = (f"/proc/self/fd/{number}", (number,)) if HAS_OPEN_FILES else (str(self.temporary), ())
        # a session of its own: Ctrl-C in the terminal must not reach the encoder before the file is closed
        return subprocess.Popen(
            [*self._command, f"file:{target}"],
            stdin=subprocess.PIPE,
            stderr=self._log,
            pass_fds=kept,
            start_new_session=True,
        )

    def _bring_back(self) -> None:
        """Give the file a name again where it has lost that with its folder."""
        if self._file is not None and not self.temporary.exists():
            self.temporary.parent.mkdir(parents=True, exist_ok=True)
            with self.temporary.open("xb") as new:
                self._file.seek(0)
                shutil.copyfileobj(self._file, new)

    def finish(self) -> None:
        if self._process is None:
            return
        try:
            _pipe(self._process.stdin).close()
        except BrokenPipeError:
            pass  # the exit status tells more
        if self._process.wait():
            raise RuntimeError(f"ffmpeg could not write {self.temporary.name}: {_last_lines(self._log)}")
        self._bring_back()
        if self._audio is not None and self.added:
            self._add_sound(self._audio)

    def _add_sound(self, audio: Path | ClipInfo) -> None:
        """Replace the silent file by one with sound. A failure leaves the silent file, and is not tried again."""
        both = temporary_name(self.temporary)
        clip, path = (audio, audio.path) if isinstance(audio, ClipInfo) else (None, audio)
        track, downmix = sound_track(path)
        timing = [FROM_ZERO]
        if clip is not None:
            end = clip.frames / self._fps
            timing = [f"asetpts=PTS-({clip.start:.6f})/TB", "aresample=async=1:min_hard_comp=0.04:first_pts=0"]
            timing += [f"atrim=end={end:.6f}", f"afade=out:st={max(0, end - SOUND_FADE):.6f}:d={SOUND_FADE}"]
        filters = ",".join([*timing, *downmix, WHOLE_NUMBERS, "apad", f"atrim=end={self.added / self._fps:.6f}"])
        streams = ["-map", "0:v", "-map", f"1:{track}", "-map_chapters", "-1", "-c:v", "copy", "-c:a", "aac"]
        try:
            run_ffmpeg(
                ["-i", f"file:{self.temporary}", *sound_input(path), *streams, "-b:a", AAC_BITS, "-af", filters]
                + ["-metadata", f"comment={self._comment}", "-movflags", "+faststart", "-f", "mp4", f"file:{both}"],
                f"add the sound of {path}",
            )
            both.replace(self.temporary)
            self._audio = None
        except RuntimeError as error:
            self._audio = None
            if clip is None:
                raise
            logger.warning("%s; the video has none", error)
        finally:
            both.unlink(missing_ok=True)

    def discard(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()
        if self._file is not None:
            self._file.close()
        self.temporary.unlink(missing_ok=True)


class _FolderSink:
    """A folder of numbered PNG files. It is made by the first frame."""

    is_folder = True

    def __init__(self, temporary: Path, comment: str) -> None:
        self.temporary = temporary
        self.added = 0
        self._info = PngInfo()
        if comment:
            self._info.add_text("comment", comment)

    def add(self, frame: np.ndarray) -> None:
        if self.added == 0:  # not later: where somebody has removed it, frames are missing
            self.temporary.mkdir(exist_ok=True)
        path = self.temporary / f"{self.added:05d}.png"
        try:
            Image.fromarray(frame).save(path, pnginfo=self._info, compress_level=PNG_COMPRESSION)
        except BaseException:
            path.unlink(missing_ok=True)  # half a picture must not get into a partial result
            raise
        self.added += 1

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)


@dataclass(frozen=True)
class _VideoTrack:
    """Of the video tracks of a file the one to be read, and how.

    `source` are ffmpeg's options that choose it, `filters` make its frames RGB, `has_sound` tells of the file, `notes`
    are what the user should know.
    """

    source: list[str]
    filters: str = TO_RGB
    too_large: bool = False
    has_sound: bool = False
    notes: tuple[str, ...] = ()


def _video_track(path: Path) -> _VideoTrack:
    """The default video track that is no cover picture, else the first one."""
    specifier, text, log = _chosen_track(path, "Video", CONTAINERS)
    source = [*_input(path, CONTAINERS), "-map", specifier]
    picture = PICTURE.search(text)
    if picture is None:
        return _VideoTrack(source, too_large="exceeds specified max pixel count" in log)
    pixel_format, details, width, height, *aspect = picture.groups(default="")
    across, down = (int(value or 1) for value in aspect)
    alpha = WITH_ALPHA.match(pixel_format) is not None
    library = ALPHA_DECODERS.get(text[:3])
    if library and re.search(r"^ +alpha_mode +: 1$", text, re.MULTILINE):
        alpha, source = True, ["-c:v", library, *source]
    colours = COLOURS.search(details)
    matrix = colours[1] if colours is not None else "unknown"
    filters, notes = TO_RGB_ON_WHITE if alpha else TO_RGB, []
    if colours is not None and (colours[3] in HDR or colours[2] in WIDE_PRIMARIES):
        filters = f"{_to_sdr(*colours.groups(), alpha)},{filters}"
        if colours[3] in HDR:
            notes.append(f"is HDR ({HDR[colours[3]]}); it is tone-mapped to SDR")
    elif matrix == "unknown" and "bt709" not in details and pixel_format.startswith("yuv") and int(height) >= HD_HEIGHT:
        filters = filters.replace("scale=", "scale=in_color_matrix=bt709:", 1)
    if INTERLACED.search(details):
        notes.append("is interlaced; whole frames are made of its fields")
    if "progressive" not in details and pixel_format.startswith("yuv"):
        # where nothing is said each frame tells; progressive ones are passed on as they are
        filters = f"bwdif=deint=interlaced,{filters}"
    too_large = int(width) * int(height) * across > MAX_FRAME_PIXELS * down
    has_sound = any(kind == "Audio" for _, kind, _ in TRACK.findall(log))
    return _VideoTrack(source, filters, too_large, has_sound, tuple(notes))


def _to_sdr(matrix: str, primaries: str, transfer: str, alpha: bool) -> str:
    """Filters that bring frames of a wide gamut, or HDR, to SDR BT.709; what is unknown is taken to be BT.2020's."""
    guessed = {"colorspace=bt2020nc": matrix, "color_primaries=bt2020": primaries, "color_trc=bt709": transfer}
    missing = ":".join(option for option, value in guessed.items() if value == "unknown")
    planes = "gbrap" if alpha else "gbrp"
    steps = [f"setparams={missing}"] if missing else []
    steps.append(TO_LINEAR.format(linear=f"{planes}f32le"))
    if transfer in HDR:
        steps.append(TONE_MAP)
    return ",".join([*steps, TO_SDR.format(whole=planes)])


def sound_track(path: Path) -> tuple[str, list[str]]:
    """The number of a file's default sound track, else of the first one, and filters to stereo if it has more channels.

    The number is ffmpeg's, within the file; it is "a:0" where there is none.
    """
    specifier, text, _ = _chosen_track(path, "Audio", SOUND_CONTAINERS)
    return specifier.removeprefix("0:"), [DOWNMIX] if SURROUND.search(text) else []


def _chosen_track(path: Path, kind: str, containers: str) -> tuple[str, str, str]:
    """Specifier and description of the default track of a kind, else of the first one, and all that ffmpeg said."""
    # without an output ffmpeg describes the file, and fails
    command = ffmpeg_command(["-v", "info", *_input(path, containers)])
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    log = run.stderr.decode(errors="replace")
    tracks = [
        (f"0:{number}", text)
        for number, is_kind, text in TRACK.findall(log)
        if is_kind == kind and "(attached pic)" not in text.partition("\n")[0]
    ]
    default = (track for track in tracks if "(default)" in track[1].partition("\n")[0])
    return *next(default, tracks[0] if tracks else (f"0:{FIRST[kind]}:0", "")), log


def _packet_times(path: Path, track: _VideoTrack, flag: str) -> list[tuple[Fraction, Fraction]]:
    """Begin and end in seconds of every frame's display, in order, by demuxing alone; at least one.

    Raises:
        UserError: not a video, damaged or cut off.
    """
    command = ffmpeg_command(track.source + ["-c", "copy", "-f", "framecrc", "pipe:1"])
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    log = run.stderr.decode(errors="replace")
    if "matches no streams" in log:
        raise UserError(flag, f"{shown(path)} has no video stream; give a video clip")
    if "not on whitelist" in log:
        raise UserError(flag, f"{shown(path)} is a picture or another kind of file; give a video clip, such as an mp4")
    if TRUNCATED.search(log) or _is_cut_gif(path):
        raise UserError(flag, f"{shown(path)} is truncated or not a video; give a complete video file, such as an mp4")
    times = _parse_packets(run.stdout.decode())
    if run.returncode or not times:
        raise UserError(flag, f"{shown(path)} is not a video or damaged; give a complete video file, such as an mp4")
    return times


def _parse_packets(listing: str) -> list[tuple[Fraction, Fraction]]:
    """Begin and end in seconds of the frames in ffmpeg's framecrc listing `stream, dts, pts, duration, size, ...`."""
    time_base = Fraction(1)
    ticks = []
    for line in listing.splitlines():
        if line.startswith("#tb 0:"):
            time_base = Fraction(line.split(":")[1].strip())
        if line.startswith("#"):
            continue
        dts, pts, duration = (int(word) for word in line.split(",")[1:4])
        flags = re.search(r"F=0x([0-9A-Fa-f]+)", line)
        if not (flags and int(flags[1], 16) & DISCARDED):
            ticks.append((dts if pts == UNKNOWN_TIME else pts, duration))
    ticks.sort()
    if len(ticks) > 1:
        begin, duration = ticks[-1]
        gap = begin - ticks[-2][0]
        if duration <= 1 and gap > 2:  # a made-up duration; ffmpeg shows the last frame as long as the one before it
            ticks[-1] = (begin, gap)
    return [(begin * time_base, (begin + duration) * time_base) for begin, duration in ticks]


def _is_cut_gif(path: Path) -> bool:
    """Whether a GIF file lacks its end mark; ffmpeg takes it as a shorter animation."""
    with path.open("rb") as file:
        if file.read(4) != b"GIF8":
            return False
        file.seek(-min(1024, path.stat().st_size), 2)
        return not file.read().rstrip(b"\0").endswith(b";")


def _decode(track: _VideoTrack, fps: int | None, options: list[str] | None = None) -> Iterator[np.ndarray]:
    """Frames of a track at `fps` frames a second, or as they are in the file, uint8 [H, W, 3]."""
    # The rate last: what follows it would do its work on all repetitions of a long still before the first is read.
    filters = track.filters + (f",fps={fps}" if fps else "")
    arguments = track.source + ["-vf", filters, "-fps_mode", "passthrough", *(options or [])]
    with _reading(arguments + ["-c:v", "ppm", "-f", "image2pipe", "pipe:1"]) as stream:
        while (frame := _read_ppm(stream)) is not None:
            yield frame


def _read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    """The next picture of a stream of binary PPM pictures, uint8 [H, W, 3]; None at its end."""
    if not stream.readline():  # P6
        return None
    width, height = (int(word) for word in stream.readline().split())
    stream.readline()  # 255
    data = bytearray(height * width * 3)
    if stream.readinto(data) < len(data):  # type: ignore[attr-defined]  # buffered readers have it
        return None  # ffmpeg has died, which its exit status says
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


@contextmanager
def _reading(arguments: list[str]) -> Iterator[IO[bytes]]:
    """ffmpeg's standard output. Leaving early ends ffmpeg; its failure is a RuntimeError with its last words."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ffmpeg_command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield _pipe(process.stdout)
            if process.wait():
                raise RuntimeError(f"ffmpeg failed: {_last_lines(log)}")
        finally:
            process.kill()
            process.wait()
            _pipe(process.stdout).close()


def check_ffmpeg() -> None:
    """Have ffmpeg encode a frame with sound, once in a process (0.05 s).

    Raises:
        UserError: there is none, or it cannot be started, is too old, or lacks an encoder.
    """
    own = os.environ.get("IMAGEIO_FFMPEG_EXE")
    way_out = "unset it, so that imageio-ffmpeg's own is taken" if own else "set it to one that can, or reinstall it"
    try:
        problem = _problem_of(get_ffmpeg_exe())
    except RuntimeError as error:  # imageio-ffmpeg finds none
        problem = f"{error}"
    if problem:
        where = "" if own else "not set, and imageio-ffmpeg gives "
        raise UserError("IMAGEIO_FFMPEG_EXE", f"{where}{problem}; {way_out}")


@cache
def _problem_of(program: str) -> str:
    """What keeps an ffmpeg from doing its work here, nothing if all is well."""
    picture, silence = "color=s=16x16:d=0.04,format=yuv420p[v]", "anullsrc=d=0.04[a]"
    streams = ["-map", "[v]", "-map", "[a]", "-fps_mode", "passthrough", "-c:v", "libx264", "-c:a", "aac"]
    command = [program, "-hide_banner", "-nostdin", "-filter_complex", f"{picture};{silence}", *streams]
    try:
        run = subprocess.run(
            [*command, "-f", "mp4", "-movflags", "frag_keyframe+empty_moov", "-"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TRIAL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{shown(program)}, which cannot be started ({shown(error)})"
    log = run.stderr.decode(errors="replace")
    if "fps_mode" in log:
        return f"{shown(program)}, which is older than ffmpeg 5.1"
    missing = [name for name in ("libx264", "aac") if f"Unknown encoder '{name}'" in log]
    if missing:
        return f"{shown(program)}, which has no encoder {missing[0]}"
    if run.returncode or not run.stdout:
        return f"{shown(program)}, which fails ({shown(' / '.join(log.strip().splitlines()[-2:]))})"
    return ""


def ffmpeg_command(arguments: list[str]) -> list[str]:
    return [get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", "-v", "warning", *arguments]


def run_ffmpeg(arguments: list[str], purpose: str) -> None:
    """Run ffmpeg to its end, for nothing but the files that it writes; an exception ends it.

    Raises:
        RuntimeError: it fails. The message has its last words, after "ffmpeg could not" and `purpose`.
    """
    with tempfile.TemporaryFile() as log:
        command = ffmpeg_command(arguments)
        # a session of its own: `run` ends it on Ctrl-C, after which nothing of it must appear in the terminal
        run = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True, check=False)
        if run.returncode:
            raise RuntimeError(f"ffmpeg could not {purpose}: {_last_lines(log)}")


def sound_input(path: Path) -> list[str]:
    """Options for reading a local sound file or clip, and never anything but that file."""
    return _input(path, SOUND_CONTAINERS)


def _input(path: Path, containers: str) -> list[str]:
    """Options for reading a local file of one of these containers, and never anything but that file."""
    return [
        *("-protocol_whitelist", "file,pipe", "-format_whitelist", containers),
        *("-max_pixels", str(MAX_FRAME_PIXELS), "-i", f"file:{path}"),
    ]


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return " / ".join(lines[-ERROR_LINES:]) or "no message"


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    """A pipe that `Popen` was asked for, for the type checker."""
    assert stream is not None
    return stream


def _round_half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))
