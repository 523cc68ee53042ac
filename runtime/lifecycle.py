"""What the server may truthfully say at any moment: a pure state machine, no I/O.

PID 1 owns one while it answers the port; the engine process owns a copy once it has the port.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Any

from runtime.phases import SCHEMA_VERSION, Phase, PhaseEvent, now


class State(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


_ALLOWED: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.FAILED, State.STOPPED}),
    State.READY: frozenset({State.DRAINING, State.FAILED, State.STOPPED}),
    State.DRAINING: frozenset({State.FAILED, State.STOPPED}),
    State.FAILED: frozenset({State.STOPPED}),
    State.STOPPED: frozenset(),
}

RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP answer: status, JSON body, and whether a retry makes sense."""

    status: HTTPStatus
    body: dict[str, Any]

    @property
    def headers(self) -> list[tuple[str, str]]:
        headers = [("content-type", "application/json")]
        if self.status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(("retry-after", str(RETRY_AFTER_SECONDS)))
        return headers

    @property
    def content(self) -> bytes:
        return json.dumps(self.body).encode()


@dataclass(frozen=True, slots=True)
class Running:
    """A phase under way in process `pid`. start: epoch seconds; detail: how far it is, for people."""

    phase: Phase
    pid: int
    start: float
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Lifecycle:
    """State, finished phases and the phases under way.

    started: seconds since the Unix epoch at the entrypoint's first line; start_id: as in every JSON log line;
    recording: whether the image's recorded state is used, and why not; degraded: what else this start does
    without, and why.
    """

    started: float
    start_id: str = ""
    state: State = State.STARTING
    reason: str = ""
    events: list[PhaseEvent] = field(default_factory=list)
    running: dict[tuple[Phase, int], Running] = field(default_factory=dict)
    ready_at: float | None = None
    recording: Mapping[str, str] = field(default_factory=dict)
    degraded: tuple[str, ...] = ()

    def move(self, state: State, reason: str = "") -> None:
        """Raises ValueError on a transition that cannot happen."""
        if state not in _ALLOWED[self.state]:
            raise ValueError(f"cannot go from {self.state} to {state}")
        self.state, self.reason = state, reason
        if state is State.READY:
            self.ready_at = now()

    def begin(self, phase: Phase, pid: int, start: float, detail: str = "") -> None:
        """A second call with the same start tells how far the phase is."""
        self.running[phase, pid] = Running(phase, pid, start, detail)

    def finish(self, event: PhaseEvent) -> None:
        self.running.pop((event.phase, event.pid), None)
        self.events.append(event)

    @property
    def current(self) -> Running | None:
        """The phase that began last and has not ended."""
        return max(self.running.values(), key=lambda running: running.start, default=None)

    def snapshot(self) -> dict[str, Any]:
        """The body of `/startup`: seconds, finished phases as PhaseEvent.to_json(), and those under way."""
        end = self.ready_at if self.ready_at is not None else now()
        current = self.current
        return {
            "schema": SCHEMA_VERSION,
            "status": self.state.value,
            "reason": self.reason,
            "phase": current.phase.value if current else None,
            "detail": current.detail if current else "",
            "elapsed": round(end - self.started, 6),
            "started": self.started,
            "start_id": self.start_id,
            "recording": dict(self.recording),
            "degraded": list(self.degraded),
            "phases": [event.to_json() for event in self.events],
            "running": [running.to_json() for running in self.running.values()],
        }

    def answer(self, path: str) -> Reply | None:
        """The reply for `path`, or None when only the engine can answer it."""
        if path == "/health":
            alive = self.state not in (State.FAILED, State.STOPPED)
            return Reply(_ok(alive), {"status": self.state.value, "reason": self.reason})
        if path == "/ready":
            return Reply(_ok(self.state is State.READY), {"status": self.state.value, "reason": self.reason})
        if path == "/startup":
            return Reply(_ok(self.state in (State.READY, State.DRAINING)), self.snapshot())
        if self.state is State.READY or (self.state is State.DRAINING and path != "/v1/models"):
            return None
        return self.not_serving()

    def not_serving(self) -> Reply:
        current = self.current
        phase = current.phase.value if current else None
        where = f" ({phase})" if phase else ""
        message = f"The server is {self.state.value}{where}. {self.reason}".strip()
        error = {
            "message": message,
            "type": "service_unavailable",
            "param": None,
            "code": self.state.value,
            "phase": phase,
        }
        return Reply(HTTPStatus.SERVICE_UNAVAILABLE, {"error": error})


def describe_recording(recording: Mapping[str, str]) -> str:
    """What a start took from a recording, for people: see `Settings.recorded`."""
    status = recording.get("status", "none")
    if status == "used":
        return f"recording used: {recording['mode']}"
    return f"recording not used: {recording['reason']}" if status == "unused" else "no recording"


def _ok(condition: bool) -> HTTPStatus:
    return HTTPStatus.OK if condition else HTTPStatus.SERVICE_UNAVAILABLE
