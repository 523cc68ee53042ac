"""Reports phases from whichever process they happen in to PID 1, by datagrams.

vLLM's functions are wrapped once, in the template process; every process forked from it inherits them.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import socket
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from runtime.phases import Phase, PhaseEvent, now

SOCKET_VARIABLE = "COLDSTART_EVENTS"
LAUNCHED_VARIABLE = "_COLDSTART_LAUNCHED"
_PROGRESS_SECONDS = 0.2
_ERROR_CHARACTERS = 2000
_SEND_SECONDS = 1.0


@dataclass(frozen=True)
class _Point:
    """A function of vLLM that a phase happens in.

    tail: the phase is what lies between the end of the phase before it in this process (or the fork) and
    the end of the function, rather than the whole call.
    """

    module: str
    owner: str
    name: str
    phase: Phase
    tail: bool = False


_WORKER = "vllm.v1.worker.gpu_worker"
_CPU_WORKER = "vllm.v1.worker.cpu_worker"
# Of vLLM 0.32. A name that a version lacks is skipped: the phase is then missing from the report.
_IN_API = (
    _Point("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", Phase.CONFIG_PARSE),
    _Point("vllm.v1.engine.async_llm", "", "renderer_from_config", Phase.TOKENIZER_INIT),
    _Point("vllm.v1.engine.utils", "CoreEngineProcManager", "__init__", Phase.ENGINE_INIT),
)
_IN_CORE = (
    _Point(_WORKER, "Worker", "init_device", Phase.ENGINE_INIT, tail=True),
    _Point(_WORKER, "Worker", "load_model", Phase.WEIGHT_LOAD),
    _Point(_WORKER, "Worker", "determine_available_memory", Phase.KV_CACHE_ALLOC),
    _Point(_WORKER, "Worker", "initialize_from_config", Phase.KV_CACHE_ALLOC),
    _Point(_WORKER, "Worker", "compile_or_warm_up_model", Phase.GRAPH_CAPTURE),
    _Point("vllm.v1.engine.core", "EngineCoreProc", "__init__", Phase.ENGINE_INIT, tail=True),
)

# When the last phase of this process ended, or when it was forked.
_last = now()
_active: dict[Phase, float] = {}  # its start


def _after_fork() -> None:
    global _last
    _last = now()


os.register_at_fork(after_in_child=_after_fork)


def _send(message: dict[str, Any]) -> None:
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return
    # The kernel queues ten datagrams in a container, so a burst waits for PID 1. Measuring must never stop a
    # start.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):
        sender.settimeout(_SEND_SECONDS)
        sender.sendto(json.dumps(message).encode(), path)


def _role() -> str:
    name = multiprocessing.current_process().name
    return "template" if name == "MainProcess" else name.replace("VllmWorker-", "worker ")


def emit(phase: Phase, start: float, end: float, detail: str = "") -> None:
    global _last
    _last = max(_last, end)
    event = PhaseEvent(phase, start, end, process=_role(), pid=os.getpid(), detail=detail)
    _send({"event": event.to_json()})


def announce(phase: Phase, start: float, detail: str = "") -> None:
    """A phase began at `start`; again with another detail while it goes on."""
    _send({"begin": {"phase": phase.value, "start": start, "pid": os.getpid(), "detail": detail}})


def progress(phase: Phase, detail: str) -> None:
    """Tell how far a phase that is under way in this process is, such as "shard 3 of 9"."""
    if phase in _active:
        announce(phase, _active[phase], detail)


def _report(phase: Phase, error: Exception) -> None:
    """Why the start fails, for PID 1's last line: vLLM's own exceptions say only which process failed."""
    _send({"error": f"{phase.value} failed: {type(error).__name__}: {error}"[:_ERROR_CHARACTERS]})


def take_back_error() -> None:
    """Tell PID 1 that what was reported is tried again in another way."""
    _send({"taken_back": True})


def refuse_fork(reason: str) -> None:
    """Tell PID 1 that this process must not be forked."""
    _send({"no_fork": reason})


def process_started() -> float:
    """Epoch seconds at which the kernel made this process, to the tick of 10 ms: before Python could look."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return now() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def launched() -> float:
    """Epoch seconds at which PID 1 began to make this process; where another did, at which it was made."""
    told = os.environ.pop(LAUNCHED_VARIABLE, None)
    return float(told) if told else process_started()


@contextmanager
def span(phase: Phase, detail: str = "", *, since: float | None = None) -> Iterator[None]:
    """Report `phase` around a block, from `since` on. A phase inside the same phase counts once."""
    if phase in _active:
        yield
        return
    begin = now() if since is None else since
    _active[phase] = begin
    announce(phase, begin)
    try:
        yield
    except Exception as error:
        _report(phase, error)
        raise
    finally:
        del _active[phase]
        emit(phase, begin, now(), detail)


def _around(function: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with span(phase):
            return function(*args, **kwargs)

    return wrapper


def _tail(function: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        announce(phase, _last)
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            _report(phase, error)
            raise
        emit(phase, _last, now())
        return result

    return wrapper


def _compile(monitor: Callable[..., Any]) -> Callable[..., Any]:
    """Report torch.compile, and whether vLLM loaded what it had compiled before: by its own counter."""
    counter = importlib.import_module("vllm.compilation.counter").compilation_counter

    @contextmanager
    @functools.wraps(monitor)
    def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
        begin, loaded = now(), counter.num_aot_artifacts_loaded
        announce(Phase.COMPILE, begin)
        detail = "not in the cache"
        try:
            with monitor(*args, **kwargs) as result:
                yield result
            detail = "loaded from the cache" if counter.num_aot_artifacts_loaded > loaded else "compiled"
        finally:
            emit(Phase.COMPILE, begin, now(), detail)

    return wrapper


def _shards(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell how far vLLM's iterator over the weights of safetensors files is."""

    @functools.wraps(function)
    def wrapper(files: list[str], *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        sizes = [Path(file).stat().st_size for file in sorted(files)]
        ends, total = list(accumulate(sizes)), sum(sizes)
        done, told = 0, 0.0
        for name, tensor in function(files, *args, **kwargs):
            if now() - told > _PROGRESS_SECONDS:
                told = now()
                # vLLM reads file after file; a file's header is less than its share of a percent.
                shard = min(bisect_right(ends, done) + 1, len(files))
                detail = f"shard {shard} of {len(files)}, {done / 1e6:.0f} of {total / 1e6:.0f} MB"
                progress(Phase.WEIGHT_LOAD, detail)
            yield name, tensor
            done += tensor.nbytes

    return wrapper


def install_in_api() -> list[str]:
    """Wrap what happens in the API process. Returns the names that this vLLM lacks."""
    return _install(_IN_API)


def install_in_core(device: str) -> list[str]:
    """Wrap what happens in the engine core and its workers. Returns the names that this vLLM lacks."""
    points = list(_IN_CORE)
    if device == "cpu":
        # The CPU worker derives from the GPU worker and overrides some of the same methods.
        points += [
            replace(point, module=_CPU_WORKER, owner="CPUWorker")
            for point in _IN_CORE
            if point.module == _WORKER
        ]
    return [
        *_replace("vllm.model_executor.model_loader.default_loader", "safetensors_weights_iterator", _shards),
        *_replace("vllm.compilation.decorators", "monitor_torch_compile", _compile),
        *_install(points),
    ]


def _install(points: Iterable[_Point]) -> list[str]:
    missing = []
    for point in points:
        try:
            owner: Any = importlib.import_module(point.module)
            owner = getattr(owner, point.owner) if point.owner else owner
            function = vars(owner)[point.name]
        except (ImportError, AttributeError, KeyError):
            if point.module != _CPU_WORKER:
                missing.append(f"{point.module}.{point.owner}.{point.name}")
            continue
        setattr(owner, point.name, (_tail if point.tail else _around)(function, point.phase))
    return missing


def _replace(module: str, name: str, wrap: Callable[[Any], Any]) -> list[str]:
    """A module's function by what `wrap` makes of it; its name where there is none."""
    try:
        owner = importlib.import_module(module)
        setattr(owner, name, wrap(getattr(owner, name)))
    except (ImportError, AttributeError):
        return [f"{module}.{name}"]
    return []
