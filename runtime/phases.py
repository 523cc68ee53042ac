"""Start-up phases: names, clock and event schema, shared by the runtime and by `coldstart bench`.

Standard library only, so that PID 1 stays small and the builder can import it anywhere.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

SCHEMA_VERSION = 1
# The process that serves the engine, by the name that PID 1 gives it.
API_PROCESS = "api"


class Phase(enum.StrEnum):
    """One row of the phase table in docs/architecture.md; the order is the order of display."""

    IMAGE_PULL = "image_pull"
    IMAGE_UNPACK = "image_unpack"
    CONTAINER_START = "container_start"
    SERVER_BIND = "server_bind"
    CONFIG_PARSE = "config_parse"
    ENGINE_IMPORT = "engine_import"
    MODEL_DOWNLOAD = "model_download"
    ENGINE_INIT = "engine_init"
    WEIGHT_LOAD = "weight_load"
    COMPILE = "compile"
    KV_CACHE_ALLOC = "kv_cache_alloc"
    GRAPH_CAPTURE = "graph_capture"
    TOKENIZER_INIT = "tokenizer_init"
    READY = "ready"
    FIRST_TOKEN = "first_token"  # noqa: S105 - a phase, not a password


def now() -> float:
    """Seconds since the Unix epoch: the one clock that all processes and the host share."""
    return time.time()


@dataclass(frozen=True, slots=True)
class PhaseEvent:
    """One finished stretch of start-up. Phases may overlap and may occur several times.

    start, end: seconds since the Unix epoch; process: role, such as "pid1", "api", "engine_core".
    """

    phase: Phase
    start: float
    end: float
    process: str
    pid: int
    detail: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PhaseEvent:
        """Raises ValueError or KeyError on anything that is not an event of this schema."""
        known = {f.name for f in fields(cls)}
        unknown = set(data) - known
        if unknown:
            raise ValueError(f"unknown fields in phase event: {sorted(unknown)}")
        return cls(
            phase=Phase(data["phase"]),
            start=float(data["start"]),
            end=float(data["end"]),
            process=str(data["process"]),
            pid=int(data["pid"]),
            detail=str(data.get("detail", "")),
        )


def covered_seconds(events: Iterable[PhaseEvent], start: float, end: float) -> float:
    """Seconds of [start, end] that at least one event covers (the union, not the sum)."""
    total, edge = 0.0, start
    for event in sorted(events, key=lambda e: e.start):
        begin, stop = max(event.start, edge), min(event.end, end)
        if stop > begin:
            total += stop - begin
            edge = stop
    return total


def breakdown(events: Iterable[PhaseEvent], start: float, end: float) -> str:
    """One line that says where the seconds of [start, end] went, the largest share first.

    Where phases overlap, the moment belongs to the one that began last, so that the shares add up.
    """
    events = list(events)
    edges = sorted({start, end, *(t for e in events for t in (e.start, e.end) if start < t < end)})
    shares: dict[str, float] = {}
    for begin, stop in itertools.pairwise(edges):
        running = [event for event in events if event.start <= begin and event.end >= stop]
        name = max(running, key=lambda e: e.start).phase.value if running else "unattributed"
        shares[name] = shares.get(name, 0.0) + stop - begin
    ranked = sorted(shares.items(), key=lambda item: (item[0] == "unattributed", -item[1]))
    parts = [f"{name} {seconds:.1f}" for name, seconds in ranked if seconds >= 0.05]
    return f"ready after {end - start:.1f} s: {', '.join(parts)}"
