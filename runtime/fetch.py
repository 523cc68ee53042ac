"""Downloads the locked files to the model's path and checks every one, in a process of its own.

The only module of the runtime that imports huggingface_hub; HF_TOKEN, HF_ENDPOINT and the like are the
client's own business. The last line on stdout is FETCHED, or the reason why not.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from runtime import logs, trace
from runtime.phases import Phase, now
from runtime.settings import LockedFile, Manifest

FETCHED = "fetched"

_AT_ONCE = 8
_TICK_SECONDS = 0.5
# Reading less than this is no sign of progress: looking for one reads, too.
_TOLD_BYTES = 1 << 17
_WAITING = "waiting for another container"
_START_WITH_TOKEN = "start with `docker run -e HF_TOKEN …`"  # noqa: S105 - a sentence
_TERMS = f"accept the terms on the model's page, and {_START_WITH_TOKEN}"
# The client's own notes on what it put into a folder.
_NOTES = Path(".cache", "huggingface", "download")

# Seconds before each further try of a body, where the hub does not ask for others. The client itself tries
# metadata several times, and bodies only after 408, 429 and some cuts.
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
_LONGEST_WAIT = 300.0  # the hub's rate limits reset within that
# By name: which library raises them depends on the client's version. A wrong address does not pass.
_PASSING_ERRORS = frozenset({"ReadError", "ReadTimeout", "RemoteProtocolError", "ChunkedEncodingError"})
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)

_T = TypeVar("_T")


class FetchError(Exception):
    """The model cannot be had. One line: why, and what to do."""


def main(manifest: Manifest) -> int:
    """Ends the process: the client's threads would finish their files first."""
    multiprocessing.current_process().name = "fetch"  # the role that the phase is reported with
    started = now()
    try:
        detail = fetch(manifest, started)
        trace.emit(Phase.MODEL_DOWNLOAD, started, now(), detail)
        line, code = FETCHED, 0
    except FetchError as error:
        line, code = str(error), 1
    print(line, flush=True)
    os._exit(code)


def fetch(manifest: Manifest, started: float) -> str:
    """Have exactly the locked files at the model's path; says what was done. Raises FetchError.

    A file that is whole stays; one that is not is fetched, and once more if it arrives damaged.
    """
    root = Path(manifest.model_path)
    total = sum(file.size for file in manifest.files)
    trace.announce(Phase.MODEL_DOWNLOAD, started)
    try:
        # Containers that share a volume take turns; those that come later find everything there.
        with _alone(root, started), _progress(root, total, started):
            _tidy(root, manifest.files)
            whole = _each(lambda file: file.is_whole(root), manifest.files)
            missing = [file for file, is_whole in zip(manifest.files, whole, strict=True) if not is_whole]
            if missing:
                _require_space(root, missing)
                _each(lambda file: _get(manifest, root, file), missing)
    except OSError as error:
        raise _disk_error(root, error) from None
    size = sum(file.size for file in missing)
    return f"{_amount(size)} downloaded" if missing else f"{_amount(total)} here already"


def _get(manifest: Manifest, root: Path, file: LockedFile) -> None:
    for attempt in (1, 2):
        (root / file.path).unlink(missing_ok=True)
        _download(manifest, root, file.path, force=attempt == 2)
        if file.is_whole(root):
            return
    raise FetchError(
        f"{file.path} of {manifest.source} arrived damaged twice (its sha256 is not the one locked at the "
        "build): check the disk and any proxy or mirror in between"
    )


def _download(manifest: Manifest, root: Path, path: str, *, force: bool) -> None:
    """One file, by the hub's client; its errors become FetchError. force: pass its cache by."""
    from huggingface_hub import constants, errors, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        raise FetchError("HF_HUB_OFFLINE is set, and this image downloads its model: start without it")
    disable_progress_bars()
    repo = manifest.source.removeprefix("hf://")
    for wait in (*_WAITS, None):
        try:
            hf_hub_download(repo, path, revision=manifest.revision, local_dir=root, force_download=force)
            return
        except Exception as error:
            # The client wraps what the hub answered as "not in the cache", or as a wrong use of
            # `force_download`, where it could not get the metadata.
            wrapped = isinstance(error, errors.LocalEntryNotFoundError | ValueError)
            told = error.__cause__ if wrapped else error
            if isinstance(told, OSError) and told.errno in _DISK_ERRORS:
                raise _disk_error(root, told) from None
            reason = _reason(told, f"{path} of {repo}", manifest)
            pause = None if wrapped or wait is None else _pause(told, wait)
            if pause is None:
                raise FetchError(reason) from None
        logs.say(f"{reason.partition(': ')[0]}; trying again in {pause:.0f} s")
        time.sleep(pause)


def _pause(error: BaseException | None, wait: float) -> float | None:
    """Seconds until another try may succeed, `wait` where the hub does not say; None where none will."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError) or error.response is None:
        return wait if type(error).__name__ in _PASSING_ERRORS else None
    status, asked = error.response.status_code, error.response.headers.get("retry-after", "")
    if status not in (408, 429) and (status < 500 or status == 501):
        return None
    pause = float(asked) if asked.isdecimal() else wait
    return pause if pause <= _LONGEST_WAIT else None


def _reason(error: BaseException | None, what: str, manifest: Manifest) -> str:
    """Never the error's own text, which may hold a signed address."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated, and the hub refused it: {_TERMS}"
    if isinstance(error, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
        return (
            f"{what} is gone from the hub at {manifest.revision}: build the image again with --weights bake"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what} is not on the hub, or is private: for a private model {_START_WITH_TOKEN}"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            advice = _TERMS
        elif status == 429:
            advice = f"too many requests from here, so start fewer at once, or {_START_WITH_TOKEN}"
        else:
            advice = "try again later"
        return f"the hub answered {status} for {what}: {advice}"
    return (
        f"the hub gave no usable answer for {what} ({type(error).__name__}): "
        "check the container's network, or set HF_ENDPOINT with `docker run -e HF_ENDPOINT …`"
    )


def _disk_error(root: Path, error: OSError) -> FetchError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FetchError(f"the disk under {root} is full: mount a larger volume at {root.parent}")
    return FetchError(f"cannot read or write {error.filename or root}: {error.strerror}")


def _require_space(root: Path, missing: Sequence[LockedFile]) -> None:
    needed, free = sum(file.size for file in missing), shutil.disk_usage(root).free
    if free < needed:
        raise FetchError(
            f"the model needs {_amount(needed)}, and {root} has {_amount(free)} free: mount a larger volume "
            f"at {root.parent}"
        )


def _tidy(root: Path, files: Sequence[LockedFile]) -> None:
    """Remove what a kill left half-written, and what an image of another commit had fetched here."""
    for path in root.joinpath(_NOTES).rglob("*.incomplete"):
        path.unlink(missing_ok=True)
    ours = {file.path for file in files}
    for note in root.joinpath(_NOTES).rglob("*.metadata"):
        fetched = note.relative_to(root / _NOTES).as_posix().removesuffix(".metadata")
        if fetched not in ours:
            (root / fetched).unlink(missing_ok=True)
            note.unlink(missing_ok=True)


def _each(function: Callable[[LockedFile], _T], files: Sequence[LockedFile]) -> list[_T]:
    """Several at once; the first error in order of the files is raised and the rest is left."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        return list(pool.map(function, files))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _alone(root: Path, started: float) -> Iterator[None]:
    """Waiting is no hang: whoever has the lock has a deadline of its own."""
    (root / ".cache").mkdir(parents=True, exist_ok=True)
    with (root / ".cache" / "coldstart.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                trace.announce(Phase.MODEL_DOWNLOAD, started, _WAITING)
                time.sleep(_TICK_SECONDS)
        yield


@contextmanager
def _progress(root: Path, total: int, started: float) -> Iterator[None]:
    """Say how much is on the disk while anything happens: silence lets PID 1 end a start that hangs."""
    over = threading.Event()

    def tick() -> None:
        said, read = -1, _bytes_read()
        while not over.wait(_TICK_SECONDS):
            have = min(_bytes_below(root), total)
            # Checking what is there changes no size, and takes minutes where that is much.
            if have != said or _bytes_read() - read > _TOLD_BYTES:
                trace.announce(Phase.MODEL_DOWNLOAD, started, f"{_amount(have)} of {_amount(total)}")
                said, read = have, _bytes_read()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _bytes_below(root: Path) -> int:
    total = 0
    for path in root.rglob("*"):
        with suppress(OSError):  # renamed this moment
            stat = path.stat()
            # A file that is written in several places at once has its size early.
            total += min(stat.st_size, stat.st_blocks * 512) if path.is_file() else 0
    return total


def _bytes_read() -> int:
    """By this process, from files."""
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counted["rchar"])


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
