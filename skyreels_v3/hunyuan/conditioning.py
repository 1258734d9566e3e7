"""V1's conditioning: the text encoders (Llama and CLIP) and `HunyuanConditioning`, which calls the transformer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerBase

from skyreels_v3.errors import format_value
from skyreels_v3.hunyuan.key_maps import TEXT_TOKENS
from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

logger = logging.getLogger(__name__)

CLIP_TOKENS = 77  # per prompt, including begin and end tokens
GUIDANCE_UNIT = 1000.0  # the guidance scale is embedded like a timestep


class HunyuanTextEncoder:
    """Llama, for the hidden states of a prompt's tokens, and CLIP, for one pooled vector, with their tokenizers."""

    def __init__(
        self,
        llama: LlamaModel,
        tokenizer: PreTrainedTokenizerBase,
        clip: CLIPTextModel,
        clip_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.module = nn.ModuleDict({"llama": llama, "clip": clip})
        self.llama, self.tokenizer, self.clip_tokenizer = llama, tokenizer, clip_tokenizer
        others: dict[str, Any] = dict.fromkeys(("transformer", "vae", "scheduler", "text_encoder_2", "tokenizer_2"))
        others["tokenizer"] = tokenizer  # any tokenizer will do, not only the class in the signature
        self.pipeline = HunyuanVideoPipeline(text_encoder=llama, **others)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Llama's layers, for streaming."""
        return cast(Sequence[nn.Module], self.llama.layers)

    @torch.inference_mode()
    def encode(self, prompt: str) -> dict[str, Tensor]:
        """`context` (1, L, D), Llama's states of the prompt's own tokens, and `pooled` (1, P), CLIP's vector."""
        # else the tokenizers warn about their own limits
        quiet: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        start = format_value(prompt[:40])  # quoted, as it may be the negative prompt
        length, clip_length = (len(t(prompt, **quiet).input_ids) for t in (self.tokenizer, self.clip_tokenizer))
        if length > TEXT_TOKENS:
            logger.warning('only the first %d of the %d tokens of "%s..." are used', TEXT_TOKENS, length, start)
        if (seen := CLIP_TOKENS - 2) < clip_length:
            llama = f"Llama reads up to {TEXT_TOKENS}"
            logger.info('CLIP reads the first %d of %d tokens of "%s..."; %s', seen, clip_length, start, llama)
        device = self.llama.embed_tokens.weight.device
        clip_ids = self.clip_tokenizer(
            prompt, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        pooled = self.module["clip"](clip_ids.to(device)).pooler_output
        states, pooled, mask = self.pipeline.encode_prompt(
            prompt, pooled_prompt_embeds=pooled, device=device, max_sequence_length=TEXT_TOKENS
        )
        return {"context": states[:, : int(mask.sum())], "pooled": pooled}


@dataclass(frozen=True)
class HunyuanConditioning:
    """The transformer's inputs besides latents and timestep.

    Attributes:
        text: (1, L, D) Llama states of the prompt's own tokens.
        pooled: (1, P) CLIP's vector.
        guidance: the embedded guidance scale, an input of the model.
        channels: (1, C, F, H, W) concatenated to the latents' channels, or None.
    """

    text: Tensor
    pooled: Tensor
    guidance: float
    channels: Tensor | None = None

    def arguments(self, model: HunyuanTransformer3DModel) -> dict[str, Tensor]:
        """The model's arguments besides latents and timestep."""
        text, pooled = (part.to(model.dtype) for part in (self.text, self.pooled))
        guidance = text.new_full((1,), self.guidance) * GUIDANCE_UNIT
        return {
            "encoder_hidden_states": text,
            "encoder_attention_mask": text.new_ones(text.shape[:2]),
            "pooled_projections": pooled,
            "guidance": guidance,
        }

    def predict(self, model: HunyuanTransformer3DModel, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (1, C, F, H, W) of the latents at `timestep`, a scalar; float32."""
        seen = latents if self.channels is None else torch.cat((latents, self.channels), dim=1)
        times = timestep.reshape(1).to(latents)
        (velocity,) = model(
            hidden_states=seen.to(model.dtype), timestep=times, return_dict=False, **self.arguments(model)
        )
        return velocity.float()
