"""Writing frames as they are made: to an mp4 file, with or without sound, or to a folder of PNG files."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from fractions import Fraction
from functools import partial
from itertools import chain, count
from pathlib import Path
from subprocess import PIPE

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from skyreels_v3.errors import counted
from skyreels_v3.media.audio import downmix_filters
from skyreels_v3.media.ffmpeg import AUDIO, VIDEO, ffmpeg_process, find_track, input_options, log_end, run, write_file
from skyreels_v3.media.files import publish, remove, temporary_name
from skyreels_v3.media.video_reader import ClipInfo

logger = logging.getLogger(__name__)

TO_YUV = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp,format=yuv420p,"
    "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
)
CRF = 16  # x264's constant quality: 0 is lossless, 18 is usually called visually lossless
H264 = ("-vf", TO_YUV, "-c:v", "libx264", "-crf", str(CRF), "-preset", "medium")
LOSSLESS = ("-c:v", "libx264rgb", "-qp", "0", "-preset", "ultrafast")
AAC_BITS = "256k"  # per second; the encoder uses less if the sample rate limits it
FROM_ZERO = "asetpts=N/SR/TB"  # samples back to back, whatever their timestamps, as the model hears them
CLIPPED = "aformat=sample_fmts=s32:channel_layouts=mono|stereo"  # float files may exceed [-1, 1]
SOUND_FADE = 0.01  # seconds, at the end of a clip's sound
METADATA_BYTES = 1 << 20  # largest comment that is read
COMMENT_BYTES = 120_000  # largest that is written: Linux limits a program's argument to 128 KiB
PNG_COMPRESSION = 3  # of 9; higher levels take much longer for a few percent
FRAMES_AHEAD = 16  # frames that may wait for the encoder: 44 MB at 1280 x 720

AddFrame = Callable[[np.ndarray], None]


def write_video(
    frames: Iterable[np.ndarray],
    path: Path,
    *,
    height: int,
    width: int,
    fps: int,
    comment: Callable[[], str],
    audio: Path | ClipInfo | None = None,
    workspace: Path | None = None,
) -> Path:
    """Encode frames, uint8 [height, width, 3], as they arrive: H.264, yuv420p, BT.709, index at the front.

    The file gets its name when it is complete, or another one if that was taken meanwhile. If `frames` raises, the
    frames so far are kept as `<stem>.partial.mp4` and the exception is passed on.

    Args:
        frames: up to `FRAMES_AHEAD` wait to be encoded, so do not change a frame after yielding it.
        height, width: even numbers.
        comment: called when all frames are encoded; returns the file's comment, the record of how it was made, of at
            most `COMMENT_BYTES`.
        audio: a file with sound that `probe_audio` has accepted. It is encoded as AAC from the first frame on, at its
            own sample rate (or the nearest that AAC has), in mono or stereo, and cut or padded with silence to the
            length of the frames. Or the clip whose frames come first: its sound keeps its timestamps.
        workspace: a folder on the same file system for the unfinished file; by default that of `path`.

    Returns:
        The path of the file.

    Raises:
        RuntimeError: there are no frames, or ffmpeg fails. If only the sound could not be added, the silent video is
            kept as a partial file; for the sound of a clip that is only a warning.
    """
    temporary = temporary_name((workspace or path.parent) / path.name)
    sink = video_file(temporary, height, width, fps, H264)
    return write_frames(frames, temporary, path, sink, partial(complete, temporary, audio, fps, comment))


def write_frame_folder(
    frames: Iterable[np.ndarray], folder: Path, *, comment: str, workspace: Path | None = None
) -> Path:
    """Write frames, uint8 [H, W, 3], as they arrive to 00000.png, 00001.png, ... in a new folder, losslessly.

    Frames, names and interruptions are handled as in `write_video`; a partial folder is named `<name>.partial`. Every
    file carries `comment` in a PNG text chunk, so that a frame copied elsewhere still says how it was made.
    """
    temporary = temporary_name((workspace or folder.parent) / folder.name)
    return write_frames(frames, temporary, folder, png_folder(temporary, comment))


def copy_frames(
    frames: Generator[np.ndarray, None, None], path: Path, fps: int | Fraction
) -> Generator[np.ndarray, None, None]:
    """Pass frames through; once all have been read, `path` is a clip from which `read_frames` reads them without loss.

    It replaces an older file of that name, and the unfinished one of a run that was killed.

    Raises:
        RuntimeError: ffmpeg fails.
    """
    temporary = path.with_name(f".{path.name}.part")
    with closing(frames):
        first = next(frames, None)
        if first is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        try:
            height, width, _ = first.shape
            with video_file(temporary, height, width, fps, LOSSLESS) as add:
                for frame in chain([first], frames):
                    add(frame)
                    yield frame
            temporary.replace(path)
        finally:
            remove(temporary)


def read_comment(path: Path) -> str:
    """The comment of a video, a frame folder or one of its frames; empty if there is none.

    Raises:
        OSError, RuntimeError, ValueError: it is none of these, or its metadata is too large.
    """
    if path.is_dir() or path.suffix.lower() == ".png":
        try:
            with Image.open(path / "00000.png" if path.is_dir() else path, formats=["PNG"]) as picture:
                return str(picture.info.get("comment", ""))
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path} is not one of our frames") from error
    code, output, log = run([*input_options(path, VIDEO), "-c", "copy", "-t", "0", "-f", "ffmetadata", "pipe:1"])
    if code or len(output) > METADATA_BYTES:
        raise RuntimeError(f"the metadata of {path} cannot be read: {log_end(log)}")
    text = output.decode(errors="replace")
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else ""


def write_frames(
    frames: Iterable[np.ndarray],
    temporary: Path,
    final: Path,
    sink: AbstractContextManager[AddFrame],
    finish: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write frames to a sink and publish the result; see `write_video`.

    Args:
        sink: context manager with the function that adds a frame to `temporary`, which is complete on exit.
        finish: then called with the number of frames; if it fails, `temporary` is published as a partial result.
    """
    frames = iter(frames)
    first = next(frames, None)  # nothing is created before the first frame exists
    if first is None:
        raise RuntimeError(f"{final}: there are no frames to write")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    failure: BaseException | None = None
    try:
        with ThreadPoolExecutor(1, "frame writer") as thread, sink as add:
            queue = FrameQueue(thread, add)
            try:
                for frame in chain([first], frames):
                    queue.put(frame)
                queue.collect()
            except BaseException as error:
                failure = error
                thread.submit(int).result()  # last in the queue: waits for all earlier writes
        if queue.added:
            try:
                finish(queue.added)
            except BaseException as error:
                failure = failure or error
            final.parent.mkdir(parents=True, exist_ok=True)
            path = publish(temporary, final, partial=failure is not None)
            if failure is None:
                return path
            logger.warning("not finished; the first %s in %s", counted(queue.added, "frame is", "frames are"), path)
    except (RuntimeError, OSError) as error:
        if failure is None or isinstance(failure, BrokenPipeError):  # ffmpeg's own error says more
            raise
        logger.debug("nothing of %s could be kept: %s", final, error)
    finally:
        remove(temporary)
    assert failure is not None
    raise failure


class FrameQueue:
    """A bounded queue of frames for `add`, which is called in a thread while the next frames are made.

    After a failure nothing more is added, so that no frame is missing in between.
    """

    def __init__(self, thread: ThreadPoolExecutor, add: AddFrame) -> None:
        self.added = 0
        self.writes: deque[Future[None]] = deque()
        self._thread = thread
        self._add = add
        self._failed = False

    def put(self, frame: np.ndarray) -> None:
        """Add a frame, waiting while the queue is full. Raises the error of an earlier frame."""
        self.writes.append(self._thread.submit(self._write, frame))
        self.collect(FRAMES_AHEAD)

    def collect(self, waiting: int = 0) -> None:
        """Wait until at most `waiting` frames are queued; raises the error of a failed one."""
        while self.writes and (len(self.writes) > waiting or self.writes[0].done()):
            self.writes[0].result()  # removed only afterwards: if interrupted here, it must still be queued
            self.writes.popleft()

    def _write(self, frame: np.ndarray) -> None:
        if self._failed:
            return
        try:
            self._add(frame)
            self.added += 1
        except BaseException:
            self._failed = True
            raise


@contextmanager
def video_file(path: Path, height: int, width: int, fps: int | Fraction, codec: Sequence[str]) -> Iterator[AddFrame]:
    """Start ffmpeg and yield a function that adds a frame to a new mp4 file.

    Raises:
        RuntimeError: ffmpeg fails.
    """
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    arguments = [*source, *codec, "-f", "mp4", f"file:{path}"]
    with ffmpeg_process(arguments, f"write {path.name}", stdin=PIPE) as process:
        assert process.stdin is not None
        pipe = process.stdin

        def add(frame: np.ndarray) -> None:
            if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
                raise ValueError(f"a frame is {frame.dtype} {frame.shape}, not uint8 {(height, width, 3)}")
            pipe.write(np.ascontiguousarray(frame).data)

        yield add
        with suppress(BrokenPipeError):  # the exit status says more
            pipe.close()


def complete(video: Path, audio: Path | ClipInfo | None, fps: int, comment: Callable[[], str], frames: int) -> None:
    """Add sound and comment to a silent video of `frames` frames, and move the index to the front.

    A second ffmpeg process does this. So the length is known, no process waits for two inputs at once, and sound that
    cannot be encoded does not cost the frames.
    """
    text = comment()
    if len(text.encode()) > COMMENT_BYTES:
        raise ValueError(f"comment of more than {COMMENT_BYTES} bytes")
    output = ["-metadata", f"comment={text}", "-movflags", "+faststart", "-f", "mp4"]
    if audio is None:
        rewrite(video, ["-i", f"file:{video}", "-c", "copy", *output], "complete the video")
        return
    try:
        add_sound(video, audio, fps, output, frames)
    except RuntimeError as error:
        rewrite(video, ["-i", f"file:{video}", "-c", "copy", *output], "complete the video")
        if not isinstance(audio, ClipInfo):
            raise
        logger.warning("%s; the video has no sound", error)


def add_sound(video: Path, audio: Path | ClipInfo, fps: int, output: Sequence[str], frames: int) -> None:
    """Replace a silent video of `frames` frames with one that has sound; see `write_video`."""
    clip, path = (audio, audio.path) if isinstance(audio, ClipInfo) else (None, audio)
    timing = [FROM_ZERO]
    if clip is not None:
        end = clip.frames / fps
        timing = [f"asetpts=PTS-({clip.start:.6f})/TB", "aresample=async=1:min_hard_comp=0.04:first_pts=0"]
        timing += [f"atrim=end={end:.6f}", f"afade=out:st={max(0, end - SOUND_FADE):.6f}:d={SOUND_FADE}"]
    track = find_track(path, AUDIO)
    filters = ",".join([*timing, *downmix_filters(track), CLIPPED, "apad", f"atrim=end={frames / fps:.6f}"])
    inputs = ["-i", f"file:{video}", *input_options(path, AUDIO)]
    streams = ["-map", "0:v", "-map", f"1:{track.number}", "-map_chapters", "-1", "-c:v", "copy", "-c:a", "aac"]
    rewrite(video, [*inputs, *streams, "-b:a", AAC_BITS, "-af", filters, *output], f"add the sound of {path}")


def rewrite(video: Path, arguments: Sequence[str], purpose: str) -> None:
    """Replace a video with what ffmpeg makes of it."""
    made = temporary_name(video)
    try:
        write_file([*arguments, f"file:{made}"], purpose)
        made.replace(video)
    finally:
        made.unlink(missing_ok=True)


@contextmanager
def png_folder(folder: Path, comment: str) -> Iterator[AddFrame]:
    """Create a folder and yield a function that adds a frame as the next numbered PNG file."""
    folder.mkdir()
    info, numbers = PngInfo(), count()
    if comment:
        info.add_text("comment", comment)

    def add(frame: np.ndarray) -> None:
        path = folder / f"{next(numbers):05d}.png"
        try:
            Image.fromarray(frame).save(path, pnginfo=info, compress_level=PNG_COMPRESSION)
        except BaseException:
            path.unlink(missing_ok=True)  # no incomplete picture in a partial result
            raise

    yield add
