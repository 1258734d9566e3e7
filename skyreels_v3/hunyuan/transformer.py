"""`HunyuanTransformer3DModel`: the transformer of SkyReels V1, a HunyuanVideo model.

The network is diffusers' own, with an attention function set from outside and its blocks in one list: double blocks,
with separate layers for text tokens, then single blocks, which treat text and video alike. Attention is joint: one
sequence of video tokens, then text tokens.

The text is cropped to its real tokens beforehand, and a batch has one sample. So there is no padding, and attention
needs no mask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

import skyreels_v3.vector_kernels  # noqa: F401  first of all
from skyreels_v3.attention.backends import AttentionFn
from skyreels_v3.checkpoints.key_maps import KeyMap
from skyreels_v3.hunyuan.key_maps import NATIVE_TRANSFORMER
from skyreels_v3.wan.rope import Rotary, apply_rotary


class JointAttention:
    """Attention among video and text tokens: a processor of diffusers' attention layers."""

    def __init__(self, attention: AttentionFn) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Updates of the video tokens (B, Lv, D) and the text tokens (B, Lt, D); the names are diffusers'."""
        assert image_rotary_emb is not None
        query, key, value = self.project(attn, hidden_states, encoder_hidden_states, *image_rotary_emb)
        attended = self.attention(query, key, value).flatten(2)
        del query, key, value
        video, text = attended.tensor_split((hidden_states.shape[1],), dim=1)
        # single blocks have neither layer, but one output projection of their own
        video = video if attn.to_out is None else attn.to_out[0](video)
        return video, text if attn.to_add_out is None else attn.to_add_out(text)

    def project(
        self, attn: Any, video: Tensor, text: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, Lv + Lt, N, D); cos and sin (Lv, D) rotate those of the video."""
        of_video = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        of_text = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None)
        if attn.add_q_proj is None:  # the same layers for both
            of_text = of_video
        rotary = torch.stack((cos[:, ::2], sin[:, ::2]), dim=-1).unsqueeze(1)  # the tables hold each pair's value twice
        query, key, value = (
            torch.cat((heads(video, *first, attn.heads, turn), heads(text, *second, attn.heads)), dim=1)
            for first, second, turn in zip(of_video, of_text, (rotary, rotary, None), strict=True)
        )
        return query, key, value


def heads(x: Tensor, layer: nn.Module, norm: nn.Module | None, number: int, rotary: Rotary | None = None) -> Tensor:
    """Apply `layer` to tokens x (B, L, N * D) and split heads (B, L, N, D); normalize and rotate unless None."""
    out = layer(x).unflatten(-1, (number, -1))
    out = out if norm is None else norm(out)
    return out if rotary is None else apply_rotary(out, rotary).type_as(out)


class HunyuanTransformer3DModel(HunyuanVideoTransformer3DModel):
    """diffusers' HunyuanVideo transformer with the interface of `families.Transformer`."""

    native_names: ClassVar[KeyMap] = NATIVE_TRANSFORMER

    @property
    def blocks(self) -> list[nn.Module]:
        """Double blocks, then single blocks."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def set_attention(self, attention: AttentionFn) -> None:
        """Set the attention function of all blocks; the small text refiner keeps its own."""
        joint = JointAttention(attention)
        for block in self.blocks:
            cast(Any, block).attn.set_processor(joint)

    def compilable(self) -> Iterator[tuple[object, str]]:
        """The code before attention, see `families.Transformer`."""
        for joint in {cast(Any, block).attn.processor for block in self.blocks}:
            yield joint, "project"

    def to_json_string(self) -> str:
        """The config with diffusers' class name, so that diffusers loads what is saved here."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = HunyuanVideoTransformer3DModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
