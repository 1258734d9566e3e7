"""What the nodes use of ComfyUI's API, with the same parameters; test_comfyui.py compares it with the real one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from typing import Any

from torch import Tensor

from comfy_api.latest import io


class ComfyExtension(ABC):
    @abstractmethod
    async def get_node_list(self) -> list[type[io.ComfyNode]]: ...


class Types:
    @dataclass
    class VideoComponents:
        images: Tensor
        frame_rate: Fraction
        audio: Mapping[str, Any] | None = None


class Input:
    class Video(ABC):
        @abstractmethod
        def get_components(self) -> Types.VideoComponents: ...


class InputImpl:
    class VideoFromComponents(Input.Video):
        def __init__(self, components: Types.VideoComponents) -> None:
            self.components = components

        def get_components(self) -> Types.VideoComponents:
            return self.components

    class VideoFromFile(Input.Video):
        def __init__(self, file: str | BytesIO) -> None:
            self.file = file

        def get_stream_source(self) -> str | BytesIO:
            return self.file

        def get_duration(self) -> float:
            return 1.0

        def get_dimensions(self) -> tuple[int, int]:
            return 1, 1

        def get_components(self) -> Types.VideoComponents:
            raise AssertionError("decodes the file with other colors")


__all__ = ["ComfyExtension", "Input", "InputImpl", "Types", "io"]
