"""ComfyUI's progress bars."""

from __future__ import annotations

from PIL import Image

Preview = tuple[str, Image.Image, int]  # format, image, longest side
SHOWN: list[tuple[int, int, Preview | None]] = []  # what all progress bars have shown


class ProgressBar:
    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Preview | None = None) -> None:
        SHOWN.append((value, total or self.total, preview))
