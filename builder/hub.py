"""The Hugging Face hub. The only module that imports huggingface_hub.

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are the client's own business; nothing here reads them.
"""

from __future__ import annotations

import hashlib
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from builder.errors import HostError, ModelError
from builder.files import require_space
from builder.models import ModelRef, Shapes
from builder.report import Reporter, Task

_METADATA_SECONDS = 30.0
_LOGIN = "set HF_TOKEN or run `hf auth login`"


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at a branch, tag or commit; None is the default branch."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.kind == "model" else f"the dataset {self.name}"

    @property
    def at(self) -> str:
        return f"{self}@{self.revision}" if self.revision else str(self)

    @property
    def cache_name(self) -> str:
        """The folder that the hub's cache keeps it in."""
        return f"{self.kind}s--{self.name.replace('/', '--')}"


_AT_ONCE = 8


@dataclass(frozen=True)
class Fetched:
    """A snapshot in the hub's cache.

    digests and sizes: path -> what the hub says of it, "sha256:…" or "git:…", and bytes.

    offline: it was taken as it is in the cache; nothing can be fetched again.
    """

    repository: Repository
    root: Path
    commit: str
    digests: Mapping[str, str]
    offline: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)


def download(
    ref: ModelRef,
    choose: Callable[[Iterable[str]], list[str]],
    reporter: Reporter,
    accept: Callable[[Path], None] | None = None,
) -> Fetched:
    """Fetch the files that `choose` keeps, at one commit, several at a time.

    accept: sees a folder with config.json before the weights are fetched. Finished files are reused; a file
    that a kill cut starts again. Raises ModelError or HostError.
    """
    from huggingface_hub import constants as hub
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

    assert ref.repo is not None
    repository = Repository("model", ref.repo, ref.revision)
    if hub.HF_HUB_OFFLINE:
        cached = _cached(repository, choose)
        if accept:
            accept(cached.root)
        return cached
    info, sizes = _metadata(repository, reporter)
    if accept and "config.json" in sizes:
        config = _call(repository, lambda: hf_hub_download(repository.name, "config.json", revision=info.sha))
        accept(Path(config).parent)
    # The card carries the licence; it does not go into the image.
    wanted = choose(sizes) + [name for name in sizes if name == "README.md"]
    missing = [
        name
        for name in wanted
        if not isinstance(try_to_load_from_cache(ref.repo, name, revision=info.sha), str)
    ]
    remove_orphans(Path(hub.HF_HUB_CACHE), repository.cache_name)
    _require_space(sum(sizes[name] for name in missing))
    total = sum(sizes[name] for name in wanted)
    with reporter.task(f"Downloading {ref.repo}", total) as task:
        task.advance(total - sum(sizes[name] for name in missing))
        root = _call(
            repository,
            lambda: snapshot_download(
                repository.name,
                revision=ref.revision,  # by its name, so that the client can find it again offline
                allow_patterns=[_literal(name) for name in wanted],
                tqdm_class=_forwarding_bar(task),
            ),
        )
    _require_commit(repository, Path(root).name, info.sha)
    return Fetched(repository, Path(root), str(info.sha), _digests(info), sizes=sizes)


def download_again(fetched: Fetched, paths: Iterable[str]) -> None:
    """Replace files of a snapshot, each at once, so that a build beside this one never misses one."""
    from huggingface_hub import hf_hub_download

    for path in paths:
        fetch = partial(
            hf_hub_download,
            fetched.repository.name,
            path,
            repo_type=fetched.repository.kind,
            revision=fetched.commit,
            force_download=True,
            tqdm_class=_forwarding_bar(None),
        )
        _call(fetched.repository, fetch)


def tensor_shapes(fetched: Fetched, paths: Sequence[str]) -> dict[str, Shapes]:
    """What the headers of these shards say, which alone are read. Raises ModelError."""
    from huggingface_hub import HfApi, errors

    def shapes(path: str) -> Shapes:
        try:
            header = HfApi().parse_safetensors_file_metadata(
                fetched.repository.name, path, revision=fetched.commit
            )
        except errors.SafetensorsParsingError:
            raise ModelError(
                f"the shard {path} of {fetched.repository} is corrupt", fix="Use another revision."
            ) from None
        return {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}

    def all_shapes() -> dict[str, Shapes]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(paths, pool.map(shapes, paths), strict=True))

    found: dict[str, Shapes] = _call(fetched.repository, all_shapes)
    return found


def download_dataset_file(
    repository: Repository, choose: Callable[[Mapping[str, int]], str], reporter: Reporter
) -> Path:
    """The one file of a dataset that `choose` names (of path -> size), checked. Raises as `download` does."""
    from huggingface_hub import constants as hub
    from huggingface_hub import hf_hub_download, snapshot_download

    if hub.HF_HUB_OFFLINE:
        root = Path(
            _call(
                repository,
                lambda: snapshot_download(
                    repository.name,
                    repo_type="dataset",
                    revision=repository.revision,
                    local_files_only=True,
                ),
            )
        )
        here = {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}
        path = choose(here)
        _require_whole(Fetched(repository, root, root.name, _digests_of_links(root, [path]), True), path)
        return root / path
    info, sizes = _metadata(repository, reporter)
    path = choose(sizes)
    remove_orphans(Path(hub.HF_HUB_CACHE), repository.cache_name)
    _require_space(sizes[path])
    with reporter.task(f"Downloading {path} of {repository}", sizes[path]) as task:
        local = Path(
            _call(
                repository,
                lambda: hf_hub_download(
                    repository.name,
                    path,
                    repo_type="dataset",
                    revision=repository.revision,
                    tqdm_class=_forwarding_bar(task),
                ),
            )
        )
    root = local.parents[path.count("/")]
    _require_commit(repository, root.name, info.sha)
    fetched = Fetched(repository, root, str(info.sha), _digests(info))
    if not _holds(local, fetched.digests.get(path)):
        reporter.note(f"{path} is not what the hub has; fetching it again")
        download_again(fetched, [path])
        _require_whole(fetched, path)
    return local


def damaged(fetched: Fetched, path: str) -> ModelError:
    """The error for a file that is not what the hub says, when all was done that can be done."""
    if fetched.offline:
        return ModelError(
            f"{path} of {fetched.repository} is damaged in the local hub cache",
            why="Its digest is not the hub's, and HF_HUB_OFFLINE forbids to fetch it again.",
            fix="Unset HF_HUB_OFFLINE and run again.",
        )
    return ModelError(
        f"{path} of {fetched.repository} arrived damaged twice",
        why="Its digest is not the hub's.",
        fix="Check the disk and any proxy in between, then run again.",
    )


def _require_whole(fetched: Fetched, path: str) -> None:
    if not _holds(fetched.root / path, fetched.digests.get(path)):
        raise damaged(fetched, path)


def _holds(path: Path, digest: str | None) -> bool:
    if digest is None:
        return True
    kind, _, value = digest.partition(":")
    with path.open("rb") as file:
        prefix = b"" if kind == "sha256" else b"blob %d\0" % path.stat().st_size
        hasher = hashlib.new("sha256" if kind == "sha256" else "sha1", prefix, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: hasher).hexdigest() == value


def _metadata(repository: Repository, reporter: Reporter) -> tuple[Any, dict[str, int]]:
    """What the hub says of a repository, and path -> size. Every request from here on is retried."""
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook

    from builder.hub_http import RetryingClient

    set_client_factory(
        lambda: RetryingClient(
            reporter.note,
            event_hooks={"request": [hf_request_event_hook]},
            follow_redirects=True,
            timeout=None,
        )
    )
    reporter.step(f"Resolving {repository} on the hub")
    info = _call(
        repository,
        lambda: HfApi().repo_info(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            files_metadata=True,
            timeout=_METADATA_SECONDS,
        ),
    )
    return info, {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}


def _require_commit(repository: Repository, found: str, wanted: str | None) -> None:
    if found != wanted:
        raise ModelError(
            f"{repository} changed while it was downloaded",
            fix="Run again, or give a commit as its revision.",
        )


def _digests(info: Any) -> dict[str, str]:
    found = {}
    for sibling in info.siblings or []:
        if sibling.lfs is not None:
            found[sibling.rfilename] = f"sha256:{sibling.lfs.sha256}"
        elif sibling.blob_id:
            found[sibling.rfilename] = f"git:{sibling.blob_id}"
    return found


def _digests_of_links(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """As the cache itself says them: a file there is a link to a blob that is named by its digest."""
    found = {}
    for path in paths:
        blob = (root / path).readlink().name if (root / path).is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{64}", blob):
            found[path] = f"sha256:{blob}"
        elif re.fullmatch(r"[0-9a-f]{40}", blob):
            found[path] = f"git:{blob}"
    return found


def _cached(repository: Repository, choose: Callable[[Iterable[str]], list[str]]) -> Fetched:
    """The snapshot in the local cache, which must have every wanted file that was there at its commit."""
    from huggingface_hub import get_cached_repo_tree, try_to_load_from_cache
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    config = try_to_load_from_cache(repository.name, "config.json", revision=repository.revision)
    if not isinstance(config, str):
        raise _unreachable(repository)
    root = Path(config).parent
    try:
        paths = [file.path for file in get_cached_repo_tree(repository.name, revision=root.name)]
    except CachedRepoTreeNotFoundError:  # of an older client: what is there is taken for all
        paths = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    wanted = choose(paths)
    missing = [path for path in wanted if not (root / path).is_file()]
    if missing:
        raise ModelError(
            f"{missing[0]} of {repository} is not in the local hub cache",
            why="HF_HUB_OFFLINE forbids to fetch it.",
            fix="Unset HF_HUB_OFFLINE and run again.",
        )
    return Fetched(repository, root, root.name, _digests_of_links(root, [*wanted, "README.md"]), offline=True)


def remove_orphans(cache: Path, repository: str) -> None:
    """Remove what killed downloads of one repository left: `blobs/<etag>.<random>.incomplete`.

    The client writes such a file only while it holds the lock of its etag, so one whose lock is free is
    nobody's. Where the lock cannot be had, or the disk has no locks, everything stays.
    """
    from filelock import FileLock, Timeout

    for part in (cache / repository / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / repository / f"{part.name.split('.', 1)[0]}.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=0, mode=0o664):
                part.unlink(missing_ok=True)
        except (Timeout, OSError, NotImplementedError):
            continue


def _literal(name: str) -> str:
    """The client matches names as shell patterns; a name must match only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _forwarding_bar(task: Task | None) -> Any:
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        """Shows nothing itself; of the client's bars, the one of bytes on the disk feeds the task."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("name") in (
                "huggingface_hub.snapshot_download",
                "huggingface_hub.http_get",
            )
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if task and self._counts and n:
                task.advance(int(n))

    return Bar


def _interruptible(function: Callable[[], Any]) -> Any:
    """Call in a thread that is left behind on Ctrl-C: the client waits for whole files otherwise."""
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((True, function()))
        except Exception as error:
            outcome.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    ok, value = outcome.get()
    if not ok:
        raise value
    return value


def _call(repository: Repository, function: Callable[[], Any]) -> Any:
    """Run a hub call and turn its errors into ours. The client's messages name no token."""
    from huggingface_hub import errors

    from builder.hub_http import GaveUpError

    try:
        return _interruptible(function)
    except GaveUpError as error:
        raise ModelError(
            f"cannot get {repository.at}",
            why=f"{str(error).capitalize()}.",
            fix="Run again later; files that were finished are kept.",
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refused(repository, error) from None
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refused(repository, error.__cause__) from None
        raise _unreachable(repository) from None
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        raise ModelError(
            f"cannot reach the hub for {repository.at}",
            why=f"{type(error).__name__}: {error}.",
            fix="Check the network or HF_ENDPOINT, or give a folder or file of this machine.",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise HostError(
                f"cannot put {repository.at} into the local hub cache",
                why=f"{error}.",
                fix="Check the disk, or set HF_HOME to a folder that you may write to.",
            ) from None
        raise ModelError(
            f"the answer about {repository.at} is not like a hub's",
            why=f"{type(error).__name__}: {error}.",
            fix="Check HF_ENDPOINT and any proxy in between.",
        ) from None


def _unreachable(repository: Repository) -> ModelError:
    return ModelError(
        f"{repository} is not in the local hub cache, and the hub is out of reach",
        fix="Check the network, unset HF_HUB_OFFLINE, or give a folder or file of this machine.",
    )


def _refused(repository: Repository, error: Any) -> ModelError:
    """What a status means. Without a token the hub answers 401 for what is missing, private or gated; with
    one, 404 for what is missing or hidden, 403 for what is gated, and 401 where it does not know the token.
    """
    from huggingface_hub import errors

    status = error.response.status_code
    with_token = "authorization" in error.response.request.headers
    why = f"The hub answered {status}."
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"{repository} has no revision {repository.revision!r}",
            fix="Give a branch, a tag or a commit of it.",
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ModelError(f"a file of {repository.at} is gone", why=why, fix="Run again.")
    if isinstance(error, errors.DisabledRepoError):
        return ModelError(f"{repository} is disabled on the hub", why=why, fix="Use another one.")
    if isinstance(error, errors.GatedRepoError):
        if with_token:
            why += " The token's account has not accepted its terms, or the token may not read gated ones."
            fix = "Accept the terms on its page with that account."
        else:
            fix = f"Accept the terms on its page, then {_LOGIN}."
        return ModelError(f"{repository.at} is gated", why=why, fix=fix)
    if status == 401 and with_token:
        return ModelError(
            f"the hub does not accept the token (asked for {repository.at})",
            why=why,
            fix="Make a new token and set it as HF_TOKEN or with `hf auth login`; public ones need none.",
        )
    if status == 401:
        return ModelError(
            f"{repository} is not on the hub, or is private and no token was given",
            why=why,
            fix=f"Check the name; for a private one {_LOGIN}.",
        )
    if status == 404:
        hidden = "the token may not see it" if with_token else "is private and no token was given"
        return ModelError(
            f"{repository} does not exist on the hub, or {hidden}",
            why=why,
            fix="Check the name and whose token it is." if with_token else f"Check the name, or {_LOGIN}.",
        )
    fix = "Use a token that may read it." if status == 403 else "Run again later."
    return ModelError(f"cannot get {repository.at}", why=why, fix=fix)


def _require_space(needed: int) -> None:
    from huggingface_hub import constants as hub

    require_space(
        Path(hub.HF_HUB_CACHE),
        needed,
        what="the download needs",
        fix="Free some, or set HF_HOME to a larger disk.",
    )
