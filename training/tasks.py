"""Training data of each transformer: drawn samples, encoded once, in batches with the pipelines' conditioning.

A bank holds encoded samples on the device and grows during training; new ones replace the oldest. `velocity` runs the
transformer as `wan.conditioning.Conditioning.predict` does, with a noise level per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import Tensor

from skyreels_v3.denoising.loop import euler
from skyreels_v3.hunyuan.conditioning import HunyuanConditioning
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel
from skyreels_v3.tasks import REFERENCE_SLOTS, task_spec
from skyreels_v3.wan.avatar import AUDIO_REACH
from skyreels_v3.wan.conditioning import Conditioning, ImageEncoder
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.shot_switching_extension import CUT_POSITION
from skyreels_v3.wan.windows import MOTION_FRAMES, WINDOW_FRAMES
from training import captions, encoders, networks, sound, world
from training.layouts import SCHEDULER, random_image_encoder
from training.networks import TEXT_ROWS

FPS = 24
CONDITION_FRAMES, CONDITION_LATENTS = 25, 7  # of a single-shot extension
SHORT_FRAMES, ROLL_FRAMES = 4 * 9, 4 * 33  # new frames of it; the longer in its first roll-out
CUT_LENGTHS = {2: 9, 5: 33}  # of a shot switch: seconds -> condition frames
VOICE_SECONDS = 12.0
PAIR = "pair"  # two faces
PAIRS = 0.35  # share of batches with them, once clips have full length
DROPPED = 0.1  # share of prompts that are dropped
COLORLESS = 0.6  # share of prompts without colors, with reference pictures
# Kinds of single frames, which cost little and so allow many more scenes
PICTURE = "picture"  # with reference pictures
TEXT = "text"  # described by words alone, which is no task's condition, but the cheapest
CUT_PICTURE = "cut picture"  # the first frame after a cut
CUTS = {f"cut {seconds}": (seconds, seen) for seconds, seen in CUT_LENGTHS.items()} | {CUT_PICTURE: (0, 9)}
LENGTHS = {"short": CONDITION_FRAMES + SHORT_FRAMES, "long": CONDITION_FRAMES + ROLL_FRAMES} | {
    kind: seconds * FPS + 1 for kind, (seconds, _) in CUTS.items()
}  # frames of a kind; of the others 1
BATCH_FRAMES = 640  # latent frames in a batch of V3's scenes, those of conditions included
ENCODED = {"cuda": 2e7, "cpu": 2e5}  # pixels that go through the VAE at once; on a CPU, what its cache holds
MOUTH_WEIGHT = 6.0
THING_WEIGHT = 5.0

Sample = dict[str, Tensor]
Condition = Conditioning | HunyuanConditioning
Batch = tuple[Tensor, Condition, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of pictures, banks and batches.

    Attributes:
        scene, face: height and width of the drawings.
        first: samples drawn at the start.
        kept: maximum number of samples, if all came in chunks of `chunk`.
        batch: factor on the usual batch size.
        chunk: samples drawn at once, every `steps` training steps.
        pictures: the same for single frames.
        voices: number of dialogs, and of voices that faces speak with alone.
    """

    scene: tuple[int, int] = (96, 160)
    face: tuple[int, int] = (128, 128)
    first: int = 768
    kept: int = 4096
    batch: float = 1.0
    chunk: int = 16
    pictures: int = 64
    steps: int = 10
    voices: int = 64

    def chunk_of(self, kind: str) -> int:
        """How many samples of a kind are drawn at once."""
        if kind == CUT_PICTURE:  # with several frames before the cut
            return self.pictures // 2
        if kind == PAIR:  # twice as wide
            return self.chunk // 2
        return self.pictures if kind in (PICTURE, TEXT) else self.chunk


ON_CUDA = Sizes()
ON_CPU = Sizes(first=96, batch=0.3, chunk=8, pictures=128, steps=8)
TOY = Sizes(scene=(32, 48), face=(32, 32), first=12, kept=24, batch=0.1, chunk=4, pictures=4, voices=2)


def to_bytes(video: Tensor) -> Tensor:
    return ((video + 1) * 127.5).round().to(torch.uint8)


def from_bytes(video: Tensor) -> Tensor:
    return video.float() / 127.5 - 1


class Latents:
    """Encodes batches to normalized latents with a trained VAE."""

    def __init__(self, vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo, device: torch.device) -> None:
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.device = device
        networks.to_channels_last(vae)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of uint8 video (B, 3, F, H, W), a few clips at a time."""
        some = max(1, int(ENCODED[self.device.type] // video[0, 0].numel()))
        with torch.autocast(self.device.type, torch.bfloat16):
            parts = [
                self.encode(from_bytes(part.to(self.device)).contiguous(memory_format=torch.channels_last_3d))
                for part in video.split(some)
            ]
        mean, variance = (torch.cat(part) for part in zip(*parts, strict=True))
        scale = networks.published_normalization(self.vae)[1].to(mean).view(1, -1, 1, 1, 1)
        return networks.normalized(self.vae, mean), (0.5 * variance).exp() / scale

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.vae, AutoencoderKLHunyuanVideo):  # diffusers encodes long clips in pieces
            posterior = self.vae.encode(video).latent_dist
            return posterior.mean.float(), posterior.logvar.float()
        return networks.moments_of(self.vae, video)


class Bank:
    """Samples of one kind on the device."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.count = 0
        self.place = 0
        self.tensors: Sample = {}

    def add(self, samples: Sample) -> None:
        size = len(next(iter(samples.values())))
        for name, value in samples.items():
            if name not in self.tensors:
                self.tensors[name] = value.new_empty((self.kept, *value.shape[1:]))
        for index in range(size):
            for name, value in samples.items():
                self.tensors[name][self.place].copy_(value[index])
            self.place = (self.place + 1) % self.kept
            self.count = min(self.count + 1, self.kept)

    def pick(self, index: Tensor) -> Sample:
        return {name: value[index.to(value.device, non_blocking=True)] for name, value in self.tensors.items()}


class Task:
    """One transformer's training data.

    Attributes:
        kinds: kinds of conditions.
        drawn: kinds of samples, in the order in which they are drawn.
    """

    kinds: tuple[str, ...] = ("",)
    drawn: tuple[str, ...] = ("",)
    vae = "wan"
    shift = 5.0
    floor = True  # round timesteps down to whole numbers

    def __init__(self, name: str, sizes: Sizes, device: torch.device, folder: Path) -> None:
        self.name, self.sizes, self.device = name, sizes, device
        shares = {kind: self.drawn.count(kind) / len(self.drawn) for kind in self.drawn}
        self.banks = {
            k: Bank(math.ceil(sizes.kept * share * sizes.chunk_of(k) / sizes.chunk)) for k, share in shares.items()
        }
        self.generator = torch.Generator(device).manual_seed(1)
        self.random = np.random.default_rng(1)
        self.prepare(folder)

    def prepare(self, folder: Path) -> None:
        """Build the encoders and everything constant."""
        self.text = encoders.text_encoder(folder / "tokenizer")
        self.text.module.to(self.device)
        self.empty = self.encode_texts([""])[0]

    def draw(self, kind: str, seeds: Sequence[int]) -> Sample:
        """New samples; those with `video` in their names are uint8 pixels."""
        raise NotImplementedError

    def encode(self, drawn: Sample, latents: Latents) -> Sample:
        """Encode pixels to latents; names that end in `sampled` also get a `NAME deviation`."""
        made = {}
        for name, value in drawn.items():
            if "video" not in name:
                made[name] = value
                continue
            mean, deviation = latents(value)
            made[name] = mean
            if name.endswith("sampled"):
                made[f"{name} deviation"] = deviation
        return made

    def batch(self, progress: float) -> Batch:
        """The next batch: latents, condition and loss weights; `progress` of the training goes from 0 to 1."""
        raise NotImplementedError

    def unguided(self, condition: Condition) -> Condition | None:
        """The condition without what guidance strengthens; None where no guidance is distilled."""
        return None

    def pick(self, kind: str, size: int) -> Sample:
        bank = self.banks[kind]
        size = max(2, round(size * self.sizes.batch))
        return bank.pick(torch.randint(bank.count, (size,), device=self.device, generator=self.generator))

    def chance(self, size: int, probability: float) -> Tensor:
        return torch.rand(size, device=self.device, generator=self.generator) < probability

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=self.device, generator=self.generator)

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Text states (B, TEXT_ROWS, WIDTH) as the transformer gets them, without most of the zero padding."""
        contexts = [self.text.encode(prompt)["context"][0] for prompt in prompts]
        return torch.stack([F.pad(context, (0, 0, 0, TEXT_ROWS - len(context))) for context in contexts])

    def drop_text(self, text: Tensor) -> Tensor:
        return torch.where(self.chance(len(text), DROPPED)[:, None, None], self.empty, text)

    def noise_levels(self, size: int) -> Tensor:
        """Sigmas (B,): most distributed as by the task's shift, the rest uniformly."""
        even = torch.rand(size, device=self.device, generator=self.generator)
        shift = torch.where(self.chance(size, 0.75), self.shift, 1.0)
        return shift * even / (1 + (shift - 1) * even)

    def scenes(self, seeds: Sequence[int], begins: Sequence[float] | None = None) -> list[world.Scene]:
        """A scene per seed, for clips that begin at these times, else at 0."""
        height, width = self.sizes.scene
        times = begins or [0.0] * len(seeds)
        return [
            world.make_scene(seed, width / height, state_direction=begin == 0)
            for seed, begin in zip(seeds, times, strict=True)
        ]

    def rendered(self, scenes: Sequence[world.Scene], frames: int, start: Any = 0.0) -> Sample:
        """A video, and a mask (B, 1, F, h, w) of the latents in which there is a thing."""
        video = to_bytes(world.render(scenes, frames, *self.sizes.scene, self.device, start))
        height, width = (side // 8 for side in self.sizes.scene)
        found = world.where_things_are(scenes, frames, height, width, start)
        found = torch.cat((found[:, :1].expand(-1, 3, -1, -1), found), dim=1).unflatten(1, (-1, 4)).any(dim=2)
        return {"video": video, "things": found[:, None].to(self.device)}

    def weights(self, chosen: Sample, frames: slice) -> Tensor:
        """Loss weights (B, 1, F, h, w) of some latent frames: larger where things are, which are small."""
        return balanced(1 + (THING_WEIGHT - 1) * chosen["things"][:, :, frames])


class Video(Task):
    """reference_to_video and both extensions, which share a transformer.

    A sample is a shot, its caption, and pictures of its things on white; before a cut there is another shot. The VAE is
    causal, so the first latents of any shot are a complete video.
    """

    kinds = ("references", "short", "long", "cut 2", "cut 5")
    drawn = (
        "short", PICTURE, "cut 2", TEXT, "long", "cut 2", CUT_PICTURE, "short", PICTURE, "cut 2", "long",
        "short", PICTURE, "cut 2", TEXT, "cut 5", "cut 2", CUT_PICTURE, "short", PICTURE, "short", "long",
    )  # fmt: skip
    shift = 6.0  # sampling uses 5 and 8

    def draw(self, kind: str, seeds: Sequence[int]) -> Sample:
        # half of the clips begin at 0, with a direction in their captions
        begins = [max(0.0, float(np.random.default_rng([6, seed]).uniform(-2.5, 2.5))) for seed in seeds]
        scenes = self.scenes(seeds, begins)
        frames, before = LENGTHS.get(kind, 1), {}
        if kind in CUTS:
            _, seen = CUTS[kind]
            before = {"before video": self.rendered(scenes, seen, begins)["video"]}
            begins = [begin + seen / FPS for begin in begins]
            kinds = [world.CUTS[seed % len(world.CUTS)] for seed in seeds]
            scenes = [world.cut_to(*values) for values in zip(scenes, begins, kinds, strict=True)]
        texts = {"text": self.encode_texts([scene.caption for scene in scenes])}
        made = texts | self.rendered(scenes, frames, begins) | before
        return made if kind in (TEXT, CUT_PICTURE) else made | self.pictures(scenes)

    def pictures(self, scenes: Sequence[world.Scene]) -> Sample:
        """Reference pictures, and captions that leave the colors to them."""
        height, width = self.sizes.scene
        pictures = torch.full((len(scenes), 2, 3, 1, height, width), 255, dtype=torch.uint8, device=self.device)
        for index, scene in enumerate(scenes):
            shown = world.references(scene)
            wide = height if scene.seed % 2 else height * 3 // 4
            made = to_bytes(world.render(shown, 1, height, wide, self.device, fine=True))
            left = (width - wide) // 2
            pictures[index, : len(shown), ..., left : left + wide] = made
        return {
            "pictures": pictures,
            "count": torch.tensor([len(scene.things) for scene in scenes], device=self.device),
            "colorless text": self.encode_texts([captions.without_colors(scene.caption) for scene in scenes]),
        }

    def encode(self, drawn: Sample, latents: Latents) -> Sample:
        if "pictures" not in drawn:
            return super().encode(drawn, latents)
        pictures = drawn.pop("pictures")
        mean, deviation = latents(pictures.flatten(0, 1))
        made = super().encode(drawn, latents)
        return made | {
            "pictures": mean.unflatten(0, (-1, 2)).squeeze(3),  # (B, 2, 16, h, w)
            "deviation": deviation.unflatten(0, (-1, 2)).squeeze(3),
        }

    def batch(self, progress: float) -> Batch:
        early = progress < 0.5
        shares = (0.38, 0.14, 0.38, 0.04, 0.0, 0.06, 0.0) if early else (0.08, 0.05, 0.42, 0.12, 0.13, 0.16, 0.04)
        kind = str(self.random.choice((TEXT, CUT_PICTURE, *self.kinds), p=shares))
        frames, slots, bank = None, 0, kind
        if kind == "references":
            frames = int(self.random.choice((1, 4, 13), p=(0.84, 0.08, 0.08) if early else (0.3, 0.25, 0.45)))
            # fewer pictures than the pipeline's, of which most are blank, for single frames: they cost as much as these
            slots = REFERENCE_SLOTS if frames > 1 else int(self.random.choice((1, 2, 4), p=(0.4, 0.4, 0.2)))
            bank = PICTURE if frames == 1 else str(self.random.choice(("short", "cut 2", "long", "short", "cut 2")))
        held = self.banks[bank].tensors
        frames = frames or held["video"].shape[2]
        seen = held["before video"].shape[2] if kind in CUTS else 0
        chosen = self.pick(bank, round(BATCH_FRAMES / (frames + slots + seen)))
        condition = self.condition(kind, chosen, frames, slots=slots)
        new = slice(condition.start_frame, frames)
        return chosen["video"][:, :, new], condition, self.weights(chosen, new)

    def condition(
        self, kind: str, chosen: Sample, frames: int, drop: bool = True, slots: int = REFERENCE_SLOTS
    ) -> Conditioning:
        text = self.drop_text(chosen["text"]) if drop else chosen["text"]
        if kind == TEXT:
            return Conditioning(text)
        if kind in CUTS:
            return Conditioning(text, after=(Segment(chosen["before video"], CUT_POSITION, clean=True),))
        if kind != "references":
            prefix = chosen["video"][:, :, :CONDITION_LATENTS]
            return Conditioning(text, CONDITION_LATENTS, before=(Segment(prefix, clean=True),))
        pictures = chosen["pictures"] + chosen["deviation"] * self.normal(chosen["pictures"])
        there = torch.arange(2, device=self.device) < chosen["count"][:, None]
        pictures = pictures * there[:, :, None, None, None]
        if drop:  # if the prompt says everything, nothing is learned from pictures
            colorless = self.chance(len(text), COLORLESS) & (chosen["count"] <= slots)  # all things have a picture
            text = torch.where(colorless[:, None, None], chosen["colorless text"], text)
            swapped = self.chance(len(pictures), 0.5) & (chosen["count"] == 2)
            pictures = torch.where(swapped[:, None, None, None, None], pictures.flip(1), pictures)
            pictures = pictures * (~self.chance(len(pictures), 0.05))[:, None, None, None, None]
        filled = F.pad(pictures.transpose(1, 2), (0, 0, 0, 0, 0, slots - 2))  # (B, 16, slots, h, w)
        return Conditioning(text, after=(Segment(filled, frames),))

    def unguided(self, condition: Condition) -> Condition | None:
        assert isinstance(condition, Conditioning)
        if condition.before:  # an extension, in which almost everything has been seen
            return None
        return replace(condition, text=self.empty.expand_as(condition.text))


class Avatar(Task):
    """talking_avatar: windows of faces and their sounds, as in the key-frame pass, the first window and later ones.

    A face speaks alone, or two next to each other take turns.
    """

    kinds = drawn = ("", PAIR)
    shift = 11.0
    floor = False

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        spec = task_spec("talking_avatar")
        self.empty = self.encode_texts([spec.negative_prompt])[0]
        self.visited = euler(spec.num_inference_steps, spec.shift).sigmas[:-1].to(self.device)
        encoder = sound.audio_encoder()
        encoder.module.to(self.device)
        self.image = ImageEncoder(random_image_encoder().to(self.device).eval())
        seeds = range(self.sizes.voices)
        voices = [voice for seed in seeds for voice in sound.make_dialog(seed, VOICE_SECONDS)]  # pairs come first
        voices += [sound.make_voice(len(voices) + seed, VOICE_SECONDS) for seed in seeds]  # others than in dialogs
        self.mouths = [sound.mouth_of(voice) for voice in voices]
        heard = [encoder(torch.from_numpy(voice).to(self.device), sound.FPS) for voice in voices]
        self.features = torch.stack(heard).clone()  # (V, F, layers, D)
        side = self.sizes.face[0] // 8
        self.weight = around_the_mouth(side).to(self.device)
        left = (torch.arange(2 * side) < side).expand(side, -1)
        self.masks = torch.stack((left, ~left, torch.zeros_like(left))).float().to(self.device)

    def draw(self, kind: str, seeds: Sequence[int]) -> Sample:
        people = 2 if kind == PAIR else 1
        faces, keys, firsts, starts, voices, passes = [], [], [], [], [], []
        for seed in seeds:
            random = np.random.default_rng([8, seed])
            first = int(random.integers(len(self.mouths)) if kind != PAIR else 2 * random.integers(self.sizes.voices))
            spoken = [*range(first, first + people)]
            begin = int(random.integers(0, len(self.mouths[first]) - WINDOW_FRAMES))
            which = int(random.choice(3, p=(0.4, 0.2, 0.4)))
            for person, voice in enumerate(spoken):
                mouth = self.mouths[voice]
                made = world.make_face(seed + person, mouth[begin : begin + WINDOW_FRAMES].copy())
                if which < 2:  # these begin with the portrait, whatever the sound
                    made.mouth[0], made.lids[:2] = float(random.choice((0.0, 0.0, 0.5))), 0.0
                other = np.array([mouth[int(random.integers(len(mouth)))]] * MOTION_FRAMES)
                faces.append(made)
                keys.append(replace(made, mouth=other, lids=np.zeros(MOTION_FRAMES)))
            firsts.append(MOTION_FRAMES if which == 2 else 1)
            starts.append(begin)
            voices.append(spoken)
            passes.append(which)

        def side_by_side(faces: Sequence[world.Face]) -> Tensor:
            shown = world.render_faces(faces, *self.sizes.face, self.device)
            return shown.unflatten(0, (-1, people)).movedim(1, -2).flatten(-2)  # (B, 3, F, H, people * W)

        video, key = side_by_side(faces), side_by_side(keys)
        known = torch.zeros_like(video)
        mask = torch.zeros(len(seeds), WINDOW_FRAMES, device=self.device)
        for index, (first, which) in enumerate(zip(firsts, passes, strict=True)):
            known[index, :, :first] = video[index, :, :first]
            mask[index, :first] = 1
            if which:
                known[index, :, -MOTION_FRAMES:] = key[index]
                mask[index, -MOTION_FRAMES:] = 1
        mask = torch.cat((mask[:, :1].expand(-1, 4), mask[:, 1:]), dim=1).unflatten(1, (-1, 4)).transpose(1, 2)
        return {
            "video": to_bytes(video),
            "known video": to_bytes(known),
            "mask": mask,  # (B, 4, 21)
            "image": self.image(video[:, :, 0]).clone(),
            "text": self.encode_texts([face.caption for face in faces[::people]]),
            "voices": torch.tensor(voices, device=self.device),
            "start": torch.tensor(starts, device=self.device),
        }

    def noise_levels(self, size: int) -> Tensor:
        """Sigmas (B,): half of them those of the sampler's steps."""
        index = torch.randint(len(self.visited), (size,), device=self.device, generator=self.generator)
        return torch.where(self.chance(size, 0.5), self.visited[index], super().noise_levels(size))

    def batch(self, progress: float) -> Batch:
        frames, kind, size = 21, "", 24
        if progress < 0.35:
            frames, size = 9, 48
        elif self.random.random() < PAIRS:
            kind, size = PAIR, 12
        chosen = self.pick(kind, size)
        weight = self.weight.repeat(1, chosen["voices"].shape[1])
        return chosen["video"][:, :, :frames], self.condition(chosen, frames), weight

    def condition(self, chosen: Sample, frames: int = 21, drop: bool = True) -> Conditioning:
        height, width = chosen["video"].shape[3:]
        mask = chosen["mask"][..., None, None].expand(-1, -1, -1, height, width)
        channels = torch.cat((mask, chosen["known video"]), dim=1)[:, :, :frames]
        reach = torch.arange(-AUDIO_REACH, AUDIO_REACH + 1, device=self.device)
        places = chosen["start"][:, None, None] + torch.arange(4 * frames - 3, device=self.device)[:, None] + reach
        places = places.clamp(0, self.features.shape[1] - 1)  # (B, frames, 5)
        voices = chosen["voices"]  # (B, people)
        audio = self.features[voices[..., None, None], places[:, None]]  # (B, people, frames, 5, layers, D)
        text = chosen["text"]
        if drop:
            text = self.drop_text(text)
            audio = audio * (~self.chance(len(audio), 0.07))[:, None, None, None, None, None]
        masks = self.masks if voices.shape[1] > 1 else None
        return Conditioning(text, channels=channels, image=chosen["image"], audio=audio, speaker_masks=masks)

    def unguided(self, condition: Condition) -> Condition | None:
        assert isinstance(condition, Conditioning) and condition.audio is not None
        return replace(condition, audio=torch.zeros_like(condition.audio))


def around_the_mouth(side: int) -> Tensor:
    """Loss weights of a square latent frame: larger where mouths are, since little else moves."""
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side * 2 - 1] * 2, indexing="ij")
    return balanced(1 + (MOUTH_WEIGHT - 1) * ((x.abs() < 0.35) & (y > 0.05) & (y < 0.75)))


def balanced(weight: Tensor) -> Tensor:
    """Weights that are 1 on average."""
    return weight / weight.mean()


class Hunyuan(Task):
    """t2v and i2v: 2 s of a scene, and for i2v a sample of its first frame's latents."""

    vae = "hunyuan"
    shift = SCHEDULER["shift"]
    floor = False

    def prepare(self, folder: Path) -> None:
        spec = task_spec(self.name)
        self.prefix = spec.prompt_prefix
        self.hunyuan = encoders.hunyuan_text_encoder(folder)
        self.hunyuan.module.to(self.device)
        self.negative = {name: part.clone() for name, part in self.hunyuan.encode(spec.negative_prompt).items()}

    def draw(self, kind: str, seeds: Sequence[int]) -> Sample:
        scenes = self.scenes(seeds)
        encoded = [self.hunyuan.encode(self.prefix + self.lengthened(scene)) for scene in scenes]
        texts = [F.pad(parts["context"][0], (0, 0, 0, TEXT_ROWS))[:TEXT_ROWS] for parts in encoded]
        made = {
            **self.rendered(scenes, 1 if kind == PICTURE else 49),
            "text": torch.stack(texts),
            "pooled": torch.cat([parts["pooled"] for parts in encoded]),
            "length": torch.tensor([min(TEXT_ROWS, parts["context"].shape[1]) for parts in encoded]),
        }
        if self.name == "i2v":
            made["first video sampled"] = made["video"][:, :, :1].clone()
        return made

    def lengthened(self, scene: world.Scene) -> str:
        """The caption with up to two dots appended: with few different lengths, each has enough samples for batches."""
        tokens = len(self.hunyuan.tokenizer(self.prefix + scene.caption).input_ids) - 1
        return scene.caption + "." * (-tokens % 3)

    def batch(self, progress: float) -> Batch:
        early = progress < 0.45
        bank, frames, size = self.banks[""], 13, 40
        if PICTURE in self.banks and self.random.random() < (0.75 if early else 0.4):
            bank, frames, size = self.banks[PICTURE], 1, 300
        elif early and self.random.random() < 0.85:
            frames, size = 7, 64
        size = max(2, round(size * self.sizes.batch))
        # one length of text in a batch: padding would be attended to
        lengths = bank.tensors["length"][: bank.count].numpy()
        length = int(self.random.choice(lengths))
        chosen = bank.pick(torch.from_numpy(self.random.choice(np.flatnonzero(lengths == length), size)))
        dropped = self.random.random() < DROPPED
        condition = self.condition(chosen, frames, length, dropped)
        return chosen["video"][:, :, :frames], condition, self.weights(chosen, slice(frames))

    def condition(self, chosen: Sample, frames: int, length: int, dropped: bool = False) -> HunyuanConditioning:
        text, pooled = chosen["text"][:, :length], chosen["pooled"]
        if dropped:
            text = self.negative["context"].expand(len(text), -1, -1)
            pooled = self.negative["pooled"].expand(len(text), -1)
        channels = None
        if self.name == "i2v":
            first = chosen["first video sampled"]
            first = first + chosen["first video sampled deviation"] * self.normal(first)
            channels = F.pad(first, (0, 0, 0, 0, 0, frames - 1))
        return HunyuanConditioning(text, pooled, 1.0, channels)


class TextToVideo(Hunyuan):
    """t2v, which is also trained on single frames."""

    drawn = ("", PICTURE, PICTURE, PICTURE)


TASKS: dict[str, Callable[..., Task]] = {
    "video": Video,
    "talking_avatar": Avatar,
    "t2v": TextToVideo,
    "i2v": Hunyuan,
}


def velocity(model: Any, condition: Condition, noisy: Tensor, sigma: Tensor, floor: bool = False) -> Tensor:
    """Predicted velocity (B, 16, F, h, w), float32, of noisy latents with a noise level (B,) per sample."""
    times = 1000 * sigma.float()
    times = times.floor() if floor else times
    if isinstance(model, HunyuanTransformer3DModel):
        assert isinstance(condition, HunyuanConditioning)
        seen = noisy if condition.channels is None else torch.cat((noisy, condition.channels), dim=1)
        (made,) = model(
            hidden_states=seen.to(model.dtype), timestep=times, return_dict=False, **condition.arguments(model)
        )
        return made.float()
    assert isinstance(condition, Conditioning)
    seen = noisy if condition.channels is None else torch.cat((noisy, condition.channels), dim=1)
    segments = (*condition.before, Segment(seen, condition.start_frame), *condition.after)
    if any(segment.clean for segment in segments):
        spread = [times[:, None].expand(-1, s.latents.shape[2]) * (not s.clean) for s in segments]
        times = torch.cat(spread, dim=1)
    text = F.pad(condition.text, (0, 0, 0, 1))  # see `networks.padded_attention`
    made = model(segments, times, text, condition.image, condition.audio, condition.speaker_masks)
    return made[len(condition.before)]
