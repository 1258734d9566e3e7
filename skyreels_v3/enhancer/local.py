"""Rewrites a prompt with a vision-language model on this machine, which is loaded for it and freed afterwards."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PretrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.logging import disable_progress_bar

from skyreels_v3.checkpoints.hub import ENHANCER
from skyreels_v3.enhancer.question import EnhancerError, Question
from skyreels_v3.errors import UserError, cause_of
from skyreels_v3.parallel.ranks import ranks_of
from skyreels_v3.request import GenerationRequest
from skyreels_v3.runtime import collect_garbage, likely_device

logger = logging.getLogger(__name__)

MAX_TOKENS = 512  # of an answer
WORKSPACE = 2 << 30  # bytes in addition to the weights
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # runs no code from the model's folder


def ask_local(folder: Path, request: GenerationRequest, question: Question) -> str:
    """The answer of the model in a folder.

    Raises:
        UserError: the model cannot be loaded.
        EnhancerError: the answer is incomplete, or this machine cannot run the model.
    """
    device = choose_device(folder, request)
    disable_progress_bar()
    logger.info("asking %s on %s for a better prompt", folder, device)
    try:
        config = AutoConfig.from_pretrained(folder, **SAFE)
        processor = load_processor(folder, config)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, config=config, dtype="auto", use_safetensors=True, output_loading_info=True, **SAFE
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"no weights for {missing[0]}")
    except Exception as error:  # libraries raise anything for a folder that is not a model
        reason = f"{folder} is not a vision-language model that transformers can load ({cause_of(error)})"
        raise UserError("--enhancer_model", f"{reason}; give such a model, for example {ENHANCER.model_id}") from error
    try:
        return generate(model.to(device), processor, question)
    except EnhancerError:
        raise
    except Exception as error:  # out of memory, or anything that the model's template raises
        problem = cause_of(error)
    finally:
        del model
        collect_garbage()
    raise EnhancerError(problem)  # only now: the first error keeps the model alive


def choose_device(folder: Path, request: GenerationRequest) -> torch.device:
    """The request's device, or the CPU if the device has too little free memory."""
    name = likely_device(request)
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks = ranks_of(os.environ)
    device = torch.device("cuda", ranks.local_rank if ranks.local_world_size > 1 else torch.cuda.current_device())
    needed = sum(file.stat().st_size for file in ENHANCER.weights(folder, "enhancer")) + WORKSPACE
    if torch.cuda.mem_get_info(device)[0] >= needed:
        return device
    logger.info("the enhancer needs %.1f GB, more than is free on %s", needed / 1e9, device)
    return torch.device("cpu")


def load_processor(folder: Path, config: PretrainedConfig) -> ProcessorMixin:
    """The model's processor without its video processor, which needs torchvision; only pictures are used."""
    whole: Any = PROCESSOR_MAPPING.get(type(config), None)
    if whole is None or "video_processor" not in whole.get_attributes():
        return AutoProcessor.from_pretrained(folder, **SAFE)

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        whole.__init__(self, image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    pictures_only: Any = type(whole.__name__, (whole,), {"__init__": init})
    return pictures_only.from_pretrained(folder, **SAFE)


@torch.inference_mode()
def generate(model: Any, processor: Any, question: Question) -> str:
    """The model's answer by greedy decoding; raises EnhancerError if it is too long."""
    content = [{"type": "image", "url": url} for url in question.urls]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": question.rules}]},
        {"role": "user", "content": [*content, {"type": "text", "text": question.prompt}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=ends, pad_token_id=own.pad_token_id
    )
    made = model.generate(**inputs, generation_config=greedy)[0, inputs["input_ids"].shape[1] :]
    if int(made[-1]) not in ends:
        raise EnhancerError(f"the answer does not end within {MAX_TOKENS} tokens")
    return str(processor.decode(made, skip_special_tokens=True))
