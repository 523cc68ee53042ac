"""Has the kernel read a start's files ahead, in the order in which the start will need them.

vLLM's imports are thousands of small files and a few large libraries, read one after the other by one
thread. From a cold disk it waits for each; read ahead, the waiting overlaps with the work.

Small files are asked for, thousands at a time. Of a large one the kernel would read no more than its
read-ahead window, 128 KiB on most disks, however much is asked for; so a second thread reads those itself, in
order and without copying a byte.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from runtime import threads
from runtime.state import FILES, recordings

FILE_LIST = "files.txt"

_SMALL_BYTES = 128 << 10
_BLOCK_BYTES = 4 << 20
# Read-ahead must not push out what it read first.
_SHARE_OF_LIMIT = 0.5
_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def start(model: Path, files: Sequence[str], state: Path) -> threading.Thread:
    """Begin in the background: the recordings in `state`, the list there, then `files` of the model."""
    paths = _paths(model, files, state)
    thread = threading.Thread(target=read_ahead, args=(paths, _budget()), name="prefetch", daemon=True)
    return threads.start(thread)


def _paths(model: Path, files: Sequence[str], state: Path) -> Iterator[str]:
    # PID 1 copies one of the recordings before it starts anything; which one is not known yet.
    for recording in recordings(state):
        for folder, _, names in os.walk(recording / FILES):
            yield from (f"{folder}/{name}" for name in names)
    yield from _recorded(state)
    yield from (str(model / file) for file in files)


def read_ahead(paths: Iterable[str], budget: int) -> int:
    """Have files read, `budget` bytes at most; returns how many were. Skips what is missing or does not fit.

    Returns when the last large file is in the page cache; small ones may still be under way.
    """
    large: SimpleQueue[str | None] = SimpleQueue()
    reader = threading.Thread(target=_read_each, args=(large,), name="prefetch-large", daemon=True)
    reader.start()
    asked = 0
    for path in paths:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                if asked + size > budget:
                    continue
                asked += size
                if size <= _SMALL_BYTES:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                else:
                    large.put(path)
            finally:
                os.close(descriptor)
    large.put(None)
    reader.join()
    return asked


def _read_each(paths: SimpleQueue[str | None]) -> None:
    with Path(os.devnull).open("wb") as nowhere:
        while path := paths.get():
            with suppress(OSError), Path(path).open("rb") as file:
                # The kernel moves pages of the page cache to where they are dropped.
                while os.sendfile(nowhere.fileno(), file.fileno(), None, _BLOCK_BYTES):
                    pass


def _recorded(state: Path) -> list[str]:
    try:
        return (state / FILE_LIST).read_text().splitlines()
    except OSError:
        return []


def _budget() -> int:
    """Half of the container's memory limit, or of the machine's memory."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _LIMIT_FILES:
        with suppress(OSError, ValueError):  # "max" is no number
            limit = min(limit, int(Path(name).read_text()))
    return int(limit * _SHARE_OF_LIMIT)
