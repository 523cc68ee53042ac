"""The Hugging Face hub. The only module that imports huggingface_hub.

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are the client's own business; nothing here reads them.
"""

from __future__ import annotations

import hashlib
import math
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from builder.errors import HostError, ModelError
from builder.files import require_space
from builder.models import Header, ModelRef, TensorHeader
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
_LOOK_SECONDS = 0.5


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


def is_offline() -> bool:
    """Whether the client may not ask the hub."""
    from huggingface_hub import constants as hub

    return bool(hub.HF_HUB_OFFLINE)


Choose = Callable[[Iterable[str], Callable[[str], Path]], list[str]]


def download(
    ref: ModelRef,
    choose: Choose,
    reporter: Reporter,
    accept: Callable[[Path], None] | None = None,
) -> Fetched:
    """Fetch the files that `choose` keeps, at one commit, several at a time.

    choose: of all paths; what it is given besides has one file here, checked, to choose by.
    accept: sees a folder with config.json before the weights are fetched. Finished files are reused; a file
    that a kill cut starts again. Raises ModelError or HostError.
    """
    from huggingface_hub import constants as hub
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

    assert ref.repo is not None
    repository = Repository("model", ref.repo, ref.revision)
    if hub.HF_HUB_OFFLINE:
        cached = _cached(repository, choose, reporter)
        if accept:
            accept(cached.root)
        return cached
    info, sizes = _metadata(repository, reporter)

    def fetch(path: str) -> Path:
        local = _call(repository, lambda: hf_hub_download(repository.name, path, revision=info.sha))
        root = Path(local).parents[path.count("/")]
        return _whole(Fetched(repository, root, info.sha, _digests(info)), path, reporter)

    if accept and "config.json" in sizes:
        accept(fetch("config.json").parent)
    # The card carries the licence; it does not go into the image.
    wanted = choose(sizes, fetch) + [name for name in sizes if name == "README.md"]
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


def shard_headers(fetched: Fetched, paths: Sequence[str]) -> dict[str, Header]:
    """The headers of these shards, which alone are read. Raises ModelError."""
    from huggingface_hub import HfApi, errors

    def header(path: str) -> Header:
        try:
            found = HfApi().parse_safetensors_file_metadata(
                fetched.repository.name, path, revision=fetched.commit
            )
            return checked_header(found.tensors, fetched.sizes[path])
        except (errors.SafetensorsParsingError, ValueError, TypeError, AttributeError, RecursionError):
            raise ModelError(
                f"the shard {path} of {fetched.repository} is corrupt", fix="Use another revision."
            ) from None

    def all_headers() -> dict[str, Header]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(paths, pool.map(header, paths), strict=True))

    found: dict[str, Header] = _call(fetched.repository, all_headers)
    return found


def checked_header(tensors: Mapping[str, Any], size: int) -> Header:
    """What the client read of a header, whose types it does not check. Raises ValueError or TypeError.

    size: of the whole shard, in bytes.
    """
    header = {}
    for name, tensor in tensors.items():
        begin, end = tensor.data_offsets
        if not isinstance(tensor.dtype, str) or not isinstance(tensor.shape, list):
            raise TypeError(name)
        if any(type(number) is not int for number in (begin, end, *tensor.shape)):
            raise TypeError(name)
        # The narrowest types have two numbers a byte.
        fits = 0 <= begin <= end < size and math.prod(tensor.shape) <= 2 * (end - begin)
        if not fits or any(length < 0 for length in tensor.shape):
            raise ValueError(name)
        header[name] = TensorHeader(tensor.dtype, tuple(tensor.shape))
    return header


def download_dataset_file(
    repository: Repository, choose: Callable[[Mapping[str, int]], str], reporter: Reporter
) -> tuple[Path, str]:
    """The one file of a dataset that `choose` names (of path -> size), checked, and the commit.

    Raises as `download` does.
    """
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
        cached = Fetched(repository, root, root.name, _digests_of_links(root, [path]), offline=True)
        return _whole(cached, path, reporter), cached.commit
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
    return _whole(fetched, path, reporter), fetched.commit


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


def _whole(fetched: Fetched, path: str, reporter: Reporter) -> Path:
    """A file of a snapshot with the bytes that the hub has, fetched once more where it had others."""
    local, digest = fetched.root / path, fetched.digests.get(path)
    if _holds(local, digest):
        return local
    if not fetched.offline:
        reporter.note(f"{path} is not what the hub has; fetching it again")
        download_again(fetched, [path])
        if _holds(local, digest):
            return local
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
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    digests = [sibling.lfs.sha256 for sibling in info.siblings or [] if sibling.lfs is not None]
    # What becomes a path, a sum or a lock; the client checks none of it.
    usable = (
        (isinstance(info.sha, str) and re.fullmatch(r"\w[\w.-]*", info.sha))
        and all(isinstance(path, str) and type(size) is int and size >= 0 for path, size in sizes.items())
        and all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    )
    if not usable:
        raise _unlike_a_hub(repository, "It has no commit, or sizes or digests that are none.")
    return info, sizes


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


def _cached(repository: Repository, choose: Choose, reporter: Reporter) -> Fetched:
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

    def require(path: str) -> None:
        if not (root / path).is_file():
            raise ModelError(
                f"{path} of {repository} is not in the local hub cache",
                why="HF_HUB_OFFLINE forbids to fetch it.",
                fix="Unset HF_HUB_OFFLINE and run again.",
            )

    def with_digests_of(*paths: str) -> Fetched:
        return Fetched(repository, root, root.name, _digests_of_links(root, paths), offline=True)

    def fetch(path: str) -> Path:
        require(path)
        return _whole(with_digests_of(path), path, reporter)

    wanted = choose(paths, fetch)
    for path in wanted:
        require(path)
    return with_digests_of(*wanted, "README.md")


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
        except BaseException as error:  # a panic of hf_xet's Rust; without an outcome all would wait for ever
            outcome.put((False, RuntimeError(f"{type(error).__name__}: {error}")))

    threading.Thread(target=run, daemon=True).start()
    while True:
        # A signal that comes between Python's last look for one and the wait does not end the wait.
        with suppress(queue.Empty):
            ok, value = outcome.get(timeout=_LOOK_SECONDS)
            break
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
        raise _unlike_a_hub(repository, f"{type(error).__name__}: {error}.") from None
    except RecursionError:
        raise _unlike_a_hub(repository, "It is nested too deeply.") from None
    except RuntimeError as error:  # all that hf_xet knows to say
        raise ModelError(
            f"cannot get {repository.at}",
            why=f"{error}.",
            fix="Run again; HF_HUB_DISABLE_XET=1 does without the client's chunk transfer.",
        ) from None


def _unlike_a_hub(repository: Repository, why: str) -> ModelError:
    return ModelError(
        f"the answer about {repository.at} is not like a hub's",
        why=why,
        fix="Check HF_ENDPOINT and any proxy in between.",
    )


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
