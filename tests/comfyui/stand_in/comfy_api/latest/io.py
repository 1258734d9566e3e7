"""Inputs, outputs and nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class Input:
    io_type = ""

    def __init__(
        self, id: str, display_name: str | None = None, optional: bool = False, tooltip: str | None = None
    ) -> None:
        self.id, self.display_name, self.optional, self.tooltip = id, display_name, optional, tooltip

    def get_io_type(self) -> str:
        return self.io_type


class WidgetInput(Input):
    default: Any = None


class Output:
    io_type = ""

    def __init__(self, id: str | None = None, display_name: str | None = None) -> None:
        self.id, self.display_name = id, display_name


class Boolean:
    class Input(WidgetInput):
        io_type = "BOOLEAN"

        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            default: bool | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip)
            self.default = default


class Int:
    class Input(WidgetInput):
        io_type = "INT"

        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            default: int | None = None,
            min: int | None = None,
            max: int | None = None,
            step: int | None = None,
            control_after_generate: bool | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip)
            self.default, self.min, self.max, self.step = default, min, max, step
            self.control_after_generate = control_after_generate


class Float:
    class Input(WidgetInput):
        io_type = "FLOAT"

        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            default: float | None = None,
            min: float | None = None,
            max: float | None = None,
            step: float | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip)
            self.default, self.min, self.max, self.step = default, min, max, step


class String:
    class Input(WidgetInput):
        io_type = "STRING"

        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            multiline: bool = False,
            default: str | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip)
            self.multiline, self.default = multiline, default


class Combo:
    class Input(WidgetInput):
        io_type = "COMBO"

        def __init__(
            self,
            id: str,
            options: list[str] | None = None,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            default: str | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip)
            self.options, self.default = options, default


class ComfyType:
    Input: type[Input]
    Output: type[Output]


def Custom(io_type: str) -> type[ComfyType]:
    names = {"io_type": io_type}
    both = {"Input": type("Input", (Input,), names), "Output": type("Output", (Output,), names)}
    return type("Custom", (ComfyType,), {**names, **both})


Image, Audio, Video = Custom("IMAGE"), Custom("AUDIO"), Custom("VIDEO")


class MultiType:
    class Input(Input):
        def __init__(
            self,
            id: str,
            types: Sequence[type[Any]],
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip)
            self.types = types

        def get_io_type(self) -> str:
            return ",".join(each.io_type for each in self.types)


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    description: str = ""


class NodeOutput:
    def __init__(self, *args: Any) -> None:
        self.args = args

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class ComfyNode:
    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, *args: Any, **kwargs: Any) -> NodeOutput:
        raise NotImplementedError
