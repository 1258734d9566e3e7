"""What V1's transformer is conditioned on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerBase

from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

logger = logging.getLogger(__name__)

GUIDANCE_UNIT = 1000.0  # the guidance is embedded like a timestep


@dataclass(frozen=True)
class HunyuanConditioning:
    """What the transformer sees besides the latents.

    Attributes:
        text: (1, L, D) Llama states of the prompt's own tokens.
        pooled: (1, P) from CLIP.
        guidance: the scale that the model takes as an input.
        channels: (1, C, F, H, W) joined to the latents' channels, or None.
    """

    text: Tensor
    pooled: Tensor
    guidance: float
    channels: Tensor | None = None

    def arguments(self, model: HunyuanTransformer3DModel) -> dict[str, Tensor]:
        """The model's arguments besides latents and timestep."""
        text, pooled = (part.to(model.dtype) for part in (self.text, self.pooled))
        guidance = torch.tensor([self.guidance], dtype=model.dtype, device=text.device) * GUIDANCE_UNIT
        return {
            "encoder_hidden_states": text,
            "encoder_attention_mask": text.new_ones(text.shape[:2]),
            "pooled_projections": pooled,
            "guidance": guidance,
        }

    def predict(self, model: HunyuanTransformer3DModel, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (1, C, F, H, W) of the latents, float32."""
        seen = latents if self.channels is None else torch.cat((latents, self.channels), dim=1)
        times = timestep.reshape(1).to(latents)
        (velocity,) = model(
            hidden_states=seen.to(model.dtype), timestep=times, return_dict=False, **self.arguments(model)
        )
        return velocity.float()


MAX_TOKENS = 256
CLIP_TOKENS = 77  # including those that mark start and end


class HunyuanTextEncoder:
    """A prompt to what the transformer sees of it: the state of each token, and one row for all of them."""

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
        others["tokenizer"] = tokenizer  # any with the library's interface, not only the class in its signature
        self.pipeline = HunyuanVideoPipeline(text_encoder=llama, **others)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The Llama's layers, which can be streamed."""
        return cast(Sequence[nn.Module], self.llama.layers)

    @torch.inference_mode()
    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Context (1, L, D) of the prompt's tokens and `pooled` (1, P), on the modules' device."""
        quiet: dict[str, Any] = {"add_special_tokens": False, "verbose": False}  # the library warns of other limits
        length, clip_length = (len(t(prompt, **quiet).input_ids) for t in (self.tokenizer, self.clip_tokenizer))
        if length > MAX_TOKENS:
            logger.warning("the prompt has %d tokens; only the first %d are used", length, MAX_TOKENS)
        if (seen := CLIP_TOKENS - 2) < clip_length:
            reads = f"the Llama reads up to {MAX_TOKENS}"
            logger.info("CLIP's summary is of the first %d of the prompt's %d tokens; %s", seen, clip_length, reads)
        device = self.llama.embed_tokens.weight.device
        clip_ids = self.clip_tokenizer(
            prompt, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        pooled = self.module["clip"](clip_ids.to(device)).pooler_output
        states, pooled, mask = self.pipeline.encode_prompt(
            prompt, pooled_prompt_embeds=pooled, device=device, max_sequence_length=MAX_TOKENS
        )
        return {"context": states[:, : int(mask.sum())], "pooled": pooled}
