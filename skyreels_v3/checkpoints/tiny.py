"""The built-in toy model: small random checkpoints in the published layouts, for demos and tests.

Made once, in seconds, into the user's cache folder. They go through the same files, key maps and loader as the
published ones, so what works with them is the toolkit; what they paint is noise.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from skyreels_v3.checkpoints import key_maps
from skyreels_v3.checkpoints.hub import NATIVE_TEXT_ENCODER_FILE, NATIVE_TOKENIZER, NATIVE_VAE_FILE
from skyreels_v3.models.transformer import SkyReelsTransformer3DModel
from skyreels_v3.tasks import CONFIG_DIR, TaskSpec, load_yaml

logger = logging.getLogger(__name__)

VERSION = 1  # a new number where the files change, so that an older cache is not taken for them
WEIGHTS = "diffusion_pytorch_model.safetensors"


def cache_folder() -> Path:
    """Where made files are kept: $SKYREELS_CACHE, or skyreels_v3 in the user's cache folder."""
    base = os.environ.get("SKYREELS_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyreels_v3"


def make_tiny(task: TaskSpec) -> Path:
    """The folder of the toy checkpoint that `task` needs, made if it is not there yet."""
    logger.warning("tiny is a toy with random weights: it shows that everything runs, its pictures are noise")
    folder = cache_folder() / f"tiny-{VERSION}" / task.layout
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        (write_diffusers if task.layout == "diffusers" else write_native)(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run has made it meanwhile: the same files
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def tiny_models() -> tuple[SkyReelsTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel]:
    """The toy's networks, the same at every call."""
    sizes = load_yaml(CONFIG_DIR / "tiny.yaml")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes["seed"])
        transformer = SkyReelsTransformer3DModel(**sizes["transformer"])
        vae = AutoencoderKLWan(**sizes["vae"])
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, **sizes["text_encoder"]
            )
        )
    return transformer, vae, text_encoder


def write_diffusers(root: Path) -> None:
    """The diffusers layout, as of the reference-to-video checkpoint."""
    transformer, vae, text_encoder = tiny_models()
    for name, model in (("transformer", transformer), ("vae", vae)):
        (root / name).mkdir()
        save_file(weights(model), root / name / WEIGHTS)
        write_json(root / name / "config.json", published_config(model))
    (root / "text_encoder").mkdir()
    save_file(weights(text_encoder), root / "text_encoder" / "model.safetensors")
    write_json(root / "text_encoder" / "config.json", text_encoder.config.to_dict())
    write_tokenizer(root / "tokenizer", text_encoder.config.vocab_size)
    write_json(root / "model_index.json", {"_class_name": "SkyReelsTiny"})


def write_native(root: Path) -> None:
    """The Wan-native layout, as of the video extension checkpoint; both transformers have the same weights."""
    transformer, vae, text_encoder = tiny_models()
    config = transformer.config
    native = {theirs: config[ours] for theirs, ours in key_maps.NATIVE_CONFIG.items() if ours and "audio" not in ours}
    native |= {
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "model_type": "t2v",
        "text_len": 512,
    }
    for name in ("transformer", "shot_transformer"):
        (root / name).mkdir()
        save_file(rename_back(weights(transformer), key_maps.NATIVE_TRANSFORMER), root / name / WEIGHTS)
        write_json(root / name / "config.json", native)
    torch.save(rename_back(weights(vae), key_maps.NATIVE_VAE), root / NATIVE_VAE_FILE)
    torch.save(rename_back(weights(text_encoder), key_maps.NATIVE_TEXT_ENCODER), root / NATIVE_TEXT_ENCODER_FILE)
    write_tokenizer(root / NATIVE_TOKENIZER, text_encoder.config.vocab_size)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, tied ones once."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def rename_back(tensors: dict[str, Tensor], key_map: key_maps.KeyMap) -> dict[str, Tensor]:
    """Tensors under the names that the published file has for them."""
    inverse = key_maps.invert(key_map)
    return {str(key_maps.translate(name, inverse)): tensor for name, tensor in tensors.items()}


def published_config(model: Any) -> dict[str, Any]:
    """A diffusers config without what the published one does not have."""
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("audio")}
    return {"_class_name": type(model).__name__, **config}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=list) + "\n", encoding="utf-8")


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
