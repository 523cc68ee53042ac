"""Images of ours: the runtime reports its phases at /startup."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.adapters import Report, Seen
from benchmarks.schema import MeasuredPhase
from runtime.phases import Phase

NAME = "coldstart"

# What only a client sees both ends of; a runtime that reports these too is not believed.
_CLIENT_PHASES = frozenset({Phase.CONTAINER_START, Phase.FIRST_TOKEN})


class _Startup(BaseModel):
    """The runtime's answer. Further fields are welcome; a wrong type in a known one is not."""

    model_config = ConfigDict(allow_inf_nan=False)

    schema_: Literal[1] = Field(alias="schema")
    started: float | None = None
    phases: tuple[MeasuredPhase, ...]


def recognises(seen: Seen) -> bool:
    return seen.startup is not None


def read(seen: Seen) -> Report:
    assert seen.startup is not None
    try:
        report = _Startup.model_validate_json(seen.startup.body)
    except ValueError:
        raise ValueError(f"GET /startup answered {seen.startup.status}, not a start-up report") from None
    phases = tuple(event for event in report.phases if event.phase not in _CLIENT_PHASES)
    started = report.started
    if started is None:
        started = min((event.start for event in phases), default=None)
    if started is not None and not seen.created_at <= started <= seen.startup.at:
        raise ValueError(
            "the phases at /startup do not lie within this start: is the container's clock right?"
        )
    if any(event.end < event.start for event in phases):
        raise ValueError("GET /startup reports a phase that ends before it starts")
    return Report(started, phases, "runtime")
