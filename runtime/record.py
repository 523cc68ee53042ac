"""What only `python3 -m runtime warm` wants to know of a start: files opened, variables that matter."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

VARIABLE = "_COLDSTART_RECORD"
OPENED = "opened.txt"
VARIABLES_VARIABLE = "_COLDSTART_VARIABLES"
VARIABLES = "variables.json"
# What Inductor and Triton read besides what vLLM hashes.
OF_COMPILERS = ("CC", "CXX", "CUDA_HOME", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


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
