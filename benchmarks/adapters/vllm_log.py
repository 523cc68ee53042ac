"""Any vLLM server image: phases from its log lines, the engine's time stamps, and the process tree.

A line marks the end of a stretch; the stretch began at the line before it in the same process, or where the
processes that it waited for ended theirs. A process begins with the import of vLLM, up to its first line.
Lines are those of vLLM 0.32; one that a version lacks makes the next stretch longer, and loses no time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.adapters import Report, Seen
from benchmarks.schema import MeasuredPhase
from runtime.phases import Phase

NAME = "vllm_log"

_LINE = re.compile(r"^\((?P<role>[A-Za-z]+)[^)]* pid=(?P<pid>\d+)\) (?P<text>.*)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_MARKS = (
    (re.compile(r"Resolved architecture"), Phase.CONFIG_PARSE),
    (re.compile(r"Starting to load model"), Phase.ENGINE_INIT),
    (re.compile(r"Initializing model took"), Phase.WEIGHT_LOAD),
    (re.compile(r"Time spent downloading weights"), Phase.MODEL_DOWNLOAD),
    (re.compile(r"(Loading weights|Model loading) took"), Phase.WEIGHT_LOAD),
    (re.compile(r"Reducing Torch threads"), Phase.WEIGHT_LOAD),  # on CPU weights are packed until here
    (re.compile(r"Dynamo bytecode transform time|Compiling a graph|torch\.compile took"), Phase.COMPILE),
    (re.compile(r"Warming up done"), Phase.COMPILE),
    (re.compile(r"profiling/warmup run took"), Phase.KV_CACHE_ALLOC),
    (re.compile(r"Available KV cache memory|GiB for KV cache|KV cache size:"), Phase.KV_CACHE_ALLOC),
    (re.compile(r"Graph capturing finished|init engine \("), Phase.GRAPH_CAPTURE),
    (re.compile(r"Supported tasks:"), Phase.ENGINE_INIT),
    (re.compile(r"chat template content format"), Phase.TOKENIZER_INIT),
    (re.compile(r"Starting vLLM (API )?server"), Phase.READY),
)
# On CPU, and only where something is compiled: all up to "done" is that, profiling too.
_COMPILING, _COMPILED = "Warming up model for the compilation", "Warming up done"
# Who waits for whom: the API server for the engine core, the core for its workers.
_DEPTHS = {"APIServer": 0, "EngineCore": 1}
_WORKER_DEPTH = 2
# What a process does between its last mark and the start of the process that it then waits for.
_LAUNCHES = {0: Phase.TOKENIZER_INIT, 1: Phase.ENGINE_INIT}
# vLLM asks a new interpreter what a model class can do: one more import of everything.
_INSPECTION = re.compile(r"-m vllm\.model_executor\.models\.registry")


@dataclass(slots=True)
class _Known:
    """A process that has logged. edge: where its next stretch begins."""

    role: str
    pid: int
    depth: int
    edge: float
    compiling: bool = False

    def stretch(self, phase: Phase, start: float, end: float, detail: str = "") -> MeasuredPhase:
        self.edge = end
        return MeasuredPhase(phase, min(start, end), end, self.role, self.pid, detail)


def recognises(seen: Seen) -> bool:
    return any(_match(text) for _, text in seen.log)


def read(seen: Seen) -> Report:
    born = {process.pid: process.started for process in seen.processes}
    # The first process is born before the engine has set it up and lets it run.
    first = [at for at in (born.get(1), seen.started_at) if at is not None]
    started = max(first, default=None)
    if started is not None and 1 in born:
        born[1] = started
    return Report(started, (*_inspections(seen), *_stretches(seen, born, started)), "log")


def _match(line: str) -> re.Match[str] | None:
    return _LINE.match(_COLOUR.sub("", line))


def _inspections(seen: Seen) -> Iterator[MeasuredPhase]:
    until = 0.0
    for process in sorted(seen.processes, key=lambda process: process.started):
        if _INSPECTION.search(process.command) and process.ended is not None:
            if process.started < until:  # what an inspection forks has its command, until it runs another
                continue
            until = process.ended
            yield MeasuredPhase(
                Phase.ENGINE_IMPORT,
                process.started,
                process.ended,
                "registry",
                process.pid,
                "to inspect the model",
            )


def _stretches(seen: Seen, born: Mapping[int, float], started: float | None) -> Iterator[MeasuredPhase]:
    first = seen.created_at if started is None else started
    known: dict[int, _Known] = {}
    for at, line in seen.log:
        if not (found := _match(line)):
            continue
        pid, depth = int(found["pid"]), _DEPTHS.get(found["role"], _WORKER_DEPTH)
        if pid not in known:
            above = [process for process in known.values() if process.depth < depth]
            begin = born.get(pid, max((process.edge for process in above), default=first))
            for parent in above:
                if parent.depth == depth - 1 and parent.edge < begin:
                    yield parent.stretch(
                        _LAUNCHES[parent.depth], parent.edge, begin, "up to the next process"
                    )
            known[pid] = _Known(found["role"], pid, depth, at)
            yield known[pid].stretch(Phase.ENGINE_IMPORT, begin, at)
        process = known[pid]
        phase = next((phase for mark, phase in _MARKS if mark.search(found["text"])), None)
        if phase is not None and process.compiling:
            phase = Phase.COMPILE
        if _COMPILING in found["text"] or _COMPILED in found["text"]:
            process.compiling = _COMPILING in found["text"]
        if phase is not None:
            below = [other for other in known.values() if other.depth > depth]
            yield process.stretch(phase, max(other.edge for other in (process, *below)), at)
            for other in below:  # they have done what this one waited for
                other.edge = at
    servers = [process for process in known.values() if process.depth == 0]
    if seen.ready_at is not None and servers:
        last = max(process.edge for process in known.values())
        yield servers[0].stretch(Phase.READY, last, seen.ready_at)
