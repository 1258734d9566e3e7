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
    """Fix the encoding, unescape HTML entities (twice: they come doubly escaped), collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """Prompts to context rows, as the transformers were trained: padding rows are zero, not the padding's states."""

    def __init__(self, module: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.module = module
        self.tokenizer = tokenizer

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, which can be streamed."""
        return cast(Sequence[nn.Module], self.module.encoder.block)

    def tokenize(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1, L) of the cleaned prompt, L <= 512."""
        text = clean_prompt(prompt)
        length = len(self.tokenizer(text, verbose=False).input_ids)
        if length > MAX_TOKENS:
            logger.warning("the prompt has %d tokens; only the first %d are used", length, MAX_TOKENS)
        batch = self.tokenizer([text], truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    @torch.inference_mode()
    def encode(self, prompt: str) -> dict[str, Tensor]:
        """The context (1, L, D) of the prompt's own tokens, without the zeros behind them; small enough to store."""
        ids, mask = (tensor.to(self.module.shared.weight.device) for tensor in self.tokenize(prompt))
        return {"context": self.module(ids, attention_mask=mask).last_hidden_state}


def pad_context(states: Tensor) -> Tensor:
    """(B, L, D) -> (B, 512, D), with zeros at the end."""
    return torch.nn.functional.pad(states, (0, 0, 0, MAX_TOKENS - states.shape[1]))
