"""The tree of processes under PID 1: how it is forked, and how it is ended."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from runtime.switches import Switch

_T = TypeVar("_T")

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.01
# What the kernel may take to forget threads that have ended.
_THREADS_END_SECONDS = 0.2
# Of NVIDIA, AMD, and Intel's GPUs.
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")
# Of control groups version 2 and 1.
_OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
# Thousandths of the memory that is there: more than PID 1 has, even of 300 MB.
_OOM_HANDICAP = 100


# How the children that `reap` collected have ended, by process id.
_ended: dict[int, int] = {}


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


class SpawnedProcess(SpawnProcess):
    """A new interpreter that imports by itself what the template would have imported for it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # What comes before the state is called before the state, and with it vLLM, is unpickled.
        return _import_and_make, (type(self),), self.__dict__


def _import_and_make(process: type[SpawnedProcess]) -> SpawnedProcess:
    from runtime import template

    template.load()
    return process.__new__(process)


class SpawnedContext(SpawnContext):
    """Without the template: slower, and as vLLM itself does it."""

    Process: ClassVar[type[SpawnProcess]] = SpawnedProcess


_TEMPLATE, _SPAWNED = TemplateContext(), SpawnedContext()


def context() -> TemplateContext | SpawnedContext:
    """What PID 1, and vLLM, start processes with."""
    return _TEMPLATE if Switch.TEMPLATE.on else _SPAWNED


def why_not_fork() -> str:
    """What makes a fork of this process unsafe; empty when nothing does.

    A fork has one thread, so locks that others held stay locked: those of Python, OpenMP and ZeroMQ alike, so
    every thread counts that the kernel knows. A GPU's context does not work in a fork. OpenBLAS, which numpy
    loads, has threads too, but ends them before each fork: they are gone after one that does nothing.
    """
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    deadline = time.monotonic() + _THREADS_END_SECONDS
    while (threads := sum(1 for _ in Path("/proc/self/task").iterdir())) != 1:
        if time.monotonic() > deadline:
            return f"since importing vLLM started {threads - 1} thread{'s' if threads > 2 else ''}"
        time.sleep(_POLL_SECONDS / 10)
    devices = open_devices()
    return f"since importing vLLM opened {', '.join(devices)}" if devices else ""


def open_devices() -> list[str]:
    """GPU devices that this process has open."""
    found = set()
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            found.add(str(descriptor.readlink()))
    return sorted(path for path in found if path.startswith(_DEVICES))


def serve(*arguments: Any) -> None:
    """Entry of the API process. PID 1 never imports what that runs, and does not wait for its files."""
    from runtime import engine

    engine.serve(*arguments)


def call_in_fork(function: Callable[[], _T]) -> _T:
    """Call `function` in a fork of the template and return its picklable result.

    `function` may be a lambda, as vLLM's own `_run_in_subprocess` allows. Raises RuntimeError if it fails.
    """
    import cloudpickle

    receiver, sender = _TEMPLATE.Pipe(duplex=False)
    process = _TEMPLATE.Process(target=_answer, args=(cloudpickle.dumps(function), sender), name="inspect")
    process.start()
    sender.close()
    try:
        ok, result = receiver.recv()
    except EOFError:
        ok, result = False, "the process died"
    process.join()
    if not ok:
        raise RuntimeError(f"failed in a forked process: {result}")
    return cast(_T, result)


def _answer(pickled: bytes, sender: Connection) -> None:
    import cloudpickle

    try:
        sender.send((True, cloudpickle.loads(pickled)()))
    except Exception:
        sender.send((False, traceback.format_exc()))


def preload(device: str, environ: Mapping[str, str]) -> str:
    """LD_PRELOAD for the template on CPUs: what vLLM preloads in engine processes that it starts itself.

    It binds OpenMP threads through the libgomp that torch ships (vllm#27369), and some builds of it bring
    tcmalloc; both must be loaded when a process starts, and a forked one no longer can.
    """
    wanted = environ.get("LD_PRELOAD", "")
    if device != "cpu":
        return wanted
    torch, vllm = _package("torch"), _package("vllm")
    if torch and not any(name in wanted for name in ("libgomp", "libiomp", "libomp")):
        wanted = _joined(wanted, _first((torch.parent / "torch.libs", torch / "lib"), "libgomp*.so*"))
    if vllm and "libtcmalloc" not in wanted:
        folder = (vllm / "libs",)
        found = _first(folder, "libtcmalloc_minimal*.so*") or _first(folder, "libtcmalloc.so*")
        wanted = _joined(found, wanted)
    return wanted


def _package(name: str) -> Path | None:
    """Its folder, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _first(folders: Iterable[Path], pattern: str) -> str:
    return next((str(path) for folder in folders for path in sorted(folder.glob(pattern))), "")


def _joined(*libraries: str) -> str:
    return ":".join(filter(None, libraries))


def start_fetch() -> subprocess.Popen[str]:
    """The process that downloads the model. Its last line says how it ended: see runtime/fetch.py."""
    return subprocess.Popen(
        [sys.executable, "-m", "runtime", "fetch"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )


def leave_hub(environ: MutableMapping[str, str]) -> None:
    """What engine processes inherit: no token of the hub, and no way to it, since every file is here."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        environ.pop(name, None)
    environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


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


def adopt_orphans() -> None:
    """Every orphan below becomes our child, as it is for PID 1, so that none gets away."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(pid: int, seconds: float) -> None:
    """Kill every process below `pid` and wait until none is left, `seconds` at most."""
    # multiprocessing's resource tracker removes the semaphores and shared memory of the others when it sees,
    # by their end of a pipe, that they are gone; ours is the last. A process that was just being started
    # holds that pipe too, so whoever appears meanwhile is killed as well.
    tracker: Any = resource_tracker._resource_tracker
    deadline = time.monotonic() + seconds
    while (left := set(descendants(pid))) and time.monotonic() < deadline:
        if left == {tracker._pid}:
            if tracker._fd is not None:
                os.close(tracker._fd)
                tracker._fd = None
        else:
            _kill(left - {tracker._pid})
        reap()
        time.sleep(_POLL_SECONDS)
    while (left := set(descendants(pid))) and time.monotonic() < deadline + seconds:
        _kill(left)
        reap()
        time.sleep(_POLL_SECONDS)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def shared_memory(pid: int) -> set[Path]:
    """The files in /dev/shm that processes below `pid` have mapped and that are ours.

    Whoever is killed cannot remove its segments, and with `--ipc=host` they outlive the container.
    """
    found = set()
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/maps").read_text().splitlines():
                path = line.partition(" /dev/shm/")[2]
                if path and not path.endswith(" (deleted)"):
                    found.add(Path("/dev/shm") / path)  # noqa: S108
    return {path for path in found if _is_ours(path)}


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return False


def go_before(parent: int, pid: int) -> None:
    """Have the kernel, out of memory, take `pid`, and what that forks from now on, before `parent`.

    Where it cannot, as in a sandbox without such a file, nothing is lost but that order.
    """
    with contextlib.suppress(OSError, ValueError):
        score = int(Path(f"/proc/{parent}/oom_score_adj").read_text())
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(min(1000, score + _OOM_HANDICAP)))


def start_tracker() -> None:
    """multiprocessing's resource tracker, which the first process would start otherwise."""
    resource_tracker.ensure_running()
    tracker: Any = resource_tracker._resource_tracker
    go_before(os.getpid(), tracker._pid)


def oom_kills() -> int:
    """How many processes of this container the kernel has killed for want of memory, as far as it tells."""
    for path in _OOM_COUNTERS:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0


def reap() -> None:
    """Collect exited children: PID 1 inherits every orphan of the container."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            _ended[found[0]] = os.waitstatus_to_exitcode(found[1])


def exit_code(process: BaseProcess) -> int | None:
    """Of a process that has ended, also where `reap` was first."""
    return process.exitcode if process.exitcode is not None else _ended.get(process.pid or 0)
