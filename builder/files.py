"""Folders that are whole or not there, and who may make them."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder.report import Reporter


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

    For the holder of its lock: what a killed build left is removed first.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
