"""Quantized weights: fewer bytes than bfloat16, in plain tensors that stream and save like any others.

`quantize` stores each row of a weight matrix as float8 (e4m3, with 3 mantissa bits) times a power of two. Such a scale
costs no accuracy, since float8 is a floating-point format, and it is exact in bfloat16: the result equals that of a
bfloat16 model whose weights were rounded to 4 significant bits. Checkpoint files come in other formats as well (see
checkpoints/formats.py): float8 and int8 with arbitrary scales, and GGUF's blocks. All of them become `QuantizedLinear`
layers, which dequantize their weight on every use.

`fp8` multiplies in the activations' dtype, on any device. `fp8_dynamic` also rounds the activations, with a scale per
token, for the FP8 matrix units of recent GPUs. No work is repeated: an input that several layers share (queries, keys
and values) is rounded once, and `cache_dequantized` keeps a block's dequantized weights while it processes its tokens
in chunks.

Only matrices in the repeated blocks are quantized; `quantize` also skips `SKIP_MODULES`. Norms, modulation, embeddings
and the output head, which are small and affect everything, keep their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from skyreels_v3.float8 import FP8, LARGEST, fitting_scale
from skyreels_v3.memory.gguf_blocks import unpack
from skyreels_v3.memory.policy import SCALE

QUANTIZED_DTYPES = (FP8, torch.float8_e5m2, torch.int8, torch.uint8)  # of the weights of quantized layers
MULTIPLE = 16  # FP8 matrix units need sizes that are multiples of it
UNPACKED_AT_ONCE = 1 << 24  # elements of GGUF's blocks, of 4 bytes each while being unpacked
# `wo` of UMT5, since transformers casts that layer's input to the dtype of its weight; and the norms of HunyuanVideo's
# blocks, large matrices that compute the modulation from the timestep.
SKIP_MODULES = ("wo", "norm1", "norm1_context", "norm")


@dataclass(frozen=True)
class Packed:
    """A weight as stored in a quantized file.

    Attributes:
        data: (out, in) float8 or int8; or a GGUF type's blocks, (out, bytes per row) uint8.
        shape: of the weight, (out, in) for a matrix.
        scale: (out,) float32, what each row is multiplied by; None for a GGUF type.
        kind: the GGUF type, such as Q6_K; empty for other formats.
    """

    data: Tensor
    shape: tuple[int, ...]
    scale: Tensor | None = None
    kind: str = ""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def on_meta(self) -> Packed:
        """A copy on the meta device."""
        scale = None if self.scale is None else self.scale.to("meta")
        return replace(self, data=self.data.to("meta"), scale=scale)

    def split(self, rows: Sequence[int]) -> list[Packed]:
        """Split a stacked matrix into the matrices it is made of, given the rows of each."""
        scales = [None] * len(rows) if self.scale is None else self.scale.split([*rows])
        made = zip(self.data.split([*rows]), scales, strict=True)
        return [Packed(data, (len(data), *self.shape[1:]), scale, self.kind) for data, scale in made]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight, dequantized to `dtype`."""
        if self.scale is not None:  # in place, so that the product is rounded once, whatever the scale's dtype
            return self.data.to(dtype).mul_(self.scale[:, None])
        columns = math.prod(self.shape) // len(self.data)
        weight = torch.empty(len(self.data), columns, dtype=dtype, device=self.data.device)
        at_once = max(1, UNPACKED_AT_ONCE // columns)
        for part, rows in zip(weight.split(at_once), self.data.split(at_once), strict=True):
            part.copy_(unpack(rows, self.kind, columns))
        return weight.view(self.shape)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight stays as stored in a quantized file.

    Attributes:
        weight, weight_scale, kind: see `Packed`.
        bias: (out,) in the dtype of the activations, or None.
        dynamic: multiply in FP8, with activations rounded per token.
        caching: keep the dequantized weight in `cached` between forward calls.
    """

    def __init__(self, packed: Packed, bias: nn.Parameter | None, dynamic: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.kind = packed.kind
        self.dynamic = dynamic
        self.caching = False
        self.cached: Tensor | None = None
        self.weight = nn.Parameter(packed.data, requires_grad=False)
        scale = None if packed.scale is None else nn.Parameter(packed.scale, requires_grad=False)
        self.weight_scale: Tensor | None
        self.register_parameter(SCALE, scale)
        self.bias = bias

    @property
    def packed(self) -> Packed:
        """The weight with its scale."""
        return Packed(self.weight, (self.out_features, self.in_features), self.weight_scale, self.kind)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if self.dynamic:
            return self.fp8_product(x).unflatten(0, x.shape[:-1])
        weight = self.dequantized(x.dtype) if self.cached is None else self.cached
        if self.caching:
            self.cached = weight
        return F.linear(x, weight, self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), dequantized to `dtype`."""
        return self.packed.dequantized(dtype)

    def fp8_product(self, x: Tensor) -> Tensor:
        """Multiply in FP8, (..., in) -> (L, out); both scales are applied to the sums.

        Fast accumulation keeps about 14 significant bits: enough for the rounded factors, and twice as fast as float32.
        """
        assert self.weight_scale is not None
        rounded, scale = rounded_once(x)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        options: dict[str, Any] = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        # torch has no public function for products with row-wise scales
        return torch._scaled_mm(rounded, self.weight.t(), scale, self.weight_scale[None], **options).to(x.dtype)


Rounded = tuple[Tensor, Tensor]  # see `round_tokens`
_ROUNDED = WeakTensorKeyDictionary()  # live input -> its version and the result


def rounded_once(x: Tensor) -> Rounded:
    """`round_tokens`, cached for the next layers with the same input."""
    if torch.compiler.is_compiling():  # the compiler removes repeated work itself, and cannot trace the dictionary
        return round_tokens(x)
    version = None if x.is_inference() else x._version
    known = _ROUNDED.get(x)
    if known is None or known[0] != version:
        known = _ROUNDED[x] = version, round_tokens(x)
    return known[1]


def round_tokens(x: Tensor) -> Rounded:
    """Round tokens (..., in) to float8 (L, in), row-major, with float32 scales (L, 1)."""
    x = x.flatten(0, -2)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float()
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(FP8).contiguous(), scale


def cache_dequantized(blocks: Iterable[nn.Module]) -> None:
    """Make quantized layers dequantize once per forward of their block, however many chunks its tokens are split into.

    While a block runs, its dequantized matrices use memory.
    """
    for block in blocks:
        layers = [layer for layer in block.modules() if isinstance(layer, QuantizedLinear) and not layer.dynamic]
        if layers:
            block.register_forward_pre_hook(partial(_set_caching, layers, True))
            block.register_forward_hook(partial(_set_caching, layers, False), always_call=True)


def _set_caching(layers: Sequence[QuantizedLinear], caching: bool, *_: object) -> None:
    for layer in layers:
        layer.caching, layer.cached = caching, None


def quantize(blocks: Iterable[nn.Module], device: torch.device, dynamic: bool = False) -> None:
    """Replace the linear layers in `blocks` with FP8 ones, quantized on `device` and stored where the weights were.

    For layers that are already quantized, as in a quantized checkpoint, only `dynamic` is set. With `dynamic`, layers
    whose size FP8 matrix units do not support keep their dtype.
    """
    skipped = {*SKIP_MODULES}
    for block in blocks:
        for path, layer in [*block.named_modules()]:
            if isinstance(layer, QuantizedLinear):
                layer.dynamic = dynamic and layer.weight.dtype == FP8 and fits(layer)
            elif type(layer) is nn.Linear and skipped.isdisjoint(path.split(".")) and (fits(layer) or not dynamic):
                block.set_submodule(path, quantized(layer, device, dynamic))


def fits(layer: nn.Linear | QuantizedLinear) -> bool:
    """Whether FP8 matrix units support the size of a layer."""
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def quantized(layer: nn.Linear, device: torch.device, dynamic: bool) -> QuantizedLinear:
    """An FP8 version of `layer`; the bias is shared."""
    home = layer.weight.device
    weight, scale = round_rows(layer.weight.detach().to(device))
    packed = Packed(weight.to(home), tuple(weight.shape), scale.to(home))
    return QuantizedLinear(packed, layer.bias, dynamic).eval()


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round (out, in) to float8 with scales (out,), the smallest powers of two that keep each row in range."""
    scale = fitting_scale(weight.abs().amax(dim=1).float())
    return (weight.float() / scale[:, None]).to(FP8), scale


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the quantized layers of a model with plain linear ones, with weights of `dtype`."""
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, QuantizedLinear):
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantized(dtype), requires_grad=False)
            plain.bias = layer.bias  # type: ignore[assignment]  # None in a layer without
            model.set_submodule(path, plain.eval())
