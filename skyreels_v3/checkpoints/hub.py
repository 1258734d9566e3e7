"""Where a checkpoint is: a local folder, checked, or a hub that it is downloaded from. No torch.

Only the files that the task needs are fetched, downloads resume where they broke off, and a second run finds them in
the hub's own cache.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import struct
import zipfile
from collections.abc import Container
from pathlib import Path

from skyreels_v3.checkpoints.key_maps import NATIVE_CONFIG
from skyreels_v3.errors import CheckpointError, UserError
from skyreels_v3.tasks import GenerationRequest, TaskSpec

logger = logging.getLogger(__name__)

NATIVE_VAE_FILE = "Wan2.1_VAE.pth"
NATIVE_TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_TOKENIZER = "google/umt5-xxl"
TINY = "tiny"  # the embedded model, made on the spot
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")


def locate(request: GenerationRequest) -> Path | None:
    """The folder of a checkpoint that is on this machine, checked; None for one that must be fetched from its hub."""
    folder = Path(request.model_id).expanduser()
    if folder.is_dir():
        check_folder(folder, request.task)
        return folder
    if folder.exists():
        raise UserError("--model_id", f"{request.model_id} is a file; give a checkpoint's folder or a hub id")
    if not HUB_ID.fullmatch(request.model_id):
        raise UserError(
            "--model_id",
            f"{request.model_id} is neither a folder nor a hub id; give a folder, an id such as "
            f"{request.task.model_id}, or {TINY}",
        )
    if request.model_source == "modelscope" and importlib.util.find_spec("modelscope") is None:
        raise UserError("--model_source", "modelscope needs its package: pip install modelscope")
    return None


def download(request: GenerationRequest) -> Path:
    """Fetch the files that the task needs and return their folder.

    Raises:
        UserError: the hub cannot be reached, or does not have the model; says what to do.
    """
    patterns = download_patterns(request.task)
    logger.info("fetching %s from %s: %s", request.model_id, request.model_source, ", ".join(patterns))
    try:
        if request.model_source == "modelscope":
            from modelscope import snapshot_download
        else:
            from huggingface_hub import snapshot_download
        folder = Path(snapshot_download(request.model_id, allow_patterns=patterns))
    except Exception as error:  # the hubs' clients raise anything from OSError to their HTTP library's own errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            "--model_id",
            f"{request.model_id} could not be fetched from {request.model_source} ({reason}). Check the id and the "
            "connection; try --model_source modelscope (or huggingface), or download it elsewhere and give its folder",
        ) from error
    check_folder(folder, request.task)
    return folder


def download_patterns(task: TaskSpec) -> list[str]:
    """Glob patterns of the repository's files that `task` needs."""
    if task.layout == "diffusers":
        folders = (task.transformer_folder, "vae", "text_encoder", "tokenizer")
        return ["model_index.json", *(f"{folder}/*" for folder in folders)]
    return [f"{task.transformer_folder}/*", NATIVE_VAE_FILE, NATIVE_TEXT_ENCODER_FILE, f"{NATIVE_TOKENIZER}/*"]


def check_folder(folder: Path, task: TaskSpec) -> None:
    """Raise CheckpointError when a file that `task` needs is missing from `folder` or cut off."""
    transformer = folder / task.transformer_folder
    if task.layout == "diffusers":
        models, files, tokenizer = [transformer, folder / "vae", folder / "text_encoder"], [], folder / "tokenizer"
    else:
        models, tokenizer = [transformer], folder / NATIVE_TOKENIZER
        files = [folder / NATIVE_VAE_FILE, folder / NATIVE_TEXT_ENCODER_FILE]
    configs = [model / "config.json" for model in models]
    missing = [str(path.relative_to(folder)) for path in (*configs, *files) if not path.is_file()]
    missing += [
        f"{m.relative_to(folder)}/*.safetensors" for m in models if m.is_dir() and not any(m.glob("*.safetensors"))
    ]
    if not any((tokenizer / name).is_file() for name in TOKENIZER_FILES[:2]):
        missing.append(f"{tokenizer.relative_to(folder)}/{TOKENIZER_FILES[0]}")
    if missing:
        raise CheckpointError(
            f"{folder} is not a {task.name} checkpoint: missing {', '.join(missing)}; "
            f"the files are those of {task.model_id}"
        )
    for model in models:
        for file in weight_files(model):
            check_safetensors(file)
    for file in files:
        check_pickle(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: the shards that its index names, or the one file."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return indexed_files(index)
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()] or sorted(
        folder.glob("*.safetensors")
    )
    if len(files) != 1:
        raise CheckpointError(f"{folder} holds {len(files)} safetensors files and no index; expected {WEIGHT_FILES[0]}")
    return files


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; raises CheckpointError when one is missing."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of shards; download it again") from error
    if missing := [str(file) for file in files if file.parent != index.parent or not file.is_file()]:
        raise CheckpointError(f"missing shards {', '.join(missing)}; download them again")
    return files


def transformer_config(folder: Path, names: Container[str]) -> dict[str, int]:
    """The entries of a transformer's config.json, native or diffusers, that are among our `names`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    renamed = {NATIVE_CONFIG.get(key) or key: value for key, value in config.items()}
    if "dim" in config:
        renamed["attention_head_dim"] = config["dim"] // config["num_heads"]
    return {key: value for key, value in renamed.items() if key in names}


def stored_bytes(folder: Path, task: TaskSpec) -> tuple[int, int]:
    """Bytes on disk of the text encoder and the VAE of a checked folder."""
    if task.layout == "diffusers":
        components = [weight_files(folder / "text_encoder"), weight_files(folder / "vae")]
    else:
        components = [[folder / NATIVE_TEXT_ENCODER_FILE], [folder / NATIVE_VAE_FILE]]
    text_encoder, vae = (sum(file.stat().st_size for file in files) for files in components)
    return text_encoder, vae


def check_safetensors(file: Path) -> None:
    """Raise CheckpointError when the file's length is not what its own header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (header_size,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(min(header_size, size)))
        data = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no safetensors file; download it again") from error
    if size != 8 + header_size + data:
        raise CheckpointError(
            f"{file} is truncated or damaged ({size} bytes instead of {8 + header_size + data}); download it again"
        )


def check_pickle(file: Path) -> None:
    """Raise CheckpointError when a .pth file is not the complete zip archive that torch writes."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is truncated or no .pth checkpoint; download it again")
