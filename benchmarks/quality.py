#!/usr/bin/env python3
"""Measures the built-in model on scenes that it was not trained on, whose ground truth is known.

    python benchmarks/quality.py                          # all tasks, 50 scenes each: about an hour on 2 cores
    python benchmarks/quality.py --only t2v --scenes 5    # one task
    python benchmarks/quality.py --switches --scenes 20   # each switch that can change the picture, next to the default

Each scene is generated twice, as specified and with a wrong prompt, reference or sound, which should score clearly
worse. Each line of the table has the share of correct scenes, or the median of a figure; its JSON is appended to
`results.jsonl` in --out when it is done. --page FILE writes the results of the latest weights from there as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installing

import numpy as np
import soundfile
import torch
from imageio_ffmpeg import write_frames
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.frames import stack
from skyreels_v3 import load
from skyreels_v3.api import Frame, VideoGenerator
from skyreels_v3.checkpoints.tiny import make_tiny
from skyreels_v3.families import family_of
from skyreels_v3.quality import Meter
from skyreels_v3.tasks import TINY, TaskSpec, task_spec
from skyreels_v3.wan.avatar import in_turn
from training import captions, measure, networks, sound, world
from training.run import HELD_OUT
from training.tasks import CONDITION_FRAMES, CUT_LENGTHS, from_bytes, to_bytes

HEIGHT, WIDTH, FACE = 96, 160, 128  # as trained
FPS = 24
NEAR = 0.1  # of the frame's width: how far off its place a thing may be
MADE = "results.jsonl"
LABEL = 12  # pixels

INTRODUCTION = """# Quality

The built-in model (`--model_id tiny`) on scenes of its drawn world that it was not trained on, whose ground truth is
known. Made by `benchmarks/quality.py`, with fewer scenes where they take long; the figures are those of
`training/measure.py` and of `--check`. A figure is either the share of scenes that are right (1 is all) or a median
over scenes. "Target" is what a well trained model should reach (for the jump: at most); this one was trained on a CPU
for hours, and mostly does not reach it. "Wrong" rows show the figures of videos whose named input was wrong, usually
another scene's; those that it cannot affect are left out. Compare a row with the default on as many scenes. The model
is small: here a switch shows whether it costs quality, not how much it costs with the published checkpoints.
"""

Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A video to generate and judge.

    Attributes:
        flags: of the call.
        judge: returns figures of its frames (3, F, H, W) in [-1, 1]; booleans become shares.
    """

    flags: dict[str, Any]
    judge: Callable[[Tensor], Figures]


def scene_of(seed: int) -> world.Scene:
    """A held-out scene for a seed, whose caption gives the direction of motion."""
    while not (scene := world.make_scene(HELD_OUT + seed, WIDTH / HEIGHT)).direction_stated:
        seed += 100_000
    return scene


def rendered(scene: world.Scene, frames: int, start: float = 0.0) -> Tensor:
    """(3, F, H, W)."""
    return world.render([scene], frames, HEIGHT, WIDTH, start=start)[0]


def pixels_of(video: Tensor) -> np.ndarray:
    """uint8 (F, H, W, 3)."""
    return to_bytes(video.clamp(-1, 1)).permute(1, 2, 3, 0).contiguous().numpy()


def write_clip(path: Path, video: Tensor) -> Path:
    """Write a lossless clip."""
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
    """Write the first frame."""
    Image.fromarray(pixels_of(video[:, :1])[0]).save(path)
    return path


def write_portrait(path: Path, faces: list[world.Face]) -> Path:
    """Write faces next to each other, mouths shut and eyes open."""
    still = [replace(face, mouth=np.zeros(1), lids=np.zeros(1)) for face in faces]
    return write_picture(path, torch.cat([*world.render_faces(still, FACE, FACE)], dim=-1))


def write_voice(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples, sound.RATE)
    return path


def recognition_figures(video: Tensor, scene: world.Scene) -> Figures:
    """Whether kind, color and direction of the scene's first thing are right."""
    found, thing = measure.find_thing(video, scene), scene.things[0]
    return {
        "thing": found.kind == thing.kind,
        "color": found.color == thing.color,
        "direction": found.direction == scene.direction,
    }


# Cases, see `Subject.case`


def from_text(seed: int, folder: Path, wrong: bool) -> Case:
    scene = scene_of(seed)
    prompt = scene_of(seed + 1).caption if wrong else scene.caption
    return Case({"prompt": prompt, "num_frames": 49}, lambda video: recognition_figures(video, scene))


def from_picture(seed: int, folder: Path, wrong: bool) -> Case:
    scene = scene_of(seed)
    truth = rendered(scene, 49)
    picture = write_picture(folder / "picture.png", rendered(scene_of(seed + 1), 1) if wrong else truth)

    def judge(video: Tensor) -> Figures:
        psnr, ssim = measure.psnr(video, truth), measure.ssim(video, truth)
        figures = {"first frame, dB": float(psnr[0]), "video, dB": float(psnr.mean()), "SSIM": float(ssim.mean())}
        return figures | recognition_figures(video, scene)

    return Case({"prompt": scene.caption, "image": str(picture), "num_frames": 49}, judge)


def from_references(seed: int, folder: Path, wrong: bool) -> Case:
    scene = scene_of(seed)
    shown = world.references(scene_of(seed + 1) if wrong else scene)
    pictures = world.render(shown, 1, HEIGHT, HEIGHT, fine=True)
    names = [str(write_picture(folder / f"{n}.png", picture)) for n, picture in enumerate(pictures)]
    prompt = captions.without_colors(scene.caption)  # only the references show them
    return Case(
        {"prompt": prompt, "ref_imgs": names, "num_frames": 49}, lambda video: recognition_figures(video, scene)
    )


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
        quality = meter.quality()
        assert quality.seam is not None
        found = measure.find_thing(video[:, : FPS + 1], scene, start=start + seen / FPS)
        place = scene.on_screen(0, np.array([start + (seen + FPS) / FPS]))[0]
        off = np.linalg.norm(found.poses[-1][:2] - place[:2]) / (WIDTH / HEIGHT)
        return {
            "first new frame, dB": float(measure.psnr(video[:, :1], new[:, :1])[0]),
            "place after 1 s": found.is_found and off <= NEAR,
            "jump at the seam": quality.seam.luma,
            "no cut": not quality.cuts,
        }

    # a direction would be wrong after a while, when things turn back
    prompt = world.make_scene(scene.seed, WIDTH / HEIGHT, state_direction=False).caption
    return Case({"prompt": prompt, "input_video": str(clip), "duration": 5}, judge)


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
            "closer or wider": after.is_found and change == wanted,
        }

    return Case({"prompt": prompt, "input_video": str(clip), "duration": 2}, judge)


def avatar(seed: int, folder: Path, wrong: bool) -> Case:
    voices = [sound.make_voice(HELD_OUT + each, 4.0) for each in (seed, seed + 1)]
    face = world.make_face(HELD_OUT + seed, sound.mouth_of(voices[0]), blinks=False)
    portrait = write_portrait(folder / "portrait.png", [face])
    voice = write_voice(folder / "voice.wav", voices[wrong])

    def judge(video: Tensor) -> Figures:
        count = min(video.shape[1], len(face.mouth))
        mouth = measure.lip_sync(measure.mouth_openings(video[:, :count], face), face.mouth[:count])
        return {
            "correlation of mouth and speech": mouth.correlation,
            "lag of 0 or 1": mouth.lag in (0, 1),
            "mouth movement in silence": mouth.restless,
        }

    flags = {"prompt": face.caption, "input_image": str(portrait), "input_audio": str(voice)}
    return Case(flags | {"height": FACE, "width": FACE}, judge)


def pair_of(seed: int) -> tuple[list[np.ndarray], list[world.Face]]:
    """Two sounds of 4 s, with voices that take turns, and the faces that speak them."""
    voices = in_turn([sound.make_voice(HELD_OUT + each, 2.0) for each in (seed, seed + 1)], sequential=True)
    mouths = [sound.mouth_of(voice) for voice in voices]
    return voices, [world.make_face(HELD_OUT + seed + n, mouth, blinks=False) for n, mouth in enumerate(mouths)]


def two_speakers(seed: int, folder: Path, wrong: bool) -> Case:
    voices, faces = pair_of(seed)
    portrait = write_portrait(folder / "portrait.png", faces)
    names = [str(write_voice(folder / f"{n}.wav", voice)) for n, voice in enumerate(voices)]
    names = names[::-1] if wrong else names

    def judge(video: Tensor) -> Figures:
        count = min(video.shape[1], len(faces[0].mouth))
        halves = zip(video[:, :count].split(FACE, dim=-1), faces, strict=True)
        openings = [measure.mouth_openings(half, face) for half, face in halves]
        moved = np.array([[np.abs(np.diff(turn)).mean() for turn in np.array_split(each, 2)] for each in openings])
        found = [measure.lip_sync(each, face.mouth[:count]) for each, face in zip(openings, faces, strict=True)]
        return {
            "correlation of mouths and speech": float(np.mean([each.correlation for each in found])),
            "the one who speaks moves more": bool(moved[0, 0] > moved[1, 0] and moved[1, 1] > moved[0, 1]),
        }

    flags = {"prompt": faces[0].caption, "input_image": str(portrait), "input_audio": names}
    return Case(flags | {"height": FACE, "width": 2 * FACE}, judge)


def long_extension(seed: int, folder: Path, wrong: bool) -> Case:
    """30 s; only the first seconds have a ground truth, since things turn back at the frame's sides."""
    made = extension(seed, folder, wrong)
    return Case(made.flags | {"duration": 30}, drifting)


def long_avatar(seed: int, folder: Path, wrong: bool) -> Case:
    """100 s."""
    made = avatar(seed, folder, wrong)
    write_voice(folder / "voice.wav", sound.make_voice(HELD_OUT + seed + wrong, 100.0))
    return Case(made.flags, partial(drifting, fps=task_spec("talking_avatar").fps))


def drifting(video: Tensor, fps: int = FPS) -> Figures:
    """Figures that need no ground truth."""
    meter = Meter(fps)
    meter.add(pixels_of(video))
    quality = meter.quality()
    return {
        "color drift": quality.drift,
        "flicker": quality.flicker,
        "cuts": len(quality.cuts),
        "noisy, black or of one color, %": 100 * (quality.noisy + quality.black + quality.flat) / quality.frames,
        "frozen, %": 100 * quality.frozen / quality.frames,
    }


class Subject(NamedTuple):
    """A subject of the benchmark.

    Attributes:
        case: makes the case of a seed, with its inputs in a folder; if `wrong`, one input is wrong.
        wrong: which input that is; "" if that affects no figure.
        share: fraction of the scenes that are run.
        unaffected: figures that a wrong input does not affect.
    """

    task: str
    case: Callable[[int, Path, bool], Case]
    wrong: str
    share: float = 1.0
    unaffected: tuple[str, ...] = ()


SUBJECTS = {
    "t2v": Subject("t2v", from_text, "prompt"),
    "i2v": Subject("i2v", from_picture, "picture"),
    "reference_to_video": Subject("reference_to_video", from_references, "references"),
    "single_shot_extension": Subject(
        "single_shot_extension", extension, "clip", unaffected=("jump at the seam", "no cut")
    ),
    "shot_switching_extension": Subject("shot_switching_extension", shot, "tag", unaffected=("one cut, at the seam",)),
    "talking_avatar": Subject("talking_avatar", avatar, "sound"),
    "talking_avatar, two speakers": Subject("talking_avatar", two_speakers, "order of the sounds", 0.4),
    "single_shot_extension, 30 s": Subject("single_shot_extension", long_extension, "", 0.1),
    "talking_avatar, 100 s": Subject("talking_avatar", long_avatar, "", 0.04),
}
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {  # variants to compare with the default, by subject
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
        "--quant fp8": {"quant": "fp8"},
        "--low_vram": {"low_vram": True},
        **{f"--num_inference_steps {steps}": {"num_inference_steps": steps} for steps in (4, 16, 30)},
        **{f"--shift {shift}": {"shift": shift} for shift in (1.0, 3.0, 8.0)},
        **{f"--guidance_scale {scale}": {"guidance_scale": scale} for scale in (2.0, 4.0)},
        "--dtype bfloat16": {"dtype": "bfloat16"},
    },
    "talking_avatar": {
        "--quant fp8": {"quant": "fp8"},
        **{f"--num_inference_steps {steps}": {"num_inference_steps": steps} for steps in (2, 8)},
        "--text_guidance_scale 3": {"text_guidance_scale": 3.0},
        "--audio_guidance_scale 3": {"audio_guidance_scale": 3.0},
    },
    "talking_avatar, 100 s": {"--color_correction_strength 0": {"color_correction_strength": 0.0}},
}

FAMILIES = {spec.family: spec for spec in (task_spec(subject.task) for subject in SUBJECTS.values())}  # a task of each
RECOGNIZED = dict.fromkeys(("thing", "color", "direction"), 0.8)
TARGETS = {  # what a well trained model should reach; the jump at most
    "t2v": RECOGNIZED,
    "reference_to_video": RECOGNIZED,
    "single_shot_extension": {"first new frame, dB": 24, "place after 1 s": 0.8, "jump at the seam": 1.5},
    "shot_switching_extension": {"one cut, at the seam": 1, "closer or wider": 0.8},
    "talking_avatar": {"correlation of mouth and speech": 0.6},
    "VAE, wan": {"PSNR, dB": 28},
    "VAE, hunyuan": {"PSNR, dB": 28},
}


# Making and measuring


@cache
def generator_of(task: str, model: str) -> VideoGenerator:
    return load(task, model_id=model, height=HEIGHT, width=WIDTH, device="cpu", no_cache=True)


def video_of(task: str, model: str, flags: Mapping[str, Any], seed: int) -> Tensor:
    """(3, F, H, W) in [-1, 1]."""
    made = [event.image for event in generator_of(task, model)(**flags, seed=seed) if isinstance(event, Frame)]
    return from_bytes(torch.from_numpy(np.stack(made))).permute(3, 0, 1, 2)


def judged(subject: Subject, model: str, scenes: int, wrong: bool = False, **more: Any) -> tuple[Figures, list[Tensor]]:
    """Figures over `scenes` scenes, each a share or a median, and the videos."""
    found: dict[str, list[float]] = {}
    videos = []
    for seed in range(scenes):
        with tempfile.TemporaryDirectory() as folder:
            case = subject.case(seed, Path(folder), wrong)
            videos.append(video_of(subject.task, model, case.flags | more, seed))
        for name, value in case.judge(videos[-1]).items():
            found.setdefault(name, []).append(value)
    return {name: summary(values) for name, values in found.items()}, videos


def summary(values: list[float]) -> float:
    """The share of true values if all are booleans, else the median."""
    shares = all(isinstance(value, bool | np.bool_) for value in values)
    return round(float(np.mean(values) if shares else np.median(values)), 3)


class Result(NamedTuple):
    """Figures of a subject.

    Attributes:
        variant: "" for the default, "wrong", or flags.
        weights: identify the model.
        video: of the first scene.
    """

    subject: str
    variant: str
    scenes: int
    figures: Figures
    weights: str
    video: Tensor | None = None


def run(args: argparse.Namespace) -> Iterator[Result]:
    for family in () if args.only or args.switches else FAMILIES:  # no switch affects them
        yield vae_result(family, args.scenes)
    for name in args.only or SUBJECTS:
        subject = SUBJECTS[name]
        scenes = math.ceil(args.scenes * subject.share)
        weights = weights_of(task_spec(subject.task)) if args.model_id == TINY else args.model_id
        figures, videos = judged(subject, args.model_id, scenes)
        yield Result(name, "", scenes, figures, weights, videos[0])
        if not args.switches and subject.wrong:
            figures, made = judged(subject, args.model_id, scenes, wrong=True)
            for unaffected in subject.unaffected:
                del figures[unaffected]
            yield Result(name, "wrong", scenes, figures, weights, made[0])
        for variant, flags in SWITCHES.get(name, {}).items() if args.switches else ():
            figures, made = judged(subject, args.model_id, scenes, **flags)
            pairs = [pair for pair in zip(videos, made, strict=True) if pair[0].shape == pair[1].shape]
            if pairs:
                figures["PSNR to the default, dB"] = summary([float(measure.psnr(*pair).mean()) for pair in pairs])
            yield Result(name, variant, scenes, figures, weights, made[0])


def weights_of(task: TaskSpec, part: str = "") -> str:
    """A checksum of the built-in model's weights for a task, or of those with `part` in their names."""
    folder, checksum = make_tiny(task), 0
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".pth") and part in str(file.relative_to(folder)).lower():
            checksum = zlib.crc32(file.read_bytes(), checksum)
    return f"{checksum:08x}"


@torch.no_grad()
def vae_result(family: str, scenes: int) -> Result:
    """PSNR of clips after encoding and decoding, and the errors that pieces and tiles add."""
    spec = FAMILIES[family]
    folder = make_tiny(spec)
    vae = family_of(spec).loaders(spec, folder, folder, torch.float32, torch.float32)["vae"]()
    found: dict[str, list[float]] = {}
    for seed in range(scenes):
        video = rendered(scene_of(seed), 33)[None]
        latents = vae.encode(video)
        made = torch.cat([*vae.decode_stream(latents)], dim=2)
        whole = networks.decoded(vae.module, networks.denormalized(vae.module, latents)).clamp(-1, 1)
        pairs = {"PSNR, dB": (made, video), "pieces to whole, dB": (made, whole)}
        if family == "wan":  # V1's chooses its tiles itself
            vae.tiles = (2, 2)
            pairs["tiles to whole, dB"] = torch.cat([*vae.decode_stream(latents)], dim=2), made
            vae.tiles = (1, 1)
        for name, (one, other) in pairs.items():
            found.setdefault(name, []).append(float(measure.psnr(one[0], other[0]).clamp(max=100).mean()))
        found.setdefault("SSIM", []).append(float(measure.ssim(made[0], video[0]).mean()))
    figures = {name: summary(values) for name, values in found.items()}
    return Result(f"VAE, {family}", "", scenes, figures, weights_of(spec, "vae"))


# Pictures and pages


def slug(text: str) -> str:
    return re.sub("[^a-z0-9_]+", "-", text.lower()).strip("-")


def row_file(folder: Path, subject: str, variant: str) -> Path:
    """The file of a row of frames."""
    return folder / f"{slug(f'{subject} {variant}')}.png"


def write_row(path: Path, title: str, video: Tensor, count: int = 6) -> None:
    """Write some of a video's frames as one picture with a title."""
    numbers = np.linspace(0, video.shape[1] - 1, count).round().astype(int)
    frames = np.concatenate([*pixels_of(video[:, numbers])], axis=1)
    row = Image.new("RGB", (frames.shape[1], frames.shape[0] + LABEL), "white")
    ImageDraw.Draw(row).text((2, 1), title, fill="black")
    row.paste(Image.fromarray(frames), (0, LABEL))
    row.save(path)


def page_of(folder: Path, pictures: Path) -> str:
    """All results of each subject's latest weights as Markdown tables, with the pictures."""
    lines = [json.loads(line) for line in (folder / MADE).read_text(encoding="utf-8").splitlines()]
    weights = {line["subject"]: line["weights"] for line in lines}
    latest = {
        (line["subject"], line["variant"], line["scenes"]): line
        for line in lines
        if line["weights"] == weights[line["subject"]]
    }
    text = [INTRODUCTION]
    for subject in weights:
        rows = [line for line in latest.values() if line["subject"] == subject]
        rows.sort(key=lambda line: -line["scenes"])
        names = list(dict.fromkeys(name for line in rows for name in line["figures"]))
        text += [f"## {subject}", "", f"| | scenes | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
        target = {"variant": "target", "scenes": "", "figures": TARGETS.get(subject, {})}
        for line in [target, *rows] if subject in TARGETS else rows:
            cells = [f"{line['figures'][name]:g}" if name in line["figures"] else "" for name in names]
            text.append(f"| {title_of(subject, line['variant'])} | {line['scenes']} | {' | '.join(cells)} |")
        variants = dict.fromkeys(line["variant"] for line in rows)
        if files := [file for variant in variants if (file := row_file(folder, subject, variant)).exists()]:
            pictures.mkdir(exist_ok=True)
            stack([Image.open(file) for file in files]).save(pictures / f"{slug(subject)}.webp", quality=90)
            text += ["", f"![Frames of the first scene]({pictures.name}/{slug(subject)}.webp)"]
        text.append("")
    return "\n".join(text)


def title_of(subject: str, variant: str) -> str:
    """The first cell of a row."""
    if variant == "wrong":
        return f"wrong {SUBJECTS[subject].wrong}"
    return f"`{variant}`" if variant.startswith("--") else variant or "default"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=50, help="of each task")
    parser.add_argument("--only", action="append", choices=SUBJECTS, help="a subject; may be repeated")
    parser.add_argument("--switches", action="store_true", help="flags next to the default, instead of wrong inputs")
    parser.add_argument("--model_id", default=TINY, help=f"{TINY}, or a folder for the task of --only")
    parser.add_argument("--out", type=Path, default=Path("result/quality"), help=f"folder of {MADE} and pictures")
    parser.add_argument("--page", type=Path, help="make nothing; write what was measured to this Markdown file")
    args = parser.parse_args()
    if args.page is not None:
        args.page.write_text(page_of(args.out, args.page.with_suffix("")), encoding="utf-8")
        return
    logging.getLogger("skyreels_v3").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    for result in run(args):
        line = result._asdict()
        if (video := line.pop("video")) is not None:
            write_row(row_file(args.out, result.subject, result.variant), result.variant or "default", video)
        with (args.out / MADE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = ", ".join(f"{name} {value:g}" for name, value in result.figures.items())
        print(f"{result.subject:28}{result.variant or 'default':32}{figures}", flush=True)


if __name__ == "__main__":
    main()
