"""Folders that are whole or not there, who may make them, and whether they fit the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder.errors import HostError
from builder.report import Reporter

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def exclusive(lock: Path, busy: str, reporter: Reporter) -> Iterator[None]:
    """Hold a file lock, and say whom it waits for. The file stays: deleting it would let two hold it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.note(f"Waiting: {busy} by another build.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` only when the block ends without an error.

    For the holder of its lock: what a killed build left is removed first. Raises HostError where the disk
    fills up.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _to_disk(partial, *partial.rglob("*"))
        partial.rename(folder)
        _to_disk(folder.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise HostError(
            f"cannot finish {folder}", why=f"{error.strerror}.", fix="Free some disk space, and run again."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_disk(*paths: Path) -> None:
    """So that a machine that dies after a rename does not have the name without the content."""
    for path in paths:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_space(folder: Path, needed: int, *, what: str, fix: str) -> None:
    """Raises HostError where the disk of a folder, which need not exist yet, has fewer than `needed` bytes.

    what: subject and verb of the message, such as "the model needs".
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise HostError(
            f"{what} {needed / 1e9:.1f} GB of disk space in {folder}",
            why=f"{free / 1e9:.1f} GB are free.",
            fix=fix,
        )
