"""V3's toy checkpoints, in both published layouts."""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor

from skyreels_v3.checkpoints.files import MAIN_FILES
from skyreels_v3.checkpoints.key_maps import KeyMap, invert, translate
from skyreels_v3.checkpoints.tiny import SIZES, random_model, save, weights
from skyreels_v3.tasks import TaskSpec
from skyreels_v3.wan import key_maps
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel


def write(root: Path, task: TaskSpec, sizes: dict[str, int]) -> None:
    """Write the toy of a task, with a transformer of `sizes`, to an empty folder."""
    transformer = random_model(lambda: SkyReelsTransformer3DModel(**sizes))
    vae = random_model(lambda: AutoencoderKLWan(**SIZES["vae"]))
    umt5 = transformers.UMT5Config(
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, **SIZES["text_encoder"]
    )
    text_encoder = random_model(lambda: transformers.UMT5EncoderModel(umt5))
    if task.layout == "diffusers":
        transformer.save_pretrained(root / "transformer")
        vae.save_pretrained(root / "vae")
        save(text_encoder, root / "text_encoder")
        write_tokenizer(root / "tokenizer", umt5.vocab_size)
        return
    # the checkpoint of video extension has a transformer for each of its two tasks; here they are equal
    for folder in ["."] if "input_audio" in task.inputs else ["transformer", "shot_transformer"]:
        write_native_transformer(root / folder, transformer)
    torch.save(native(weights(vae), key_maps.NATIVE_VAE), root / key_maps.NATIVE_VAE_FILE)
    torch.save(native(weights(text_encoder), key_maps.NATIVE_TEXT_ENCODER), root / key_maps.NATIVE_TEXT_ENCODER_FILE)
    write_tokenizer(root / key_maps.NATIVE_TOKENIZER, umt5.vocab_size)
    if "input_audio" in task.inputs:
        write_image_encoder(root / key_maps.NATIVE_IMAGE_ENCODER_FILE)
        wav2vec2 = transformers.Wav2Vec2Config(**SIZES["audio_encoder"])
        save(random_model(lambda: transformers.Wav2Vec2Model(wav2vec2)), root / key_maps.AUDIO_ENCODER)


def write_native_transformer(folder: Path, transformer: SkyReelsTransformer3DModel) -> None:
    """A transformer under its native names."""
    config = transformer.config
    avatar = config["audio_dim"] is not None
    values = config | {"dim": config["num_attention_heads"] * config["attention_head_dim"]}
    sizes = {theirs: values[ours] for theirs, ours in key_maps.NATIVE_SIZES.items() if avatar or "audio" not in ours}
    folder.mkdir(exist_ok=True)
    save_file(native(weights(transformer), key_maps.NATIVE_TRANSFORMER), folder / MAIN_FILES[0])
    more = {"eps": config["eps"], "model_type": "i2v" if avatar else "t2v", "text_len": 512}
    (folder / "config.json").write_text(json.dumps(sizes | more, indent=2), encoding="utf-8")


def write_image_encoder(file: Path) -> None:
    """CLIP's image encoder under its native names; two embeddings have leading axes of size 1 there."""
    model = random_model(lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES["image_encoder"])))
    tensors = native(weights(model), key_maps.NATIVE_IMAGE_ENCODER)
    tensors["visual.cls_embedding"] = tensors["visual.cls_embedding"][None, None]
    tensors["visual.pos_embedding"] = tensors["visual.pos_embedding"][None]
    torch.save(tensors, file)


def native(tensors: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Tensors under the names that the published file has for them, and stacked where it stacks them."""
    found: dict[str, list[Tensor]] = {}
    stacked = [(pattern, target) for pattern, target in key_map if isinstance(target, tuple)]
    parts = [tuple((pattern, target[n]) for pattern, target in stacked if n < len(target)) for n in range(3)]
    for inverse in map(invert, (key_map, *parts)):
        for name, tensor in tensors.items():
            with contextlib.suppress(KeyError):  # no way back in this map
                found.setdefault(str(translate(name, inverse)), []).append(tensor)
    return {key: torch.cat(parts) for key, parts in found.items()}


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of single ASCII characters in UMT5's format."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(c for c in string.printable if c.isprintable() and c != " ")]
    assert len(pieces) <= vocabulary
    tokenizer = Tokenizer(Unigram([(piece, 0.0) for piece in pieces], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    config |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
