"""Text encoders that are constructed, not trained: fixed features that distinguish words and include their neighbors.

Synonyms have the same embedding, seeded by their meaning, so it does not depend on the vocabulary. One attention layer
mixes the words around each word into its row: in "a blue fox and a red lantern" the lantern's row has red in it. All
random numbers are numpy's.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, UMT5Config, UMT5EncoderModel

from skyreels_v3.checkpoints.load import load_tokenizer
from skyreels_v3.hunyuan.checkpoint import load_llama_tokenizer
from skyreels_v3.hunyuan.conditioning import HunyuanTextEncoder
from skyreels_v3.wan.conditioning import TextEncoder
from training import captions
from training.layouts import (
    SPACE,
    SPECIAL_TOKEN,
    llama_template,
    llama_vocabulary,
    random_clip,
    umt5_characters,
    write_clip_tokenizer,
    write_llama_tokenizer,
)
from training.layouts import write_umt5_tokenizer as write_pieces

WIDTH, HEADS = 64, 4
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 512,
}
STRESS = 8.0  # how much an attention head prefers its neighbor to other tokens
CONSTANT = 8.0  # the first value of every Llama embedding, which replaces biases


def embedding_of(piece: str) -> np.ndarray:
    """The embedding (WIDTH,) of a piece of text, shared by its synonyms."""
    meaning = captions.meaning_of(piece.replace(SPACE, "").strip()) or piece
    return np.random.default_rng([19, zlib.crc32(meaning.encode())]).standard_normal(WIDTH)


def matrix(number: int, rows: int = WIDTH, columns: int = WIDTH) -> torch.Tensor:
    """A random matrix that preserves the scale of its input."""
    values = np.random.default_rng([23, number]).standard_normal((rows, columns)) / math.sqrt(columns)
    return torch.from_numpy(values)


def word_forms() -> list[str]:
    """All words, as written within a sentence and at its beginning."""
    words = captions.vocabulary()
    return list(dict.fromkeys([*words, *(word.capitalize() for word in words), "FPS"]))


# V3: UMT5


def umt5_pieces() -> list[str]:
    """The vocabulary: special tokens, single characters, words."""
    words = [f"{SPACE}{word}" for word in (*word_forms(), *captions.TAGS)]
    return list(dict.fromkeys([*umt5_characters(), *words]))


def write_umt5_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words that falls back to characters."""
    pieces = umt5_pieces()
    write_pieces(folder, {piece: -1.0 if len(piece) > 1 and piece.startswith(SPACE) else -9.0 for piece in pieces})


def umt5_module() -> UMT5EncoderModel:
    """One layer whose four heads attend to the three words before and the one after."""
    pieces = umt5_pieces()
    config = UMT5Config(
        vocab_size=len(pieces),
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=16,
        num_layers=1,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = UMT5EncoderModel(config)
    attention = model.encoder.block[0].layer[0].SelfAttention
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    behind = config.relative_attention_num_buckets // 2
    with torch.no_grad():
        for part in (attention.q, attention.k, feed_forward.wi_0, feed_forward.wi_1, feed_forward.wo):
            part.weight.zero_()
        attention.v.weight.copy_(matrix(1))
        attention.o.weight.copy_(matrix(2))
        attention.relative_attention_bias.weight.zero_()
        for head, bucket in enumerate((1, 2, 3, behind + 1)):
            attention.relative_attention_bias.weight[bucket, head] = STRESS
        model.shared.weight.copy_(torch.from_numpy(np.stack([embedding_of(piece) for piece in pieces])))
        model.shared.weight[0].zero_()
    return model.eval().requires_grad_(False)


def text_encoder(tokenizer: Path) -> TextEncoder:
    """V3's text encoder in the pipelines' wrapper; writes the tokenizer's folder if it is missing."""
    if not tokenizer.is_dir():
        write_umt5_tokenizer(tokenizer)
    return TextEncoder(umt5_module(), load_tokenizer(tokenizer, AutoTokenizer))


# V1: Llama and CLIP


def llama_pieces() -> dict[str, int]:
    """Bytes, the words of diffusers' prompt template, and the world's words with and without a leading space."""
    words = [word for word in word_forms() if word.isalpha()]
    tags = [part for tag in captions.TAGS for part in re.findall(r"[A-Za-z]+", tag)]
    return llama_vocabulary(llama_template() + "".join(f"\n{word}\n {word}" for word in (*words, *tags)))


def llama_module() -> LlamaModel:
    """Three layers of which only the first has an effect: its heads attend to the four words before.

    The transformer is given that layer's output. Rotary positions: a head with the same query everywhere, and with the
    query rotated by n positions as its key, attends n positions back.
    """
    pieces = list(llama_pieces())
    marks = 3 + len(set(re.findall(SPECIAL_TOKEN, DEFAULT_PROMPT_TEMPLATE["template"])))
    model = LlamaModel(LlamaConfig(vocab_size=len(pieces) + marks, use_cache=False, **LLAMA))
    half = WIDTH // HEADS // 2
    speeds = 10000.0 ** (-np.arange(half) / half)
    query, key = np.zeros((HEADS, 2 * half)), np.zeros((HEADS, 2 * half))
    for head in range(HEADS):
        query[head, :half] = STRESS
        key[head, :half], key[head, half:] = STRESS * np.cos((head + 1) * speeds), STRESS * np.sin((head + 1) * speeds)
    rows = np.stack([embedding_of(piece.replace("\u0120", " ")) for piece in [*pieces, *map(str, range(marks))]])
    rows[:, 0] = CONSTANT
    normed = CONSTANT / math.sqrt((CONSTANT**2 + WIDTH - 1) / WIDTH)
    with torch.no_grad():
        for layer in model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.o_proj):
                part.weight.zero_()
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                part.weight.zero_()
            layer.self_attn.v_proj.weight.copy_(matrix(3))
        attention = model.layers[0].self_attn
        attention.q_proj.weight[:, 0] = torch.from_numpy(query.ravel() / normed)
        attention.k_proj.weight[:, 0] = torch.from_numpy(key.ravel() / normed)
        attention.v_proj.weight[:, 0] = 0
        attention.o_proj.weight.copy_(matrix(4) * 1.5)
        attention.o_proj.weight[0] = 0
        model.embed_tokens.weight.copy_(torch.from_numpy(rows))
    return model.eval().requires_grad_(False)


def hunyuan_text_encoder(folder: Path) -> HunyuanTextEncoder:
    """V1's text encoders in the pipeline's wrapper; writes the tokenizers' folders if they are missing."""
    llama, clip = folder / "tokenizer", folder / "tokenizer_2"
    if not llama.is_dir():
        write_llama_tokenizer(llama, llama_pieces())
    if not clip.is_dir():
        write_clip_tokenizer(clip)
    tokenizer, clip_tokenizer = load_llama_tokenizer(llama), load_tokenizer(clip, AutoTokenizer)
    return HunyuanTextEncoder(llama_module(), tokenizer, random_clip().eval(), clip_tokenizer)
