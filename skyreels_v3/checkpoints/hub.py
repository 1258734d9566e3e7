"""Finding a checkpoint or a LoRA in a folder on this machine, or downloading it from a hub. No torch.

Only the files that the task needs are fetched. The hub's client keeps them in its cache, where later runs find them
without contacting the hub. After an interrupted download, the next one fetches only the incomplete files.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from skyreels_v3.checkpoints.files import OTHER_FORMATS, Repository, check_file, errors_about
from skyreels_v3.console import say
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.packages import check_packages
from skyreels_v3.request import DEFAULT_ENHANCER, ENHANCER_LOCAL, GenerationRequest
from skyreels_v3.tasks import TASK_NAMES, TINY, task_spec

logger = logging.getLogger(__name__)

CACHES = {"huggingface": "HF_HOME", "modelscope": "MODELSCOPE_CACHE"}  # variables that move the hub clients' caches
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_FILE = re.compile(rf"({HUB_ID.pattern})(?:/((?:[^/.][^/]*/)*[^/.][^/]*\.(?:safetensors|gguf)))?", re.ASCII)
LORA_CONFIG = "adapter_config.json"
LIST_SECONDS = 10.0


@dataclass(frozen=True)
class FileKind:
    """A flag for a single file of weights.

    Attributes:
        name: what such a file is; for a component, its name in `Repository`.
        suffixes: of such files.
        usual: names that are preferred if a folder holds several files; without any, a hub id must name the file.
        beside: another file that is fetched with it if it exists.
    """

    flag: str
    name: str
    suffixes: tuple[str, ...]
    usual: tuple[str, ...] = ()
    beside: str = ""

    @property
    def remedy(self) -> str:
        file = f"a {' or '.join(self.suffixes)} file"
        ids = "OWNER/NAME or OWNER/NAME/FILE" if self.usual else "OWNER/NAME/FILE"
        return f"give {file}, a folder with one, or a hub id: {ids}{self.suffixes[0]}"


# the usual names are those of diffusers and PEFT; PEFT stores its settings next to the weights
LORA = FileKind(
    "--lora", "LoRA", (".safetensors",), ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"), LORA_CONFIG
)
# by field of the request, which is also the name of the loaded component
COMPONENTS = {
    "transformer": FileKind("--transformer", "transformer", (".safetensors", ".gguf")),
    "text_encoder": FileKind("--text_encoder", "text encoder", (".safetensors",)),
    "vae": FileKind("--vae", "VAE", (".safetensors",)),
}
# a vision-language model in transformers' format
ENHANCER = Repository(
    flag="--enhancer_model",
    kind="vision-language model",
    model_id=DEFAULT_ENHANCER,
    components={"enhancer": (".",)},
    tokenizers=(".",),
    extras=("*.json", "*.jinja", "merges.txt"),
)


def locate(request: GenerationRequest, repository: Repository, beside: Path | None = None) -> Path | None:
    """The folder on this machine with a repository's files, checked; None if they must be downloaded.

    Args:
        beside: a folder that may have them if the request names none.

    Raises:
        UserError: the request names neither a folder nor a hub id, or a file is missing or damaged.
    """
    flag = repository.flag
    name = getattr(request, flag.removeprefix("--"))
    if name is None:
        found = beside is not None and all((beside / folder).is_dir() for folder in repository.folders)
        folder, flag = beside if found else None, "--model_id"
    else:
        example = f"an id such as {repository.model_id}"
        choices = f"a folder, {example}, or {TINY}" if flag == "--model_id" else f"a folder, or {example}"
        folder = local_folder(name, flag, f"give {choices}")
        if folder is None:
            refuse_other_tasks(request)
            check_client(request)
    if folder is not None:
        repository.check(folder, flag)
    return folder


def local_folder(name: str, flag: str, remedy: str) -> Path | None:
    """The folder `name`; None if that is a hub id; raises UserError if it is neither."""
    given = format_value(name) if name.strip() else "an empty value"
    folder = Path(os.path.expanduser(name))
    if name.strip() and os.path.isdir(folder):  # unlike Path's, it accepts invalid names
        if (folder / "snapshots").is_dir():
            raise UserError(
                flag,
                f"{given} is a hub's cache folder of a model; give a folder in {folder}/snapshots, or the model's id",
            )
        return folder
    if os.path.isfile(folder):
        raise UserError(flag, f"{given} is a file; give a checkpoint's folder or a hub id")
    if not HUB_ID.fullmatch(name):
        raise UserError(flag, f"{given} is neither a folder nor a hub id; {remedy}")
    return None


def check_client(request: GenerationRequest) -> None:
    """Raise UserError if the hub's client, an optional package, is not installed."""
    if request.model_source == "modelscope":
        name = request.model_source
        check_packages("--model_source", name, name, value=name, otherwise="use huggingface")


def refuse_other_tasks(request: GenerationRequest) -> None:
    """Raise UserError if --model_id is the published checkpoint of another task, before it is downloaded."""
    for other in map(task_spec, TASK_NAMES):
        published = request.model_id in (other.model_id, *other.also_published_as)
        if published and other.model_id != request.task.model_id:
            remedy = f"{request.task.name} needs {request.task.model_id}, or give --task_type {other.name}"
            raise UserError("--model_id", f"{request.model_id} is the checkpoint of {other.name}; {remedy}")


def model_id_of(request: GenerationRequest, repository: Repository) -> str:
    """The hub id or folder that the request names for a repository, else the published hub id."""
    return getattr(request, repository.flag.removeprefix("--")) or repository.model_id


def cache_of(source: str) -> Path:
    """The folder that a hub's client downloads to."""
    if source == "modelscope":
        return Path(os.environ.get(CACHES[source], Path.home() / ".cache" / "modelscope"))
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def bytes_to_fetch(request: GenerationRequest, repository: Repository) -> tuple[int, int] | None:
    """Bytes of all needed files of a repository, and of those not yet in the cache; None if unknown."""
    if request.model_source == "modelscope":
        return None
    from huggingface_hub import snapshot_download

    name = model_id_of(request, repository)
    try:
        ask(name)
        files = snapshot_download(name, allow_patterns=repository.patterns, dry_run=True)
    except Exception as error:
        logger.debug("the files of %s cannot be listed: %s", name, error)
        return None
    sizes = [(file.file_size or 0, file.will_download) for file in files]
    return sum(size for size, _ in sizes), sum(size for size, missing in sizes if missing)


def download(request: GenerationRequest, repository: Repository) -> Path:
    """Download the files of a repository, unless they are cached, and return their folder, checked.

    Raises:
        UserError: the hub cannot be reached, or does not have the model or all of its files; says what to do.
    """
    name, flag = model_id_of(request, repository), repository.flag
    if (folder := cached(request, name)) is not None:
        with suppress(UserError):  # incomplete
            repository.check(folder, flag)
            return folder
    folder = fetch(request, name, repository.patterns, flag)
    repository.check(folder, flag)
    return folder


def cached(request: GenerationRequest, model_id: str) -> Path | None:
    """The folder of a model in Hugging Face's cache, complete or not; the hub is not contacted."""
    if request.model_source != "modelscope":
        from huggingface_hub import snapshot_download

        with suppress(OSError, ValueError):
            return Path(snapshot_download(model_id, local_files_only=True, allow_patterns=[]))
    return None


def ask(model_id: str) -> None:
    """Raise TimeoutError if Hugging Face's hub does not respond; its client would wait forever."""
    import httpx
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(model_id, timeout=LIST_SECONDS)
    except httpx.TimeoutException as error:
        raise TimeoutError(f"no answer within {LIST_SECONDS:g} s") from error
    except Exception as error:  # the client will get it too, and its cache may be enough
        logger.debug("%s cannot be looked up: %s", model_id, error)


def fetch(request: GenerationRequest, model_id: str, patterns: Iterable[str], flag: str) -> Path:
    """Download a model's files that match the patterns and return its folder; failures are UserErrors about `flag`."""
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
            if request.model_source == "huggingface":
                ask(model_id)
            fetched.set_result(snapshot_download(model_id, allow_patterns=patterns))
        except BaseException as error:
            fetched.set_exception(error)

    # a daemon, or Ctrl-C would wait for the client to finish the files that it is fetching
    Thread(target=run, daemon=True).start()
    try:
        return Path(fetched.result())
    except KeyboardInterrupt:
        say("\n" * (request.verbosity >= 0))  # after its progress bars
        raise
    except Exception as error:  # the clients raise anything from OSError to their HTTP library's own errors
        raise fetch_error(request, model_id, flag, error) from error


def fetch_error(request: GenerationRequest, model_id: str, flag: str, error: Exception) -> UserError:
    """A hub client's error as a UserError."""
    other = "huggingface" if request.model_source == "modelscope" else "modelscope"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = f"check the id and the connection, try --model_source {other}"
    if status_of(error) in (401, 403):
        remedy = "check the id; a gated or private model needs its license accepted on its page and `hf auth login`"
        remedy += f" or HF_TOKEN; or try --model_source {other}"
    message = f"{model_id} could not be fetched from {request.model_source} ({reason}); {remedy}"
    return UserError(flag, f"{message}, or download it elsewhere and give its folder")


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, None if the hub did not respond."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return status
        error = error.__cause__
    return None


def list_files(request: GenerationRequest, model_id: str, flag: str) -> list[str]:
    """The files of a model on its hub; empty if the hub cannot be reached, since the cache may be enough.

    Raises:
        UserError: about `flag`, if the hub says that there is no such model, or that access is restricted.
    """
    if request.model_source == "modelscope":  # the download will tell
        return []
    from huggingface_hub import HfApi

    try:
        return [file.rfilename for file in HfApi().model_info(model_id, timeout=LIST_SECONDS).siblings or ()]
    except Exception as error:  # as in `fetch`
        if status_of(error) in (401, 403, 404) and cached(request, model_id) is None:
            raise fetch_error(request, model_id, flag, error) from error
        logger.debug("the files of %s cannot be listed: %s", model_id, error)
        return []


def check_on_hub(request: GenerationRequest) -> None:
    """Raise UserError for files and models that the hub does not have, or that this user may not access."""
    for name, kind in single_files(request):
        if locate_file(name, kind) is None:
            file_on_hub(name, request, kind)
    models = {"--base_model_id": request.base_model_id}
    if request.enhance_prompt == ENHANCER_LOCAL:
        models[ENHANCER.flag] = request.enhancer_model
    for flag, model in models.items():
        if model is not None and not os.path.isdir(os.path.expanduser(model)) and cached(request, model) is None:
            list_files(request, model, flag)


def components_of(request: GenerationRequest) -> dict[str, str]:
    """The separate files that a request gives for components, by the keys of COMPONENTS."""
    return {field: name for field in COMPONENTS if (name := getattr(request, field)) is not None}


def single_files(request: GenerationRequest) -> list[tuple[str, FileKind]]:
    """All separate files that a request gives: components and LoRAs."""
    components = [(name, COMPONENTS[field]) for field, name in components_of(request).items()]
    return [*components, *((lora.source, LORA) for lora in request.lora)]


def locate_file(name: str, kind: FileKind) -> Path | None:
    """A file on this machine, checked; None if it must be downloaded from a hub.

    Args:
        name: a file, a folder that holds one, or a hub id (OWNER/NAME or OWNER/NAME/FILE).

    Raises:
        UserError: it is none of these, or the file is damaged.
    """
    given = format_value(name) if name.strip() else "an empty value"
    path = Path(os.path.expanduser(name))
    if name.strip() and os.path.isdir(path):  # unlike Path's, it accepts invalid names
        with errors_about(kind.flag):
            path = path / choose_file(os.listdir(path), given, kind)
    elif not os.path.isfile(path):
        match = HUB_FILE.fullmatch(name)
        mistyped = Path(name).suffix in (".safetensors", ".gguf", *OTHER_FORMATS)  # a file name rather than a hub id
        if match is not None and match[2] is not None:
            mistyped = os.path.isdir(os.path.dirname(name)) or Path(name).suffix not in kind.suffixes
        if match is None or mistyped or not (match[2] or kind.usual):
            raise UserError(kind.flag, f"{given} is not a file or folder; {kind.remedy}")
        return None
    check_single_file(path, kind)
    return path


def choose_file(names: Collection[str], where: str, kind: FileKind) -> str:
    """Choose from the files of a folder or hub model: the one with a usual name, or the only one."""
    found = sorted(name for name in names if name.endswith(kind.suffixes) and "/" not in name)
    usual = [name for name in kind.usual if name in found]
    if not usual and len(found) != 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        wanted = " or ".join(kind.suffixes)
        held = f"{len(found)} {wanted} files ({some})" if found else f"no {wanted} file"
        remedy = f"give the {kind.name}'s own file, {where.rstrip('/')}/FILE{kind.suffixes[0]}"
        raise UserError(kind.flag, f"{where} holds {held}; {remedy}")
    return (usual or found)[0]


def check_single_file(file: Path, kind: FileKind) -> None:
    """Raise UserError unless `file` is complete and in a format of its kind."""
    if file.suffix not in kind.suffixes:
        reason = f"{format_value(file)} is not a {' or '.join(kind.suffixes)} file"
        raise UserError(kind.flag, f"{reason}; convert it, as other formats can run code")
    with errors_about(kind.flag):
        check_file(file)


def file_on_hub(name: str, request: GenerationRequest, kind: FileKind) -> tuple[str, str | None]:
    """The model that a file's hub id names, and the file in it, None if only the download can tell.

    Raises:
        UserError: there is no such model or file, or the choice of file is ambiguous.
    """
    check_client(request)
    match = HUB_FILE.fullmatch(name)
    assert match, f"{name} is not a hub id of a file"
    model_id, file = match[1], match[2]
    if file is not None and (folder := cached(request, model_id)) is not None and (folder / file).is_file():
        return model_id, file
    listed = list_files(request, model_id, kind.flag)
    if listed and file is None:
        file = choose_file(listed, name, kind)
    if listed and file not in listed:
        raise UserError(kind.flag, f"{model_id} on {request.model_source} has no {file}; check the file's name")
    return model_id, file


def download_file(name: str, request: GenerationRequest, kind: FileKind) -> Path:
    """Download a file from the request's hub, with what is needed beside it, and return its path, checked.

    Args:
        name: a hub id for which `locate_file` returned None.

    Raises:
        UserError: the hub cannot be reached or does not have the file; says what to do.
    """
    model_id, file = file_on_hub(name, request, kind)
    folder = cached(request, model_id)
    if folder is None or file is None or not (folder / file).is_file():
        wanted = [glob.escape(one) for one in ([file] if file else kind.usual)]
        if kind.beside:
            wanted.append(glob.escape((Path(file or kind.beside).parent / kind.beside).as_posix()))
        folder = fetch(request, model_id, wanted, kind.flag)
    path = folder / (file or choose_file(os.listdir(folder), name, kind))
    check_single_file(path, kind)
    return path
