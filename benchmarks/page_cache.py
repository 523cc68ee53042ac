"""Puts files out of the page cache or into it, and counts which pages are there: states are verified.

Linux only; needs to be on the engine's machine, and root, because only root may read the engine's folders.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from builder.errors import HostError

# A page that another process maps cannot be dropped, and memory pressure may take one back at once.
TOLERANCE = 0.005
_BLOCK = 1 << 20
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


@dataclass(frozen=True, slots=True)
class Residency:
    """Pages of some files: how many are in memory, of how many."""

    resident: int
    total: int

    @property
    def share(self) -> float:
        return self.resident / self.total if self.total else 0.0


def bring(folders: Sequence[Path], state: Literal["cold", "warm"]) -> Residency:
    """Make every file below `folders` cold or warm and verify it. Raises HostError if it does not hold."""
    if state == "cold":
        os.sync()  # a page that is not written yet cannot be dropped
    for descriptor, size in _open_files(folders):
        if state == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            _read(descriptor, size)
    found = residency(folders)
    if state == "cold" and found.share > TOLERANCE:
        raise HostError(
            f"{found.share:.1%} of the image's pages stay in the page cache",
            why="A running container uses the same layers.",
            fix="Stop it, or leave --page-cache out.",
        )
    if state == "warm" and found.share < 1 - TOLERANCE:
        raise HostError(
            f"only {found.share:.1%} of the image's pages stay in the page cache",
            why="The image is larger than the memory that is free.",
            fix="Free memory, or leave --page-cache out.",
        )
    if state == "cold":
        _drop_metadata()
    return found


def residency(folders: Sequence[Path]) -> Residency:
    """Pages of all files below `folders`. Raises HostError where they cannot be read."""
    resident = total = 0
    for descriptor, size in _open_files(folders):
        resident += _resident_pages(descriptor, size)
        total += -(-size // mmap.PAGESIZE)
    return Residency(resident, total)


def check(folders: Sequence[Path]) -> None:
    """Raises HostError where the folders cannot be read, before anything is measured."""
    for folder in folders:
        if not os.access(folder, os.R_OK | os.X_OK):
            raise HostError(
                f"cannot read the image's files in {folder}",
                why="The page cache can only be controlled on the engine's own machine, and by root.",
                fix="Run as root beside the engine, or leave --page-cache out.",
            )


def _open_files(folders: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """(open descriptor, bytes) of each file that has bytes; the descriptor is closed afterwards."""
    check(folders)
    for top in folders:
        for folder, _, names in os.walk(top):
            for name in names:
                path = f"{folder}/{name}"
                if not stat.S_ISREG(
                    os.lstat(path).st_mode
                ):  # also a device that hides a file of a layer below
                    continue
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME)
                try:
                    if size := os.fstat(descriptor).st_size:
                        yield descriptor, size
                finally:
                    os.close(descriptor)


def _read(descriptor: int, size: int) -> None:
    for offset in range(0, size, _BLOCK):
        os.pread(descriptor, _BLOCK, offset)


def _resident_pages(descriptor: int, size: int) -> int:
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        raise HostError(f"cannot map a file of the image: {os.strerror(ctypes.get_errno())}")
    try:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if _libc.mincore(address, size, pages) != 0:
            raise HostError(f"cannot ask for resident pages: {os.strerror(ctypes.get_errno())}")
        return pages.raw.count(b"\x01")
    finally:
        _libc.munmap(address, size)


def _drop_metadata() -> None:
    """Inodes, directories and disk blocks, where the kernel lets us: a fresh node has none either."""
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
