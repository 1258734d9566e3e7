"""Everything that a request names, on this machine: its inputs looked at, its checkpoint and LoRAs downloaded.

With several ranks the main process of each machine does so; the others come after it, and find everything there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyreels_v3.cache import cache_folder
from skyreels_v3.checkpoints.files import Repository
from skyreels_v3.checkpoints.hub import download, download_lora, locate, locate_lora
from skyreels_v3.errors import AlreadyDone, UserError, cause_of
from skyreels_v3.families import family_of, make_tiny
from skyreels_v3.media.files import run_folder
from skyreels_v3.parallel import processes
from skyreels_v3.parallel.ranks import Ranks
from skyreels_v3.plan import Checked
from skyreels_v3.preflight import checkpoint_here, follow_checkpoint, preflight
from skyreels_v3.request import GenerationRequest, Request
from skyreels_v3.tasks import TINY

RemoteError = tuple[str | None, str]  # for other processes: the flag of a UserError or DONE, and the text
DONE = "done"


@contextmanager
def downloads_folder(ranks: Ranks) -> Iterator[Path]:
    """A folder for the inputs of one video that are URLs, by the process that fetches them; the others use that."""
    if not ranks.is_local_main:
        yield Path()
        return
    with run_folder() as folder:
        yield folder


def resolve(
    request: GenerationRequest,
    downloads: Path,
    ranks: Ranks,
    resolver: AssetResolver,
    name: str,
    checked: Checked | AlreadyDone | None = None,
) -> Checked:
    """Check a request and download what is missing. If it goes wrong on one rank, it raises on all of them.

    Args:
        downloads: a folder for inputs that are URLs, for as long as the video is being made.
        ranks: of the processes that make the video together.
        name: what the processes call this video; used once.
        checked: what `look` has found already, where it has been called.
    """
    if ranks.world_size == 1:
        return find(request, downloads, ranks, resolver, checked)
    found, problem, own = None, None, None
    if not ranks.is_local_main:
        there, known, problem = processes.store_get(f"found/{name}/{ranks.node}")
        downloads = Path(there)
        resolver.learn(known)
    try:
        found = find(request, downloads, ranks, resolver, checked) if problem is None else None
    except Exception as error:
        own, problem = error, to_remote(error)
    if ranks.is_local_main:
        processes.store_set(f"found/{name}/{ranks.node}", [str(downloads), resolver.known(), problem])
    seed = request.seed if found is None else found.request.seed  # maybe that of an interrupted run
    processes.store_set(f"ready/{name}/{ranks.rank}", [seed, problem])
    everyone = [processes.store_get(f"ready/{name}/{rank}") for rank in range(ranks.world_size)]
    for _, problem in everyone:
        if problem is not None:
            raise own or from_remote(problem)
    assert found is not None
    return replace(found, request=replace(found.request, seed=everyone[0][0]))


def find(
    request: GenerationRequest,
    downloads: Path,
    ranks: Ranks,
    resolver: AssetResolver,
    checked: Checked | AlreadyDone | None,
) -> Checked:
    """What `resolve` gives, on this process."""
    checked = checked or look(request, downloads, ranks)
    if isinstance(checked, AlreadyDone):
        raise checked
    resolved, checkpoint = resolver.resolve(checked.request, checked.checkpoint)
    return replace(checked, request=resolved, checkpoint=checkpoint)


def look(request: GenerationRequest, downloads: Path, ranks: Ranks) -> Checked | AlreadyDone:
    """See `preflight`; that a video is there already is not raised before all processes know."""
    try:
        return preflight(request, downloads, ranks)
    except AlreadyDone as done:
        return done


class AssetResolver:
    """Checkpoints and LoRAs from elsewhere. Each is fetched once, and one that could not be is not asked for again."""

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self.problems: dict[str, RemoteError] = {}

    def resolve(self, request: Request, checkpoint: Path | None) -> tuple[Request, Path]:
        """A request and the folder of its checkpoint, with that and the LoRAs on this machine.

        Args:
            checkpoint: its folder, None if it is yet to be fetched or made.
        """
        loras = tuple(lora._replace(source=self.lora(lora.source, request)) for lora in request.lora)
        request = replace(request, lora=loras)
        if checkpoint is None:
            from skyreels_v3.components import check_loras

            check_loras(request)  # they weigh less than what would have been fetched in vain
            names = (request.model_source, request.model_id, request.task.name)
            checkpoint = Path(self.get(names, lambda: fetch(request)))
        for repository in family_of(request.task).repositories(request.task)[1:]:
            request = replace(request, base_model_id=self.base(request, repository, checkpoint))
        return follow_checkpoint(request, checkpoint), checkpoint

    def base(self, request: GenerationRequest, repository: Repository, checkpoint: Path) -> str:
        """The folder of the components that are not the checkpoint's own."""
        if (folder := locate(request, repository, checkpoint)) is not None:
            return str(folder)
        name = request.base_model_id or repository.model_id
        return self.get((request.model_source, name, "base"), lambda: download(request, repository))

    def lora(self, name: str, request: GenerationRequest) -> str:
        """The file of a LoRA."""
        if (file := locate_lora(name)) is not None:
            return str(file)
        return self.get((request.model_source, name), lambda: download_lora(name, request))

    def get(self, names: Sequence[str], fetch: Callable[[], Path]) -> str:
        """What goes by some names, fetched if it has not been."""
        key = " ".join(names)
        if key in self.problems:
            raise from_remote(self.problems[key])
        if key not in self.paths:
            try:
                self.paths[key] = str(fetch())
            except Exception as error:
                self.problems[key] = to_remote(error)
                raise
        return self.paths[key]

    def resolve_all(self, requests: Iterable[GenerationRequest]) -> None:
        """Fetch all that requests need."""
        for request in requests:
            with suppress(Exception):  # the job itself meets it again
                self.resolve(request, checkpoint_here(request))

    def known(self) -> list[Any]:
        """All that another process on this machine must know, for JSON."""
        return [self.paths, self.problems]

    def learn(self, known: Sequence[Mapping[str, Any]]) -> None:
        """Take over what another one knows."""
        self.paths |= known[0]
        self.problems |= known[1]


def fetch(request: GenerationRequest) -> Path:
    """The folder of a checkpoint that was not on this machine."""
    if request.model_id != TINY:
        return download(request, family_of(request.task).repositories(request.task)[0])
    try:
        return make_tiny(request.task)
    except OSError as error:
        reason = f"{TINY} cannot be made in {cache_folder()} ({error.strerror or error})"
        raise UserError("--model_id", f"{reason}; set SKYREELS_CACHE to a folder that can be written to") from error


def to_remote(error: Exception) -> RemoteError:
    """An error for other processes."""
    if isinstance(error, AlreadyDone):
        return DONE, str(error.output)
    if isinstance(error, UserError):
        return error.flag, error.message
    return None, cause_of(error)


def from_remote(remote: RemoteError) -> Exception:
    """The error that another process tells of."""
    flag, text = remote
    if flag == DONE:
        return AlreadyDone(Path(text))
    return RuntimeError(text) if flag is None else UserError(flag, text)
