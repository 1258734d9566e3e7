#!/usr/bin/env python3
"""Frames of some videos as one picture, a row for each video.

    python benchmarks/frames.py result/*/*.mp4 --out result/frames.png

A folder stands for the newest video in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from imageio_ffmpeg import count_frames_and_secs, read_frames
from PIL import Image

HEIGHT, GAP = 96, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", type=Path, nargs="+", help="videos, or folders of videos")
    parser.add_argument("--out", type=Path, required=True, help="a PNG file")
    parser.add_argument(
        "--count", type=int, default=6, help="frames of each, evenly spaced, from the first to the last"
    )
    options = parser.parse_args()
    stack([row_of(newest(path), options.count) for path in options.videos], GAP).save(options.out)


def newest(path: Path) -> Path:
    """The video that a path stands for."""
    return max(path.glob("*.mp4"), key=lambda file: file.stat().st_mtime) if path.is_dir() else path


def row_of(video: Path, count: int) -> Image.Image:
    """Evenly spaced frames of a video, side by side."""
    total, _ = count_frames_and_secs(str(video))
    wanted = {round(index) for index in np.linspace(0, total - 1, count)}
    reader = read_frames(str(video))
    size = next(reader)["size"]
    shown = [Image.frombytes("RGB", size, frame) for number, frame in enumerate(reader) if number in wanted]
    shown = [frame.resize((round(frame.width * HEIGHT / frame.height), HEIGHT)) for frame in shown]
    row = Image.new("RGB", (sum(frame.width + GAP for frame in shown) - GAP, HEIGHT), "white")
    left = 0
    for frame in shown:
        row.paste(frame, (left, 0))
        left += frame.width + GAP
    return row


def stack(rows: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Rows below each other, on white."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height + gap for row in rows) - gap), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + gap
    return sheet


if __name__ == "__main__":
    main()
