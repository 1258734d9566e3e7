"""The built-in toy model: small random checkpoints in the published layouts, for demos and tests.

Made once, in seconds, into the user's cache folder. They go through the same files, key maps and loader as the
published ones, so what works with them is the toolkit; what they paint is noise.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import string
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from skyreels_v3.cache import cache_folder
from skyreels_v3.checkpoints import key_maps
from skyreels_v3.checkpoints.hub import (
    AUDIO_ENCODER,
    AUDIO_WEIGHT_FILES,
    NATIVE_IMAGE_ENCODER_FILE,
    NATIVE_TEXT_ENCODER_FILE,
    NATIVE_TOKENIZER,
    NATIVE_VAE_FILE,
)
from skyreels_v3.checkpoints.tiny import SIZES, WEIGHTS, toy, weights, write_json
from skyreels_v3.hunyuan.tiny import write_hunyuan
from skyreels_v3.media.files import follow_umask
from skyreels_v3.tasks import TaskSpec
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

logger = logging.getLogger(__name__)

VERSION = 1  # a new number where the files change, so that an older cache is not taken for them


def make_tiny(task: TaskSpec) -> Path:
    """The folder of the toy checkpoint that `task` needs, made if it is not there yet."""
    logger.warning("tiny is a toy with random weights: it shows that everything runs, its pictures are noise")
    name, write = next(entry for known, entry in WRITERS.items() if known in (*task.inputs, task.name))
    folder = cache_folder() / f"tiny-{VERSION}" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        write(temporary)
        follow_umask(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run has made it meanwhile: the same files
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def toy_transformer(**changes: int) -> SkyReelsTransformer3DModel:
    return toy(lambda: SkyReelsTransformer3DModel(**(SIZES["transformer"] | changes)))


def toy_vae() -> AutoencoderKLWan:
    return toy(lambda: AutoencoderKLWan(**SIZES["vae"]))


def toy_text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, **SIZES["text_encoder"]
    )
    return toy(lambda: UMT5EncoderModel(config))


def write_reference(root: Path) -> None:
    """The diffusers layout of the reference-to-video checkpoint."""
    for name, model in (("transformer", toy_transformer()), ("vae", toy_vae())):
        (root / name).mkdir()
        save_file(weights(model), root / name / WEIGHTS)
        write_json(root / name / "config.json", published_config(model))
    text_encoder = toy_text_encoder()
    (root / "text_encoder").mkdir()
    save_file(weights(text_encoder), root / "text_encoder" / "model.safetensors")
    write_json(root / "text_encoder" / "config.json", text_encoder.config.to_dict())
    write_tokenizer(root / "tokenizer", text_encoder.config.vocab_size)
    write_json(root / "model_index.json", {"_class_name": "SkyReelsTiny"})


def write_extension(root: Path) -> None:
    """The Wan-native layout of the video extension checkpoint; both transformers have the same weights."""
    for name in ("transformer", "shot_transformer"):
        write_native_transformer(root / name, toy_transformer(), "t2v")
    write_native_parts(root)


def write_avatar(root: Path) -> None:
    """The flat Wan-native layout of the talking avatar checkpoint."""
    write_native_transformer(root, toy_transformer(**SIZES["avatar_transformer"]), "i2v")
    write_native_parts(root)
    image_encoder = weights(toy(lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES["image_encoder"]))))
    native = rename_back(image_encoder, key_maps.NATIVE_IMAGE_ENCODER)
    native["visual.cls_embedding"] = native["visual.cls_embedding"][None, None]
    native["visual.pos_embedding"] = native["visual.pos_embedding"][None]
    torch.save(native, root / NATIVE_IMAGE_ENCODER_FILE)
    audio_encoder = toy(lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES["audio_encoder"])))
    (root / AUDIO_ENCODER).mkdir()
    save_file(weights(audio_encoder), root / AUDIO_ENCODER / AUDIO_WEIGHT_FILES[0])
    write_json(root / AUDIO_ENCODER / "config.json", audio_encoder.config.to_dict())


def write_native_transformer(folder: Path, transformer: SkyReelsTransformer3DModel, model_type: str) -> None:
    """A transformer under its native names."""
    config = transformer.config
    known = {theirs: ours for theirs, ours in key_maps.NATIVE_CONFIG.items() if ours}
    if config["audio_dim"] is None:
        known = {theirs: ours for theirs, ours in known.items() if "audio" not in ours}
    sizes = {theirs: config[ours] for theirs, ours in known.items()}
    sizes["dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    folder.mkdir(exist_ok=True)
    save_file(rename_back(weights(transformer), key_maps.NATIVE_TRANSFORMER), folder / WEIGHTS)
    write_json(folder / "config.json", {**sizes, "model_type": model_type, "text_len": 512})


def write_native_parts(root: Path) -> None:
    """What all Wan-native layouts share: VAE, text encoder and tokenizer."""
    text_encoder = toy_text_encoder()
    torch.save(rename_back(weights(toy_vae()), key_maps.NATIVE_VAE), root / NATIVE_VAE_FILE)
    torch.save(rename_back(weights(text_encoder), key_maps.NATIVE_TEXT_ENCODER), root / NATIVE_TEXT_ENCODER_FILE)
    write_tokenizer(root / NATIVE_TOKENIZER, text_encoder.config.vocab_size)


def rename_back(tensors: dict[str, Tensor], key_map: key_maps.KeyMap) -> dict[str, Tensor]:
    """Tensors under the names that the published file has for them, and stacked where it stacks them."""
    native: dict[str, list[Tensor]] = {}
    maps = [key_maps.invert(key_map), *(key_maps.invert(key_maps.part(key_map, number)) for number in range(3))]
    for inverse in maps:
        for name, tensor in tensors.items():
            with contextlib.suppress(KeyError):  # no way back in this map
                native.setdefault(str(key_maps.translate(name, inverse)), []).append(tensor)
    return {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in native.items()}


def published_config(model: Any) -> dict[str, Any]:
    """A diffusers config without what the published one does not have."""
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("audio")}
    return {"_class_name": type(model).__name__, **config}


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of single ASCII characters, in the format of UMT5's."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(c for c in string.printable if c.isprintable() and c != " ")]
    assert len(pieces) <= vocabulary
    tokenizer = Tokenizer(Unigram([(piece, 0.0) for piece in pieces], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **special})


# by the input that a task is known by, or its name: the checkpoint's name and who writes it
WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "ref_imgs": ("reference_to_video", write_reference),
    "input_video": ("video_extension", write_extension),
    "input_audio": ("talking_avatar", write_avatar),
    "t2v": ("text_to_video", partial(write_hunyuan, in_channels=16)),
    "i2v": ("image_to_video", partial(write_hunyuan, in_channels=32)),
}
