"""The UMT5 text encoder: a cleaned prompt to 512 rows of context."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from typing import cast

import ftfy
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

logger = logging.getLogger(__name__)

MAX_TOKENS = 512


def clean_prompt(prompt: str) -> str:
    """Repaired encoding, HTML entities undone (twice: they come doubly escaped), white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """Prompts to context rows, as the transformers were trained: zeros, not padding states, behind the prompt."""

    def __init__(self, module: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.module = module
        self.tokenizer = tokenizer

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, which may come one after the other."""
        return cast(Sequence[nn.Module], self.module.encoder.block)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, L) of the cleaned prompts, padded to the longest, at most 512."""
        texts = [clean_prompt(prompt) for prompt in prompts]
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False).input_ids]
        if max(lengths) > MAX_TOKENS:
            logger.warning("the prompt has %d tokens; only the first %d are used", max(lengths), MAX_TOKENS)
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """The context (1, L, D) of a prompt's own tokens, without the zeros behind them; what is kept of a prompt."""
        context = self([prompt])
        rows = int(context[0].any(dim=-1).nonzero().max()) + 1 if context.any() else 1
        return {"context": context[:, :rows].contiguous()}

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Context (B, 512, D) on the module's device."""
        ids, mask = (tensor.to(self.module.shared.weight.device) for tensor in self.tokenize(prompts))
        states = self.module(ids, attention_mask=mask).last_hidden_state * mask[..., None]  # (B, L, D)
        return pad_context(states)


def pad_context(states: Tensor) -> Tensor:
    """(B, L, D) -> (B, 512, D): zeros behind."""
    return torch.nn.functional.pad(states, (0, 0, 0, MAX_TOKENS - states.shape[1]))
