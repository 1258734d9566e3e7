#!/usr/bin/env python3
"""What the built-in model makes of scenes that it was not trained on, whose truth is known.

    python benchmarks/quality.py                          # all tasks, 50 scenes each: about an hour on 2 cores
    python benchmarks/quality.py --only t2v --scenes 5    # one task
    python benchmarks/quality.py --switches --scenes 20   # each switch that can change the picture, next to the default

Each scene is made twice: as asked, and with a wrong prompt, reference or sound, which must score clearly worse: else a
figure means nothing. Each line of the table has the share of scenes that are right, or the median of a figure; its JSON
is appended to `results.jsonl` in --out as it is done. --page FILE writes all that is in there as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import numpy as np
import torch
from imageio_ffmpeg import write_frames
from PIL import Image
from torch import Tensor

from skyreels_v3 import load
from skyreels_v3.api import Frame, VideoGenerator
from skyreels_v3.quality import Meter
from training import measure, sound, world
from training.tasks import CONDITION_FRAMES, CUT_LENGTHS, from_bytes, to_bytes

HEIGHT, WIDTH, FACE = 96, 160, 128  # as trained
FPS = 24
HELD_OUT = 1_000_000  # the first seed that is not trained on
NEAR = 0.1  # of the frame's width: how far from its place a thing may be
MADE = "results.jsonl"

WRONG = {  # what is wrong in the second row of a task
    "t2v": "prompt",
    "i2v": "picture",
    "reference_to_video": "references",
    "single_shot_extension": "clip",
    "shot_switching_extension": "tag",
    "talking_avatar": "sound",
}
INTRODUCTION = """# Quality

The built-in model (`--model_id tiny`) on scenes of its drawn world that it was not trained on, whose truth is known.
Made by `make quality` ([benchmarks/quality.py](../benchmarks/quality.py)); the figures are those of
[training/measure.py](../training/measure.py) and of `--check`. Shares are of the scenes in which something is right, 1
is all; the others are medians. "Wrong" rows are what a figure falls to where the model is told something else than what
it is measured by. The model is small: what a switch costs here says which way it goes, not how much on the published
checkpoints.
"""

Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A video to make.

    Attributes:
        flags: of the call.
        judge: figures of its frames (3, F, H, W) in [-1, 1]; a share's are 0 or 1.
    """

    flags: dict[str, Any]
    judge: Callable[[Tensor], Figures]


def scene_of(seed: int) -> world.Scene:
    """The scene of a seed, whose caption says where its thing moves."""
    while not (scene := world.make_scene(HELD_OUT + seed, WIDTH / HEIGHT)).told:
        seed += 100_000
    return scene


def rendered(scene: world.Scene, frames: int, start: float = 0.0) -> Tensor:
    """(3, F, H, W)."""
    return world.render([scene], frames, HEIGHT, WIDTH, start=start)[0]


def pixels_of(video: Tensor) -> np.ndarray:
    """uint8 (F, H, W, 3)."""
    return to_bytes(video.clamp(-1, 1)).permute(1, 2, 3, 0).contiguous().numpy()


def write_clip(path: Path, video: Tensor) -> Path:
    """A lossless clip."""
    writer = write_frames(
        str(path), (video.shape[3], video.shape[2]), fps=FPS, codec="libx264rgb", pix_fmt_out="rgb24", quality=None,
        macro_block_size=1, output_params=["-crf", "0"],
    )  # fmt: skip
    writer.send(None)
    for frame in pixels_of(video):
        writer.send(frame)
    writer.close()
    return path


def write_picture(path: Path, video: Tensor) -> Path:
    """The first frame."""
    Image.fromarray(pixels_of(video[:, :1])[0]).save(path)
    return path


def write_voice(path: Path, samples: np.ndarray) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, sound.RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def told_apart(video: Tensor, scene: world.Scene) -> Figures:
    """Whether the scene's first thing is there as named."""
    found, thing = measure.find_thing(video, scene), scene.things[0]
    return {
        "thing": found.kind == thing.kind,
        "color": found.colour == thing.colour,
        "direction": found.direction == scene.direction,
    }


# Cases: of a seed, in a folder for their inputs; `wrong` swaps what the model is told for that of another scene


def from_text(seed: int, folder: Path, wrong: bool) -> Case:
    scene = scene_of(seed)
    prompt = scene_of(seed + 1).caption if wrong else scene.caption
    return Case({"prompt": prompt, "num_frames": 49}, lambda video: told_apart(video, scene))


def from_picture(seed: int, folder: Path, wrong: bool) -> Case:
    scene = scene_of(seed)
    truth = rendered(scene, 49)
    picture = write_picture(folder / "picture.png", rendered(scene_of(seed + 1), 1) if wrong else truth)

    def judge(video: Tensor) -> Figures:
        error = measure.psnr(video, truth)
        return {"first frame, dB": float(error[0]), "video, dB": float(error.mean())} | told_apart(video, scene)

    return Case({"prompt": scene.caption, "image": str(picture), "num_frames": 49}, judge)


def from_references(seed: int, folder: Path, wrong: bool) -> Case:
    scene = scene_of(seed)
    shown = world.references(scene_of(seed + 1) if wrong else scene)
    pictures = world.render(shown, 1, HEIGHT, HEIGHT, fine=True)
    names = [str(write_picture(folder / f"{n}.png", picture)) for n, picture in enumerate(pictures)]
    return Case({"prompt": scene.caption, "ref_imgs": names, "num_frames": 49}, lambda video: told_apart(video, scene))


def extension(seed: int, folder: Path, wrong: bool) -> Case:
    scene, start = scene_of(seed), 0.5
    seen = 2 * CONDITION_FRAMES - 1
    truth = rendered(scene, seen + 5 * FPS, start)
    given = rendered(scene_of(seed + 1), seen, start) if wrong else truth[:, :seen]
    clip = write_clip(folder / "clip.mp4", given)

    def judge(video: Tensor) -> Figures:
        new = truth[:, seen : seen + video.shape[2]]
        meter = Meter(FPS)
        meter.add_before(pixels_of(given))
        meter.add(pixels_of(video))
        seam = meter.quality().seam
        assert seam is not None
        found = measure.find_thing(video[:, : FPS + 1], scene, start=start + seen / FPS)
        place = scene.on_screen(0, np.array([start + (seen + FPS) / FPS]))[0]
        off = np.linalg.norm(found.poses[-1][:2] - place[:2]) / (WIDTH / HEIGHT)
        return {
            "first new frame, dB": float(measure.psnr(video[:, :1], new[:, :1])[0]),
            "place after 1 s": found.there and off <= NEAR,
            "jump at the seam": seam.luma,
            "no cut": not meter.quality().cuts,
        }

    return Case({"prompt": scene.caption, "input_video": str(clip), "duration": 5}, judge)


def shot(seed: int, folder: Path, wrong: bool) -> Case:
    scene, kind, start = scene_of(seed), world.CUTS[seed % 2], 0.5
    seen = CUT_LENGTHS[2] + FPS
    given = rendered(scene, seen, start)
    clip = write_clip(folder / "clip.mp4", given)
    prompt = world.cut_to(scene, start + seen / FPS, world.CUTS[(seed + 1) % 2] if wrong else kind).caption

    def judge(video: Tensor) -> Figures:
        meter = Meter(FPS)
        meter.add_before(pixels_of(given))
        meter.add(pixels_of(video))
        before = measure.find_thing(given, scene, start=start)
        after = measure.find_thing(video, replace(scene, zooming=0.0, pan=0.0), start=start + seen / FPS)
        _, change = measure.size_change(before, after)
        wanted = "closer" if kind == "ZOOM_IN_CUT" else "wider"
        return {
            "one cut, at the seam": meter.quality().cuts == (0,),
            "closer or wider": after.there and change == wanted,
        }

    return Case({"prompt": prompt, "input_video": str(clip), "duration": 2}, judge)


def avatar(seed: int, folder: Path, wrong: bool) -> Case:
    voices = [sound.make_voice(HELD_OUT + each, 4.0) for each in (seed, seed + 1)]
    face = world.make_face(HELD_OUT + seed, sound.mouth_of(voices[0]), blinks=False)
    still = replace(face, mouth=np.zeros(1), lids=np.zeros(1))
    portrait = write_picture(folder / "portrait.png", world.render_faces([still], FACE, FACE)[0])
    voice = write_voice(folder / "voice.wav", voices[wrong])

    def judge(video: Tensor) -> Figures:
        count = min(video.shape[1], len(face.mouth))
        mouth = measure.lip_sync(measure.mouth_openings(video[:, :count], face), face.mouth[:count])
        return {
            "correlation of mouth and speech": mouth.best if mouth.lag in (0, 1) else mouth.correlation,
            "lag of 0 or 1": mouth.lag in (0, 1),
            "restless in silence": mouth.restless,
        }

    flags = {"prompt": face.caption, "input_image": str(portrait), "input_audio": str(voice)}
    return Case(flags | {"height": FACE, "width": FACE}, judge)


CASES: dict[str, Callable[[int, Path, bool], Case]] = {
    "t2v": from_text,
    "i2v": from_picture,
    "reference_to_video": from_references,
    "single_shot_extension": extension,
    "shot_switching_extension": shot,
    "talking_avatar": avatar,
}
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {  # what is next to the default, by task
    "t2v": {
        "--quant fp8": {"quant": "fp8"},
        "--quant fp8_dynamic": {"quant": "fp8_dynamic"},
        "--cache fbcache:0.05": {"cache": "fbcache:0.05"},
        "--cache fbcache:0.15": {"cache": "fbcache:0.15"},
        **{f"--num_inference_steps {steps}": {"num_inference_steps": steps} for steps in (4, 8, 16)},
        **{f"--guidance_scale {scale}": {"guidance_scale": scale} for scale in (1.0, 3.0, 9.0)},
        **{f"--shift {shift}": {"shift": shift} for shift in (3.0, 13.0)},
        "--dtype bfloat16": {"dtype": "bfloat16"},
        "--vae_dtype bfloat16": {"vae_dtype": "bfloat16"},
        **{f"--num_frames {frames}": {"num_frames": frames} for frames in (97, 193, 289)},
        **{f"--num_frames {n} --no_riflex": {"num_frames": n, "no_riflex": True} for n in (193, 289)},
    },
    "reference_to_video": {
        "--low_vram": {"low_vram": True},
        **{f"--num_inference_steps {steps}": {"num_inference_steps": steps} for steps in (4, 16, 30)},
        **{f"--shift {shift}": {"shift": shift} for shift in (1.0, 3.0, 8.0)},
        **{f"--guidance_scale {scale}": {"guidance_scale": scale} for scale in (2.0, 4.0)},
        "--dtype bfloat16": {"dtype": "bfloat16"},
    },
    "talking_avatar": {
        "--quant fp8": {"quant": "fp8"},
        **{f"--num_inference_steps {steps}": {"num_inference_steps": steps} for steps in (2, 8)},
        "--color_correction_strength 0": {"color_correction_strength": 0.0},
        "--text_guidance_scale 3": {"text_guidance_scale": 3.0},
        "--audio_guidance_scale 3": {"audio_guidance_scale": 3.0},
    },
}


# Making and measuring


@cache
def generator_of(task: str, model: str) -> VideoGenerator:
    return load(task, model_id=model, height=HEIGHT, width=WIDTH, device="cpu", no_cache=True)


def video_of(task: str, model: str, flags: Mapping[str, Any], seed: int) -> Tensor:
    """(3, F, H, W) in [-1, 1]."""
    made = [event.image for event in generator_of(task, model)(**flags, seed=seed) if isinstance(event, Frame)]
    return from_bytes(torch.from_numpy(np.stack(made))).permute(3, 0, 1, 2)


def judged(task: str, model: str, scenes: int, wrong: bool = False, **more: Any) -> tuple[Figures, list[Tensor]]:
    """Figures over some scenes, a share or a median each, and the videos."""
    found: dict[str, list[float]] = {}
    videos = []
    for seed in range(scenes):
        with tempfile.TemporaryDirectory() as folder:
            case = CASES[task](seed, Path(folder), wrong)
            videos.append(video_of(task, model, case.flags | more, seed))
        for name, value in case.judge(videos[-1]).items():
            found.setdefault(name, []).append(value)
    return {name: summary(values) for name, values in found.items()}, videos


def summary(values: list[float]) -> float:
    """The share of those that are true, or the median."""
    shares = all(isinstance(value, bool | np.bool_) for value in values)
    return round(float(np.mean(values) if shares else np.median(values)), 3)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for task in args.only or CASES:
        figures, videos = judged(task, args.model_id, args.scenes)
        yield {"task": task, "variant": "", "scenes": args.scenes, "figures": figures}
        if not args.switches:
            figures, _ = judged(task, args.model_id, args.scenes, wrong=True)
            yield {"task": task, "variant": "wrong", "scenes": args.scenes, "figures": figures}
            continue
        for name, flags in SWITCHES.get(task, {}).items():
            figures, changed = judged(task, args.model_id, args.scenes, **flags)
            pairs = [(one, two) for one, two in zip(videos, changed, strict=True) if one.shape == two.shape]
            if pairs:
                figures["PSNR to the default, dB"] = summary([float(measure.psnr(*pair).mean()) for pair in pairs])
            yield {"task": task, "variant": name, "scenes": args.scenes, "figures": figures}


def page_of(lines: list[dict[str, Any]]) -> str:
    """Tables of all that was measured, as Markdown; of what was measured twice, the later."""
    latest = {(line["task"], line["variant"]): line for line in lines}
    text = [INTRODUCTION]
    for task in CASES:
        rows = {variant: line for (name, variant), line in latest.items() if name == task}
        if not rows:
            continue
        names = list(dict.fromkeys(name for line in rows.values() for name in line["figures"]))
        text += [f"## {task}", "", f"| | scenes | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
        for variant, line in rows.items():
            title = {"": "default", "wrong": f"wrong {WRONG[task]}"}.get(variant, f"`{variant}`")
            cells = [f"{line['figures'][name]:g}" if name in line["figures"] else "" for name in names]
            text.append(f"| {title} | {line['scenes']} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=50, help="of each task")
    parser.add_argument("--only", action="append", choices=CASES, help="a task; may be given again")
    parser.add_argument("--switches", action="store_true", help="flags next to the default, instead of wrong inputs")
    parser.add_argument("--model_id", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"), help=f"folder of {MADE}")
    parser.add_argument("--page", type=Path, help="make nothing; write what was measured to this Markdown file")
    args = parser.parse_args()
    if args.page is not None:
        lines = (args.out / MADE).read_text(encoding="utf-8").splitlines()
        args.page.write_text(page_of([json.loads(line) for line in lines]), encoding="utf-8")
        return
    logging.getLogger("skyreels_v3").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    for line in run(args):
        with (args.out / MADE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = ", ".join(f"{name} {value:g}" for name, value in line["figures"].items())
        print(f"{line['task']:26}{line['variant'] or 'default':32}{figures}", flush=True)


if __name__ == "__main__":
    main()
