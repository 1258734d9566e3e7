"""The names and shapes of a transformer's weights, from its sizes alone. No torch.

That is what a checkpoint must hold, and what a LoRA must fit. A test compares both tables with the models themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from skyreels_v3.tasks import PATCH_SIZE

if TYPE_CHECKING:
    from skyreels_v3.hunyuan.sizes import HunyuanSizes
    from skyreels_v3.plan import Sizes

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Linear = tuple[str, int, int]  # name, in, out

SINUSOID = 256  # values that HunyuanVideo's timesteps are embedded from
REFINER_RATIO = 4  # width of HunyuanVideo's text refiner's hidden layers


def linear(layers: list[Linear]) -> Shapes:
    """Weights and biases of linear layers."""
    made: Shapes = {}
    for name, inputs, outputs in layers:
        made |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return made


def norms(width: int, *names: str, bias: bool = True) -> Shapes:
    """Weights of norms over `width` channels, and their biases if they have some."""
    made: Shapes = {f"{name}.weight": (width,) for name in names}
    return made | ({f"{name}.bias": (width,) for name in names} if bias else {})


def embedding(name: str, inputs: int, width: int) -> list[Linear]:
    """The two linear layers that numbers or a text are embedded by."""
    return [(f"{name}.linear_1", inputs, width), (f"{name}.linear_2", width, width)]


def wan_shapes(sizes: Sizes) -> Shapes:
    """The weights of `SkyReelsTransformer3DModel`."""
    dim, patch = sizes.dim, PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    place = "condition_embedder"
    layers = embedding(f"{place}.time_embedder", sizes.freq_dim, dim)
    layers += embedding(f"{place}.text_embedder", sizes.text_dim, dim)
    layers += [(f"{place}.time_proj", dim, 6 * dim), ("proj_out", dim, sizes.out_channels * patch)]
    made: Shapes = {"patch_embedding.weight": (dim, sizes.in_channels, *PATCH_SIZE), "patch_embedding.bias": (dim,)}
    made["scale_shift_table"] = (1, 2, dim)
    if (width := sizes.image_dim) is not None:
        place = f"{place}.image_embedder"
        layers += [(f"{place}.ff.net.0.proj", width, width), (f"{place}.ff.net.2", width, dim)]
        made |= norms(width, f"{place}.norm1") | norms(dim, f"{place}.norm2")
    if sizes.audio_dim is not None:
        entries = 2 * (sizes.audio_window // 2 + 1) + 2  # of a later frame's windows, see AudioProjection
        hidden = sizes.audio_hidden_dim
        layers += [
            ("audio_projection.first_frame", sizes.audio_window * sizes.audio_features, hidden),
            ("audio_projection.later_frames", entries * sizes.audio_features, hidden),
            ("audio_projection.shared", hidden, hidden),
            ("audio_projection.to_tokens", hidden, sizes.audio_tokens * sizes.audio_dim),
        ]
        made |= norms(sizes.audio_dim, "audio_projection.norm")
    for number in range(sizes.num_layers):
        made |= wan_block(f"blocks.{number}", sizes)
    return made | linear(layers)


def wan_block(block: str, sizes: Sizes) -> Shapes:
    """The weights of one block."""
    dim = sizes.dim
    layers = [(f"{block}.ffn.net.0.proj", dim, sizes.ffn_dim), (f"{block}.ffn.net.2", sizes.ffn_dim, dim)]
    made: Shapes = {f"{block}.scale_shift_table": (1, 6, dim)} | norms(dim, f"{block}.norm2")
    for attention in ("attn1", "attn2"):
        layers += [(f"{block}.{attention}.{part}", dim, dim) for part in ("to_q", "to_k", "to_v", "to_out.0")]
        made |= norms(dim, f"{block}.{attention}.norm_q", f"{block}.{attention}.norm_k", bias=False)
    if sizes.image_dim is not None:
        layers += [(f"{block}.attn2.add_{part}_proj", dim, dim) for part in "kv"]
        made |= norms(dim, f"{block}.attn2.norm_added_k", bias=False)
    if sizes.audio_dim is not None:
        layers += [(f"{block}.attn_audio.{part}", dim, dim) for part in ("to_q", "to_out.0")]
        layers += [(f"{block}.attn_audio.{part}", sizes.audio_dim, dim) for part in ("to_k", "to_v")]
        made |= norms(dim, f"{block}.norm_audio")
    return made | linear(layers)


def hunyuan_shapes(sizes: HunyuanSizes) -> Shapes:
    """The weights of `HunyuanTransformer3DModel`."""
    dim, patch = sizes.dim, (1, 2, 2)
    made: Shapes = {"x_embedder.proj.weight": (dim, sizes.in_channels, *patch), "x_embedder.proj.bias": (dim,)}
    numbers = ("timestep_embedder", "guidance_embedder") if sizes.guidance_embeds else ("timestep_embedder",)
    layers = [layer for name in numbers for layer in embedding(f"time_text_embed.{name}", SINUSOID, dim)]
    layers += embedding("time_text_embed.text_embedder", sizes.pooled_projection_dim, dim)
    place = "context_embedder"
    layers += embedding(f"{place}.time_text_embed.timestep_embedder", SINUSOID, dim)
    layers += embedding(f"{place}.time_text_embed.text_embedder", sizes.text_embed_dim, dim)
    layers += [(f"{place}.proj_in", sizes.text_embed_dim, dim), ("norm_out.linear", dim, 2 * dim)]
    layers += [("proj_out", dim, 4 * sizes.out_channels)]
    for number in range(sizes.num_refiner_layers):
        block = f"{place}.token_refiner.refiner_blocks.{number}"
        layers += [(f"{block}.attn.{part}", dim, dim) for part in ("to_q", "to_k", "to_v", "to_out.0")]
        layers += feed_forward(f"{block}.ff", dim, REFINER_RATIO * dim)
        layers += [(f"{block}.norm_out.linear", dim, 2 * dim)]
        made |= norms(dim, f"{block}.norm1", f"{block}.norm2")
    layers += [*hunyuan_double_layers(sizes), *hunyuan_single_layers(sizes)]
    blocks = [(f"transformer_blocks.{n}", ("q", "k", "added_q", "added_k")) for n in range(sizes.num_layers)]
    blocks += [(f"single_transformer_blocks.{n}", ("q", "k")) for n in range(sizes.num_single_layers)]
    for block, parts in blocks:
        made |= norms(sizes.attention_head_dim, *(f"{block}.attn.norm_{part}" for part in parts), bias=False)
    return made | linear(layers)


def feed_forward(name: str, dim: int, hidden: int) -> list[Linear]:
    return [(f"{name}.net.0.proj", dim, hidden), (f"{name}.net.2", hidden, dim)]


def hunyuan_double_layers(sizes: HunyuanSizes) -> Iterator[Linear]:
    """The linear layers of the blocks of two streams."""
    dim = sizes.dim
    projections = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for block in (f"transformer_blocks.{number}" for number in range(sizes.num_layers)):
        yield from ((f"{block}.{norm}.linear", dim, 6 * dim) for norm in ("norm1", "norm1_context"))
        yield from ((f"{block}.attn.{part}", dim, dim) for part in projections)
        yield from feed_forward(f"{block}.ff", dim, sizes.hidden)
        yield from feed_forward(f"{block}.ff_context", dim, sizes.hidden)


def hunyuan_single_layers(sizes: HunyuanSizes) -> Iterator[Linear]:
    """The linear layers of the blocks of one stream."""
    dim = sizes.dim
    for block in (f"single_transformer_blocks.{number}" for number in range(sizes.num_single_layers)):
        yield (f"{block}.norm.linear", dim, 3 * dim)
        yield from ((f"{block}.attn.{part}", dim, dim) for part in ("to_q", "to_k", "to_v"))
        yield (f"{block}.proj_mlp", dim, sizes.hidden)
        yield (f"{block}.proj_out", dim + sizes.hidden, dim)
