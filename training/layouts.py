"""Writes checkpoints of networks of any size, and tokenizers, in the published layouts."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from skyreels_v3.checkpoints.files import MAIN_FILES
from skyreels_v3.checkpoints.save import native
from skyreels_v3.hunyuan.conditioning import CLIP_TOKENS
from skyreels_v3.wan import key_maps
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

SEED = 20260  # of all random networks
# Minimal sizes, for networks that are constructed or whose values do not matter
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CLIP_TOKENS,
}
IMAGE_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
AUDIO_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "conv_dim": [16] * 7,
}
SCHEDULER = {"shift": 7.0}

# Llama's tokenizer is of the published kind, with bytes and the whole words of diffusers' prompt template, so that the
# template has as many tokens as with the published tokenizer: diffusers relies on that number.
PIECES = r" ?[A-Za-z]+|\n+|."  # words with a leading space, line ends, single characters
SPECIAL_TOKEN = r"<\|\w+\|>"  # special tokens of the chat format
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
SPACE = "\u2581"  # the beginning of a word, to UMT5's tokenizer
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def random_model(build: Callable[[], nn.Module]) -> Any:
    """A network with random weights, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, tied ones once."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def save(model: Any, folder: Path) -> None:
    """Write a transformers model to a new folder; `save_pretrained` would show a progress bar."""
    model.config.save_pretrained(folder)
    save_file(weights(model), folder / "model.safetensors", metadata={"format": "pt"})


# V3


def write_native_transformer(folder: Path, transformer: SkyReelsTransformer3DModel) -> None:
    """Write a transformer under Wan-native names."""
    config = transformer.config
    avatar = config["audio_dim"] is not None
    values = config | {"dim": config["num_attention_heads"] * config["attention_head_dim"]}
    sizes = {theirs: values[ours] for theirs, ours in key_maps.NATIVE_SIZES.items() if avatar or "audio" not in ours}
    folder.mkdir(exist_ok=True)
    save_file(native(weights(transformer), key_maps.NATIVE_TRANSFORMER), folder / MAIN_FILES[0])
    more = {"eps": config["eps"], "model_type": "i2v" if avatar else "t2v", "text_len": 512}
    (folder / "config.json").write_text(json.dumps(sizes | more, indent=2), encoding="utf-8")


def random_image_encoder() -> CLIPVisionModel:
    """CLIP's image encoder with random weights."""
    return cast(CLIPVisionModel, random_model(lambda: CLIPVisionModel(CLIPVisionConfig(**cast(Any, IMAGE_ENCODER)))))


def write_native_image_encoder(file: Path, model: CLIPVisionModel) -> None:
    """Write CLIP's image encoder under native names, in which two embeddings have leading axes of size 1."""
    tensors = native(weights(model), key_maps.NATIVE_IMAGE_ENCODER)
    tensors["visual.cls_embedding"] = tensors["visual.cls_embedding"][None, None]
    tensors["visual.pos_embedding"] = tensors["visual.pos_embedding"][None]
    torch.save(tensors, file)


def write_umt5_tokenizer(folder: Path, pieces: Mapping[str, float]) -> None:
    """Write a tokenizer of pieces with scores, in UMT5's format."""
    tokenizer = Tokenizer(Unigram([*pieces.items()], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    config |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", config)


def umt5_characters() -> list[str]:
    """The special pieces of UMT5's vocabulary, and single ASCII characters."""
    return ["<pad>", "</s>", "<unk>", SPACE, *(c for c in string.printable if c.isprintable() and c != " ")]


# V1


def random_clip() -> CLIPTextModel:
    """CLIP with random weights, for the tokenizer below."""
    vocabulary = clip_vocabulary()
    begin, end = vocabulary[CLIP_BEGIN], vocabulary[CLIP_END]
    special = {"vocab_size": len(vocabulary), "bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    config = CLIPTextConfig(**cast(dict[str, Any], special | CLIP))
    return cast(CLIPTextModel, random_model(lambda: CLIPTextModel(config)))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_llama_tokenizer(folder: Path, pieces: Mapping[str, int]) -> None:
    """Write a tokenizer of pieces that falls back to bytes, in Llama 3's format."""
    template = str(DEFAULT_PROMPT_TEMPLATE["template"])
    marks = [BEGIN, END, PAD, *sorted(set(re.findall(SPECIAL_TOKEN, template)))]
    tokenizer = Tokenizer(BPE(dict(pieces), [], ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, BYTES])
    tokenizer.decoder = decoders.ByteLevel()
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def llama_template() -> str:
    """diffusers' prompt template without its special tokens."""
    return re.sub(SPECIAL_TOKEN, "", str(DEFAULT_PROMPT_TEMPLATE["template"]))


def llama_vocabulary(text: str) -> dict[str, int]:
    """All bytes, in their byte-level encoding, and the pieces of a text."""
    pieces = [BYTES.pre_tokenize_str(piece)[0][0] for piece in re.findall(PIECES, text)]
    known = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    return {piece: number for number, piece in enumerate(known)}


def clip_vocabulary() -> dict[str, int]:
    """All bytes, in their byte-level encoding, inside a word and at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), CLIP_BEGIN, CLIP_END]
    return {piece: number for number, piece in enumerate(pieces)}


def write_clip_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single characters, in CLIP's format."""
    folder.mkdir()
    write_json(folder / "vocab.json", clip_vocabulary())
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": CLIP_BEGIN, "eos_token": CLIP_END, "pad_token": CLIP_END, "unk_token": CLIP_END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS, **special}
    write_json(folder / "tokenizer_config.json", config)
