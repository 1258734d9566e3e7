"""Textures of the drawn world (things, grounds, faces), drawn once; `world.render` composites them.

Shapes are those of `assets/make_assets.py`, so that the sample inputs belong to the world. Everything is drawn at four
times its size and averaged down, with premultiplied alpha.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Points = Sequence[float]

SCALE = 4
TEXTURE = 128  # side of a texture, in pixels
FACE = 160  # side of a face texture
GROUND = (192, 384)  # rows and columns of a ground: 1.6 by 3.2 heights of a frame
GROUND_SPAN = (1.6, 3.2)
BLACK, WHITE = (32, 20, 14), (255, 255, 255)

COLORS: dict[str, Color] = {
    "red": (200, 32, 31),
    "orange": (233, 115, 31),
    "yellow": (250, 212, 60),
    "green": (52, 150, 70),
    "blue": (45, 95, 205),
    "purple": (130, 60, 170),
    "pink": (240, 140, 185),
    "white": (243, 241, 236),
    "black": (45, 43, 48),
    "brown": (122, 58, 29),
    "grey": (135, 138, 142),
}


def shade(color: Color, factor: float) -> Color:
    """The color, darker for factors below 1, towards white above."""
    if factor <= 1:
        return tuple(round(value * factor) for value in color)
    return tuple(round(255 - (255 - value) * (2 - factor)) for value in color)


class Pen:
    """Draws in [-1, 1] x [-1, 1], y downwards, on a transparent square."""

    def __init__(self, side: int = TEXTURE) -> None:
        self.half = side * SCALE / 2
        self.image = Image.new("RGBA", (side * SCALE, side * SCALE), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)

    def to(self, points: Points) -> list[float]:
        return [(value + 1) * self.half for value in points]

    def polygon(self, points: Points, color: Color) -> None:
        self.draw.polygon(self.to(points), fill=color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        self.draw.ellipse(self.to((x - rx, y - ry, x + rx, y + ry)), fill=color)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        self.draw.rectangle(self.to((x0, y0, x1, y1)), fill=color)

    def line(self, points: Points, color: Color, width: float) -> None:
        self.draw.line(self.to(points), fill=color, width=max(1, round(width * self.half)), joint="curve")

    def arc(self, x: float, y: float, rx: float, ry: float, color: Color, width: float) -> None:
        box = self.to((x - rx, y - ry, x + rx, y + ry))
        self.draw.arc(box, 0, 360, fill=color, width=max(1, round(width * self.half)))

    def texture(self) -> np.ndarray:
        return averaged(np.asarray(self.image))


def averaged(pixels: np.ndarray) -> np.ndarray:
    """uint8 [S*H, S*W, 3 or 4] -> float32 [4, H, W] in 0..1, colors multiplied by alpha."""
    values = pixels.astype(np.float32) / 255
    if values.shape[2] == 3:
        values = np.concatenate((values, np.ones_like(values[..., :1])), axis=2)
    values[..., :3] *= values[..., 3:]
    height, width = values.shape[0] // SCALE, values.shape[1] // SCALE
    small = values.reshape(height, SCALE, width, SCALE, 4).mean(axis=(1, 3))
    return np.ascontiguousarray(small.transpose(2, 0, 1))


# Things; each fills most of its square


def fox(pen: Pen, color: Color) -> None:
    def at(*points: float) -> list[float]:  # from pixels of the sample picture
        return [(value - (256, 265)[index % 2]) / 210 for index, value in enumerate(points)]

    for side in (-1, 1):
        ear = (256 + side * 170, 60, 256 + side * 190, 260, 256 + side * 40, 170)
        pen.polygon(at(*ear), shade(color, 0.92))
        inner = (256 + side * 155, 100, 256 + side * 168, 220, 256 + side * 80, 170)
        pen.polygon(at(*inner), shade(color, 0.4))
    pen.ellipse(0, 15 / 210, 176 / 210, 150 / 210, color)
    pen.polygon(at(90, 300, 256, 470, 422, 300, 256, 330), (255, 243, 226))
    for x in (180, 332):
        pen.ellipse(*at(x, 270), 26 / 210, 30 / 210, BLACK)
        pen.ellipse(*at(x + 5, 257), 9 / 210, 9 / 210, WHITE)
    pen.ellipse(*at(256, 428), 28 / 210, 22 / 210, BLACK)


def cat(pen: Pen, color: Color, sunglasses: bool = False) -> None:
    dark = shade(color, 0.7)
    for side in (-1, 1):
        pen.polygon((side * 0.85, -0.95, side * 0.9, 0.1, side * 0.2, -0.5), color)
        pen.polygon((side * 0.76, -0.72, side * 0.78, -0.15, side * 0.38, -0.5), (240, 170, 170))
    pen.ellipse(0, 0.12, 0.9, 0.78, color)
    for x in (-0.22, 0, 0.22):
        pen.line((x, -0.64, x * 0.8, -0.36), dark, 0.07)
    pen.ellipse(0, 0.5, 0.4, 0.26, shade(color, 1.6))
    for side in (-1, 1):
        pen.line((side * 0.3, 0.5, side * 0.98, 0.4), dark, 0.035)
        pen.line((side * 0.3, 0.56, side * 0.98, 0.66), dark, 0.035)
        if sunglasses:
            pen.ellipse(side * 0.36, 0.06, 0.33, 0.22, (18, 18, 24))
            pen.line((side * 0.6, 0.0, side * 0.86, -0.06), (18, 18, 24), 0.07)
            pen.ellipse(side * 0.36 - 0.1, -0.02, 0.09, 0.05, (120, 130, 150))
        else:
            pen.ellipse(side * 0.36, 0.05, 0.17, 0.19, (120, 190, 90))
            pen.ellipse(side * 0.36, 0.05, 0.06, 0.17, BLACK)
    if sunglasses:
        pen.line((-0.2, 0.0, 0.2, 0.0), (18, 18, 24), 0.09)
    pen.polygon((-0.12, 0.38, 0.12, 0.38, 0, 0.5), (225, 120, 130))


def lantern(pen: Pen, color: Color) -> None:
    def at(*points: float) -> list[float]:
        return [(value - (192, 250)[index % 2]) / 238 for index, value in enumerate(points)]

    dark = shade(color, 0.68)
    pen.line(at(192, 20, 192, 110), (51, 51, 51), 4 / 238)
    pen.ellipse(*at(192, 260), 130 / 238, 140 / 238, color)
    for width in (60, 140, 210):
        pen.arc(*at(192, 260), width / 476, 140 / 238, dark, 5 / 238)
    gold = (202, 162, 58)
    for y in (104, 388):
        pen.rectangle(*at(132, y, 252, y + 26), gold)
    for x in range(150, 240, 12):
        pen.line(at(x, 414, x, 480), gold, 4 / 238)


def boat(pen: Pen, color: Color) -> None:
    def at(*points: float) -> list[float]:
        return [(value - (0, -29)[index % 2]) / 55 for index, value in enumerate(points)]

    pen.polygon(at(-45, 0, 45, 0, 30, 22, -30, 22), color)
    pen.line(at(0, 0, 0, -80), (58, 36, 19), 3 / 55)
    pen.polygon(at(4, -78, 4, -8, 48, -8), (247, 243, 232))
    pen.polygon(at(-4, -66, -4, -8, -36, -8), (228, 215, 189))


def ball(pen: Pen, color: Color) -> None:
    pen.ellipse(0, 0, 0.92, 0.92, color)
    pen.polygon((-0.9, -0.16, 0.9, -0.16, 0.9, 0.16, -0.9, 0.16), shade(color, 1.75))
    pen.ellipse(-0.35, -0.5, 0.16, 0.12, shade(color, 1.8))


def cube(pen: Pen, color: Color) -> None:
    pen.polygon((-0.8, -0.4, 0, -0.85, 0.8, -0.4, 0, 0.05), shade(color, 1.45))
    pen.polygon((-0.8, -0.4, 0, 0.05, 0, 0.95, -0.8, 0.5), color)
    pen.polygon((0.8, -0.4, 0, 0.05, 0, 0.95, 0.8, 0.5), shade(color, 0.65))


def star(pen: Pen, color: Color) -> None:
    turns = [(math.pi * (index / 5 - 0.5), 0.97 if index % 2 == 0 else 0.42) for index in range(10)]
    pen.polygon([value for angle, r in turns for value in (r * math.cos(angle), r * math.sin(angle) + 0.05)], color)


def heart(pen: Pen, color: Color) -> None:
    for side in (-1, 1):
        pen.ellipse(side * 0.44, -0.34, 0.48, 0.46, color)
    pen.polygon((-0.87, -0.12, 0.87, -0.12, 0, 0.92), color)
    pen.ellipse(-0.5, -0.45, 0.14, 0.12, shade(color, 1.7))


def sun(pen: Pen, color: Color) -> None:
    pen.ellipse(0, 0, 0.95, 0.95, (255, 224, 138))


def cat_in_sunglasses(pen: Pen, color: Color) -> None:
    cat(pen, color, sunglasses=True)


THINGS: dict[str, Callable[[Pen, Color], None]] = {
    "fox": fox,
    "cat": cat,
    "cat in sunglasses": cat_in_sunglasses,
    "lantern": lantern,
    "boat": boat,
    "ball": ball,
    "cube": cube,
    "star": star,
    "heart": heart,
    "sun": sun,
}
NATURAL = {"fox": "orange", "cat": "grey", "cat in sunglasses": "grey", "lantern": "red", "boat": "brown"}


@cache
def thing_texture(kind: str, color: str) -> np.ndarray:
    """[4, TEXTURE, TEXTURE]."""
    pen = Pen()
    THINGS[kind](pen, COLORS[color])
    return pen.texture()


@cache
def flakes_texture(number: int) -> np.ndarray:
    """A tile of snowflakes that repeats in both directions."""
    random = np.random.default_rng([7, number])
    pen = Pen()
    for _ in range(9):
        x, y = random.uniform(-0.9, 0.9, 2)
        r = random.uniform(0.025, 0.05)
        pen.ellipse(x, y, r, r, (250, 251, 253))
    return pen.texture()


@cache
def waves_texture() -> np.ndarray:
    """A tile of water lines that repeats horizontally: one period of five waves."""
    side = TEXTURE * SCALE
    y, x = np.mgrid[0:side, 0:side] / side
    pixels = np.zeros((side, side, 4), np.float32)
    for row in range(5):
        line = 0.1 + 0.2 * row + 0.035 * np.sin(2 * math.pi * x + row)
        pixels[np.abs(y - line) < 0.022] = (150, 195, 225, 115)
    return averaged(pixels.astype(np.uint8))


# Grounds


def gradient(top: Points, bottom: Points, size: tuple[int, int] = GROUND, part: float = 1 / 1.6) -> Image.Image:
    """A picture, SCALE times as large, that changes from one color to another in the middle `part` of it."""
    rows, columns = size[0] * SCALE, size[1] * SCALE
    place = ((np.linspace(-0.5, 0.5, rows) / part) + 0.5).clip(0, 1)[:, None]
    column = np.asarray(top) * (1 - place) + np.asarray(bottom) * place
    return Image.fromarray(np.repeat(column[:, None], columns, axis=1).round().astype(np.uint8))


def rows_of(y: float) -> float:
    """A height in the world (0 is the middle of the frame) in pixels of the drawing."""
    return (y / GROUND_SPAN[0] + 0.5) * GROUND[0] * SCALE


def columns_of(x: float) -> float:
    return (x / GROUND_SPAN[1] + 0.5) * GROUND[1] * SCALE


def ridge(pen: ImageDraw.ImageDraw, random: np.random.Generator, y: float, height: float, color: Color) -> None:
    """Draw hills across the whole width, with their foot at `y`."""
    xs = np.arange(-1.7, 1.75, 0.28) + random.uniform(-0.06, 0.06, 13)
    ys = y - height * np.where(np.arange(13) % 2 == int(random.integers(2)), 1.0, 0.25) * random.uniform(0.7, 1.2, 13)
    points = [(columns_of(x), rows_of(top)) for x, top in zip(xs, ys, strict=True)]
    pen.polygon([(0, rows_of(y + 0.02)), *points, (columns_of(1.7), rows_of(y + 0.02))], fill=color)


def mixed(random: np.random.Generator, *choices: Color, spread: float = 14) -> Color:
    """A random choice of the colors, slightly varied."""
    color = np.asarray(choices[int(random.integers(len(choices)))]) + random.uniform(-spread, spread, 3)
    return tuple(int(value) for value in color.clip(0, 255))


class Ground:
    """A sky and the picture drawn over it."""

    def __init__(self, top: Points, bottom: Points) -> None:
        self.picture = gradient(top, bottom)
        self.sky = np.asarray(self.picture).copy()
        self.pen = ImageDraw.Draw(self.picture)

    def fill_below(self, y: float, color: Color) -> None:
        """Fill with one color from `y` down."""
        self.pen.rectangle((0, rows_of(y), *self.picture.size), fill=color)


def draw_snow(random: np.random.Generator) -> Ground:
    dark = random.random() < 0.4
    top, bottom = ((22, 30, 62), (70, 84, 120)) if dark else ((150, 172, 196), (214, 222, 230))
    ground = Ground(mixed(random, top), mixed(random, bottom))
    ridge(ground.pen, random, 0.16, 0.22, mixed(random, (112, 124, 150) if dark else (188, 200, 214)))
    ground.fill_below(0.16, mixed(random, (172, 182, 206) if dark else (238, 242, 246), spread=6))
    return ground


def draw_night(random: np.random.Generator) -> Ground:
    ground = Ground(mixed(random, (8, 10, 30)), mixed(random, (40, 34, 84)))
    pen = ground.pen
    for _ in range(60):
        x, y, r = (
            random.uniform(0, ground.picture.width),
            random.uniform(0, ground.picture.height * 0.62),
            random.uniform(3, 6),
        )
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(245, 242, 220))
    ridge(pen, random, 0.3, 0.12, mixed(random, (16, 22, 32), spread=8))
    ground.fill_below(0.3, mixed(random, (16, 22, 32), spread=8))
    return ground


def draw_sea(random: np.random.Generator) -> Ground:
    dusk = random.random() < 0.7
    top, bottom = ((32, 58, 107), (242, 166, 90)) if dusk else ((96, 160, 220), (206, 226, 236))
    ground = Ground(mixed(random, top), mixed(random, bottom))
    ridge(ground.pen, random, 0.21, 0.28, mixed(random, (59, 51, 80) if dusk else (92, 116, 120)))
    ground.fill_below(0.21, mixed(random, (29, 78, 120)))
    return ground


def draw_hills(random: np.random.Generator) -> Ground:
    ground = Ground(mixed(random, (96, 168, 232)), mixed(random, (206, 230, 244)))
    ridge(ground.pen, random, 0.2, 0.3, mixed(random, (112, 160, 110)))
    ground.fill_below(0.19, mixed(random, (88, 156, 72)))
    return ground


def draw_room(random: np.random.Generator) -> Ground:
    wall = mixed(random, (222, 200, 168), (176, 196, 190), (205, 182, 190), (190, 180, 160))
    ground = Ground(wall, shade(wall, 0.88))
    pen = ground.pen
    x = random.uniform(-0.7, 0.7)
    pen.rectangle((columns_of(x - 0.24), rows_of(-0.36), columns_of(x + 0.24), rows_of(0.02)), fill=(250, 248, 240))
    pen.rectangle((columns_of(x - 0.2), rows_of(-0.32), columns_of(x + 0.2), rows_of(-0.02)), fill=(150, 200, 235))
    ground.fill_below(0.24, mixed(random, (128, 84, 52), (150, 120, 90)))
    return ground


def draw_pool(random: np.random.Generator) -> Ground:
    ground = Ground(mixed(random, (150, 206, 240)), mixed(random, (224, 238, 242)))
    pen = ground.pen
    deck = mixed(random, (226, 208, 178), (214, 214, 208))
    pen.rectangle((0, rows_of(-0.02), ground.picture.width, rows_of(0.14)), fill=deck)
    for x in np.arange(-1.6, 1.6, 0.2):
        pen.line((columns_of(x), rows_of(-0.02), columns_of(x), rows_of(0.14)), fill=shade(deck, 0.85), width=5)
    ground.fill_below(0.14, mixed(random, (60, 190, 210)))
    return ground


def draw_sky(random: np.random.Generator) -> Ground:
    ground = Ground(mixed(random, (70, 140, 220)), mixed(random, (190, 220, 242)))
    pen = ground.pen
    for _ in range(9):
        x, y, r = random.uniform(-1.6, 1.6), random.uniform(-0.7, 0.7), random.uniform(0.07, 0.12)
        for dx, s in ((-1.1, 0.7), (0, 1), (1.1, 0.75)):
            box = (x + r * (dx - s), y - r * s * 0.7, x + r * (dx + s), y + r * s * 0.7)
            ends = (columns_of(box[0]), rows_of(box[1]), columns_of(box[2]), rows_of(box[3]))
            pen.ellipse(ends, fill=(250, 251, 253))
    return ground


def draw_plain(random: np.random.Generator) -> Ground:
    return Ground((255, 255, 255), (240, 240, 240))


GROUNDS: dict[str, Callable[[np.random.Generator], Ground]] = {
    "snow": draw_snow,
    "night": draw_night,
    "sea": draw_sea,
    "hills": draw_hills,
    "room": draw_room,
    "pool": draw_pool,
    "sky": draw_sky,
    "plain": draw_plain,
}
VARIANTS = 12  # of each ground


@cache
def ground_texture(name: str, variant: int) -> np.ndarray:
    """[4, *GROUND]: a picture, with a mask of its sky as the last channel."""
    random = np.random.default_rng([11, list(GROUNDS).index(name), variant])
    ground = GROUNDS[name](random)
    texture = averaged(np.asarray(ground.picture))
    sky = (np.asarray(ground.picture) == ground.sky).all(axis=2, keepdims=True)
    texture[3:] = averaged(np.repeat(sky * np.uint8(255), 3, axis=2))[:1]
    return texture


# Faces. The mouth and the lids move, so they have their own textures, placed in the face's square.

FACES = 96  # different drawings
COATS = ("red", "green", "blue", "purple", "grey", "brown", "yellow", "white")
SKINS: tuple[Color, ...] = ((239, 193, 161), (224, 172, 136), (178, 124, 88), (120, 78, 52), (247, 214, 188))
HAIRS: tuple[Color, ...] = ((58, 35, 23), (28, 24, 24), (150, 100, 50), (210, 170, 95), (150, 60, 30), (140, 140, 145))
LIPS, GAP = (181, 71, 77), (110, 32, 38)
EYES: tuple[Color, ...] = ((59, 91, 46), (60, 100, 150), (90, 60, 35))
WALLS = (
    *(((184, 212, 227), (230, 238, 242)), ((226, 214, 190), (245, 240, 228))),
    *(((196, 214, 190), (232, 240, 228)), ((200, 190, 210), (236, 230, 240))),
)


@cache
def face_texture(number: int) -> tuple[np.ndarray, str, bool]:
    """A face without a mouth [4, FACE, FACE], the color of the coat, and whether the hair is long.

    Number 0 is that of the sample portrait. Coordinates are pixels of that portrait, 480 x 480.
    """
    random = np.random.default_rng([13, number])
    coat = "red" if number == 0 else COATS[int(random.integers(len(COATS)))]
    skin = SKINS[0] if number == 0 else SKINS[int(random.integers(len(SKINS)))]
    hair = HAIRS[0] if number == 0 else HAIRS[int(random.integers(len(HAIRS)))]
    eyes = EYES[0] if number == 0 else EYES[int(random.integers(len(EYES)))]
    wall = WALLS[0 if number == 0 else int(random.integers(len(WALLS)))]
    long_hair = number == 0 or random.random() < 0.6
    wide = 1.0 if number == 0 else random.uniform(0.9, 1.08)
    picture = gradient(*wall, size=(FACE, FACE), part=1.0)
    unit = FACE * SCALE / 480
    pen = ImageDraw.Draw(picture)

    def at(*points: float) -> list[float]:
        return [(240 + (value - 240) * wide if index % 2 == 0 else value) * unit for index, value in enumerate(points)]

    if long_hair:
        pen.ellipse(at(110, 60, 370, 400), fill=hair)
    else:
        pen.ellipse(at(132, 62, 348, 300), fill=hair)
    pen.rectangle(at(200, 330, 280, 420), fill=shade(skin, 0.92))
    coat_color = (163, 38, 46) if number == 0 else COLORS[coat]
    pen.polygon(at(60, 480, 100, 410, 200, 385, 240, 420, 280, 385, 380, 410, 420, 480), fill=coat_color)
    pen.ellipse(at(150, 100, 330, 365), fill=skin)
    pen.pieslice(at(140, 70, 340, 300), 180, 360, fill=hair)
    for x in (203, 277):
        pen.ellipse(at(x - 18, 205, x + 18, 229), fill="white")
        pen.ellipse(at(x - 8, 208, x + 8, 226), fill=eyes)
        pen.ellipse(at(x - 4, 212, x + 4, 222), fill="black")
        pen.arc(at(x - 24, 182, x + 24, 215), 200, 340, fill=hair, width=round(4 * unit))
    pen.line(at(240, 225, 233, 270, 246, 272), fill=shade(skin, 0.82), width=round(3 * unit))
    return averaged(np.asarray(picture)), coat, long_hair


def skin_of(number: int) -> Color:
    random = np.random.default_rng([13, number])
    random.integers(len(COATS))
    return SKINS[0] if number == 0 else SKINS[int(random.integers(len(SKINS)))]


@cache
def part_texture(part: str, number: int = 0) -> np.ndarray:
    """A moving part of a face, filling its square: the lips, the gap between them, or a lid in the skin's color."""
    pen = Pen(64)
    color = {"lips": LIPS, "gap": GAP}.get(part) or shade(skin_of(number), 0.93)
    pen.ellipse(0, 0, 0.98, 0.98, color)
    return pen.texture()


def draw_everything() -> None:
    """Draw all textures in advance, on all cores."""
    with ThreadPoolExecutor() as pool:
        pool.map(lambda names: ground_texture(*names), itertools.product(GROUNDS, range(VARIANTS)))
        pool.map(lambda names: thing_texture(*names), itertools.product(THINGS, COLORS))
        for number in range(FACES):
            pool.submit(face_texture, number)
            pool.submit(part_texture, "lid", number)
