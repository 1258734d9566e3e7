"""The nodes in the real ComfyUI, without a GPU: COMFYUI names its folder, PYTHONPATH leads to the packages it needs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skyreels_v3.media.audio import probe_audio
from skyreels_v3.media.video_reader import probe_video
from tests.conftest import ASSETS, files_in

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).parent / "stand_in"
COMFYUI = os.environ.get("COMFYUI")
pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(COMFYUI is None, reason="needs ComfyUI; give its folder as COMFYUI"),
]
SMALL = {"width": 48, "height": 32, "num_inference_steps": 2}
# changes to each task's example, and extra flags for the command that makes the same frames
TASKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "t2v": ({"num_frames": 9, "seed": 5}, []),
    "i2v": ({"num_frames": 9, "seed": 5}, ["--image", "fox.png"]),
    "reference_to_video": ({"num_frames": 9, "seed": 5}, ["--ref_imgs", "fox.png,lantern.png"]),
    "single_shot_extension": ({"seed": 5}, ["--input_video", "boat.mp4"]),
    "shot_switching_extension": ({"seed": 5}, ["--input_video", "boat.mp4"]),
    "talking_avatar": ({"seed": 5}, ["--input_image", "portrait.png", "--input_audio", "speech.mp3"]),
}
Prompt = dict[str, dict[str, Any]]


class Server:
    """A running ComfyUI, driven over its HTTP API."""

    def __init__(self, port: int, folder: Path) -> None:
        self.address, self.folder = f"http://127.0.0.1:{port}", folder

    def call(self, path: str, **body: Any) -> Any:
        """Send a GET, or a POST if there is a body."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self.address}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def wait(self, id: str, seconds: float = 300) -> dict[str, Any]:
        """Wait until a prompt has finished; returns its history entry."""
        end = time.monotonic() + seconds
        while not (found := self.call(f"history/{id}")):
            assert time.monotonic() < end
            time.sleep(0.1)
        return found[id]

    def run(self, prompt: Prompt) -> dict[str, Any]:
        return self.wait(self.call("prompt", prompt=prompt)["prompt_id"])

    def example(self, task: str, **changes: Any) -> Prompt:
        """A task's example workflow as a prompt, with a node added that saves the frames."""
        workflow = json.loads((ROOT / "comfyui" / "example_workflows" / f"{task}.json").read_text())
        links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
        known, prompt = self.call("object_info"), {}
        for node in workflow["nodes"]:
            inputs = {each["name"]: links[each["link"]] for each in node["inputs"]}
            values = iter(node["widgets_values"])
            described = known[node["type"]]["input"]
            for name, (kind, *options) in {**described["required"], **described.get("optional", {})}.items():
                if isinstance(kind, list) or kind in ("STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"):
                    inputs[name] = next(values)
                    if options and options[0].get("control_after_generate"):
                        assert next(values) == "fixed"
            if "prompt" in inputs:
                assert changes.keys() <= inputs.keys()
                inputs |= changes
                prompt["frames"] = {
                    "class_type": "SaveImage",
                    "inputs": {"images": [str(node["id"]), 0], "filename_prefix": f"{task}/frame"},
                }
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        return prompt

    def frames(self, ended: dict[str, Any]) -> np.ndarray:
        assert ended["status"]["status_str"] == "success", ended["status"]["messages"][-1]
        images = ended["outputs"]["frames"]["images"]
        folder = self.folder / "output"
        return np.stack([np.asarray(Image.open(folder / each["subfolder"] / each["filename"])) for each in images])

    @property
    def loads(self) -> int:
        """How many times models have been loaded."""
        return (self.folder / "log.txt").read_text().count("device cpu, dtype")

    @property
    def temporary(self) -> set[str]:
        return files_in(self.folder / "temporary")


@pytest.fixture(scope="module")
def server(tmp_path_factory, cache) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "temporary"):
        (folder / name).mkdir()
    (folder / "custom_nodes" / "skyreels").symlink_to(ROOT / "comfyui")
    shutil.copytree(ASSETS, folder / "input")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--cpu", "--disable-api-nodes", "--base-directory", folder, "--port", port]
    flags += ["--database-url", f"sqlite:///{folder}/comfyui.db"]
    environment = os.environ | {"SKYREELS_CACHE": str(cache), "TMPDIR": str(folder / "temporary")}
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, f"{COMFYUI}/main.py", *map(str, flags)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    made = Server(port, folder)
    try:
        for _ in range(600):
            try:
                made.call("system_stats")
                break
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()
                time.sleep(0.2)
        yield made
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("task", TASKS)
def test_the_same_frames_as_the_command(server, main, tmp_path, task):
    changes, flags = TASKS[task]
    ended = server.run(server.example(task, **SMALL, **changes))
    frames = server.frames(ended)
    prompt = next(node["inputs"]["prompt"] for node in ended["prompt"][2].values() if "prompt" in node["inputs"])
    argv = [str(ASSETS / word) if word.endswith(("png", "mp4", "mp3")) and "," not in word else word for word in flags]
    argv = [",".join(str(ASSETS / name) for name in word.split(",")) if "," in word else word for word in argv]
    values = {**SMALL, **changes, "duration": 2 if task == "shot_switching_extension" else None}
    argv += [word for name, value in values.items() if value is not None for word in (f"--{name}", value)]
    code, _, stderr = main(
        "--task_type", task, "--prompt", prompt, "--model_id", "tiny", "--device", "cpu", *argv, "--output", "frames/"
    )
    assert code == 0, stderr
    made = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").glob("*.png"))]
    np.testing.assert_array_equal(frames, np.stack(made))
    assert frames.std(axis=(1, 2)).min() > 1
    assert not server.temporary
    (video,) = (server.folder / "output" / "SkyReels").glob(f"{task}*.mp4")
    assert video.stat().st_size


def test_images_as_a_clip_with_options(server):
    """Frames and frame rate from ComfyUI's own nodes, and flags from the options node."""
    prompt = server.example("shot_switching_extension", **SMALL, include_input=True)
    task = next(node for node in prompt.values() if node["class_type"] == "SkyReelsShotSwitchingExtension")
    prompt["parts"] = {"class_type": "GetVideoComponents", "inputs": {"video": task["inputs"]["input_video"]}}
    prompt["options"] = {"class_type": "SkyReelsOptions", "inputs": {"guidance_scale": 2.0, "check": True}}
    task["inputs"] |= {"input_video": ["parts", 0], "clip_fps": ["parts", 2], "options": ["options", 0]}
    frames = server.frames(server.run(prompt))
    assert len(frames) == probe_video(ASSETS / "boat.mp4", 24).frames + 48


def test_two_speakers(server):
    """Sequential speech: the video lasts as long as both recordings together, and has their sound."""
    prompt = server.example("talking_avatar", **SMALL, audio_type="sequential")
    task = next(node for node in prompt.values() if node["class_type"] == "SkyReelsTalkingAvatar")
    source = task["inputs"]["input_audio_1"]
    prompt["short"] = {"class_type": "TrimAudioDuration", "inputs": {"audio": source, "start_index": 0, "duration": 1}}
    task["inputs"] |= {"input_audio_1": ["short", 0], "input_audio_2": ["short", 0]}
    ended = server.run(prompt)
    assert len(server.frames(ended)) == 50
    (saved,) = next(each["images"] for name, each in ended["outputs"].items() if name != "frames")
    video = server.folder / "output" / saved["subfolder"] / saved["filename"]
    assert probe_audio(video).seconds == pytest.approx(2, abs=0.1) and probe_audio(video).notes == ()


def test_interrupted_and_run_again(server):
    long = server.call("prompt", prompt=server.example("t2v", **{**SMALL, "num_inference_steps": 200}))["prompt_id"]
    while not server.temporary:
        time.sleep(0.05)
    server.call("interrupt", all=True)
    ended = server.wait(long, 30)
    assert [name for name, _ in ended["status"]["messages"]][-1] == "execution_interrupted"
    assert not server.temporary

    def make(seed: int) -> np.ndarray:
        return server.frames(server.run(server.example("t2v", **SMALL, num_frames=5, seed=seed)))

    before = server.loads
    first, other = make(1), make(2)
    assert not np.array_equal(first, other) and server.loads == before
    server.call("free", unload_models=True)
    time.sleep(1)  # ComfyUI unloads in the thread that runs prompts
    np.testing.assert_array_equal(make(1), first)
    assert server.loads == before + 1


def test_errors_are_one_line(server):
    for changes, line in (
        ({"num_frames": 6}, "num_frames: 6: not 4k+1"),
        ({"resolution": "9P"}, "resolution: 9P: choose"),
    ):
        ended = server.run(server.example("reference_to_video", **changes))
        name, error = ended["status"]["messages"][-1]
        assert (name, error["node_type"]) == ("execution_error", "SkyReelsReferenceToVideo")
        assert error["exception_message"].startswith(line) and not server.temporary


def test_help_pages(server):
    page = server.address + "/extensions/skyreels/docs/SkyReelsTextToVideo.md"
    with urllib.request.urlopen(page, timeout=60) as answer:
        assert answer.read() == (ROOT / "comfyui" / "web" / "docs" / "SkyReelsTextToVideo.md").read_bytes()


PROGRAM = """
import importlib.util, inspect, json, sys
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]
if importlib.util.find_spec("comfy.options"):
    import comfy.options
    comfy.options.enable_args_parsing()
def parameters(thing):
    return [*inspect.signature(thing).parameters]
found = {}
for module, names in json.loads(sys.stdin.read()).items():
    for name in names:
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
        found[module + "." + name] = parameters(thing) if callable(thing) else None
print(json.dumps(found))
"""
USED = {
    "comfy_api.latest": [
        *("ComfyExtension.get_node_list", "Types.VideoComponents", "InputImpl.VideoFromComponents"),
        *("InputImpl.VideoFromFile", "InputImpl.VideoFromFile.get_stream_source", "Input.Video.get_components"),
        *("InputImpl.VideoFromFile.get_duration", "InputImpl.VideoFromFile.get_dimensions"),
        *(f"io.{name}.Input" for name in ("Boolean", "Int", "Float", "String", "Combo", "MultiType", "Image", "Audio")),
        *("io.Custom", "io.Schema", "io.NodeOutput", "io.Image.Output", "io.ComfyNode.define_schema"),
    ],
    "comfy.model_patcher": [
        "ModelPatcher",
        *(f"ModelPatcher.{name}" for name in ("model_size", "loaded_size", "partially_load", "partially_unload")),
        "ModelPatcher.detach",
    ],
    "comfy.model_management": [
        *("LoadedModel", "get_torch_device", "free_memory", "loaded_models", "load_models_gpu", "unload_all_models"),
        *("throw_exception_if_processing_interrupted", "interrupt_current_processing"),
    ],
    "comfy.utils": ["ProgressBar", "ProgressBar.update_absolute"],
    "folder_paths": ["add_model_folder_path", "get_folder_paths", "get_filename_list", "get_full_path"],
}


def test_the_stand_in_has_the_same_parameters():
    """The real functions may have more."""

    def parameters(folder: str) -> dict[str, list[str]]:
        command = [sys.executable, "-c", PROGRAM, folder]
        run = subprocess.run(command, input=json.dumps(USED), capture_output=True, text=True, check=True, cwd=ROOT)
        return json.loads(run.stdout.splitlines()[-1])

    ours, real = parameters(str(STAND_IN)), parameters(str(COMFYUI))
    for name, expected in ours.items():
        assert [one for one in real[name] if one in expected] == expected, name
