"""No-reference quality metrics of frames, for --check and the Python API.

A `Meter` takes frames as they are made and keeps a few numbers of each, so memory hardly grows with the length. Levels
are 8-bit values, 0 to 255. Jumps and cuts are measured on frames averaged down to about `PICTURE` and `THUMB` rows, so
that the thresholds hold for all sizes. Gradual transitions are not detected.

Sources: cuts, differences that are large compared with their neighbors, as in PySceneDetect's AdaptiveDetector; black
and frozen frames, ffmpeg's blackdetect and freezedetect; noise, J. Immerkaer, Fast Noise Variance Estimation, CVIU
64(2), 1996, doi:10.1006/cviu.1996.0060; color differences, CIE 1976, where 2.3 is just noticeable (M. Mahy et al.,
Color Research and Application 19(2), 1994).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from skyreels_v3.errors import counted
from skyreels_v3.media.color import rgb_to_lab, statistics

PICTURE, THUMB = 96, 32  # rows
BLACK_LEVEL, BLACK_SHARE = 26, 0.98  # luma level, and share of a frame's pixels that are no brighter
FLAT_STD = 2.0  # levels: a frame of one color
FROZEN_JUMP = 0.05  # levels; freezedetect uses 0.25, on frames that are not averaged
FROZEN_SECONDS = 2.0  # as in freezedetect; shorter stills are pauses
NOISY = 0.25  # relative to a frame's contrast; white noise has 1, sharp photographs 0.1, with noise of 20 levels 0.2
NOISY_LEVEL = 4.0  # levels; less is not visible
CUT_RATIO, CUT_LEVEL = 3.0, 2.0  # minimum ratio to the differences around, and minimum levels
CUT_AROUND = 8  # neighbors on each side: two latent frames, since decoders may jump at each
FLASH_FRAMES = 4  # a shot of at most so many frames between similar ones is a flash
SEAM_AROUND = 12  # neighbors on each side
SEAM_LEVEL = 0.5  # levels; minimum that a seam is compared with
SEAM_RATIO, SEAM_SHIFT = 3.0, 2.3  # of a bad seam
FLICKER = 2.0  # levels
DRIFT = 10.0  # color difference
BAD_SHARE = 0.05  # tolerated share of black, flat or noisy frames


class Row(NamedTuple):
    """The measurements kept per frame.

    Attributes:
        luma, contrast: mean and standard deviation of luma, in levels.
        noise: Immerkaer's estimate of the noise's standard deviation in luma, in levels.
        black, clipped: share of pixels up to `BLACK_LEVEL`, and share of values that are 0 or 255.
        color: mean CIE Lab.
        jump: mean absolute difference from the previous frame, in Y and in Cb and Cr, in levels.
        distances: the same of thumbnails, from 1, 2, ... frames before; infinite if there is no such frame.
    """

    luma: float
    contrast: float
    noise: float
    black: float
    clipped: float
    color: tuple[float, ...]
    jump: tuple[float, float]
    distances: tuple[float, ...]


@dataclass(frozen=True)
class Seam:
    """How smoothly new frames continue those before them.

    Attributes:
        frame: number of the first new frame.
        luma, chroma: mean absolute difference from the previous frame, relative to the median of such differences
            around it, which is at least `SEAM_LEVEL`; 1 is usual.
        shift: CIE 1976 difference of the mean colors of the two frames.
    """

    frame: int
    luma: float
    chroma: float
    shift: float


@dataclass(frozen=True)
class Quality:
    """Figures of the new frames; 0 where there are too few frames.

    Attributes:
        frames: number of new frames.
        seconds: their length.
        black: number of frames with 98 % of pixels darker than 10 % of white.
        flat: number of frames of one color other than black.
        frozen: number of frames equal to the previous one.
        freeze: seconds of the longest still.
        noisy: number of frames with more high-frequency noise than photographs have.
        noise: mean of Immerkaer's estimate over the standard deviation of luma, 0 to about 1.
        clipped: percentage of values that are 0 or 255.
        flicker: mean absolute second difference of mean luma, without cuts, in levels.
        drift: CIE 1976 difference of the mean colors of the first and last second of the longest shot.
        drift_per_minute: the drift divided by the minutes between them.
        cuts: frame numbers in the file at which new shots begin.
        seam: the transition from the frames that the new ones continue, if any.
    """

    frames: int
    seconds: float
    black: int
    flat: int
    frozen: int
    freeze: float
    noisy: int
    noise: float
    clipped: float
    flicker: float
    drift: float
    drift_per_minute: float
    cuts: tuple[int, ...] = ()
    seam: Seam | None = None

    def figures(self) -> dict[str, Any]:
        """All figures as JSON types, rounded."""
        return {name: rounded(value) for name, value in asdict(self).items()}


def rounded(value: Any) -> Any:
    """Round floats to four decimals, recursively."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


class Meter:
    """Measures frames, uint8 (F, H, W, 3) in chunks of any length, all of one size.

    Attributes:
        fps: frames per second.
        first: the first new frame's number in the file.
        before: number of rows of the frames that the new ones continue.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.first = self.before = 0
        self.rows: list[Row] = []
        self._picture = np.empty((0, 0, 3), np.int16)
        self._thumbs: deque[np.ndarray] = deque(maxlen=FLASH_FRAMES + 1)

    def add_before(self, frames: np.ndarray) -> None:
        """Add frames that the new ones continue. They are not judged, whether or not the file has them."""
        assert self.before == len(self.rows), "they come before the new frames"
        self.add(frames)
        self.before = len(self.rows)

    def add(self, frames: np.ndarray) -> None:
        """Add new frames."""
        assert frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8
        for frame in frames:
            self.rows.append(self._measure(Image.fromarray(frame)))

    def _measure(self, image: Image.Image) -> Row:
        grey = image.convert("L")
        levels = np.arange(256)
        histogram = np.array(grey.histogram()) / (grey.width * grey.height)
        luma = float(histogram @ levels)
        contrast = math.sqrt(histogram @ (levels - luma) ** 2)
        channels = np.array(image.histogram()).reshape(3, 256) / (3 * grey.width * grey.height)
        small = reduced(image, PICTURE)
        rgb = torch.from_numpy(np.asarray(small).transpose(2, 0, 1)[None, :, None] / np.float32(255))
        color = statistics(rgb_to_lab(rgb))[0].flatten().tolist()
        ycc = small.convert("YCbCr")
        picture, thumb = (np.asarray(each).astype(np.int16) for each in (ycc, reduced(ycc, THUMB)))
        jump = (0.0, 0.0)
        if len(self.rows):
            apart = np.abs(picture - self._picture).mean(axis=(0, 1))
            jump = float(apart[0]), float(apart[1:].mean())
        distances = [float(np.abs(thumb - earlier).mean()) for earlier in self._thumbs]
        distances += [math.inf] * (FLASH_FRAMES + 1 - len(distances))
        self._picture = picture
        self._thumbs.appendleft(thumb)
        return Row(
            luma=luma,
            contrast=contrast,
            noise=noise_level(np.asarray(grey)),
            black=float(histogram[: BLACK_LEVEL + 1].sum()),
            clipped=float(channels[:, [0, 255]].sum()),
            color=tuple(color),
            jump=jump,
            distances=tuple(distances),
        )

    def quality(self) -> Quality:
        """The figures of the frames so far."""
        cuts = find_cuts(np.array([row.distances for row in self.rows]).reshape(len(self.rows), FLASH_FRAMES + 1))
        new = self.rows[self.before :]
        count, offset = len(new), self.first - self.before  # from row numbers to frame numbers in the file
        black = [row.black >= BLACK_SHARE for row in new]
        flat = [row.contrast <= FLAT_STD for row in new]
        frozen = [bool(at + self.before) and sum(row.jump) <= FROZEN_JUMP for at, row in enumerate(new)]
        noise = [row.noise / max(row.contrast, 1.0) for row in new]
        noisy = [ratio >= NOISY and row.noise >= NOISY_LEVEL for ratio, row in zip(noise, new, strict=True)]
        inner = [cut - self.before for cut in cuts if cut > self.before]
        drift, apart = drift_of([row.color for row in new], inner, self.fps)
        return Quality(
            frames=count,
            seconds=count / self.fps,
            black=sum(black),
            flat=sum(one and not dark for one, dark in zip(flat, black, strict=True)),
            frozen=sum(frozen),
            freeze=longest_run(frozen) / self.fps,
            noisy=sum(noisy),
            noise=mean(noise),
            clipped=100 * mean([row.clipped for row in new]),
            flicker=flicker_of([row.luma for row in new], inner),
            drift=drift,
            drift_per_minute=60 * drift / apart if apart else 0.0,
            cuts=tuple(cut + offset for cut in cuts if cut >= max(1, self.before)),
            seam=seam_of(self.rows, self.before, cuts, offset) if 0 < self.before < len(self.rows) else None,
        )


def reduced(image: Image.Image, rows: int) -> Image.Image:
    """Reduce an image to about `rows` rows (or columns, if fewer) by averaging squares of pixels."""
    return image.reduce(max(1, min(image.size) // rows))


def noise_level(luma: np.ndarray) -> float:
    """Immerkaer's estimate of the standard deviation of noise in luma, uint8 (H, W), in levels.

    It uses the mean absolute response to the difference of two Laplacians, [1 -2 1] along both axes. For Gaussian noise
    this is 6 sqrt(2 / pi) times the standard deviation; on linear gradients it is 0.
    """
    if min(luma.shape) < 3:
        return 0.0
    second = np.diff(np.diff(luma.astype(np.int16), n=2, axis=0), n=2, axis=1)
    return float(np.abs(second).mean()) * math.sqrt(math.pi / 2) / 6


def find_cuts(distances: np.ndarray) -> list[int]:
    """Find the frames at which new shots begin.

    Such a frame differs from the previous one by at least `CUT_LEVEL` levels, and by `CUT_RATIO` times as much as its
    neighbors on either side differ from each other. On each side the second largest difference counts, since another
    cut or repeated frames may be among them. So neither a pan nor its start is a cut. A change that is reverted within
    `FLASH_FRAMES` frames is a flash, not a cut.

    Args:
        distances: (F, L), of each frame from those 1, 2, ... L frames before it.
    """
    if len(distances) < 2:
        return []
    step = distances[:, 0]
    cuts = []
    for at in range(1, len(step)):
        around = step[max(1, at - CUT_AROUND) : at], step[at + 1 : at + 1 + CUT_AROUND]
        ordinary = max((np.sort(side)[-2:][0] for side in around if len(side)), default=0.0)
        if step[at] < max(CUT_LEVEL, CUT_RATIO * ordinary):
            continue
        lags = range(1, distances.shape[1])
        since = [distances[at + lag, lag] for lag in lags if at + lag < len(step)]  # a flash that begins here
        until = [distances[at, lag] for lag in lags if lag <= at]  # a flash that ends here
        if min(since + until, default=math.inf) >= step[at] / 2:
            cuts.append(at)
    return cuts


def seam_of(rows: Sequence[Row], first: int, cuts: Sequence[int], offset: int) -> Seam:
    """Measure the seam before row `first`; `offset` leads from rows to frame numbers."""
    places = [*range(max(1, first - SEAM_AROUND), first), *range(first + 1, min(len(rows), first + 1 + SEAM_AROUND))]
    around = [rows[place].jump for place in places if place not in cuts]
    usual = np.median(around, axis=0) if around else np.zeros(2)
    luma, chroma = rows[first].jump / np.maximum(usual, SEAM_LEVEL)
    shift = math.dist(rows[first].color, rows[first - 1].color)
    return Seam(first + offset, float(luma), float(chroma), shift)


def flicker_of(luma: Sequence[float], cuts: Sequence[int]) -> float:
    """Mean absolute second difference of luma in levels, without those that span a cut."""
    second = np.abs(np.diff(luma, n=2))  # second[n] is of frames n, n + 1 and n + 2
    seen = {place for cut in cuts for place in (cut - 2, cut - 1)}
    return mean([float(value) for place, value in enumerate(second) if place not in seen])


def drift_of(colors: Sequence[Sequence[float]], cuts: Sequence[int], fps: float) -> tuple[float, float]:
    """The mean color's difference between the first and last second of the longest shot, and the seconds between them.

    In a shot of less than two seconds, between its two halves.
    """
    first, end = max(zip((0, *cuts), (*cuts, len(colors)), strict=True), key=lambda shot: shot[1] - shot[0])
    part = min(round(fps), (end - first) // 2)
    if part < 1:
        return 0.0, 0.0
    begin, last = (np.mean(colors[one : one + part], axis=0) for one in (first, end - part))
    return math.dist(begin, last), (end - first - part) / fps


def longest_run(flags: Sequence[bool]) -> int:
    """The length of the longest run of equal frames, including its first."""
    longest = run = 0
    for each in flags:
        run = run + 1 if each else 0
        longest = max(longest, run)
    return longest + 1 if longest else 0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def report(quality: Quality) -> Iterator[str]:
    """Format the figures as short lines."""
    cuts = ", ".join(map(str, quality.cuts[:8])) + (", ..." if len(quality.cuts) > 8 else "")
    yield (
        f"{counted(quality.frames, 'new frame')}, {quality.seconds:.2f} s: {quality.black} black, "
        f"{quality.flat} of one color, {quality.frozen} frozen (longest {quality.freeze:.1f} s), {quality.noisy} noisy"
    )
    yield (
        f"noise {quality.noise:.2f} of the contrast, {quality.clipped:.1f} % clipped, flicker {quality.flicker:.2f} "
        f"levels, color drift {quality.drift:.1f} ({quality.drift_per_minute:.0f} a minute)"
    )
    yield f"cuts: {len(quality.cuts)}" + (f", at frame {cuts}" if cuts else "")
    if quality.seam is not None:
        yield report_seam(quality.seam)


def report_seam(seam: Seam) -> str:
    """Format the figures of a seam as a short line."""
    jumps = f"luma {seam.luma:.1f} and chroma {seam.chroma:.1f} times the usual change"
    return f"seam at frame {seam.frame}: {jumps}, color shift {seam.shift:.1f}"


def warnings(quality: Quality, cut_at_seam: bool = False, cuts_known: bool = True) -> Iterator[str]:
    """Yield one line per defect of a video.

    Args:
        cut_at_seam: the new frames should begin a new shot; otherwise they should continue without a cut.
        cuts_known: any cut within the new frames is unexpected; False if they may have cuts.
    """
    if not quality.frames:
        return
    several = max(1.0, BAD_SHARE * quality.frames)
    for count, what in ((quality.black, "black"), (quality.flat, "of one color"), (quality.noisy, "noisy")):
        if count > several or count == quality.frames:
            share = "all" if count == quality.frames else f"{count} of {quality.frames}"
            yield f"{share} frames are {what}"
    if quality.freeze >= FROZEN_SECONDS or 0 < quality.frames - 1 <= quality.frozen:
        yield f"the picture is frozen for {quality.freeze:.1f} s"
    if quality.flicker > FLICKER:
        yield f"strong flicker: brightness changes by {quality.flicker:.1f} levels from frame to frame"
    if quality.drift > DRIFT:
        yield f"the colors drift by {quality.drift:.1f} from the first to the last second of a shot"
    seam = quality.seam
    inner = [cut for cut in quality.cuts if seam is None or cut != seam.frame]
    if inner and cuts_known:
        yield f"{counted(len(inner), 'unexpected cut')}, the first at frame {inner[0]}"
    if seam is None:
        return
    if cut_at_seam:
        if seam.frame not in quality.cuts:
            yield f"there is no cut at frame {seam.frame}, where the new shot begins"
    elif max(seam.luma, seam.chroma) > SEAM_RATIO or seam.shift > SEAM_SHIFT:
        jumps = f"{max(seam.luma, seam.chroma):.1f} times the usual change, color shift {seam.shift:.1f}"
        yield f"the seam at frame {seam.frame} is visible: {jumps}"
