from __future__ import annotations

import json

import pytest

from runtime.lifecycle import Lifecycle, State
from runtime.phases import Phase, PhaseEvent, covered_seconds


def _status(lifecycle: Lifecycle, path: str) -> int | None:
    reply = lifecycle.answer(path)
    return reply.status if reply else None


@pytest.mark.parametrize(
    ("states", "health", "ready", "startup", "models", "chat"),
    [
        ([], 200, 503, 503, 503, 503),
        ([State.READY], 200, 200, 200, None, None),
        ([State.READY, State.DRAINING], 200, 503, 200, 503, None),
        ([State.FAILED], 503, 503, 503, 503, 503),
        ([State.READY, State.FAILED], 503, 503, 503, 503, 503),
    ],
)
def test_every_probe_tells_the_truth(
    states: list[State], health: int, ready: int, startup: int, models: int | None, chat: int | None
) -> None:
    lifecycle = Lifecycle(started=0.0)
    for state in states:
        lifecycle.move(state)
    assert _status(lifecycle, "/health") == health
    assert _status(lifecycle, "/ready") == ready
    assert _status(lifecycle, "/startup") == startup
    assert _status(lifecycle, "/v1/models") == models
    assert _status(lifecycle, "/v1/chat/completions") == chat


def test_503_says_when_to_come_back_and_where_the_start_is() -> None:
    lifecycle = Lifecycle(started=0.0)
    lifecycle.begin(Phase.ENGINE_IMPORT, pid=7, start=1.0)
    reply = lifecycle.answer("/v1/chat/completions")
    assert reply is not None
    assert ("retry-after", "1") in reply.headers
    assert reply.body["error"]["phase"] == "engine_import"
    assert reply.body["error"]["type"] == "service_unavailable"


def test_current_phase_is_the_one_that_began_last() -> None:
    lifecycle = Lifecycle(started=0.0)
    lifecycle.begin(Phase.ENGINE_INIT, pid=1, start=1.0)
    lifecycle.begin(Phase.WEIGHT_LOAD, pid=2, start=2.0)
    assert lifecycle.snapshot()["phase"] == Phase.WEIGHT_LOAD.value
    lifecycle.finish(PhaseEvent(Phase.WEIGHT_LOAD, 2.0, 3.0, "EngineCore", 2))
    snapshot = lifecycle.snapshot()
    assert snapshot["phase"] == Phase.ENGINE_INIT.value
    assert PhaseEvent.from_json(snapshot["phases"][0]).seconds == 1.0


def test_startup_tells_how_far_a_running_phase_is() -> None:
    lifecycle = Lifecycle(started=0.0)
    lifecycle.begin(Phase.WEIGHT_LOAD, pid=2, start=2.0)
    assert lifecycle.snapshot()["detail"] == ""
    lifecycle.begin(Phase.WEIGHT_LOAD, pid=2, start=2.0, detail="shard 3 of 9")
    snapshot = lifecycle.snapshot()
    assert snapshot["detail"] == "shard 3 of 9"
    assert snapshot["running"] == [{"phase": "weight_load", "pid": 2, "start": 2.0, "detail": "shard 3 of 9"}]
    json.dumps(snapshot)
    lifecycle.finish(PhaseEvent(Phase.WEIGHT_LOAD, 2.0, 3.0, "EngineCore", 2))
    assert lifecycle.snapshot()["running"] == []


@pytest.mark.parametrize("state", [State.STARTING, State.READY, State.DRAINING])
def test_a_failed_server_does_not_come_back(state: State) -> None:
    lifecycle = Lifecycle(started=0.0)
    lifecycle.move(State.FAILED)
    with pytest.raises(ValueError, match="cannot go from"):
        lifecycle.move(state)


def test_covered_seconds_counts_overlap_once() -> None:
    events = [
        PhaseEvent(Phase.ENGINE_INIT, 1.0, 4.0, "a", 1),
        PhaseEvent(Phase.WEIGHT_LOAD, 2.0, 3.0, "a", 1),
        PhaseEvent(Phase.READY, 5.0, 9.0, "a", 1),
    ]
    assert covered_seconds(events, 0.0, 6.0) == 4.0


def test_event_with_unknown_fields_is_refused() -> None:
    data = PhaseEvent(Phase.READY, 0.0, 1.0, "a", 1).to_json()
    with pytest.raises(ValueError, match="unknown fields"):
        PhaseEvent.from_json({**data, "extra": 1})
