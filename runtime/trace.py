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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from runtime.phases import Phase, PhaseEvent, now

SOCKET_VARIABLE = "COLDSTART_EVENTS"

# Where each phase happens in vLLM 0.32: module, class, function. A name that a version lacks is skipped:
# the phase is then missing from the report, and nothing else changes.
_TRACED: tuple[tuple[str, str, str, Phase], ...] = (
    ("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", Phase.CONFIG_PARSE),
    ("vllm.v1.engine.async_llm", "", "renderer_from_config", Phase.TOKENIZER_INIT),
    ("vllm.v1.engine.utils", "CoreEngineProcManager", "__init__", Phase.ENGINE_INIT),
    ("vllm.v1.worker.gpu_worker", "Worker", "load_model", Phase.WEIGHT_LOAD),
    ("vllm.v1.worker.gpu_worker", "Worker", "determine_available_memory", Phase.KV_CACHE_ALLOC),
    ("vllm.v1.worker.gpu_worker", "Worker", "initialize_from_config", Phase.KV_CACHE_ALLOC),
    ("vllm.v1.worker.gpu_worker", "Worker", "compile_or_warm_up_model", Phase.GRAPH_CAPTURE),
)
# Ends the phase that began when the worker's process was forked.
_WORKER_INIT = ("vllm.v1.worker.gpu_worker", "Worker", "init_device", Phase.ENGINE_INIT)
_CPU_WORKER = "vllm.v1.worker.cpu_worker"

_born = now()
_active: set[Phase] = set()


def _after_fork() -> None:
    global _born
    _born = now()


os.register_at_fork(after_in_child=_after_fork)


def _send(message: dict[str, Any]) -> None:
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return
    # Measuring must never stop a start.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender, suppress(OSError):
        sender.sendto(json.dumps(message).encode(), path)


def _role() -> str:
    name = multiprocessing.current_process().name
    return {"MainProcess": "template"}.get(name, name)


def emit(phase: Phase, start: float, end: float, detail: str = "") -> None:
    event = PhaseEvent(phase, start, end, process=_role(), pid=os.getpid(), detail=detail)
    _send({"event": event.to_json()})


@contextmanager
def span(phase: Phase, start: float | None = None, detail: str = "") -> Iterator[None]:
    """Report `phase` around a block. A phase inside the same phase counts once."""
    if phase in _active:
        yield
        return
    begin = now() if start is None else start
    _active.add(phase)
    _send({"begin": {"phase": phase.value, "start": begin, "pid": os.getpid()}})
    try:
        yield
    finally:
        _active.discard(phase)
        emit(phase, begin, now(), detail)


def _traced(function: Callable[..., Any], phase: Phase, from_birth: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with span(phase, start=_born if from_birth else None):
            return function(*args, **kwargs)

    return wrapper


def install(device: str) -> list[str]:
    """Wrap what _TRACED names. Returns the names that this vLLM lacks."""
    missing: list[str] = []
    points = [(*point, False) for point in _TRACED] + [(*_WORKER_INIT, True)]
    if device == "cpu":
        # The CPU worker derives from the GPU worker and overrides some of the same methods.
        points += [
            (_CPU_WORKER, "CPUWorker", name, phase, birth)
            for module, _, name, phase, birth in points
            if module == _WORKER_INIT[0]
        ]
    for module_name, class_name, name, phase, from_birth in points:
        try:
            owner: Any = importlib.import_module(module_name)
            owner = getattr(owner, class_name) if class_name else owner
            function = vars(owner)[name]
        except (ImportError, AttributeError, KeyError):
            if module_name != _CPU_WORKER:
                missing.append(f"{module_name}.{class_name}.{name}")
            continue
        setattr(owner, name, _traced(function, phase, from_birth))
    return missing
