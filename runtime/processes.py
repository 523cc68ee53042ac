"""The tree of processes under PID 1: how it is forked, and how it is ended."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import ClassVar


class TemplateProcess(ForkServerProcess):
    """Forked from the template, with the environment that its starter had at that moment.

    multiprocessing's forkserver gives children the template's environment; vLLM sets variables
    between its processes and expects them to be inherited, as with spawn and fork.
    """

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class TemplateContext(ForkServerContext):
    """A forkserver context whose Process keeps the environment."""

    Process: ClassVar[type[ForkServerProcess]] = TemplateProcess


CONTEXT = TemplateContext()


def openmp_preload(device: str, environ: Mapping[str, str]) -> str | None:
    """LD_PRELOAD for the template on CPUs, or None.

    vLLM binds OpenMP threads through the libgomp that torch ships; it must be loaded when the process
    starts, and a forked worker no longer can (vllm#27369).
    """
    current = environ.get("LD_PRELOAD", "")
    if device != "cpu" or any(name in current for name in ("libgomp", "libiomp", "libomp")):
        return None
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    for folder in (package.parent / "torch.libs", package / "lib"):
        found = sorted(str(path) for path in folder.glob("libgomp*.so*"))
        if found:
            return f"{found[0]}:{current}" if current else found[0]
    return None


def descendants(pid: int) -> list[int]:
    """Every living process below `pid`, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold spaces; what follows it does not.
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def kill_descendants(pid: int) -> None:
    for child in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def reap() -> None:
    """Collect exited children: PID 1 inherits every orphan of the container."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
