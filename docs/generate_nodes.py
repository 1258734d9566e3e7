"""Generates the help pages and example workflows of comfyui/: python docs/generate_nodes.py"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "comfyui" / "stand_in")]

from comfy_api.latest import io  # noqa: E402

from comfyui import nodes  # noqa: E402
from comfyui.nodes import NODES, SkyReelsLoadModel, Task  # noqa: E402
from skyreels_v3.tasks import TINY, task_spec  # noqa: E402

# task inputs: sample file, the ComfyUI node that loads it, its other widget values, its outputs
FILES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "image": ("fox.png", "LoadImage", ("image",), ("IMAGE", "MASK")),
    "ref_imgs_1": ("fox.png", "LoadImage", ("image",), ("IMAGE", "MASK")),
    "ref_imgs_2": ("lantern.png", "LoadImage", ("image",), ("IMAGE", "MASK")),
    "input_image": ("portrait.png", "LoadImage", ("image",), ("IMAGE", "MASK")),
    "input_video": ("boat.mp4", "LoadVideo", ("image",), ("VIDEO",)),
    "input_audio_1": ("speech.mp3", "LoadAudio", ("", ""), ("AUDIO",)),
}
# widget values of the examples; the built-in model is made for small videos
VALUES: dict[str, dict[str, Any]] = {
    "reference_to_video": {"prompt": "A fox carries a red lantern through the snow", "num_frames": 49},
    "single_shot_extension": {"prompt": "The boat sails on into the dusk"},
    "shot_switching_extension": {"prompt": "[ZOOM_IN_CUT] The sail of the boat, lit by the sun", "duration": 2},
    "talking_avatar": {"prompt": "A woman in a red coat talks to the camera"},
    "t2v": {"prompt": "FPS-24, A cat wearing sunglasses works as a lifeguard at a pool", "num_frames": 49},
    "i2v": {"prompt": "FPS-24, A fox walks through the snow", "num_frames": 49},
}


def help_page(node: type[io.ComfyNode]) -> str:
    """A node's help, as Markdown."""
    schema = node.define_schema()
    lines = [f"# {schema.display_name}", "", schema.description, "", "| input | values | meaning |", "|---|---|---|"]
    for each in schema.inputs:
        name = each.display_name or each.id.replace("_", " ").capitalize()
        lines.append(
            f"| **{name}** `{each.id}` | {values_of(each)} | {(each.tooltip or '').replace('|', chr(92) + '|')} |"
        )
    outputs = ", ".join(f"`{each.display_name}` ({each.io_type})" for each in schema.outputs)
    return "\n".join([*lines, "", f"Outputs: {outputs}", ""])


def values_of(each: Any) -> str:
    """What an input accepts, and its default."""
    default = getattr(each, "default", None)
    shown = "" if default in (None, "") else f", by default {default}"
    if getattr(each, "options", None) is not None:
        known = [f"`{option}`" for option in each.options]
        return f"{', '.join(known) or 'a file'}{shown}"
    if getattr(each, "max", None) is not None:
        return f"{each.min:g} to {each.max:.10g}{shown}"
    return f"{each.get_io_type()}{shown}"


class Workflow:
    """A workflow in the format that ComfyUI's editor saves."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(self, kind: str, place: tuple[int, int], height: int, values: Sequence[Any], outputs: Sequence[str]) -> int:
        """Add a node; returns its id."""
        id = len(self.nodes) + 1
        made = [{"name": output, "type": output, "links": []} for output in outputs]
        node = {"id": id, "type": kind, "pos": [*place], "size": [320, height], "flags": {}, "order": id - 1, "mode": 0}
        rest = {"inputs": [], "outputs": made, "properties": {"Node name for S&R": kind}, "widgets_values": [*values]}
        self.nodes.append(node | rest)
        return id

    def link(self, source: int, output: int, target: int, input: str, kind: str) -> None:
        """Connect an output to an input."""
        inputs = self.nodes[target - 1]["inputs"]
        link = [len(self.links) + 1, source, output, target, len(inputs), kind]
        self.links.append(link)
        self.nodes[source - 1]["outputs"][output]["links"].append(link[0])
        inputs.append({"name": input, "type": kind, "link": link[0]})

    def text(self) -> str:
        """The workflow as JSON."""
        ends = {"last_node_id": len(self.nodes), "last_link_id": len(self.links)}
        parts = {"nodes": self.nodes, "links": self.links, "groups": [], "config": {}, "extra": {}, "version": 0.4}
        return json.dumps(ends | parts, indent=1) + "\n"


def widget_values(node: type[io.ComfyNode], chosen: dict[str, Any]) -> list[Any]:
    """The values of a node's widgets, in order; a seed is followed by its `control_after_generate` value."""
    values: list[Any] = []
    for each in node.define_schema().inputs:
        if isinstance(each, io.WidgetInput):
            values.append(chosen.get(each.id, each.default))
            if getattr(each, "control_after_generate", None):
                values.append("fixed")
    return values


def example(node: type[Task]) -> str:
    """The example workflow of a task, with the built-in model."""
    made, task = Workflow(), task_spec(node.TASK)
    height, width = task.tiny_size
    model = made.add(
        "SkyReelsLoadModel", (0, 0), 220, widget_values(SkyReelsLoadModel, {"model_id": TINY}), ["SKYREELS_MODEL"]
    )
    taken = [
        each.id for each in node.define_schema().inputs if each.id in FILES and nodes.flag_of(each.id) in task.inputs
    ]
    loaders = []
    for number, name in enumerate(taken):
        file, kind, rest, outputs = FILES[name]
        loaders.append((made.add(kind, (0, 280 + 360 * number), 310, [file, *rest], outputs), name, outputs[0]))
    chosen = {"width": width, "height": height, **VALUES[node.TASK]}
    main = made.add(node.__name__, (380, 0), 480, widget_values(node, chosen), ["IMAGE", "VIDEO"])
    save = made.add("SaveVideo", (760, 0), 400, [f"SkyReels/{node.TASK}", "auto", "auto"], [])
    made.link(model, 0, main, "model", "SKYREELS_MODEL")
    for id, name, kind in loaders:
        made.link(id, 0, main, name, kind)
    made.link(main, 1, save, "video", "VIDEO")
    return made.text()


def main(pack: Path = ROOT / "comfyui") -> None:
    """Write all help pages and workflows."""
    pages, workflows = pack / "web" / "docs", pack / "example_workflows"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    workflows.mkdir(exist_ok=True)
    for node in NODES:
        (pages / f"{node.__name__}.md").write_text(help_page(node), encoding="utf-8")
        if issubclass(node, Task):
            (workflows / f"{node.TASK}.json").write_text(example(node), encoding="utf-8")


if __name__ == "__main__":
    main()
