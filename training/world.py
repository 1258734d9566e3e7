"""The drawn world: scenes with their ground truth, and a batched renderer for any device.

A `Scene` is generated from a seed on the CPU, so it is the same everywhere; its pixels are the same up to rounding.
Lengths are in frame heights, (0, 0) is the middle of the frame, y points down, times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training import captions, drawing

STEADY_SECONDS = 2.0  # in which nothing turns back
MARGIN = 0.12  # distance from the frame's sides at which things turn back
DIRECTIONS = ("left", "right", "up", "down", "towards", "away", "turning", "still")
SIZES = (0.08, 0.36)  # limits of a thing's half height, at which growing and shrinking reverse
CUTS = ("ZOOM_IN_CUT", "ZOOM_OUT_CUT", "MULTI_ANGLE_CUT", "CUT_AWAY")


@dataclass(frozen=True)
class Motion:
    """The path of a thing over time."""

    start: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    size: float = 0.2
    growth: float = 0.0  # of the logarithm of the size, per second
    spin: float = 0.0  # radians per second
    bob: float = 0.0
    bounds: tuple[float, float] = (0.83, 0.5)  # half the frame
    beside: tuple[float, float] = (0.0, 0.0)  # offset from the path, in sizes of the thing

    def at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """x, y, size and turn at `times`."""
        x, y = (
            folded(start + speed * times, MARGIN - bound, bound - MARGIN) if speed else np.full_like(times, start)
            for start, speed, bound in zip(self.start, self.velocity, self.bounds, strict=True)
        )
        low, high = map(math.log, SIZES)
        size = np.exp(folded(math.log(self.size) + self.growth * times, low, high))
        y = y + self.bob * np.sin(4.5 * times)
        return x + self.beside[0] * size, y + self.beside[1] * size, size, self.spin * times


def folded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Reflect values at both ends of a range."""
    span = high - low
    place = np.mod(values - low, 2 * span)
    return low + np.where(place > span, 2 * span - place, place)


@dataclass(frozen=True)
class Thing:
    kind: str
    color: str
    motion: Motion


@dataclass(frozen=True)
class Scene:
    """One shot.

    Attributes:
        things: the first is the caption's subject; carried ones share its motion, beside it.
        direction: of the first thing, one of `DIRECTIONS`; direction_stated: whether the caption names it.
        zoom: visible height at time 0, in frame heights; zooming: change of its logarithm per second.
        center: of the frame, in the world.
        pan: speed of the ground to the right.
        mirrored: seen from the other side.
        sun: its position at time 0, or None; it sinks.
    """

    seed: int
    ground: str
    variant: int
    gain: tuple[float, float, float]
    things: tuple[Thing, ...]
    direction: str
    direction_stated: bool
    caption: str
    flakes: bool = False
    waves: float | None = None
    sun: tuple[float, float] | None = None
    zoom: float = 1.0
    zooming: float = 0.0
    center: tuple[float, float] = (0.0, 0.0)
    pan: float = 0.0
    mirrored: bool = False

    def zoom_at(self, times: np.ndarray) -> np.ndarray:
        return np.exp(np.clip(math.log(self.zoom) + self.zooming * times, math.log(0.5), math.log(1.5)))

    def on_screen(self, number: int, times: np.ndarray) -> np.ndarray:
        """x, y and size (T, 3) of a thing in the frame, as a measurement of the frames should find them."""
        x, y, size, _ = self.things[number].motion.at(times)
        zoom, sign = self.zoom_at(times), -1 if self.mirrored else 1
        return np.stack((sign * (x - self.center[0]) / zoom, (y - self.center[1]) / zoom, size / zoom), axis=1)


PLACES: dict[str, tuple[str, ...]] = {  # grounds of some things; all others can be anywhere
    "boat": ("sea", "sea", "sea", "pool"),
    "cat in sunglasses": ("pool", "pool", "room", "hills"),
    "star": ("night", "sky", "room", "hills"),
}
STANDING = ("fox", "cat", "cat in sunglasses", "cube")


def make_scene(seed: int, aspect: float = 5 / 3, state_direction: bool = True) -> Scene:
    """A scene; its caption may state a direction, which is what is visible for the first `STEADY_SECONDS`."""
    random = np.random.default_rng([1, seed])
    kinds = [kind for kind in drawing.THINGS if kind != "sun"]
    kind = pick(random, kinds)
    grounds = PLACES.get(kind, ("snow", "night", "sea", "hills", "room", "pool", "sky"))
    ground = pick(random, grounds)
    direction = pick(random, DIRECTIONS, (0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1))
    first = Thing(kind, color_of(random, kind), motion_of(random, kind, ground, direction, aspect))
    things, relation = [first], ""
    other = random.random()
    if other < 0.55:
        second_kind = pick(random, [name for name in kinds if name.split()[0] != kind.split()[0]])
        color = color_of(random, second_kind)
        if other < 0.3 and kind in STANDING:
            relation = "carries"
            motion = carried(random, first.motion)
        else:
            relation = "beside"
            motion = motion_of(random, second_kind, ground, "still", aspect, size=(0.1, 0.17))
        things.append(Thing(second_kind, color, motion))
    camera = pick(random, ("still", "left", "right", "in", "out"), (0.72, 0.08, 0.08, 0.06, 0.06))
    stated = random.random() < 0.8 and state_direction
    caption = captions.describe(
        random,
        [(thing.kind, thing.color, thing.color == drawing.NATURAL.get(thing.kind)) for thing in things],
        relation,
        direction if stated else "",
        ground,
        camera,
    )
    waves = {"sea": 0.26, "pool": 0.22}.get(ground)
    sun = (random.uniform(-0.6, 0.6), random.uniform(-0.3, 0.0))
    return Scene(
        seed=seed,
        ground=ground,
        variant=int(random.integers(drawing.VARIANTS)),
        gain=tuple(float(value) for value in random.uniform(0.94, 1.06, 3)),
        things=tuple(things),
        direction=direction,
        direction_stated=stated,
        caption=caption,
        flakes=ground == "snow",
        waves=waves,
        sun=sun if ground == "sea" and random.random() < 0.7 else None,
        zooming={"in": -0.14, "out": 0.14}.get(camera, 0.0),
        pan={"left": 0.09, "right": -0.09}.get(camera, 0.0),
    )


def pick(random: np.random.Generator, choices: Sequence[str], weights: Sequence[float] | None = None) -> str:
    return choices[int(random.choice(len(choices), p=weights))]


def color_of(random: np.random.Generator, kind: str) -> str:
    natural = drawing.NATURAL.get(kind)
    if natural is not None and random.random() < 0.5:
        return natural
    return pick(random, list(drawing.COLORS))


def motion_of(
    random: np.random.Generator,
    kind: str,
    ground: str,
    direction: str,
    aspect: float,
    size: tuple[float, float] = (0.15, 0.23),
) -> Motion:
    """A random motion in `direction`, from a start with enough room."""
    half = float(random.uniform(*size))
    bounds = (aspect / 2, 0.5)
    x = float(random.uniform(0.2 - bounds[0], bounds[0] - 0.2))
    y = float(random.uniform(0.0, 0.2) if kind in STANDING else random.uniform(-0.2, 0.2))
    bob = float(random.choice((0.0, 0.012)))
    if kind == "boat" and ground in ("sea", "pool"):
        y, bob = 0.27 - 0.9 * half + float(random.uniform(-0.03, 0.03)), 0.012
    across, along = float(random.uniform(0.18, 0.36)), float(random.uniform(0.1, 0.18))
    sign = -1 if direction in ("left", "up") else 1
    if direction in ("left", "right"):
        reach = 2 * (bounds[0] - MARGIN)
        across = min(across, 0.9 * reach / STEADY_SECONDS)
        room = (reach - across * STEADY_SECONDS) / 2
        x = sign * (float(random.uniform(-1, 1)) * room - across * STEADY_SECONDS / 2)
        return Motion((x, y), (sign * across, 0.0), half, bob=bob, bounds=bounds)
    if direction in ("up", "down"):
        room = max(0.0, (2 * (bounds[1] - MARGIN) - along * STEADY_SECONDS) / 2)
        y = sign * (float(random.uniform(-1, 1)) * room - along * STEADY_SECONDS / 2)
        return Motion((x, y), (0.0, sign * along), half, bounds=bounds)
    if direction in ("towards", "away"):
        growth = float(random.uniform(0.22, 0.34))
        half = float(random.uniform(0.09, 0.13) if direction == "towards" else random.uniform(0.24, 0.34))
        return Motion(
            (x * 0.7, y * 0.6), size=half, growth=growth if direction == "towards" else -growth, bounds=bounds
        )
    if direction == "turning":
        spin = float(random.uniform(1.2, 2.4) * random.choice((-1, 1)))
        return Motion((x, y), size=half, spin=spin, bounds=bounds)
    return Motion((x, y), size=half, bob=bob, bounds=bounds)


def carried(random: np.random.Generator, motion: Motion) -> Motion:
    """The motion of a carried thing: that of its carrier, offset to one side and down, and smaller."""
    part = float(random.uniform(0.5, 0.62))
    side = -1.0 if motion.start[0] > 0 else 1.0
    return replace(motion, size=motion.size * part, beside=(side * 0.85 / part, 0.7 / part))


def references(scene: Scene) -> list[Scene]:
    """A scene for each of a scene's things: alone and large on a plain ground."""
    random = np.random.default_rng([2, scene.seed])
    made = []
    for thing in scene.things:
        motion = Motion((0.0, 0.0), size=float(random.uniform(0.38, 0.48)))
        things = (Thing(thing.kind, thing.color, motion),)
        made.append(Scene(scene.seed, "plain", 0, (1.0, 1.0, 1.0), things, "still", False, ""))
    return made


def cut_to(scene: Scene, seconds: float, kind: str) -> Scene:
    """The shot after a cut at `seconds`: the same world in another view. Its times continue the scene's."""
    random = np.random.default_rng([3, scene.seed])
    x, y, _, _ = (float(value[0]) for value in scene.things[0].motion.at(np.array([seconds])))
    shot = replace(scene, zooming=0.0, pan=0.0, zoom=1.0)
    if kind == "ZOOM_IN_CUT":
        shot = replace(shot, zoom=float(random.uniform(0.5, 0.6)), center=(0.8 * x, 0.8 * y))
    elif kind == "ZOOM_OUT_CUT":
        shot = replace(shot, zoom=float(random.uniform(1.4, 1.5)))
    elif kind == "MULTI_ANGLE_CUT":
        shot = replace(shot, mirrored=True, zoom=0.85)
    else:
        other = make_scene(scene.seed ^ 0x5A5A5A)
        shot = replace(shot, things=other.things[:1], direction=other.direction)
    first = shot.things[0]
    natural = first.color == drawing.NATURAL.get(first.kind)
    return replace(shot, caption=captions.describe_cut(random, kind, first.kind, first.color, natural, scene.ground))


# Rendering


@dataclass
class Layer:
    """A texture per scene, and affine maps (B, F, 2, 3) from the world to it."""

    textures: list[np.ndarray]
    places: np.ndarray
    repeats: bool = False
    behind: bool = False  # hidden by the land


def affine(x: np.ndarray, y: np.ndarray, size: np.ndarray, turn: np.ndarray | float = 0.0) -> np.ndarray:
    """Affine maps (T, 2, 3) from the world to the square of a thing at x and y."""
    cos, sin = np.cos(turn) / size, np.sin(turn) / size
    rows = np.stack((cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y), axis=-1)
    return rows.reshape(*rows.shape[:-1], 2, 3)


def camera(scene: Scene, times: np.ndarray, aspect: float) -> np.ndarray:
    """Affine maps (T, 3, 3) from the frame, both axes from -1 to 1, to the world."""
    zoom = scene.zoom_at(times)
    made = np.zeros((len(times), 3, 3))
    made[:, 0, 0] = zoom * aspect / 2 * (-1 if scene.mirrored else 1)
    made[:, 1, 1] = zoom / 2
    made[:, 0, 2], made[:, 1, 2], made[:, 2, 2] = *scene.center, 1
    return made


def thing_layer(scenes: Sequence[Scene], number: int, times: np.ndarray) -> Layer:
    layer = Layer([], np.zeros((len(scenes), len(times[0]), 2, 3)))
    for index, scene in enumerate(scenes):
        if number < len(scene.things):
            thing = scene.things[number]
            layer.textures.append(drawing.thing_texture(thing.kind, thing.color))
            layer.places[index] = affine(*thing.motion.at(times[index]))
        else:
            layer.textures.append(EMPTY)
    return layer


EMPTY = np.zeros((4, drawing.TEXTURE, drawing.TEXTURE), np.float32)


def layers_of(scenes: Sequence[Scene], times: np.ndarray) -> list[Layer]:
    """The layers over the ground, bottom first."""
    layers = []
    none = np.zeros((len(times[0]), 2, 3))
    if any(scene.sun for scene in scenes):
        places = [
            none if s.sun is None else affine(s.sun[0] + 0 * t, s.sun[1] + 0.085 * t, np.full_like(t, 0.13))
            for s, t in zip(scenes, times, strict=True)
        ]
        disc = drawing.thing_texture("sun", "yellow")
        layers.append(Layer([disc if s.sun else EMPTY for s in scenes], np.stack(places), behind=True))
    if any(scene.waves is not None for scene in scenes):
        places = []
        for s, t in zip(scenes, times, strict=True):
            made = np.zeros((len(t), 2, 3))
            if s.waves is not None:  # wavelength 0.42; the texture holds one period
                made[:, 0, 0], made[:, 0, 2] = 2 / 0.42, -0.5 * t
                made[:, 1, 1], made[:, 1, 2] = 2 / 0.26, -2 / 0.26 * (s.waves + 0.12)
            places.append(made)
        waves = drawing.waves_texture()
        layers.append(Layer([EMPTY if s.waves is None else waves for s in scenes], np.stack(places), repeats=True))
    layers += [thing_layer(scenes, number, times) for number in reversed(range(max(len(s.things) for s in scenes)))]
    if any(scene.flakes for scene in scenes):
        for number, speed in enumerate((0.22, 0.34)):
            places = []
            for t in times:
                made = np.zeros((len(t), 2, 3))
                made[:, 0, 0] = made[:, 1, 1] = 2 / (0.75 - 0.15 * number)
                made[:, 0, 2], made[:, 1, 2] = 0.3 * number + 0.1 * t, -speed * t * 2 / (0.75 - 0.15 * number)
                places.append(made)
            flakes = drawing.flakes_texture(number)
            layers.append(Layer([flakes if s.flakes else EMPTY for s in scenes], np.stack(places), repeats=True))
    return layers


_kept: dict[tuple[int, str, bool], tuple[np.ndarray, Tensor]] = {}


def placed(texture: np.ndarray, device: torch.device, fine: bool) -> Tensor:
    """A texture on the device, cached; at half size unless `fine`."""
    key = (id(texture), str(device), fine)
    if key not in _kept:
        made = torch.from_numpy(texture).to(device)
        _kept[key] = (texture, made if fine else F.avg_pool2d(made[None], 2)[0])
    return _kept[key][1]


def sample(
    textures: Tensor, places: Tensor, size: tuple[int, int], repeats: bool = False, edge: bool = False
) -> Tensor:
    """Sample textures (B, C, h, w) by affine maps (B, F, 2, 3) from the frame -> (B, C, F, H, W)."""
    frames, (height, width) = places.shape[1], size
    x, y = (
        (2 * torch.arange(length, device=places.device, dtype=torch.float32) + 1) / length - 1
        for length in (width, height)
    )
    # elementwise: matrix products may have low precision on a GPU
    along, down, shift = places[..., None, None].unbind(3)  # (B, F, 2, 1, 1)
    grid = along * x + down * y[:, None] + shift  # (B, F, 2, H, W)
    if repeats:
        grid = torch.remainder(grid + 1, 2) - 1
    grid = grid.permute(0, 1, 3, 4, 2).reshape(len(places), frames * height, width, 2)
    mode = "border" if edge or repeats else "zeros"
    return F.grid_sample(textures, grid, padding_mode=mode, align_corners=False).unflatten(2, (frames, size[0]))


def render(
    scenes: Sequence[Scene],
    frames: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
    start: float | Sequence[float] = 0.0,
    fps: float = 24.0,
    fine: bool = False,
) -> Tensor:
    """Video (B, 3, F, H, W) in [-1, 1]; `start`: the first frame's time in seconds, of all scenes or of each."""
    device = torch.device(device)
    starts = [start] * len(scenes) if isinstance(start, int | float) else start
    times = np.asarray(starts, dtype=np.float64)[:, None] + np.arange(frames) / fps
    cameras = np.stack([camera(s, t, width / height) for s, t in zip(scenes, times, strict=True)])

    def placed_in_frame(places: np.ndarray) -> Tensor:
        return torch.from_numpy(np.float32(places @ cameras)).to(device, non_blocking=True)

    size = (height, width)
    rows, columns = drawing.GROUND_SPAN
    ground = np.zeros((len(scenes), frames, 2, 3))
    ground[..., 0, 0], ground[..., 1, 1] = 2 / columns, 2 / rows
    for index, scene in enumerate(scenes):
        ground[index, :, 0, 2] = -scene.pan * times[index] * 2 / columns
    textures = torch.stack([placed(drawing.ground_texture(s.ground, s.variant), device, True) for s in scenes])
    seen = sample(textures, placed_in_frame(ground), size, edge=True)
    picture, sky = seen[:, :3], seen[:, 3:]
    gain = torch.tensor([scene.gain for scene in scenes], dtype=torch.float32, device=device)
    picture = picture * gain[:, :, None, None, None]
    for layer in layers_of(scenes, times):
        textures = torch.stack([placed(texture, device, fine) for texture in layer.textures])
        over = sample(textures, placed_in_frame(layer.places), size, layer.repeats)
        if layer.behind:
            over = over * sky
        picture = over[:, :3] + picture * (1 - over[:, 3:])
    return (picture * 2 - 1).clamp(-1, 1)


def where_things_are(
    scenes: Sequence[Scene],
    frames: int,
    rows: int,
    columns: int,
    start: float | Sequence[float] = 0.0,
    fps: float = 24.0,
) -> Tensor:
    """Mask (B, F, rows, columns), bool, of the cells of `render`'s frames that contain part of a thing."""
    starts = [start] * len(scenes) if isinstance(start, int | float) else start
    y, x = np.mgrid[:rows, :columns]
    y, x = (y + 0.5) / rows - 0.5, ((x + 0.5) / columns - 0.5) * columns / rows  # in heights of a frame
    found = np.zeros((len(scenes), frames, rows, columns), dtype=bool)
    for index, (scene, begin) in enumerate(zip(scenes, starts, strict=True)):
        for number in range(len(scene.things)):
            places = scene.on_screen(number, begin + np.arange(frames) / fps)[..., None, None]  # (F, 3, 1, 1)
            reach = 0.9 * places[:, 2] + 0.5 / rows
            found[index] |= (np.abs(x - places[:, 0]) < reach) & (np.abs(y - places[:, 1]) < reach)
    return torch.from_numpy(found)


# Faces


@dataclass(frozen=True)
class Face:
    """A talking face.

    Attributes:
        number: of the drawing; 0 is the sample portrait's.
        mouth: how far it is open in each frame, 0 to 1.
        lids: how far they are closed in each frame.
        size, center: of the drawing in the frame, whose height is 2.
    """

    number: int
    mouth: np.ndarray
    lids: np.ndarray
    size: float
    center: tuple[float, float]
    caption: str
    gain: tuple[float, float, float] = field(default=(1.0, 1.0, 1.0))


def make_face(seed: int, mouth: np.ndarray, blinks: bool = True) -> Face:
    random = np.random.default_rng([4, seed])
    number = 0 if random.random() < 0.12 else int(random.integers(1, drawing.FACES))
    _, coat, long_hair = drawing.face_texture(number)
    lids = np.zeros(len(mouth))
    if blinks:
        for moment in np.cumsum(random.uniform(60, 140, len(mouth) // 60 + 1)).astype(int):
            for step, closed in enumerate((0.5, 1.0, 1.0, 0.5)):
                if moment + step < len(mouth):
                    lids[moment + step] = closed
    near = number == 0 and random.random() < 0.6
    size = 1.0 if near else float(random.uniform(1.0, 1.15))
    reach = size - 1
    center = tuple(float(value) for value in random.uniform(-reach, reach, 2))
    gain = tuple(float(value) for value in (np.ones(3) if near else random.uniform(0.93, 1.07, 3)))
    return Face(number, mouth, lids, size, center, captions.describe_face(random, coat, long_hair), gain)


def render_faces(faces: Sequence[Face], height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Video (B, 3, F, H, W) in [-1, 1] of faces with the same number of frames."""
    assert height == width, "faces are drawn in square frames"
    device = torch.device(device)
    mouths = np.stack([face.mouth for face in faces])
    lids = np.stack([face.lids for face in faces])
    sizes = np.array([face.size for face in faces])[:, None]
    centers = np.array([face.center for face in faces])[..., None]  # (B, 2, 1)

    def places(x: float, y: np.ndarray, rx: np.ndarray, ry: np.ndarray) -> Tensor:
        """Affine maps from the frame to the square of a part at (x, y) of the face."""
        wide, high = rx * sizes, np.maximum(ry, 1e-3) * sizes
        made = np.zeros((*mouths.shape, 2, 3))
        made[..., 0, 0], made[..., 0, 2] = 1 / wide, -(x * sizes + centers[:, 0]) / wide
        made[..., 1, 1], made[..., 1, 2] = 1 / high, -(y * sizes + centers[:, 1]) / high
        return torch.from_numpy(made.astype(np.float32)).to(device, non_blocking=True)

    ones, size = np.ones_like(mouths), (height, width)
    still = places(0.0, 0 * ones, ones, ones)
    textures = torch.stack([placed(drawing.face_texture(face.number)[0], device, True) for face in faces])
    gain = torch.tensor([face.gain for face in faces], dtype=torch.float32, device=device)[:, :, None, None, None]
    picture = sample(textures, still, size, edge=True)[:, :3]
    parts = [("lid", side * 37 / 240, -23 / 240 - 0.05 * (1 - lids), 0.085 * ones, 0.056 * lids) for side in (-1, 1)]
    parts.append(("lips", 0.0, 70 / 240 + 0.035 * mouths, 0.125 - 0.01 * mouths, 0.05 + 0.075 * mouths))
    parts.append(("gap", 0.0, 70 / 240 + 0.035 * mouths, 0.117 - 0.015 * mouths, 0.007 + 0.085 * mouths))
    for name, x, y, rx, ry in parts:
        drawn = [drawing.part_texture(name, face.number if name == "lid" else 0) for face in faces]
        over = sample(torch.stack([placed(part, device, True) for part in drawn]), places(x, y, rx, ry), size)
        if name == "lid":  # invisible on open eyes
            over = over * torch.from_numpy(np.float32(lids > 0)).to(device)[:, None, :, None, None]
        picture = over[:, :3] + picture * (1 - over[:, 3:])
    return (picture * gain * 2 - 1).clamp(-1, 1)
