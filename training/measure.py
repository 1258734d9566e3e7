"""Measures how close frames are to the scene they should show, given the drawn world's ground truth.

Video is (3, F, H, W) in [-1, 1] as `world.render` makes it, on any device. Lengths are in frame heights, as in
`training.world`. Metrics without ground truth are in `skyreels_v3.quality`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training import drawing
from training.world import Face, Scene

RANGE = 2.0  # of values in [-1, 1]
SSIM_WINDOW, SSIM_SIGMA, SSIM_K = 11, 1.5, (0.01, 0.03)

KINDS = tuple(kind for kind in drawing.THINGS if kind != "sun")  # that a scene can be about
COLORS = tuple(drawing.COLORS)
EVERY = 0.15  # seconds between the frames in which a thing is tracked
KEY_FRAMES = 3  # that are searched completely
SIZES = np.geomspace(0.075, 0.37, 9)  # half heights of things in a frame: those of the world, and a little more
# power of the size that weights evidence: with 2, as for pixels, half a sky would beat a small thing
AREA, FINE_AREA = 0.5, 2.0
GRAIN = 0.004  # mean square that no drawing explains, for values in [0, 1]
TURNS = np.arange(12) * math.pi / 6
COARSE, FINE = (8, 2), (12, 2)  # pixels of a template's side, and of the margin around it
MATCH = 0.68  # least explained share for a thing to count as found: true frames have 0.77 or more, blurred ones 0.7
SYMMETRY = {"star": 5, "ball": 2}  # number of turns that look the same
# least motion per second: frame heights, across and down; growth of the logarithm of the size; radians
STEADY = {"x": 0.09, "y": 0.05, "growth": 0.11, "turn": 0.6}

Steps = tuple[Sequence[float], Sequence[float], Sequence[float]]  # shifts in sizes of a thing, sizes, turns

# the mouth's region of a face of size 1: left, top, right, bottom; the share of its square that the gap fills
MOUTH = (-0.15, 0.18, 0.15, 0.47)
GAP_FILL = 0.98**2
SHUT = 0.05  # a mouth open no further counts as shut
CLOSER = 1.15  # ratio of sizes


# Against the true frames


def psnr(video: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, (F,)."""
    error = (video.double() - truth.double()).square().mean(dim=(0, 2, 3))
    return 10 * torch.log10(RANGE**2 / error)


def ssim(video: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each frame, (F,): 1 for the same, 0 for unrelated ones.

    Z. Wang et al., Image Quality Assessment, IEEE TIP 13(4), 2004: a Gaussian window of 11 pixels and sigma 1.5, means
    over the three channels and over the places where the whole window is in the frame.
    """
    at = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=video.device) - SSIM_WINDOW // 2
    window = torch.exp(-at.square() / (2 * SSIM_SIGMA**2))
    window = (window / window.sum())[None, None]
    a, b = (each.double().transpose(0, 1).flatten(0, 1)[:, None] for each in (video, truth))  # (F*3, 1, H, W)

    def blurred(planes: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(planes, window[..., None, :]), window[..., None])

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = ((k * RANGE) ** 2 for k in SSIM_K)
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similar = similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similar.mean(dim=(1, 2, 3)).view(-1, 3).mean(dim=1)


# Things


@dataclass(frozen=True)
class Found:
    """The result of searching for a thing.

    Attributes:
        times: (T,) seconds of the scene.
        poses: (T, 4), x, y and size in the frame, as in `Scene.on_screen`, and its turn in radians. Sizes are
            underestimated by a few percent.
        fit: (T,) share of the thing's contrast to its surroundings that the drawing explains; 1 is all.
        kind, color: of the drawing that fits best there, whatever was searched for; "" if nothing like it was found.
        direction: of its motion in the world, one of `world.DIRECTIONS`; "" likewise.
    """

    times: np.ndarray
    poses: np.ndarray
    fit: np.ndarray
    kind: str = ""
    color: str = ""
    direction: str = ""

    @property
    def is_found(self) -> bool:
        return float(np.median(self.fit)) >= MATCH


@dataclass(frozen=True)
class Templates:
    """C drawings on squares of Q x Q pixels with an empty margin.

    Attributes:
        alpha: (C, Q, Q).
        colors: (C, 3, Q, Q), multiplied by alpha.
        squares: (C, Q, Q) of the colors' squares times alpha.
        reach: half the square's side, in units of half the drawing's side.
    """

    alpha: Tensor
    colors: Tensor
    squares: Tensor
    reach: float


@cache
def templates(names: tuple[tuple[str, str], ...], grain: tuple[int, int], device: str) -> Templates:
    """Drawings of the kinds and colors in `names`; `grain`: pixels of the drawing's side and of the margin."""
    side, margin = grain
    made = torch.from_numpy(np.stack([drawing.thing_texture(*name) for name in names]))
    small = F.pad(F.adaptive_avg_pool2d(made, side), (margin,) * 4).to(device)
    alpha, colors = small[:, 3], small[:, :3]
    squares = (colors**2).sum(dim=1) / alpha.clamp(min=1e-6)
    return Templates(alpha, colors, squares, 1 + 2 * margin / side)


def turned(made: Templates, turns: np.ndarray) -> Templates:
    """One drawing at several angles."""
    assert len(made.alpha) == 1
    whole = torch.cat((made.colors[0], made.alpha, made.squares))[None].expand(len(turns), -1, -1, -1)
    cos, sin = (torch.tensor(part, dtype=torch.float32, device=whole.device) for part in (np.cos(turns), np.sin(turns)))
    zero = torch.zeros_like(cos)
    theta = torch.stack((cos, sin, zero, -sin, cos, zero), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(whole.shape), align_corners=False)
    seen = F.grid_sample(whole, grid, align_corners=False)
    return Templates(seen[:, 3], seen[:, :3], seen[:, 4], made.reach)


class Sums(NamedTuple):
    """Sums over the pixels of a square with a drawing of alpha A and color T on a picture I; pixels outside the frame
    do not count.

    Attributes:
        whole, inner: of I and of A I, (..., 3).
        pixels, covered: of 1 and of A.
        power, product, squares: of A I^2, A I T and A T^2, over the channels too.
    """

    whole: Tensor
    inner: Tensor
    pixels: Tensor
    covered: Tensor
    power: Tensor
    product: Tensor
    squares: Tensor

    def evidence(self) -> tuple[Tensor, Tensor]:
        """How much better the drawing explains the pixels under it than the mean color B of the surrounding ones.

        Returns the logarithm of the ratio of the mean squares of I - B and I - T, times the sum of A: twice the log
        likelihood ratio, for normal errors of unknown variance. It is large only where the drawing fits and differs
        from the background. And the share of the first mean square that the drawing explains, at most 1.
        """
        ground = (self.whole - self.inner) / (self.pixels - self.covered).clamp(min=1e-3)[..., None]
        before = self.power - 2 * (ground * self.inner).sum(dim=-1) + ground.square().sum(dim=-1) * self.covered
        after = self.power - 2 * self.product + self.squares
        ground_error, error = (each.clamp(min=0) / self.covered.clamp(min=1e-3) for each in (before, after))
        ratio = (ground_error + GRAIN) / (error + GRAIN)
        return self.covered * torch.log(ratio), (1 - after / before.clamp(min=1e-6)).clamp(min=-1)


def search(frame: Tensor, made: Templates, sizes: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The pose (4,) in a frame (3, H, W) in [0, 1] where a drawing fits best, over all places, sizes and turns."""
    side, margin = COARSE
    every = turned(made, turns)
    count, length = len(turns), side + 2 * margin
    zero = torch.zeros_like(every.alpha)
    kernels = torch.stack(  # (turns, sums, planes, Q, Q)
        [
            *(torch.stack([every.alpha if c == plane else zero for c in range(5)], dim=1) for plane in range(5)),
            torch.cat((every.colors, zero[:, None], zero[:, None]), dim=1),
            torch.stack([every.squares if c == 3 else zero for c in range(5)], dim=1),
        ],
        dim=1,
    )
    best, pose = -math.inf, np.zeros(4)
    height, width = frame.shape[1:]
    for size in sizes:
        rows = max(2, round(side / (2 * size)))
        columns = round(rows * width / height)
        small = F.interpolate(frame[None], (rows, columns), mode="bilinear", antialias=True, align_corners=False)[0]
        planes = torch.cat((small, torch.ones_like(small[:1]), small.square().sum(dim=0, keepdim=True)))
        planes = F.pad(planes, (length // 2,) * 4)[None]
        sums = F.conv2d(planes, kernels.flatten(0, 1)).unflatten(1, (count, 7))[0].movedim(1, -1)  # (turns, y, x, 7)
        whole = F.avg_pool2d(planes, length, stride=1, divisor_override=1)[0].movedim(0, -1)
        inner, covered, power, product, squares = sums.split((3, 1, 1, 1, 1), dim=-1)
        parts = (each[..., 0] for each in (covered, power, product, squares))
        evidence, _ = Sums(whole[..., :3], inner, whole[..., 3], *parts).evidence()
        at = int(evidence.argmax())
        value = float(evidence.flatten()[at]) * size**AREA
        if value > best:
            turn, y, x = np.unravel_index(at, evidence.shape)
            best = value
            pose = np.array([(x - columns / 2) / rows, (y - rows / 2) / rows, side / (2 * rows), turns[turn]])
    return pose


def patches(frames: Tensor, poses: Tensor, length: int, reach: float) -> Tensor:
    """Squares (T, N, 5, Q, Q) of frames (T, 3, H, W) around poses (T, N, 4), turned upright: the picture, 1, its power.

    All channels are 0 outside the frame.
    """
    height, width = frames.shape[2:]
    planes = torch.cat((frames, torch.ones_like(frames[:, :1]), frames.square().sum(dim=1, keepdim=True)), dim=1)
    along = ((torch.arange(length, device=frames.device) + 0.5) / length * 2 - 1) * reach
    v, u = torch.meshgrid(along, along, indexing="ij")
    x, y, size, turn = (each[..., None, None] for each in poses.unbind(-1))
    cos, sin = torch.cos(turn) * size, torch.sin(turn) * size
    grid = torch.stack(((x + cos * u - sin * v) * 2 * height / width, (y + sin * u + cos * v) * 2), dim=-1)
    seen = F.grid_sample(planes, grid.flatten(1, 2), align_corners=False)  # (T, 5, N*Q, Q)
    return seen.unflatten(2, (-1, length)).transpose(1, 2)


def compare(frames: Tensor, poses: Tensor, made: Templates) -> tuple[Tensor, Tensor]:
    """Evidence and explained share (T, N, C) of drawings at poses (T, N, 4) of frames (T, 3, H, W) in [0, 1]."""
    seen = patches(frames, poses, made.alpha.shape[-1], made.reach).flatten(3)  # (T, N, 5, QQ)
    inner = seen @ made.alpha.flatten(1).T  # (T, N, 5, C)
    product = seen[:, :, :3].flatten(2) @ made.colors.flatten(1).T
    squares = seen[:, :, 3] @ made.squares.flatten(1).T
    whole = seen.sum(dim=-1)
    sums = Sums(
        whole=whole[:, :, None, :3],
        inner=inner[:, :, :3].transpose(2, 3),
        pixels=whole[:, :, None, 3],
        covered=inner[:, :, 3],
        power=inner[:, :, 4],
        product=product,
        squares=squares,
    )
    evidence, share = sums.evidence()
    return evidence, share


def around(poses: Tensor, shifts: Sequence[float], sizes: Sequence[float], turns: Sequence[float]) -> Tensor:
    """Poses (T, N, 4) near poses (T, 4); `shifts` are in sizes of the thing; the first of each is no change."""
    steps = torch.tensor([*product(shifts, shifts, sizes, turns)], dtype=poses.dtype, device=poses.device)
    near = poses[:, None].expand(-1, len(steps), -1).clone()
    near[..., :2] += steps[:, :2] * poses[:, None, 2:3]
    near[..., 2] *= steps[:, 2]
    near[..., 3] += steps[:, 3]
    return near


# steps to try from a pose: where a thing may be `EVERY` seconds later, then finer ones
REACH = ((0.0, -0.25, 0.25, -0.5, 0.5), (1.0, 0.9, 1.1), (0.0, -0.2, 0.2, -0.4, 0.4))
REFINE = (
    ((0.0, -0.12, 0.12), (1.0, 0.93, 1.07), (0.0, -0.1, 0.1)),
    ((0.0, -0.06, 0.06), (1.0, 0.97, 1.03), (0.0, -0.05, 0.05)),
)


def climb(frame: Tensor, pose: Tensor, made: Templates, first: Steps) -> tuple[Tensor, float]:
    """The best pose (4,) near `pose` in a frame (1, 3, H, W), by the `first` and then finer steps, and its evidence.

    In the finer steps every pixel counts: no other thing is in reach.
    """
    limits = torch.tensor((frame.shape[3] / frame.shape[2] / 2, 0.5), device=frame.device)
    value = -math.inf
    for steps, power in ((first, AREA), *((steps, FINE_AREA) for steps in REFINE)):
        near = around(pose[None], *steps)
        near[..., :2] = near[..., :2].clamp(-limits, limits)
        near[..., 2] = near[..., 2].clamp(float(SIZES[0]), float(SIZES[-1]))
        evidence = compare(frame, near, made)[0][0, :, 0]
        counted = evidence * near[0, :, 2] ** power
        # the nearest of equal ones
        at = int((counted - 1e-4 * counted.abs().amax() * (near[0] - pose).abs().sum(dim=-1)).argmax())
        pose, value = near[0, at], float(evidence[at] * near[0, at, 2] ** AREA)
    return pose, value


def follow(frames: Tensor, made: Templates, coarse: Templates) -> Tensor:
    """Track a drawing through frames (T, 3, H, W), from the key frame where it fits best to both ends: poses (T, 4)."""
    keys = sorted({round(at) for at in np.linspace(0, len(frames) - 1, KEY_FRAMES)})
    best, begin, pose = -math.inf, 0, torch.zeros(4, device=frames.device)
    for key in keys:
        start = torch.tensor(search(frames[key], coarse, SIZES, TURNS), dtype=torch.float32, device=frames.device)
        there, value = climb(frames[key : key + 1], start, made, (*REACH[:2], (0.0, -0.2, 0.2)))
        if value > best:
            best, begin, pose = value, key, there
    poses = {begin: pose}
    for direction, end in ((1, len(frames)), (-1, -1)):
        for at in range(begin + direction, end, direction):
            start = poses[at - direction]
            poses[at] = climb(frames[at : at + 1], start, made, REACH)[0]
    return torch.stack([poses[at] for at in range(len(frames))])


@torch.no_grad()
def find_thing(video: Tensor, scene: Scene, start: float = 0.0, fps: float = 24.0) -> Found:
    """Search a video (3, F, H, W) for a scene's first thing by its drawing; recognize what is there, and its motion.

    Args:
        start: the scene's time at the first frame.
    """
    step = max(1, round(EVERY * fps))
    frames = (video[:, ::step].transpose(0, 1).float() + 1) / 2
    times = start + np.arange(len(frames)) * step / fps
    thing, device = scene.things[0], str(video.device)
    name = ((thing.kind, thing.color),)
    made = templates(name, FINE, device)
    poses = follow(frames, made, templates(name, COARSE, device))
    fit = compare(frames, poses[:, None], made)[1][:, 0, 0].cpu().numpy()
    found = Found(times, poses.double().cpu().numpy(), fit)
    if not found.is_found:
        return found
    kind, color = recognize(frames, poses)
    direction = direction_of(times, in_world(found.poses, scene, times), SYMMETRY.get(kind, 1))
    return replace(found, kind=kind, color=color, direction=direction)


def recognize(frames: Tensor, poses: Tensor) -> tuple[str, str]:
    """The kind and the color of the drawing that fits best at poses (T, 4), over all frames."""
    names = tuple(product(KINDS, COLORS))
    near = around(poses, (0.0, -0.12, 0.12), (1.0, 0.85, 1.18), (0.0,))
    evidence = compare(frames, near, templates(names, FINE, str(frames.device)))[0]
    evidence = evidence * near[..., 2:3] ** FINE_AREA
    return names[int(evidence.amax(dim=1).sum(dim=0).argmax())]


def in_world(poses: np.ndarray, scene: Scene, times: np.ndarray) -> np.ndarray:
    """Convert poses in the frame to poses in the world, without the camera's motion."""
    zoom, sign = scene.zoom_at(times)[:, None], -1 if scene.mirrored else 1
    made = poses.copy()
    made[:, :3] *= zoom
    made[:, :2] = made[:, :2] * (sign, 1) + scene.center
    return made


def direction_of(times: np.ndarray, poses: np.ndarray, symmetry: int = 1) -> str:
    """The direction of motion of poses (T, 4), one of `world.DIRECTIONS`.

    Slopes are medians over all pairs (Theil-Sen), so a few wrong poses do not matter.
    """
    if len(times) < 2:
        return "still"
    period = 2 * math.pi / symmetry
    turn = np.unwrap(poses[:, 3], period=period)
    slopes = {
        name: slope(times, values) / STEADY[name]
        for name, values in zip(STEADY, (poses[:, 0], poses[:, 1], np.log(poses[:, 2]), turn), strict=True)
    }
    name = max(slopes, key=lambda each: abs(slopes[each]))
    if abs(slopes[name]) < 1:
        return "still"
    ways = {"x": ("left", "right"), "y": ("up", "down"), "growth": ("away", "towards"), "turn": ("turning", "turning")}
    return ways[name][slopes[name] > 0]


def slope(times: np.ndarray, values: np.ndarray) -> float:
    first, second = np.triu_indices(len(times), k=1)
    return float(np.median((values[second] - values[first]) / (times[second] - times[first])))


def size_change(before: Found, after: Found) -> tuple[float, str]:
    """How much larger a thing is after a cut than before, and whether the shot is "closer", "wider" or the "same"."""
    ratio = float(np.median(after.poses[:3, 2]) / np.median(before.poses[-3:, 2]))
    return ratio, "closer" if ratio > CLOSER else "wider" if ratio < 1 / CLOSER else "same"


# Faces


def mouth_areas(opened: np.ndarray) -> np.ndarray:
    """Areas of the gap between the lips of a face of size 1, for mouths open from 0 to 1; see `world.render_faces`."""
    return math.pi * GAP_FILL * (0.117 - 0.015 * opened) * (0.007 + 0.085 * opened)


@torch.no_grad()
def mouth_openings(video: Tensor, face: Face) -> np.ndarray:
    """How far a face's mouth is open in each frame (F,), from the area of the gap between its lips.

    In the mouth's region every pixel is a mixture of gap, lips and skin with shares that sum to 1. The sum of the
    gap's shares, found by least squares, is its area, however blurred the frames are.
    """
    height = video.shape[2]
    at = (torch.arange(height, device=video.device) + 0.5) / height * 2 - 1
    x, y = ((at - middle) / face.size for middle in face.center)
    rows, columns = (y > MOUTH[1]) & (y < MOUTH[3]), (x > MOUTH[0]) & (x < MOUTH[2])
    region = (video[:, :, rows][..., columns].float() + 1) / 2  # (3, F, h, w)
    colors = np.array((drawing.GAP, drawing.LIPS, drawing.skin_of(face.number))) / 255
    gap, lips, skin = np.minimum(colors * face.gain, 1)
    shares = np.linalg.pinv(np.stack((gap - skin, lips - skin), axis=1))  # (2, 3)
    weight = torch.tensor(shares[0], dtype=torch.float32, device=video.device)
    share = (region.movedim(0, -1) - torch.tensor(skin, dtype=torch.float32, device=video.device)) @ weight
    area = share.sum(dim=(1, 2)).cpu().numpy() * (2 / height / face.size) ** 2
    opened = np.linspace(0, 1, 101)
    return np.interp(area, mouth_areas(opened), opened)


@dataclass(frozen=True)
class LipSync:
    """How well a measured mouth agrees with the true one.

    Attributes:
        correlation: of both, at a lag of 0 or 1 frame, whichever is better: sound that is early by up to 45 ms is not
            noticed (ITU-R BT.1359-1).
        lag: frames that the measured one is late by where they agree best; None if it does not move.
        restless: mean absolute change between frames while the true mouth is shut; 0 if still.
    """

    correlation: float
    lag: int | None
    restless: float


def lip_sync(measured: np.ndarray, truth: np.ndarray, most: int = 6) -> LipSync:
    """Compare mouth openings (F,), shifted by up to `most` frames."""
    assert len(measured) == len(truth)
    count = len(truth)
    lags = range(-most, most + 1)
    values = {
        lag: correlation(measured[max(0, lag) : count + min(0, lag)], truth[max(0, -lag) : count - max(0, lag)])
        for lag in lags
    }
    lag = max(values, key=lambda each: (values[each], -abs(each)))
    shut = truth < SHUT
    pairs = shut[1:] & shut[:-1]
    restless = float(np.abs(np.diff(measured))[pairs].mean()) if pairs.any() else 0.0
    return LipSync(max(values[0], values[1]), lag if values[lag] else None, restless)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation; 0 if one is constant."""
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale > 1e-9 else 0.0
