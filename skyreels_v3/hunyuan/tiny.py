"""V1's toy checkpoint, with HunyuanVideo's parts in the transformer's folder.

Its Llama tokenizer is of the published kind: bytes, and whole words for diffusers' prompt template. So the template has
as many tokens as with the published tokenizer, a number that diffusers relies on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from skyreels_v3.checkpoints.tiny import SIZES, random_model, save
from skyreels_v3.hunyuan.conditioning import CLIP_TOKENS
from skyreels_v3.tasks import TaskSpec

TINY = SIZES["hunyuan"]
PIECES = r" ?[A-Za-z]+|\n+|."  # words with the space before them, line ends, single characters
MARK = r"<\|\w+\|>"  # special tokens of the chat format
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
GAIN = 1.5  # of the transformer's random matrices: as initialized, the prompt hardly changes the video


def write(root: Path, task: TaskSpec) -> None:
    """Write the toy of a task to an empty folder."""
    sizes = TINY["transformer"] | {"in_channels": task.transformer["in_channels"]}
    transformer = random_model(lambda: HunyuanVideoTransformer3DModel(**sizes))
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(GAIN)
    transformer.save_pretrained(root)
    random_model(lambda: AutoencoderKLHunyuanVideo(**TINY["vae"])).save_pretrained(root / "vae")
    save(random_model(lambda: LlamaModel(LlamaConfig(**TINY["llama"]))), root / "text_encoder")
    save(random_clip(), root / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(**TINY["scheduler"]).save_pretrained(root / "scheduler")
    write_llama_tokenizer(root / "tokenizer")
    write_clip_tokenizer(root / "tokenizer_2")


def random_clip() -> CLIPTextModel:
    """CLIP with random weights, for the tokenizer below."""
    vocabulary = clip_vocabulary()
    begin, end = vocabulary[CLIP_BEGIN], vocabulary[CLIP_END]
    special = {"vocab_size": len(vocabulary), "bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    config = CLIPTextConfig(**cast(dict[str, Any], special | TINY["clip"]))
    return cast(CLIPTextModel, random_model(lambda: CLIPTextModel(config)))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_llama_tokenizer(folder: Path) -> None:
    """A tokenizer in Llama 3's format."""
    template = str(DEFAULT_PROMPT_TEMPLATE["template"])
    marks = [BEGIN, END, PAD, *sorted(set(re.findall(MARK, template)))]
    tokenizer = Tokenizer(BPE(llama_vocabulary(re.sub(MARK, "", template)), [], ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    assert tokenizer.get_vocab_size() <= TINY["llama"]["vocab_size"]
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, BYTES])
    tokenizer.decoder = decoders.ByteLevel()
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def llama_vocabulary(text: str) -> dict[str, int]:
    """All bytes, as the letters that stand for them, and the pieces of a text."""
    pieces = [BYTES.pre_tokenize_str(piece)[0][0] for piece in re.findall(PIECES, text)]
    known = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    return {piece: number for number, piece in enumerate(known)}


def clip_vocabulary() -> dict[str, int]:
    """All bytes, as the letters that stand for them, inside a word and at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), CLIP_BEGIN, CLIP_END]
    return {piece: number for number, piece in enumerate(pieces)}


def write_clip_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters in CLIP's format."""
    folder.mkdir()
    write_json(folder / "vocab.json", clip_vocabulary())
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": CLIP_BEGIN, "eos_token": CLIP_END, "pad_token": CLIP_END, "unk_token": CLIP_END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS, **special}
    write_json(folder / "tokenizer_config.json", config)
