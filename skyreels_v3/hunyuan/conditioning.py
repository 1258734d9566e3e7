"""What V1's transformer is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skyreels_v3.hunyuan.transformer import HunyuanTransformer3DModel

GUIDANCE_UNIT = 1000.0  # the guidance is embedded like a timestep


@dataclass(frozen=True)
class HunyuanConditioning:
    """What the transformer sees besides the latents.

    Attributes:
        text: (1, L, D) Llama states of the prompt's own tokens.
        pooled: (1, P) from CLIP.
        guidance: the scale that the model is told of.
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
