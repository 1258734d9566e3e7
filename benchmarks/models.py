"""Transformers with random weights, of the published or other sizes, and their inputs, for the benchmarks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.common import Work, at_least, measure_peak
from skyreels_v3.families import pipeline_of, width_of
from skyreels_v3.memory.offload import replace_tensors
from skyreels_v3.memory.quantize import QuantizedLinear
from skyreels_v3.memory.stream import tensors_of
from skyreels_v3.plan import build_on_meta
from skyreels_v3.request import ResolvedRequest
from skyreels_v3.tasks import PATCH_SIZE, VAE_STRIDE, choose_size, task_spec
from skyreels_v3.wan.family import IMAGE_TOKENS
from skyreels_v3.wan.key_maps import TEXT_TOKENS
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

HEAD_DIM = 128
FFN_RATIO = 2.7  # 13824 / 5120
OFFICIAL = {
    "r2v-720p": ("reference_to_video", "720P"),
    "r2v-480p": ("reference_to_video", "480P"),
    "extension-720p": ("single_shot_extension", "720P"),
    "avatar-720p": ("talking_avatar", "720P"),
}
SECONDS = 5  # of video or audio
LANDSCAPE = (720, 1280)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """Sizes of a transformer and of the video it runs on.

    Attributes:
        sizes: the transformer's config.
        latents: latent frames, rows and columns.
        clean: how many of the first frames are at timestep 0, like condition frames.
        full_layers: layers of the published model; None for other sizes.
    """

    sizes: Any
    latents: tuple[int, int, int]
    clean: int = 0
    full_layers: int | None = None

    @property
    def tokens_per_frame(self) -> int:
        return self.latents[1] * self.latents[2] // (PATCH_SIZE[1] * PATCH_SIZE[2])

    @property
    def tokens(self) -> int:
        return self.latents[0] * self.tokens_per_frame

    @property
    def scale(self) -> float | None:
        """Layers of the published model over those used; None if all are used, or for other sizes."""
        if self.full_layers in (None, self.sizes.num_layers):
            return None
        return self.full_layers / self.sizes.num_layers

    def described(self) -> str:
        """The case as text."""
        layers = f"{self.sizes.num_layers} layers of width {width_of(self.sizes)}"
        return f"{layers}, {self.tokens} tokens (latents {' x '.join(map(str, self.latents))})"

    def recorded(self) -> dict[str, Any]:
        """The case for the JSON line."""
        sizes = {"dim": width_of(self.sizes), "ffn_dim": self.sizes.ffn_dim, "layers": self.sizes.num_layers}
        return {**sizes, "full_layers": self.full_layers, "latents": self.latents, "tokens": self.tokens}


def add_case_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `case_of` reads."""
    parser.add_argument("--official", choices=OFFICIAL, help="sizes of a published model and a 5 s 16:9 video")
    parser.add_argument("--layers", type=at_least(1), help="default: 4; with --official, all")
    parser.add_argument("--dim", type=at_least(HEAD_DIM), default=1280, help=f"model width, a multiple of {HEAD_DIM}")
    parser.add_argument("--frames", type=at_least(1), default=5, help="latent frames")
    parser.add_argument("--height", type=at_least(2), default=40, help="latent rows, even")
    parser.add_argument("--width", type=at_least(2), default=40, help="latent columns, even")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")


def case_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Case:
    """The case the flags ask for; sets the default dtype."""
    if args.dim % HEAD_DIM or args.height % 2 or args.width % 2:
        parser.error(f"--dim must be a multiple of {HEAD_DIM}, --height and --width even")
    args.dtype = args.dtype or DTYPES[args.device.type != "cpu"]
    if args.official:
        case = official_case(*OFFICIAL[args.official])
        layers = args.layers or case.sizes.num_layers
        return replace(case, sizes=config_of({**case.sizes, "num_layers": layers}))
    sizes = dict(task_spec("reference_to_video").transformer)
    sizes |= {"num_attention_heads": args.dim // HEAD_DIM, "ffn_dim": round(FFN_RATIO * args.dim)}
    sizes["num_layers"] = args.layers or 4
    return Case(config_of(sizes), (args.frames, args.height, args.width))


def config_of(sizes: Mapping[str, Any]) -> Any:
    """The full config of a transformer."""
    return build_on_meta("wan", sizes).config


def official_case(task: str, resolution: str) -> Case:
    """The first pass of a task, according to the planner."""
    spec = task_spec(task)
    height, width = choose_size(spec, resolution, *LANDSCAPE)
    sound = SECONDS if "input_audio" in spec.inputs else None
    request = ResolvedRequest(
        spec, spec.model_id, "", duration=SECONDS, height=height, width=width, audio_seconds=sound
    )
    new, condition = next(pipeline_of(spec).passes(request))
    sizes = config_of(spec.transformer)
    clean = condition if "input_video" in spec.inputs else 0
    latents = (new + condition, height // VAE_STRIDE[1], width // VAE_STRIDE[2])
    return Case(sizes, latents, clean, sizes.num_layers)


# Models


def random_model(
    build: Callable[[], nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    home: torch.device | None = None,
    float32_names: Sequence[str] = (),
) -> Any:
    """A model with random weights of typical initial scale, created one by one on `device` and kept on `home`.

    On `home` all blocks share the same weights: moving 28 GB there would take as long as a whole benchmark. On another
    device, or after a conversion, each block has its own.
    """
    with torch.device("meta"):
        model = build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shared: dict[tuple[str, torch.Size], Tensor] = {}

    def made(tensor: Tensor) -> Tensor:
        name = names[id(tensor)]
        if home in (None, device):
            return nn.Parameter(value_of(tensor, name), requires_grad=False)
        key = (re.sub(r"\d+", "", name), tensor.shape)
        if key not in shared:
            shared[key] = value_of(tensor, name).to(home)
        return nn.Parameter(shared[key], requires_grad=False)

    def value_of(tensor: Tensor, name: str) -> Tensor:
        scale = (3 * tensor[0].numel()) ** -0.5 if tensor.ndim > 1 else 0.02
        middle = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0  # of norms
        value = torch.randn(tensor.shape, device=device).mul_(scale).add_(middle)
        return value.to(torch.float32 if any(part in name for part in float32_names) else dtype)

    replace_tensors(model, made)
    return model.eval()


def random_transformer(
    sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device, home: torch.device | None = None
) -> SkyReelsTransformer3DModel:
    """Our model, in the dtypes its loader uses."""
    float32_names = SkyReelsTransformer3DModel._keep_in_fp32_modules
    return random_model(lambda: SkyReelsTransformer3DModel(**sizes), dtype, device, home, float32_names)


def twin(model: SkyReelsTransformer3DModel, home: torch.device | None = None) -> SkyReelsTransformer3DModel:
    """A second model, FP8 layers included, that shares the weights already on `home`."""
    weights = {name: tensor.to(home or tensor.device) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        made = SkyReelsTransformer3DModel.from_config(model.config)
        for path, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                made.set_submodule(path, QuantizedLinear(layer.packed.on_meta(), made.get_submodule(path).bias))
    made.load_state_dict(weights, assign=True)
    return made.requires_grad_(False).eval()


def diffusers_twin(model: SkyReelsTransformer3DModel) -> WanTransformer3DModel:
    """diffusers' model with the same weights, shared except for those it keeps in another dtype."""
    arguments = {key: value for key, value in model.config.items() if not key.startswith(("audio", "_"))}
    with init_empty_weights(include_buffers=False):
        made = WanTransformer3DModel(**arguments)
    dtype, kept = model.patch_embedding.weight.dtype, made._keep_in_fp32_modules
    weights = {
        name: tensor.to(torch.float32 if any(part in name for part in kept) else dtype)
        for name, tensor in model.state_dict().items()
    }
    made.load_state_dict(weights, assign=True)
    made.rope.to(model.patch_embedding.weight.device)
    return made.requires_grad_(False).eval()


def bytes_on(model: nn.Module, device: torch.device) -> int:
    """Bytes of the weights now on a device."""
    return sum(tensor.nbytes for tensor in tensors_of(model) if tensor.device == device)


# Inputs


@dataclass(frozen=True)
class Inputs:
    """Noise, and all conditions that a model of these sizes takes."""

    latents: Tensor  # (1, C, F, H, W)
    timestep: Tensor  # (1,) or (1, F), on the CPU
    text: Tensor
    image: Tensor | None
    audio: Tensor | None


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random inputs: a full prompt, plus an image and one speaker's audio if the model takes them."""
    sizes, frames = case.sizes, case.latents[0]

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, device=device, dtype=dtype)

    timestep = torch.tensor([500.0])
    if case.clean:
        timestep = timestep.repeat(1, frames)
        timestep[:, : case.clean] = 0
    features = (12, sizes.audio_features // 12)  # layers and channels
    sound = (1, VAE_STRIDE[0] * (frames - 1) + 1, sizes.audio_window, *features)
    return Inputs(
        noise(sizes.in_channels, *case.latents),
        timestep,
        noise(TEXT_TOKENS, sizes.text_dim),
        None if sizes.image_dim is None else noise(IMAGE_TOKENS, sizes.image_dim),
        None if sizes.audio_dim is None else noise(*sound),
    )


def forward_of(model: SkyReelsTransformer3DModel, inputs: Inputs) -> Work:
    """Our forward pass for one condition."""
    return lambda: model([Segment(inputs.latents)], inputs.timestep, inputs.text, inputs.image, inputs.audio)[0]


def outputs_of(
    works: Mapping[str, Work], models: Mapping[str, nn.Module], device: torch.device
) -> Iterator[tuple[str, Tensor, int | None]]:
    """Name, output on the CPU and peak memory of each forward, after a first, slower run.

    The peak is that of one model alone: its weights on the device plus what a forward pass adds. None without a GPU.
    """
    for name, work in works.items():
        work()
        held = bytes_on(models[name], device)
        out, added = measure_peak(work, device)
        yield name, out, None if added is None else held + added


def diffusers_forward_of(model: WanTransformer3DModel, inputs: Inputs, case: Case) -> Work:
    """diffusers' forward pass, with a timestep per token where ours has one per frame."""
    timestep = inputs.timestep
    if timestep.ndim == 2:
        timestep = timestep.repeat_interleave(case.tokens_per_frame, dim=1)
    timestep = timestep.to(inputs.latents.device)
    return lambda: model(inputs.latents, timestep, inputs.text, return_dict=False)[0]
