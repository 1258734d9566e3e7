"""FP8 weights: half the bytes of bfloat16, as plain tensors that stream and save like any others.

A row of a weight matrix is kept as float8 (e4m3: 3 bits of mantissa) times a power of two. Such a scale costs no
accuracy, since float8 is a floating-point format, and is exact in bfloat16: the products are those of a bfloat16 model
whose weights were rounded to 4 significant bits, nothing else.

`fp8` computes with those weights in the activations' dtype, on any device. `fp8_dynamic` rounds the activations as
well, each token by its own scale, for the FP8 matrix units of newer GPUs.

Neither does its own work twice: what several layers take (queries, keys and values, or a gate and what it opens) is
rounded once, and a block that works on its tokens in pieces has its weights in full width until it has ended, see
`keep_wide_weights`.

Only matrices inside the repeated blocks are quantised, and of those not all (see `KEPT`). Norms, modulation, embeddings
and the output head, which are few and steer everything, stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from skyreels_v3.memory.units import SCALE

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
LOWEST = -126  # exponent of the smallest scale: what is below it, not every device computes with
MULTIPLE = 16  # sizes that the FP8 matrix units take
# Layers that stay as they are: attention to the conditions, whose result reaches the tokens without a gate, so that its
# error is seen most; `wo` of UMT5, since transformers casts the input of that layer to the dtype of its weight; and the
# modulation of HunyuanVideo's blocks, whose norms compute it from the timestep by large matrices of their own.
KEPT = ("attn2", "attn_audio", "wo", "norm1", "norm1_context", "norm")


class Fp8Linear(nn.Module):
    """A linear layer whose weight is float8 times a scale for each row.

    Attributes:
        weight: (out, in) float8_e4m3fn.
        weight_scale: (out,) float32, powers of two.
        bias: (out,) in the dtype of the activations, or None.
        dynamic: multiply in FP8, activations rounded token by token.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dynamic: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dynamic = dynamic
        self.keeps_wide = False  # the weight below, when it is made
        self.wide: Tensor | None = None
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=FP8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if self.dynamic:
            return self.multiplied_in_fp8(x).unflatten(0, x.shape[:-1])
        weight = self.dequantized(x.dtype) if self.wide is None else self.wide
        if self.keeps_wide:
            self.wide = weight
        return F.linear(x, weight, self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in full width."""
        return self.weight.to(dtype).mul_(self.weight_scale.to(dtype)[:, None])

    def multiplied_in_fp8(self, x: Tensor) -> Tensor:
        """(..., in) -> (L, out): both factors float8, both scales applied to the sums.

        The sums are those of the FP8 units, 14 significant bits or so: as exact as the rounding of the factors, and
        twice as fast as bringing them to float32 in between.
        """
        rounded, scale = rounded_once(x)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        out = torch._scaled_mm(
            rounded,
            self.weight.t(),
            scale,
            self.weight_scale[None],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # rows by rows: the one form of the product that has no public name
        return out.to(x.dtype)


Rounded = tuple[Tensor, Tensor]  # see `round_tokens`
_ROUNDED = WeakTensorKeyDictionary()  # of inputs that are still held by someone: their version and what they became


def rounded_once(x: Tensor) -> Rounded:
    """As `round_tokens`, for all layers that take the same input one after the other."""
    if torch.compiler.is_compiling():  # a compiler sees that it is the same, and could not look into a dictionary
        return round_tokens(x)
    version = None if x.is_inference() else x._version
    known = _ROUNDED.get(x)
    if known is None or known[0] != version:
        known = _ROUNDED[x] = version, round_tokens(x)
    return known[1]


def round_tokens(x: Tensor) -> Rounded:
    """Tokens (..., in) as float8 (L, in), row after row, times scales (L, 1), float32."""
    x = x.flatten(0, -2)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float()
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(FP8).contiguous(), scale


def keep_wide_weights(blocks: Iterable[nn.Module]) -> None:
    """Have FP8 layers dequantise once each time that their block works, however many pieces it works in.

    It takes the block's matrices in full width while it works.
    """
    for block in blocks:
        layers = [layer for layer in block.modules() if isinstance(layer, Fp8Linear) and not layer.dynamic]
        if layers:
            block.register_forward_pre_hook(partial(_keep, layers))
            block.register_forward_hook(partial(_drop, layers), always_call=True)


def _keep(layers: Sequence[Fp8Linear], *_: object) -> None:
    for layer in layers:
        layer.keeps_wide = True


def _drop(layers: Sequence[Fp8Linear], *_: object) -> None:
    for layer in layers:
        layer.keeps_wide, layer.wide = False, None


def quantize(blocks: Iterable[nn.Module], device: torch.device, dynamic: bool = False) -> None:
    """Exchange the linear layers within `blocks` for FP8 ones, computed on `device` and kept where the weights were.

    Layers that are FP8 already, as those of a checkpoint saved so, stay and take on `dynamic`; with it, layers whose
    sizes FP8 matrix units do not take stay in the dtype they have.
    """
    for block in blocks:
        for path, layer in [*block.named_modules()]:
            if isinstance(layer, Fp8Linear):
                layer.dynamic = dynamic and fits(layer)
            elif type(layer) is nn.Linear and not is_kept(path) and (fits(layer) or not dynamic):
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, quantized(layer, device, dynamic))


def is_kept(path: str) -> bool:
    """Whether a layer, by its path in a block, stays as it is."""
    return any(f".{kept}." in f".{path}." for kept in KEPT)


def fits(layer: nn.Linear | Fp8Linear) -> bool:
    """Whether FP8 matrix units take a layer of this size."""
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def quantized(layer: nn.Linear, device: torch.device, dynamic: bool) -> Fp8Linear:
    """The FP8 layer closest to `layer`; the bias is shared."""
    with torch.device("meta"):
        made = Fp8Linear(layer.in_features, layer.out_features, layer.bias is not None, dynamic)
    weight, scale = round_rows(layer.weight.detach().to(device))
    home = layer.weight.device
    made.weight = nn.Parameter(weight.to(home), requires_grad=False)
    made.weight_scale = nn.Parameter(scale.to(home), requires_grad=False)
    made.bias = layer.bias
    return made.eval()


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> float8 of that shape and scales (out,): the smallest powers of two that keep each row in range."""
    largest = weight.abs().amax(dim=1).float()
    mantissa, exponent = torch.frexp(largest)  # exact, as a logarithm would not be
    limit, highest = math.frexp(LARGEST)
    scale = torch.exp2((exponent - highest + (mantissa > limit)).float().clamp_(min=LOWEST))
    scale = torch.where(largest.isfinite(), scale, torch.nan)  # the cast to float8 would hide an infinity
    return (weight.float() / scale[:, None]).to(FP8), scale


def with_fp8_layers(model: nn.Module, keys: Iterable[str]) -> nn.Module:
    """`model`, on meta, with FP8 layers where a checkpoint's `keys` have scales."""
    for key in keys:
        if key.endswith(f".{SCALE}"):
            path, _, name = key.removesuffix(f".{SCALE}").rpartition(".")
            parent = model.get_submodule(path)
            layer = cast(Any, parent.get_submodule(name))
            with torch.device("meta"):
                setattr(parent, name, Fp8Linear(layer.in_features, layer.out_features, layer.bias is not None))
    return model
