"""The Hugging Face hub. The only module that imports huggingface_hub.

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are the client's own business; nothing here reads them.
"""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.errors import HostError, ModelError
from builder.models import ModelRef
from builder.report import Reporter, Task

_LOGIN = "Accept the terms on the model's page, then set HF_TOKEN or run `hf auth login`."


@dataclass(frozen=True)
class Fetched:
    """A snapshot in the hub's cache. digests: path -> what the hub says of it, "sha256:…" or "git:…"."""

    root: Path
    commit: str
    digests: Mapping[str, str]

    def discard(self, path: str) -> None:
        """Remove one file from the cache, so that the next download fetches it again."""
        (self.root / path).resolve().unlink(missing_ok=True)
        (self.root / path).unlink(missing_ok=True)


def download(ref: ModelRef, choose: Callable[[Iterable[str]], list[str]], reporter: Reporter) -> Fetched:
    """Fetch the files that `choose` keeps, at one commit.

    Finished files are reused; a file that a kill cut starts again. Raises ModelError or HostError.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub import constants as hub

    assert ref.repo is not None
    repo = ref.repo
    if hub.HF_HUB_OFFLINE:
        return _cached(ref, repo)
    reporter.step(f"Resolving {ref.repo} on the hub")
    info = _call(ref, lambda: HfApi().model_info(repo, revision=ref.revision, files_metadata=True))
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    # The card carries the licence; it does not go into the image.
    wanted = choose(sizes) + [name for name in sizes if name == "README.md"]
    total = sum(sizes[name] for name in wanted)
    missing = [n for n in wanted if not isinstance(try_to_load_from_cache(repo, n, revision=info.sha), str)]
    require_space(Path(hub.HF_HUB_CACHE), sum(sizes[name] for name in missing))
    with reporter.task(f"Downloading {ref.repo}", total) as task:
        root = _call(
            ref,
            lambda: snapshot_download(
                repo,
                revision=ref.revision,  # by its name, so that the client can find it again offline
                allow_patterns=[_literal(name) for name in wanted],
                tqdm_class=_forwarding_bar(task),
            ),
        )
    if Path(root).name != info.sha:
        raise ModelError(
            f"{ref.repo} changed while it was downloaded", fix="Run again, or give a commit with --revision."
        )
    digests = {sibling.rfilename: _digest(sibling) for sibling in info.siblings or []}
    return Fetched(Path(root), str(info.sha), {name: d for name, d in digests.items() if d})


def _digest(sibling: Any) -> str:
    if sibling.lfs is not None:
        return f"sha256:{sibling.lfs.sha256}"
    return f"git:{sibling.blob_id}" if sibling.blob_id else ""


def _cached(ref: ModelRef, repo: str) -> Fetched:
    """The snapshot in the local cache. Whether it is whole is for the check of the shards to say."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=ref.revision)
    if not isinstance(config, str):
        raise _unreachable(ref)
    folder = Path(config).parent
    return Fetched(folder, folder.name, {})


def _literal(name: str) -> str:
    """The client matches names as shell patterns; a name must match only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _forwarding_bar(task: Task) -> Any:
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        """Shows nothing itself; the client's one bar of bytes on the disk feeds the task."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._total_bytes = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._total_bytes and n:
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


def _call(ref: ModelRef, function: Callable[[], Any]) -> Any:
    """Run a hub call and turn its errors into ours. The client's messages name no token."""
    from huggingface_hub import errors

    where = f"{ref.repo}@{ref.revision}" if ref.revision else str(ref.repo)
    try:
        return _interruptible(function)
    except errors.GatedRepoError:
        raise ModelError(f"{where} is gated", why="The hub answered 403.", fix=_LOGIN) from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"{ref.repo} has no revision {ref.revision!r}", fix="Give a branch, a tag or a commit of it."
        ) from None
    except errors.RepositoryNotFoundError:
        raise _not_found(ref) from None
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError):
        raise _unreachable(ref) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        if status in (401, 404):
            raise _not_found(ref) from None
        fix = _LOGIN if status == 403 else "Try again later."
        raise ModelError(f"cannot get {where}", why=f"The hub answered {status}.", fix=fix) from None
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise ModelError(
            f"cannot reach the hub for {where}",
            why=f"{type(error).__name__}: {error}.",
            fix="Check the network or HF_ENDPOINT, or give a folder that has the model.",
        ) from None


def _unreachable(ref: ModelRef) -> ModelError:
    return ModelError(
        f"{ref.repo} is not in the local hub cache, and the hub is out of reach",
        fix="Check the network, unset HF_HUB_OFFLINE, or give a folder that has the model.",
    )


def _not_found(ref: ModelRef) -> ModelError:
    """The hub answers the same for a name that does not exist and for one that the caller may not see."""
    return ModelError(
        f"{ref.repo} is not on the hub, or is private",
        why="The hub answered 401 or 404.",
        fix="Check the name; for a private model set HF_TOKEN or run `hf auth login`.",
    )


def require_space(cache: Path, needed: int) -> None:
    folder = cache
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HostError(
            f"the model needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free",
            fix="Free some space, or set HF_HOME to a larger disk.",
        )
