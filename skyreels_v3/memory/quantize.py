"""FP8 weights: half the bytes of bfloat16, in plain tensors that stream and save like any others.

Each row of a weight matrix is stored as float8 (e4m3, with 3 bits of mantissa) times a power of two. Such a scale costs
no accuracy, since float8 is a floating-point format, and it is exact in bfloat16: the result is that of a bfloat16
model whose weights were rounded to 4 significant bits.

`fp8` multiplies in the activations' dtype, on any device. `fp8_dynamic` rounds the activations too, with a scale for
each token, for the FP8 matrix units of recent GPUs. No work is repeated: an input that several layers share (queries,
keys and values) is rounded once, and `cache_dequantized` keeps a block's dequantized weights while it works on its
tokens in chunks.

Only matrices in the repeated blocks are quantized, except `SKIP_MODULES`. Norms, modulation, embeddings and the output
head, which are small and affect everything, keep their dtype.
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

from skyreels_v3.memory.policy import SCALE

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
MIN_EXPONENT = -126  # of a scale: smaller numbers are subnormal, which not every device computes with
MULTIPLE = 16  # FP8 matrix units take multiples of it
# Cross-attention, whose output is added without a gate, so that its error shows most; `wo` of UMT5, since transformers
# casts the input of that layer to the dtype of its weight; and the norms of HunyuanVideo's blocks, large matrices that
# compute the modulation from the timestep.
SKIP_MODULES = ("attn2", "attn_audio", "wo", "norm1", "norm1_context", "norm")


class Fp8Linear(nn.Module):
    """A linear layer whose weight is float8 times a scale per row.

    Attributes:
        weight: (out, in) float8_e4m3fn.
        weight_scale: (out,) float32, powers of two.
        bias: (out,) in the dtype of the activations, or None.
        dynamic: multiply in FP8, with activations rounded token by token.
        caching: keep the dequantized weight in `cached` from one forward to the next.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dynamic: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dynamic = dynamic
        self.caching = False
        self.cached: Tensor | None = None
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=FP8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if self.dynamic:
            return self.fp8_product(x).unflatten(0, x.shape[:-1])
        weight = self.dequantized(x.dtype) if self.cached is None else self.cached
        if self.caching:
            self.cached = weight
        return F.linear(x, weight, self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as `dtype`."""
        return self.weight.to(dtype).mul_(self.weight_scale.to(dtype)[:, None])

    def fp8_product(self, x: Tensor) -> Tensor:
        """(..., in) -> (L, out): float8 factors, both scales applied to the sums.

        Fast accumulation keeps about 14 significant bits: enough for the rounded factors, and twice as fast as float32.
        """
        rounded, scale = rounded_once(x)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        options: dict[str, Any] = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        # torch has no public name for the product with a scale per row
        return torch._scaled_mm(rounded, self.weight.t(), scale, self.weight_scale[None], **options).to(x.dtype)


Rounded = tuple[Tensor, Tensor]  # see `round_tokens`
_ROUNDED = WeakTensorKeyDictionary()  # of live inputs: their version and the result


def rounded_once(x: Tensor) -> Rounded:
    """`round_tokens`, remembered for the next layers with the same input."""
    if torch.compiler.is_compiling():  # the compiler removes repeated work itself, and cannot trace the dictionary
        return round_tokens(x)
    version = None if x.is_inference() else x._version
    known = _ROUNDED.get(x)
    if known is None or known[0] != version:
        known = _ROUNDED[x] = version, round_tokens(x)
    return known[1]


def round_tokens(x: Tensor) -> Rounded:
    """Tokens (..., in) as float8 (L, in), row-major, times scales (L, 1), float32."""
    x = x.flatten(0, -2)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float()
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(FP8).contiguous(), scale


def cache_dequantized(blocks: Iterable[nn.Module]) -> None:
    """Have FP8 layers dequantize once per forward of their block, however many chunks the block works in.

    While a block works, its dequantized matrices take memory.
    """
    for block in blocks:
        layers = [layer for layer in block.modules() if isinstance(layer, Fp8Linear) and not layer.dynamic]
        if layers:
            block.register_forward_pre_hook(partial(_set_caching, layers, True))
            block.register_forward_hook(partial(_set_caching, layers, False), always_call=True)


def _set_caching(layers: Sequence[Fp8Linear], caching: bool, *_: object) -> None:
    for layer in layers:
        layer.caching, layer.cached = caching, None


def quantize(blocks: Iterable[nn.Module], device: torch.device, dynamic: bool = False) -> None:
    """Replace the linear layers in `blocks` by FP8 ones, computed on `device` and stored where the weights were.

    Layers that are FP8 already, as in a quantized checkpoint, only take on `dynamic`. With `dynamic`, layers whose
    sizes FP8 matrix units do not take keep their dtype.
    """
    skipped = {*SKIP_MODULES}
    for block in blocks:
        for path, layer in [*block.named_modules()]:
            if isinstance(layer, Fp8Linear):
                layer.dynamic = dynamic and fits(layer)
            elif type(layer) is nn.Linear and skipped.isdisjoint(path.split(".")) and (fits(layer) or not dynamic):
                block.set_submodule(path, quantized(layer, device, dynamic))


def fits(layer: nn.Linear | Fp8Linear) -> bool:
    """Whether FP8 matrix units take a layer of this size."""
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def quantized(layer: nn.Linear, device: torch.device, dynamic: bool) -> Fp8Linear:
    """The FP8 layer closest to `layer`; the bias is shared."""
    made = empty_like(layer, dynamic)
    for name, tensor in zip(("weight", SCALE), round_rows(layer.weight.detach().to(device)), strict=True):
        setattr(made, name, nn.Parameter(tensor.to(layer.weight.device), requires_grad=False))
    made.bias = layer.bias
    return made.eval()


def empty_like(layer: nn.Linear, dynamic: bool = False) -> Fp8Linear:
    """An FP8 layer of the same size, on meta."""
    with torch.device("meta"):
        return Fp8Linear(layer.in_features, layer.out_features, layer.bias is not None, dynamic)


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> float8 (out, in) and scales (out,), the smallest powers of two that keep each row in range."""
    largest = weight.abs().amax(dim=1).float()
    mantissa, exponent = torch.frexp(largest)  # exact, as a logarithm would not be
    limit, highest = math.frexp(LARGEST)
    scale = torch.exp2((exponent - highest + (mantissa > limit)).float().clamp_(min=MIN_EXPONENT))
    scale = torch.where(largest.isfinite(), scale, torch.nan)  # the cast to float8 would hide an infinity
    return (weight.float() / scale[:, None]).to(FP8), scale


def set_fp8_layers(model: nn.Module, scales: Iterable[str]) -> None:
    """Replace linear layers of `model`, on meta, by FP8 ones: those whose scales are the `scales` of a checkpoint."""
    for key in scales:
        path = key.removesuffix(f".{SCALE}")
        model.set_submodule(path, empty_like(cast(nn.Linear, model.get_submodule(path))))
