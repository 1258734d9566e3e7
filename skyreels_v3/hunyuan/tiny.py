"""The built-in toy model in the published layout of SkyReels V1, HunyuanVideo's parts in the transformer's folder.

Its Llama tokenizer is of the kind of the published one: bytes, and whole words where the library's request to describe
a video has them. So the request has as many tokens as in the published one, which the library counts on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from skyreels_v3.checkpoints.tiny import SIZES, WEIGHTS, toy, weights, write_json

HUNYUAN = SIZES["hunyuan"]
PIECES = r" ?[A-Za-z]+|\n+|."  # of a text: words with the space before them, line ends, single characters
MARK = r"<\|\w+\|>"  # of a chat's parts
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_TOKENS = 77
PARTS = {  # of the library's pipeline, and where it finds their classes
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "LlamaModel"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
}
GAIN = 1.5  # of the transformer's random matrices: as they are made, a prompt hardly reaches the picture


def write_hunyuan(root: Path, in_channels: int) -> None:
    """The transformer in `root`, 16 input channels for text to video and 32 for image to video; the rest beside it."""
    write_model(root, toy_hunyuan_transformer(in_channels), WEIGHTS)
    write_model(root / "vae", toy(lambda: AutoencoderKLHunyuanVideo(**HUNYUAN["vae"])), WEIGHTS)
    (root / "scheduler").mkdir()
    scheduler = FlowMatchEulerDiscreteScheduler(**HUNYUAN["scheduler"])
    write_json(root / "scheduler" / "scheduler_config.json", described(scheduler))
    write_model(root / "text_encoder", toy(lambda: LlamaModel(LlamaConfig(**HUNYUAN["llama"]))), "model.safetensors")
    write_llama_tokenizer(root / "tokenizer")
    write_model(root / "text_encoder_2", toy_clip(), "model.safetensors", prefix="text_model.")
    write_clip_tokenizer(root / "tokenizer_2")
    write_json(root / "model_index.json", {"_class_name": "HunyuanVideoPipeline", **PARTS})


def toy_hunyuan_transformer(in_channels: int) -> HunyuanVideoTransformer3DModel:
    model = toy(lambda: HunyuanVideoTransformer3DModel(**HUNYUAN["transformer"], in_channels=in_channels))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(GAIN)
    return model


def toy_clip() -> CLIPTextModel:
    vocabulary = clip_vocabulary()
    begin, end = vocabulary[CLIP_BEGIN], vocabulary[CLIP_END]
    special = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    return toy(lambda: CLIPTextModel(CLIPTextConfig(vocab_size=len(vocabulary), **special, **HUNYUAN["clip"])))


def write_model(folder: Path, model: nn.Module, file: str, prefix: str = "") -> None:
    """A network's weights and sizes; `prefix`: what the published names begin with."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{prefix}{name}": tensor for name, tensor in weights(model).items()}
    save_file(tensors, folder / file, metadata={"format": "pt"})
    config: Any = model.config
    write_json(folder / "config.json", config.to_dict() if hasattr(config, "to_dict") else described(model))


def described(part: Any) -> dict[str, Any]:
    """The config of one of diffusers' parts, with its class."""
    return {"_class_name": type(part).__name__, **part.config}


def write_llama_tokenizer(folder: Path) -> None:
    """A tokenizer in the format of Llama 3's."""
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    marks = [BEGIN, END, PAD, *sorted(set(re.findall(MARK, template)))]
    tokenizer = Tokenizer(BPE(llama_vocabulary(re.sub(MARK, "", template)), [], ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    assert tokenizer.get_vocab_size() <= HUNYUAN["llama"]["vocab_size"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def llama_vocabulary(text: str) -> dict[str, int]:
    """All bytes, in the letters that stand for them, and the pieces of a text."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [bytes_of.pre_tokenize_str(piece)[0][0] for piece in re.findall(PIECES, text)]
    known = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    return {piece: number for number, piece in enumerate(known)}


def clip_vocabulary() -> dict[str, int]:
    """All bytes, in the letters that stand for them, within a word and at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), CLIP_BEGIN, CLIP_END]
    return {piece: number for number, piece in enumerate(pieces)}


def write_clip_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters in the format of CLIP's."""
    folder.mkdir()
    write_json(folder / "vocab.json", clip_vocabulary())
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": CLIP_BEGIN, "eos_token": CLIP_END, "pad_token": CLIP_END, "unk_token": CLIP_END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS, **special}
    write_json(folder / "tokenizer_config.json", config)
