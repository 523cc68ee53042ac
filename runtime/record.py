"""Notes which files a start opens, in order; only while `python3 -m runtime warm` runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

VARIABLE = "_COLDSTART_RECORD"
OPENED = "opened.txt"


def start(folder: Path) -> None:
    """Append the path of every file that this process, and those forked from it, open to read."""
    log = os.open(folder / OPENED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    seen: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, mode, flags = arguments
        if not isinstance(path, str) or path in seen or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        seen.add(path)
        if path.isprintable() and (mode is None or "r" in mode):
            os.write(log, f"{path}\n".encode())

    sys.addaudithook(hook)
