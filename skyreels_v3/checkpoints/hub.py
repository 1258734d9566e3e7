"""Where a checkpoint or a LoRA is: in a folder, in the cache of a hub's client, or on the hub. No torch.

Only the files that the task needs are fetched. The client keeps them in its own cache, where a second run finds them,
offline too; an interrupted download goes on with the files that are not complete.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread

from skyreels_v3.checkpoints.files import OTHER_FORMATS, Repository, check_file, errors_about
from skyreels_v3.console import say
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.request import GenerationRequest
from skyreels_v3.tasks import TASK_NAMES, TINY, task_spec

logger = logging.getLogger(__name__)

CACHES = {"huggingface": "HF_HOME", "modelscope": "MODELSCOPE_CACHE"}  # where the hubs' clients keep files
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_LORA = re.compile(rf"({HUB_ID.pattern})(?:/((?:[^/.][^/]*/)*[^/.][^/]*\.safetensors))?", re.ASCII)
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # as diffusers and PEFT call theirs
LORA_CONFIG = "adapter_config.json"  # PEFT's settings, beside its weights
LORA_REMEDY = "give a .safetensors file, a folder with one, or a hub id: OWNER/NAME or OWNER/NAME/FILE.safetensors"
LIST_SECONDS = 10.0


def locate(request: GenerationRequest, repository: Repository, beside: Path | None = None) -> Path | None:
    """The folder of a repository's files on this machine, checked; None if they must be fetched.

    Args:
        beside: a folder that may hold them where the request names none.

    Raises:
        UserError: the request names neither a folder nor a hub id, or a file is missing or damaged.
    """
    name, flag = getattr(request, repository.flag.removeprefix("--")), repository.flag
    folder: Path | None
    if name is None:
        if beside is None or not all((beside / folder).is_dir() for folder in repository.folders):
            return None
        folder, flag = beside, "--model_id"
    else:
        choices = f"a folder, or an id such as {repository.model_id}"
        if flag == "--model_id":
            choices = f"a folder, an id such as {repository.model_id}, or {TINY}"
        folder = local_folder(name, flag, f"give {choices}")
    if folder is not None:
        repository.check(folder, flag)
        return folder
    refuse_other_tasks(request)
    check_client(request)
    return None


def local_folder(name: str, flag: str, remedy: str) -> Path | None:
    """The folder of that name, None if it is a hub id; raises UserError for what is neither."""
    given = format_value(name) if name.strip() else "an empty value"
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


def download(request: GenerationRequest, repository: Repository) -> Path:
    """Fetch a repository's files and return their folder.

    Raises:
        UserError: the hub cannot be reached, or does not have the model or all of its files; says what to do.
    """
    name, flag = model_id_of(request, repository), repository.flag
    if (folder := cached(request, name)) is not None:
        with suppress(UserError):  # not all of it is there
            repository.check(folder, flag)
            return folder
    folder = fetch(request, name, repository.patterns, flag)
    repository.check(folder, flag)
    return folder


def cached(request: GenerationRequest, model_id: str) -> Path | None:
    """The folder of a model in the cache of Hugging Face's client, complete or not."""
    if request.model_source == "modelscope":
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, local_files_only=True, allow_patterns=[]))
    except (OSError, ValueError):
        return None


def model_id_of(request: GenerationRequest, repository: Repository) -> str:
    """The hub id of a repository, or its folder, that the request names; else that of the published one."""
    return getattr(request, repository.flag.removeprefix("--")) or repository.model_id


def cache_of(source: str) -> Path:
    """The folder that a hub's client downloads to."""
    if source == "modelscope":
        return Path(os.environ.get(CACHES[source], Path.home() / ".cache" / "modelscope"))
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def bytes_to_fetch(request: GenerationRequest, repository: Repository) -> tuple[int, int] | None:
    """Bytes of a repository's files, and of those that are not in the cache; None where the hub does not tell."""
    if request.model_source == "modelscope":
        return None
    from huggingface_hub import snapshot_download

    name = model_id_of(request, repository)
    try:
        files = snapshot_download(name, allow_patterns=repository.patterns, dry_run=True)
    except Exception as error:
        logger.debug("the files of %s cannot be listed: %s", name, error)
        return None
    sizes = [(file.file_size or 0, file.will_download) for file in files]
    return sum(size for size, _ in sizes), sum(size for size, missing in sizes if missing)


def fetch(request: GenerationRequest, model_id: str, patterns: Iterable[str], flag: str) -> Path:
    """The folder of a model with the files of those patterns; failures are UserErrors about `flag`."""
    patterns = list(patterns)
    logger.info("fetching %s from %s: %s", model_id, request.model_source, ", ".join(patterns))
    if request.model_source == "modelscope":
        from modelscope import snapshot_download
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        if request.verbosity < 0:
            disable_progress_bars()
    fetched: Future[str] = Future()

    def run() -> None:
        try:
            fetched.set_result(snapshot_download(model_id, allow_patterns=patterns))
        except BaseException as error:
            fetched.set_exception(error)

    # on Ctrl-C the client waits for the files that it is fetching; nobody waits for this thread
    Thread(target=run, daemon=True).start()
    try:
        return Path(fetched.result())
    except KeyboardInterrupt:
        say("\n" * (request.verbosity >= 0))  # after its progress bars
        raise
    except Exception as error:  # the clients raise anything from OSError to their HTTP library's own errors
        raise fetch_error(request, model_id, flag, error) from error


def fetch_error(request: GenerationRequest, model_id: str, flag: str, error: Exception) -> UserError:
    """What a hub's client raised, for a user."""
    other = "huggingface" if request.model_source == "modelscope" else "modelscope"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = f"check the id and the connection, try --model_source {other}"
    if status_of(error) in (401, 403):
        remedy = "check the id; a gated or private model needs its licence accepted on its page and `hf auth login`"
        remedy += f" or HF_TOKEN; or try --model_source {other}"
    message = f"{model_id} could not be fetched from {request.model_source} ({reason}); {remedy}"
    return UserError(flag, f"{message}, or download it elsewhere and give its folder")


def status_of(error: BaseException | None) -> int | None:
    """The hub's HTTP status behind an error, if there was an answer."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return status
        error = error.__cause__
    return None


def list_files(request: GenerationRequest, model_id: str, flag: str) -> list[str]:
    """The files of a model on its hub; none when it cannot be asked: what is in the cache may still do.

    Raises:
        UserError: about `flag`, where the hub answers that there is no such model, or not for everybody.
    """
    if request.model_source == "modelscope":  # a download tells
        return []
    from huggingface_hub import HfApi

    try:
        return [file.rfilename for file in HfApi().model_info(model_id, timeout=LIST_SECONDS).siblings or ()]
    except Exception as error:  # as for a download, which follows and tells the user
        if status_of(error) in (401, 403, 404) and cached(request, model_id) is None:
            raise fetch_error(request, model_id, flag, error) from error
        logger.debug("the files of %s cannot be listed: %s", model_id, error)
        return []


def check_on_hub(request: GenerationRequest) -> None:
    """Raise UserError for LoRAs and a base model that their hub does not have, or does not give.

    A hub that cannot be asked is no error yet: what is needed may be in its client's cache.
    """
    for lora in request.lora:
        if locate_lora(lora.source) is None:
            lora_on_hub(lora.source, request)
    base = request.base_model_id
    if base is not None and not os.path.isdir(os.path.expanduser(base)) and cached(request, base) is None:
        list_files(request, base, "--base_model_id")


def locate_lora(name: str) -> Path | None:
    """The file of a LoRA that is on this machine, checked; None for one that must be fetched from its hub.

    Args:
        name: a safetensors file, a folder that holds one, or a hub id (OWNER/NAME or OWNER/NAME/FILE.safetensors).

    Raises:
        UserError: nothing of that, or a file that is damaged.
    """
    given = format_value(name) if name.strip() else "an empty value"
    path = Path(os.path.expanduser(name))
    if name.strip() and os.path.isdir(path):  # unlike Path's, it takes impossible names
        with errors_about("--lora"):
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
    return Path(name).suffix not in (".safetensors", *OTHER_FORMATS)


def choose_lora(names: Collection[str], where: str) -> str:
    """The LoRA among the files of a folder or of a hub's model: one of the usual name, or the only one."""
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    usual = [name for name in LORA_FILES if name in found]
    if not usual and len(found) != 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        held = f"{len(found)} .safetensors files ({some})" if found else "no .safetensors file"
        remedy = f"give the LoRA's own file, {where.rstrip('/')}/FILE.safetensors"
        raise UserError("--lora", f"{where} holds {held}; {remedy}")
    return (usual or found)[0]


def check_lora_file(file: Path) -> None:
    """Raise UserError unless `file` is a complete safetensors file."""
    if file.suffix != ".safetensors":
        reason = f"{format_value(file)} is no .safetensors file"
        raise UserError("--lora", f"{reason}; other formats can run code, convert it to this one")
    with errors_about("--lora"):
        check_file(file)


def lora_on_hub(name: str, request: GenerationRequest) -> tuple[str, str | None]:
    """The model that a hub id of a LoRA is about, and the file in it; None where the hub cannot be asked for it.

    Raises:
        UserError: there is no such model or file, or the file cannot be told from others.
    """
    check_client(request)
    match = HUB_LORA.fullmatch(name)
    assert match, f"{name} is no hub id of a LoRA"
    model_id, file = match[1], match[2]
    if file is not None and ((folder := cached(request, model_id)) is not None and (folder / file).is_file()):
        return model_id, file
    listed = list_files(request, model_id, "--lora")
    if listed and file is None:
        return model_id, choose_lora(listed, name)
    if listed and file not in listed:
        raise UserError("--lora", f"{model_id} on {request.model_source} has no {file}; check the file's name")
    return model_id, file


def download_lora(name: str, request: GenerationRequest) -> Path:
    """Fetch a LoRA from the request's hub, with PEFT's settings beside it, and return its file, checked.

    Args:
        name: a hub id for which `locate_lora` gave None.

    Raises:
        UserError: the hub cannot be reached or does not have the file; says what to do.
    """
    model_id, file = lora_on_hub(name, request)
    folder = cached(request, model_id)
    if folder is None or file is None or not (folder / file).is_file():
        settings = (Path(file or LORA_CONFIG).parent / LORA_CONFIG).as_posix()
        wanted = LORA_FILES if file is None else [file]
        folder = fetch(request, model_id, [glob.escape(pattern) for pattern in (*wanted, settings)], "--lora")
    path = folder / (file or choose_lora(os.listdir(folder), name))
    check_lora_file(path)
    return path
