"""The nodes, driven through a stand-in for ComfyUI's API; test_comfyui.py runs them in the real one."""

from __future__ import annotations

import asyncio
import json
import runpy
import tomllib
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from comfy import model_management, utils
from comfy_api.latest import InputImpl, Types, io
from PIL import Image

import comfyui
from comfyui import media, nodes
from skyreels_v3 import __version__
from skyreels_v3.forms import changed_values, common_values
from skyreels_v3.media.audio import decode
from skyreels_v3.media.ffmpeg import AUDIO, find_track
from skyreels_v3.media.video_reader import probe_video, read_frames
from skyreels_v3.request import BY_NAME, FLAGS
from skyreels_v3.tasks import TASK_NAMES, task_spec
from tests.conftest import ASSETS, write_tone

ROOT = Path(__file__).resolve().parents[2]
NODES = {node.__name__: node for node in nodes.NODES}
TASKS = {node.TASK: node for node in nodes.TASKS}
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2}
FLAGS_SMALL = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
TINY = {"model_id": "tiny"}


@pytest.fixture(autouse=True)
def place(tmp_path, cache, monkeypatch) -> Iterator[None]:
    """Use a cache of toys, and check that no temporary files are left."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("SKYREELS_CACHE", str(cache))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    utils.SHOWN.clear()
    yield
    assert not [*(tmp_path / "temporary").iterdir()]
    model_management.unload_all_models()


def picture(name: str) -> torch.Tensor:
    """An IMAGE, as ComfyUI loads it from a file."""
    return torch.from_numpy(np.asarray(Image.open(ASSETS / name).convert("RGB")).astype(np.float32) / 255)[None]


def inputs_of(node: type[io.ComfyNode]) -> dict[str, io.Input]:
    return {each.id: each for each in node.define_schema().inputs}


# Inputs


def test_the_pack():
    made = asyncio.run(asyncio.run(comfyui.comfy_entrypoint()).get_node_list())
    assert made == nodes.NODES and [*TASKS] != [] and set(TASKS) == set(TASK_NAMES)
    assert (Path(comfyui.__file__).parent / comfyui.WEB_DIRECTORY / "docs").is_dir()


def test_each_flag_has_one_place():
    """Every flag is an input of its task's node or of the options node, unless listed as elsewhere or left out."""
    elsewhere = {*nodes.LEFT_OUT, *nodes.FILES, "model_id", "lora"}
    options, loader = (set(inputs_of(NODES[name])) for name in ("SkyReelsOptions", "SkyReelsLoadModel"))
    for name, node in TASKS.items():
        inputs = set(inputs_of(node))
        found = {nodes.flag_of(each) for each in inputs} - {"", "clip", "keyframe"} | (inputs & set(BY_NAME))
        flags = {flag.name for flag in FLAGS if flag.in_line and flag.is_for(task_spec(name))}
        assert flags <= found | options | loader | elsewhere
        assert found & set(BY_NAME) <= flags
        assert not found & options


@pytest.mark.parametrize("task", TASKS)
def test_a_node_left_alone_changes_nothing(task):
    """Default inputs equal the preset's values and are within their ranges."""
    for each in inputs_of(TASKS[task]).values():
        if isinstance(each, io.Int.Input | io.Float.Input):
            assert each.min <= each.default <= each.max, each.id
        elif isinstance(each, io.Combo.Input):
            assert each.default in each.options
    options = {name: each.default for name, each in inputs_of(NODES["SkyReelsOptions"]).items()}
    assert nodes.SkyReelsOptions.execute(**options)[0] == {}
    assert changed_values({"shift": 3.0, "cache": " fbcache "}, common_values()) == {"shift": 3.0, "cache": "fbcache"}


def test_models_in_comfyuis_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "folders", {})
    for kind in ("loras", "diffusion_models", "text_encoders", "vae", nodes.FOLDER):
        (tmp_path / kind).mkdir()
        folder_paths.add_model_folder_path(kind, str(tmp_path / kind))
    for name in ("loras/style, soft.safetensors", "diffusion_models/a.safetensors", "diffusion_models/b.gguf"):
        (tmp_path / name).touch()
    (tmp_path / nodes.FOLDER / "mine").mkdir()
    inputs = inputs_of(nodes.SkyReelsLoadModel)
    assert inputs["transformer"].options == ["default", "a.safetensors", "b.gguf"]
    assert {"tiny", "mine", "Skywork/SkyReels-V3-R2V-14B"} < {*inputs["model_id"].options}
    values = {name: each.default for name, each in inputs.items()}
    assert nodes.SkyReelsLoadModel.execute(**values)[0] == {}
    changes = {"model_id": "mine", "transformer": "b.gguf", "quant": "fp8", "memory": "offload"}
    (model,) = nodes.SkyReelsLoadModel.execute(**{**values, **changes}).args
    files = {
        "model_id": str(tmp_path / nodes.FOLDER / "mine"),
        "transformer": str(tmp_path / "diffusion_models/b.gguf"),
    }
    assert model == {**changes, **files}
    (model,) = nodes.SkyReelsLoadModel.execute("mine", "OWNER/NAME").args
    assert model == {"model_id": "OWNER/NAME"}
    for strength, partial in ((0.5, False), (1.0, True)):
        (model,) = nodes.SkyReelsLoRA.execute(model, "style, soft.safetensors", strength, partial).args
    lora = tmp_path / "loras" / "style, soft.safetensors"
    assert model["lora"] == [f"{lora}:0.5", f"{lora}:1.0:partial"]


# Videos


def frames_of_command(tmp_path: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").glob("*.png"))])


def test_the_frames_of_the_command(main, tmp_path):
    """The node's frames equal the command's; progress and previews are shown, and options are passed on."""
    options = {"guidance_scale": 3.0}
    values = {**SMALL, "num_frames": 9, "seed": 3, "image": picture("fox.png"), "options": options, "duration": 4}
    images, video = TASKS["i2v"].execute(TINY, "FPS-24, a fox", **values).args
    numbers, previews = zip(*((shown[:2], shown[2]) for shown in utils.SHOWN), strict=True)
    assert numbers == ((1, 2), (2, 2)) and previews[0][1].size == (6, 4)
    argv = ("--task_type", "i2v", "--prompt", "FPS-24, a fox", "--image", ASSETS / "fox.png", "--num_frames", 9)
    more = ("--seed", 3, "--guidance_scale", 3, "--model_id", "tiny", "--device", "cpu", "--output", "frames/")
    code, _, stderr = main(*argv, *FLAGS_SMALL, *more)
    assert code == 0, stderr
    made = frames_of_command(tmp_path)
    np.testing.assert_array_equal((images * 255).to(torch.uint8), made)  # truncated, as ComfyUI's own nodes do
    parts = video.get_components()
    assert parts.images is images and parts.frame_rate == 24 and parts.audio is None and images.shape == (9, 32, 48, 3)


def test_two_speakers(main, tmp_path):
    """The sounds reach the model unchanged, and the video has both."""
    paths = [write_tone(tmp_path / f"{rate}.wav", 0.5, rate) for rate in (8000, 16000)]
    tracks = [decode(find_track(path, AUDIO)) for path in paths]
    sounds = [{"waveform": torch.from_numpy(samples)[None], "sample_rate": rate} for samples, rate in tracks]
    speech = {f"input_audio_{number}": sound for number, sound in enumerate(sounds, start=1)}
    values = {**SMALL, "audio_type": "sequential", "input_image": picture("portrait.png")}
    images, video = (
        TASKS["talking_avatar"].execute(TINY, "people talk", **dict(reversed(speech.items())), **values).args
    )
    argv = ("--task_type", "talking_avatar", "--prompt", "people talk", "--input_image", ASSETS / "portrait.png")
    more = ("--audio_type", "sequential", "--model_id", "tiny", "--device", "cpu", "--output", "frames/")
    code, _, stderr = main(*argv, "--input_audio", ",".join(map(str, paths)), *FLAGS_SMALL, *more)
    assert code == 0, stderr
    np.testing.assert_array_equal(media.to_frames(images), frames_of_command(tmp_path))
    audio = video.get_components().audio
    assert len(images) == 25 and abs(audio["waveform"].shape[-1] / audio["sample_rate"] - 1) < 0.01


def test_a_clip_and_what_goes_on_from_it(main, tmp_path, write_lossless):
    """A clip is accepted as images with a rate and as a video with sound; its frames come first in the output."""
    frames = np.random.default_rng(0).integers(0, 256, (10, 32, 48, 3), dtype=np.uint8)
    clip, images = write_lossless(tmp_path / "clip.mp4", frames), media.to_images([*frames])
    sound = {"waveform": torch.zeros(1, 1, 4000), "sample_rate": 8000}
    parts = Types.VideoComponents(images=images, frame_rate=Fraction(24), audio=sound)
    node, values = TASKS["shot_switching_extension"], {**SMALL, "duration": 2, "include_input": True}
    made, video = node.execute(TINY, "a boat", input_video=images, clip_fps=24.0, **values).args
    assert video.get_components().audio is None
    again, video = node.execute(TINY, "a boat", input_video=InputImpl.VideoFromComponents(parts), **values).args
    assert video.get_components().audio is sound and torch.equal(made, again)
    argv = ("--task_type", "shot_switching_extension", "--prompt", "a boat", "--input_video", clip, "--duration", 2)
    more = ("--include_input", "--model_id", "tiny", "--device", "cpu", "--output", "frames/")
    code, _, stderr = main(*argv, *FLAGS_SMALL, *more)
    assert code == 0, stderr
    np.testing.assert_array_equal(media.to_frames(made), frames_of_command(tmp_path))
    np.testing.assert_array_equal(media.to_frames(made[:10]), frames)


def test_interrupted(monkeypatch):
    """After an interruption only the loaded models remain, until ComfyUI frees their memory."""
    from comfyui.engine import networks

    values = {**SMALL, "num_frames": 5}
    first = TASKS["t2v"].execute(TINY, "FPS-24, a cat", **values)[0]
    monkeypatch.setattr(
        utils.ProgressBar, "update_absolute", lambda *_, **__: model_management.interrupt_current_processing()
    )
    with pytest.raises(model_management.InterruptProcessingException):
        TASKS["t2v"].execute(TINY, "FPS-24, a cat", **values)
    monkeypatch.undo()
    loaded = networks().generator.worker.generator
    assert loaded is not None and networks() in model_management.loaded_models() and networks().loaded_size() > 1e5
    again = TASKS["t2v"].execute(TINY, "FPS-24, a cat", **values)[0]
    assert networks().generator.worker.generator is loaded and torch.equal(first, again)
    model_management.unload_all_models()
    assert networks().generator.worker.generator is None and networks().loaded_size() == 0


def test_what_is_wrong():
    """Errors are one line and use the nodes' input names."""
    with pytest.raises(RuntimeError, match=r"^num_frames: 6: not 4k[^\n]*$"):
        TASKS["reference_to_video"].execute(TINY, "a fox", num_frames=6, ref_imgs_1=picture("fox.png"))
    with pytest.raises(RuntimeError, match=r"^keyframe_times: 1 for 2 keyframes"):
        TASKS["talking_avatar"].execute(TINY, "a", keyframes=torch.zeros(2, 8, 8, 3), keyframe_times="2")


# Files


def test_pictures_and_clips_lose_nothing(tmp_path):
    levels = torch.arange(256).repeat(3, 1).T.reshape(1, 16, 16, 3)
    images = media.to_images([levels[0].numpy().astype(np.uint8)])
    assert torch.equal((images * 255).to(torch.uint8), levels.to(torch.uint8))
    (path,) = media.write_images(images, tmp_path, "a")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), levels[0])
    random = np.random.default_rng(0).integers(0, 256, (7, 34, 50, 3), dtype=np.uint8)
    for number, rate in enumerate((24.0, 29.97)):
        (folder := tmp_path / str(number)).mkdir()
        clip, _ = media.write_clip(media.to_images([*random]), rate, folder)
        np.testing.assert_array_equal(np.stack([*read_frames(clip, 24)])[:2], random[:2])
        assert probe_video(clip, 24).fps == pytest.approx(rate, abs=0.01)
    (folder := tmp_path / "video").mkdir()
    parts = Types.VideoComponents(images=media.to_images([*random]), frame_rate=Fraction(24))
    clip, _ = media.write_clip(InputImpl.VideoFromComponents(parts), 1, folder)
    np.testing.assert_array_equal(np.stack([*read_frames(clip, 24)]), random)


def test_a_videos_own_file_is_taken(tmp_path):
    boat = ASSETS / "boat.mp4"
    assert media.write_clip(InputImpl.VideoFromFile(str(boat)), 1, tmp_path) == (boat, None)
    copy, _ = media.write_clip(InputImpl.VideoFromFile(BytesIO(boat.read_bytes())), 1, tmp_path)
    assert copy.read_bytes() == boat.read_bytes()


def test_sounds_lose_nothing(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 999)).astype(np.float32)
    path = media.write_sound({"waveform": torch.from_numpy(samples)[None], "sample_rate": 44100}, tmp_path / "a.au")
    found, rate = decode(find_track(path, AUDIO))
    np.testing.assert_array_equal(found, samples)
    assert rate == 44100


# Files of the node pack


def test_the_registry_gets_the_packages_version():
    project = tomllib.loads((ROOT / "comfyui" / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [package["name"]] and project["requires-python"] == package["requires-python"]


def test_help_and_examples_are_up_to_date(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "generate_nodes.py"))["main"](tmp_path)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert len(made) == len(nodes.NODES) + len(TASKS)
    for path, text in made.items():
        assert (ROOT / "comfyui" / path).read_text() == text, f"{path}: run docs/generate_nodes.py"
    for task in TASKS:
        with Image.open(ROOT / "comfyui" / "example_workflows" / f"{task}.jpg") as shown:
            assert shown.format == "JPEG"
        kinds = [node["type"] for node in json.loads(made[Path("example_workflows", f"{task}.json")])["nodes"]]
        assert TASKS[task].__name__ in kinds
