"""HunyuanVideo's text encoders: a Llama's states of the prompt's tokens, and a CLIP's summary of it.

The Llama is told to describe a video in detail; what the transformer gets are the states of the prompt alone, behind
that request. Request, cut and layer are the library's: its pipeline encodes, with the Llama and nothing else in it. It
pads to 256 tokens and says which are real. The padding is behind the prompt and attended to by nothing, so it is left
out here, and attention needs no mask.

CLIP takes 77 tokens, which is less than many a prompt has. That is nothing to worry about, the Llama reads on. The
pipeline warns of it in words that sound as if it were, so CLIP is asked here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_TOKENS = 256
CLIP_TOKENS = 77  # with the two that mark its ends


class HunyuanTextEncoder:
    """A prompt to what the transformer is told of it: each token's state, and one row for all of them."""

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
        others["tokenizer"] = tokenizer  # any with the library's interface, not the class in its signature alone
        self.pipeline = HunyuanVideoPipeline(text_encoder=llama, **others)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The Llama's layers, which may come one after the other."""
        return cast(Sequence[nn.Module], self.llama.layers)

    @torch.inference_mode()
    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Context (1, L, D) of the prompt's tokens and `pooled` (1, P), on the modules' device."""
        self.tell_of_length(prompt)
        device = self.llama.embed_tokens.weight.device
        states, pooled, mask = self.pipeline.encode_prompt(
            prompt, pooled_prompt_embeds=self.summary(prompt, device), device=device, max_sequence_length=MAX_TOKENS
        )
        return {"context": states[:, : int(mask.sum())], "pooled": pooled}

    def summary(self, prompt: str, device: torch.device) -> Tensor:
        """What CLIP makes of a prompt's beginning, (1, P)."""
        tokens = self.clip_tokenizer(
            prompt, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        )
        return self.module["clip"](tokens.input_ids.to(device)).pooler_output

    def tell_of_length(self, prompt: str) -> None:
        """Say so when the end of a prompt is not used, or not by CLIP."""
        silently: dict[str, Any] = {"add_special_tokens": False, "verbose": False}  # the library warns of other things
        tokenizers = (self.tokenizer, self.clip_tokenizer)
        length, clip_length = (len(tokenizer(prompt, **silently).input_ids) for tokenizer in tokenizers)
        if length > MAX_TOKENS:
            logger.warning("the prompt has %d tokens; only the first %d are used", length, MAX_TOKENS)
        if (seen := CLIP_TOKENS - 2) < clip_length:
            reads = f"the Llama sees up to {MAX_TOKENS}"
            logger.info("CLIP's summary is of the first %d of the prompt's %d tokens; %s", seen, clip_length, reads)
