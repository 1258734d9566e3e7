"""Where a checkpoint or a LoRA is: on this machine, checked, or on a hub that it is downloaded from. No torch.

Only the files that the task needs are fetched, an interrupted download goes on with the files that were not complete,
and a second run finds them in the hub's own cache.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import logging
import os
import re
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from skyreels_v3.checkpoints.key_maps import NATIVE_CONFIG
from skyreels_v3.console import say
from skyreels_v3.errors import CheckpointError, UserError, shown
from skyreels_v3.memory.policy import SCALE
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import HUNYUAN, LATENT_CHANNELS, TASK_NAMES, TINY, TaskSpec, task_spec

logger = logging.getLogger(__name__)

NATIVE_VAE_FILE = "Wan2.1_VAE.pth"
NATIVE_TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_TOKENIZER = "google/umt5-xxl"
NATIVE_IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
AUDIO_ENCODER = "chinese-wav2vec2-base"
AUDIO_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CACHES = {"huggingface": "HF_HOME", "modelscope": "MODELSCOPE_CACHE"}  # what says where hubs' clients keep files
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as in the library that reads it
BASE_MODELS = ("text_encoder", "text_encoder_2", "vae")  # folders of what V1 takes from HunyuanVideo
BASE_TOKENIZERS = ("tokenizer", "tokenizer_2")
BASE_SCHEDULER = "scheduler/scheduler_config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
TOKENIZER_FILE = "tokenizer.json"
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # as diffusers and PEFT call theirs
LIST_SECONDS = 10.0
LORA_CONFIG = "adapter_config.json"
OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *OTHER_FORMATS)
HUB_LORA = re.compile(rf"({HUB_ID.pattern})(?:/((?:[^/.][^/]*/)*[^/.][^/]*\.safetensors))?", re.ASCII)
LORA_REMEDY = "give a .safetensors file, a folder with one, or a hub id: OWNER/NAME or OWNER/NAME/FILE.safetensors"


def locate(request: GenerationRequest) -> Path | None:
    """The folder of a checkpoint that is on this machine, checked; None for one that must be fetched from its hub."""
    remedy = f"give a folder, an id such as {request.task.model_id}, or {TINY}"
    folder = local_folder(request.model_id, "--model_id", remedy)
    if folder is not None:
        check_folder(folder, request.task)
        return folder
    refuse_other_tasks(request)
    check_client(request)
    return None


def locate_base(request: GenerationRequest, checkpoint: Path | None) -> Path | None:
    """The folder of V1's other components, checked; None if they must be fetched or made.

    Args:
        checkpoint: that of the transformer, which may have them beside it; None if that must be fetched or made.
    """
    if request.base_model_id is None:
        beside = checkpoint is not None and all((checkpoint / name).is_dir() for name in BASE_MODELS)
        if beside:
            assert checkpoint is not None
            check_base(checkpoint, request.task, "--model_id")
        return checkpoint if beside else None
    remedy = f"give a folder, or an id such as {request.task.base_model_id}"
    folder = local_folder(request.base_model_id, "--base_model_id", remedy)
    if folder is not None:
        check_base(folder, request.task, "--base_model_id")
    else:
        check_client(request)
    return folder


def local_folder(name: str, flag: str, remedy: str) -> Path | None:
    """The folder of that name, None if it is a hub id; raises UserError for what is neither."""
    given = shown(name) if name.strip() else "an empty value"
    folder = Path(os.path.expanduser(name))
    if name.strip() and os.path.isdir(folder):  # unlike Path's, it takes impossible names
        if not (folder / "snapshots").is_dir():
            return folder
        snapshots = sorted((folder / "snapshots").iterdir(), key=os.path.getmtime) or [folder / "snapshots" / "COMMIT"]
        raise UserError(flag, f"{given} is a hub's cache of a model; give the folder {snapshots[-1]} in it, or its id")
    if os.path.isfile(folder):
        raise UserError(flag, f"{given} is a file; give a checkpoint's folder or a hub id")
    if not HUB_ID.fullmatch(name):
        raise UserError(flag, f"{given} is neither a folder nor a hub id; {remedy}")
    return None


def check_client(request: GenerationRequest) -> None:
    """Raise UserError when the hub's client, an optional package, is not installed."""
    if request.model_source == "modelscope" and importlib.util.find_spec("modelscope") is None:
        raise UserError("--model_source", "modelscope needs its package; pip install modelscope, or use huggingface")


def refuse_other_tasks(request: GenerationRequest) -> None:
    """Raise UserError for the hub id of another task's checkpoint: better now than after tens of gigabytes."""
    for other in map(task_spec, TASK_NAMES):
        published = request.model_id in (other.model_id, *other.also_published_as)
        if published and other.model_id != request.task.model_id:
            reason = f"{request.model_id} is the checkpoint of {other.name}"
            needs = f"{request.task.name} needs {request.task.model_id}"
            raise UserError("--model_id", f"{reason}; {needs}, or give --task_type {other.name}")


def download(request: GenerationRequest) -> Path:
    """Fetch the files that the task needs and return their folder.

    Raises:
        UserError: the hub cannot be reached, or does not have the model or all of its files; says what to do.
    """
    there = cached(request)
    if there is not None:
        with suppress(CheckpointError):  # not all of it
            check_folder(there, request.task)
            return there
    folder = fetch(request, download_patterns(request.task), "--model_id")
    check_folder(folder, request.task)
    return folder


def download_base(request: GenerationRequest) -> Path:
    """As `download`, of V1's other components."""
    base = replace(request, model_id=request.base_model_id or request.task.base_model_id)
    there = cached(base)
    if there is not None:
        with suppress(UserError):  # not all of it
            check_base(there, request.task, "--base_model_id")
            return there
    folder = fetch(base, base_patterns(), "--base_model_id")
    check_base(folder, request.task, "--base_model_id")
    return folder


def cached(request: GenerationRequest) -> Path | None:
    """The folder of a hub's model in the cache of Hugging Face's client, complete or not, without that client."""
    if request.model_source == "modelscope":
        return None
    from huggingface_hub import constants

    model = Path(constants.HF_HUB_CACHE, folder_in_cache(request.model_id))
    try:
        snapshot = model / "snapshots" / (model / "refs" / constants.DEFAULT_REVISION).read_text().strip()
    except (OSError, ValueError):
        return None
    return snapshot if snapshot.is_dir() else None


def folder_in_cache(model_id: str) -> str:
    """The name of a model's folder in the cache of Hugging Face's client."""
    return f"models--{model_id.replace('/', '--')}"


def base_patterns() -> list[str]:
    """Glob patterns of the files of HunyuanVideo's repository that V1 needs."""
    return [*(f"{folder}/*" for folder in (*BASE_MODELS, *BASE_TOKENIZERS)), BASE_SCHEDULER]


def fetch(request: GenerationRequest, patterns: list[str], flag: str) -> Path:
    """The folder of a hub's model with the files of those patterns; failures are UserErrors about `flag`."""
    logger.info("fetching %s from %s: %s", request.model_id, request.model_source, ", ".join(patterns))
    try:
        return fetch_snapshot(request, patterns)
    except Exception as error:  # the hubs' clients raise anything from OSError to their HTTP library's own errors
        raise fetch_error(request, flag, error) from error


def fetch_error(request: GenerationRequest, flag: str, error: Exception) -> UserError:
    """What a hub's client raised, for a user."""
    other = "huggingface" if request.model_source == "modelscope" else "modelscope"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = f"check the id and the connection, try --model_source {other}"
    if status_of(error) in (401, 403):
        remedy = "check the id; a gated or private model needs its licence accepted on its page and `hf auth login`"
        remedy += f" or HF_TOKEN; or try --model_source {other}"
    message = f"{request.model_id} could not be fetched from {request.model_source} ({reason}); {remedy}"
    return UserError(flag, f"{message}, or download it elsewhere and give its folder")


def status_of(error: BaseException | None) -> int | None:
    """The hub's HTTP status behind an error, if there was an answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def fetch_snapshot(request: GenerationRequest, patterns: list[str]) -> Path:
    """The hub client's folder of a model, with the files of those patterns that there are."""
    if request.model_source == "modelscope":
        from modelscope import snapshot_download
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        if request.verbosity < 0:
            disable_progress_bars()
        remove_orphans(request.model_id)
    fetched: Future[str] = Future()

    def run() -> None:
        try:
            fetched.set_result(snapshot_download(request.model_id, allow_patterns=patterns))
        except BaseException as error:
            fetched.set_exception(error)

    # the client's threads finish their files before they mind an interrupt; this one is not waited for
    Thread(target=run, daemon=True).start()
    try:
        return Path(fetched.result())
    except KeyboardInterrupt:
        say("\n" * (request.verbosity >= 0))  # after its progress bars
        raise


def remove_orphans(model_id: str) -> None:
    """Remove what killed downloads of a model have left in Hugging Face's cache: its client does not use it.

    Files that are being downloaded, by another process too, are locked.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import constants

    folder = folder_in_cache(model_id)
    for file in Path(constants.HF_HUB_CACHE, folder, "blobs").glob("*.incomplete"):
        lock = Path(constants.HF_HUB_CACHE, ".locks", folder, f"{file.name.split('.')[0]}.lock")
        with suppress(Timeout, OSError, NotImplementedError), FileLock(lock, timeout=0):
            file.unlink(missing_ok=True)
            logger.debug("removed %s, which a download has left unfinished", file)


def downloaded(source: str, repositories: Mapping[str, Iterable[str]]) -> tuple[Path, int]:
    """The folder that a hub's client downloads to, and how many bytes of those repositories' files are there already.

    Args:
        repositories: for the id of each the patterns of the files that are needed.
    """
    if source == "modelscope":
        return Path(os.environ.get(CACHES[source], Path.home() / ".cache" / "modelscope")), 0
    from huggingface_hub.constants import HF_HUB_CACHE

    files: set[Path] = set()
    for name, patterns in repositories.items():
        repository = Path(HF_HUB_CACHE, folder_in_cache(name))
        for pattern in (*(f"snapshots/*/{pattern}" for pattern in patterns), "blobs/*.incomplete"):
            files |= {file.resolve() for file in repository.glob(pattern) if file.is_file()}
    return Path(HF_HUB_CACHE), sum(file.stat().st_size for file in files)


def download_patterns(task: TaskSpec) -> list[str]:
    """Glob patterns of the repository's files that `task` needs."""
    if task.layout == "diffusers":
        folders = (task.transformer_folder, "vae", "text_encoder", "tokenizer")
        return ["model_index.json", *(f"{folder}/*" for folder in folders)]
    flat = task.transformer_folder == "."
    transformer = (
        ["config.json", "*.safetensors", "*.safetensors.index.json"] if flat else [task.transformer_folder + "/*"]
    )
    if task.layout == HUNYUAN:
        return transformer
    encoders = [NATIVE_IMAGE_ENCODER_FILE, f"{AUDIO_ENCODER}/*"] if "input_audio" in task.inputs else []
    return [*transformer, NATIVE_VAE_FILE, NATIVE_TEXT_ENCODER_FILE, f"{NATIVE_TOKENIZER}/*", *encoders]


def check_folder(folder: Path, task: TaskSpec) -> None:
    """Raise CheckpointError when a file that `task` needs is missing from `folder` or cut off."""
    transformer = folder / task.transformer_folder
    models, files, tokenizers, configs = [transformer], [], [], []
    if task.layout == "diffusers":
        models, tokenizers = [transformer, folder / "vae", folder / "text_encoder"], [folder / "tokenizer"]
    elif task.layout == "native":
        tokenizers, files = [folder / NATIVE_TOKENIZER], [folder / NATIVE_VAE_FILE, folder / NATIVE_TEXT_ENCODER_FILE]
    if "input_audio" in task.inputs:
        files += [folder / NATIVE_IMAGE_ENCODER_FILE, audio_weights(folder)]
        configs.append(folder / AUDIO_ENCODER / "config.json")
    files += [tokenizer / TOKENIZER_FILE for tokenizer in tokenizers]
    check_files(folder, models, [*configs, *files], f"{task.name} checkpoint", task.model_id)
    sizes = transformer_config(transformer, task.transformer)
    channels, wanted = sizes.get("in_channels", LATENT_CHANNELS), task.transformer["in_channels"]
    if task.layout == HUNYUAN and channels != wanted:
        reason = f"{folder}/config.json: in_channels = {channels} is not {task.name}'s {wanted}"
        raise CheckpointError(f"{reason}; give a checkpoint of {task.model_id}")


def check_base(folder: Path, task: TaskSpec, flag: str) -> None:
    """Raise UserError when a file that V1 needs of HunyuanVideo is missing from `folder` or cut off."""
    files = [folder / BASE_SCHEDULER]
    for name in BASE_TOKENIZERS:  # older repositories have CLIP's in two files
        tokenizer = folder / name
        two = [tokenizer / name for name in ("vocab.json", "merges.txt")]
        files += two if any(file.is_file() for file in two) else [tokenizer / TOKENIZER_FILE]
    with errors_about(flag):
        check_files(folder, [folder / name for name in BASE_MODELS], files, "HunyuanVideo", task.base_model_id)


def check_pair(checkpoint: Path, base: Path) -> None:
    """Raise UserError unless V1's transformer takes what the text encoders beside it give."""
    config = read_json(checkpoint / "config.json")
    for name, folder in (("text_embed_dim", "text_encoder"), ("pooled_projection_dim", "text_encoder_2")):
        taken, given = config.get(name), read_json(base / folder / "config.json").get("hidden_size")
        if None not in (taken, given) and taken != given:
            reason = f"{base}/{folder} gives states of width {given}, the transformer takes {taken}"
            raise UserError("--base_model_id", f"{reason}; give HunyuanVideo's own, or leave it out")


@contextmanager
def errors_about(flag: str) -> Iterator[None]:
    """Have what goes wrong with a checkpoint's file be about a flag other than --model_id."""
    try:
        yield
    except CheckpointError as error:
        if error.flag == flag:
            raise
        raise UserError(flag, error.message) from error


def check_files(folder: Path, models: list[Path], files: list[Path], kind: str, source: str) -> None:
    """Raise CheckpointError when models' folders or files are missing or damaged.

    Args:
        kind: what the folder should be, and `source` where that is to be had, for error messages.
    """
    files = [*(model / "config.json" for model in models), *files]
    missing = [str(path.relative_to(folder)) for path in files if not path.is_file()]
    empty = [model for model in models if model.is_dir() and not any(model.glob("*.safetensors"))]
    for other in (file for model in empty for file in sorted(model.iterdir()) if file.suffix in OTHER_FORMATS):
        raise CheckpointError(f"{other} is no .safetensors file; other formats of weights are not read, give that one")
    missing += [str((model / "*.safetensors").relative_to(folder)) for model in empty]
    if missing:
        raise CheckpointError(
            f"{folder} is no complete {kind}: missing {', '.join(missing)}; download these files of {source}"
        )
    for file in (*files, *(file for model in models for file in weight_files(model))):
        check = CHECKS.get(file.suffix)
        if check is not None and file.name != TOKENIZER_FILE:  # many megabytes of text
            check(file)


def audio_weights(folder: Path) -> Path:
    """The audio encoder's weights: safetensors where there are some."""
    files = [folder / AUDIO_ENCODER / name for name in AUDIO_WEIGHT_FILES]
    return next((file for file in files if file.is_file()), files[-1])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: the shards that its index names, or the one file."""
    for index in sorted(folder.glob("*.safetensors.index*.json"), key=lambda path: (len(path.name), path.name)):
        return indexed_files(index)  # the shortest name: one of a variant is taken where there is no other
    found = [file for file in sorted(folder.glob("*.safetensors")) if file.is_file()]
    files = [file for file in found if file.name in WEIGHT_FILES] or found
    if len(files) != 1:
        reason = f"{folder} holds {len(files)} safetensors files and no index"
        raise CheckpointError(f"{reason}; download {WEIGHT_FILES[0]}.index.json as well, or leave one file there")
    return files


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; raises CheckpointError when one is missing."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards; download it again") from error
    if missing := [str(file) for file in files if file.parent != index.parent or not file.is_file()]:
        raise CheckpointError(f"missing shards {', '.join(missing)}; download them again")
    return files


def transformer_config(folder: Path, names: Collection[str]) -> dict[str, int]:
    """The entries of a transformer's config.json, native or diffusers, that are among our `names`."""
    config = read_json(folder / "config.json")
    ours = {key: NATIVE_CONFIG.get(key) or key for key in config}
    for key, value in config.items():
        if (ours[key] in names or key == "dim") and (type(value) is not int or value < 1):
            raise CheckpointError(f"{folder}/config.json: {key} = {shown(value)} is no size; download it again")
    sizes = {ours[key]: value for key, value in config.items() if ours[key] in names}
    if "dim" in config:
        if "num_heads" not in config:
            raise CheckpointError(f"{folder}/config.json lacks num_heads; download it again")
        sizes["attention_head_dim"] = config["dim"] // config["num_heads"]
    return sizes


def read_json(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object; download it again")
    return content


def stored_bytes(folder: Path, task: TaskSpec) -> dict[str, int]:
    """Bytes on disk of a checked folder's components but the transformer."""
    vae = [folder / NATIVE_VAE_FILE] if task.layout == "native" else weight_files(folder / "vae")
    files = {"text encoder": text_encoder_files(folder, task), "VAE": vae}
    if "input_audio" in task.inputs:
        files |= {"image encoder": [folder / NATIVE_IMAGE_ENCODER_FILE], "audio encoder": [audio_weights(folder)]}
    return {name: sum(file.stat().st_size for file in parts) for name, parts in files.items()}


def text_encoder_files(folder: Path, task: TaskSpec) -> list[Path]:
    """The text encoder's weights in a checked folder."""
    if task.layout == "native":
        return [folder / NATIVE_TEXT_ENCODER_FILE]
    more = weight_files(folder / "text_encoder_2") if task.layout == HUNYUAN else []
    return [*weight_files(folder / "text_encoder"), *more]


def is_quantized(transformer: Path) -> bool:
    """Whether the checked transformer's folder holds FP8 weights, see memory/quantize.py."""
    return any(name.endswith(f".{SCALE}") for file in weight_files(transformer) for name in read_header(file).tensors)


class Header(NamedTuple):
    """What a safetensors file says of itself.

    Attributes:
        tensors: dtype, shape and data_offsets of each, by name.
        metadata: whatever its writer put there.
        begin: where in the file the tensors are.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, Any]
    begin: int


def read_header(file: Path) -> Header:
    """The header of a file that is a safetensors file, see `check_safetensors`."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        (header_size,) = struct.unpack("<Q", handle.read(8))
        tensors = json.loads(handle.read(min(header_size, size, MAX_HEADER_BYTES)))
    return Header(tensors, tensors.pop("__metadata__", None) or {}, 8 + header_size)


def check_safetensors(file: Path) -> None:
    """Raise CheckpointError when the file's length is not what its own header says."""
    size = file.stat().st_size
    try:
        tensors, _, begin = read_header(file)
        expected = begin + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if not all(is_entry(entry) for entry in tensors.values()):
            raise ValueError("an entry that is none")
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file; download it again") from error
    if size != expected:
        raise CheckpointError(f"{file} is truncated or damaged ({size} bytes instead of {expected}); download it again")


def is_entry(entry: Mapping[str, Any]) -> bool:
    """Whether this describes a tensor."""
    return isinstance(entry["dtype"], str) and all(type(axis) is int and axis >= 0 for axis in entry["shape"])


def check_pickle(file: Path) -> None:
    """Raise CheckpointError when a .pth file is not the complete zip archive that torch writes."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is truncated or no .pth checkpoint; download it again")


CHECKS: dict[str, Callable[[Path], object]] = {
    ".json": read_json,
    ".safetensors": check_safetensors,
    **dict.fromkeys((".pth", ".bin"), check_pickle),
}


class LoraError(CheckpointError):
    """A LoRA that is missing, damaged or does not fit the model; names the file and the keys."""

    def __init__(self, message: str) -> None:
        UserError.__init__(self, "--lora", message)


@contextmanager
def lora_errors() -> Iterator[None]:
    """Have what goes wrong with a file be about --lora, whatever it was read by."""
    try:
        yield
    except CheckpointError as error:
        raise LoraError(error.message) from error
    except OSError as error:
        raise LoraError(f"{error.filename} cannot be read ({error.strerror})") from error


def locate_lora(name: str) -> Path | None:
    """The file of a LoRA that is on this machine, checked; None for one that must be fetched from its hub.

    Args:
        name: a safetensors file, a folder that holds one, or a hub id (OWNER/NAME or OWNER/NAME/FILE.safetensors).

    Raises:
        UserError: nothing of that, or a file that is damaged.
    """
    given = shown(name) if name.strip() else "an empty value"
    path = Path(os.path.expanduser(name))
    if name.strip() and os.path.isdir(path):  # unlike Path's, it takes impossible names
        with lora_errors():
            path = path / choose_lora(os.listdir(path), given)
    elif not os.path.isfile(path):
        if is_hub_lora(name):
            return None
        raise UserError("--lora", f"{given} is no file or folder; {LORA_REMEDY}")
    check_lora_file(path)
    return path


def is_hub_lora(name: str) -> bool:
    """Whether `name`, which is not here, can be on a hub: not when it looks like a mistyped file."""
    match = HUB_LORA.fullmatch(name)
    if match is None:
        return False
    if match[2] is not None:
        return not os.path.isdir(os.path.dirname(name))
    return Path(name).suffix not in WEIGHT_SUFFIXES


def choose_lora(names: Collection[str], where: str) -> str:
    """The LoRA among the files of a folder or of a hub's model: one of the usual name, or the only one."""
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    usual = [name for name in LORA_FILES if name in found]
    if not usual and len(found) != 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        held = f"{len(found)} .safetensors files ({some})" if found else "no .safetensors file"
        raise LoraError(f"{where} holds {held}; give the LoRA's own file, {where.rstrip('/')}/FILE.safetensors")
    return (usual or found)[0]


def check_lora_file(file: Path) -> None:
    """Raise LoraError unless `file` is a complete safetensors file."""
    if file.suffix != ".safetensors":
        raise LoraError(f"{shown(file)} is no .safetensors file; other formats can run code, convert it to this one")
    with lora_errors():
        check_safetensors(file)


def download_lora(name: str, request: GenerationRequest) -> Path:
    """Fetch a LoRA from the request's hub, with PEFT's settings beside it, and return its file, checked.

    Args:
        name: a hub id for which `locate_lora` gave None.

    Raises:
        UserError: the hub cannot be reached or does not have the file; says what to do.
    """
    check_client(request)
    request, file = lora_on_hub(name, request)
    there = cached(request)
    if file is not None and there is not None and (there / file).is_file():
        check_lora_file(there / file)
        return there / file
    if file is None and (listed := list_files(request, "--lora")):
        file = choose_lora(listed, name)
    wanted = LORA_FILES if file is None else [file]
    settings = (Path(file or LORA_CONFIG).parent / LORA_CONFIG).as_posix()
    folder = fetch(request, [glob.escape(pattern) for pattern in (*wanted, settings)], "--lora")
    path = folder / (file or choose_lora(os.listdir(folder), name))
    if not path.is_file():
        raise no_such_lora(request, path.name if file is None else file)
    check_lora_file(path)
    return path


def lora_on_hub(name: str, request: GenerationRequest) -> tuple[GenerationRequest, str | None]:
    """A request for the model that a hub id of a LoRA is about, and the file if it names one."""
    match = HUB_LORA.fullmatch(name)
    assert match, f"{name} is no hub id of a LoRA"
    return replace(request, model_id=match[1]), match[2]


def no_such_lora(request: GenerationRequest, file: str) -> UserError:
    return UserError("--lora", f"{request.model_id} on {request.model_source} has no {file}; check the file's name")


def check_on_hub(request: GenerationRequest) -> None:
    """Raise UserError for LoRAs and encoders that their hub does not have, or does not give: before all is fetched.

    A hub that cannot be asked is no error yet: what is needed may be in its client's cache.
    """
    for name in (lora.source for lora in request.lora if locate_lora(lora.source) is None):
        check_client(request)
        lora, file = lora_on_hub(name, request)
        if file is not None and ((there := cached(lora)) is not None and (there / file).is_file()):
            continue
        listed = list_files(lora, "--lora")
        if listed and file is None:
            choose_lora(listed, name)
        elif listed and file not in listed:
            raise no_such_lora(lora, str(file))
    base = request.base_model_id
    if base is not None and not os.path.isdir(os.path.expanduser(base)):
        model = replace(request, model_id=base)
        if cached(model) is None:
            list_files(model, "--base_model_id")


def list_files(request: GenerationRequest, flag: str) -> list[str]:
    """The files of a hub's model; none when it cannot be asked: what is in the cache may still do.

    Raises:
        UserError: about `flag`, where the hub answers that there is no such model, or not for everybody.
    """
    try:
        if request.model_source == "modelscope":
            from modelscope.hub.api import HubApi

            entries = HubApi().get_model_files(request.model_id, recursive=True)
            return [entry["Path"] for entry in entries if entry["Type"] != "tree"]
        from huggingface_hub import HfApi

        found = HfApi().model_info(request.model_id, timeout=LIST_SECONDS)
        return [file.rfilename for file in found.siblings or ()]
    except Exception as error:  # as for a download, which follows and tells the user
        if status_of(error) in (401, 403, 404) and cached(request) is None:
            raise fetch_error(request, flag, error) from error
        logger.debug("the files of %s cannot be listed: %s", request.model_id, error)
        return []
