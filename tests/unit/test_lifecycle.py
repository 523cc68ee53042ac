from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from runtime import engine
from runtime.guard import Guard
from runtime.lifecycle import Lifecycle, State, describe_recording
from runtime.phases import Phase, PhaseEvent, breakdown, covered_seconds


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


def test_breakdown_gives_each_moment_to_the_phase_that_began_last() -> None:
    def event(phase: Phase, start: float, end: float) -> PhaseEvent:
        return PhaseEvent(phase, start, end, process="api", pid=1)

    events = [
        event(Phase.ENGINE_IMPORT, 10.0, 16.0),
        event(Phase.TOKENIZER_INIT, 15.0, 17.0),  # one second of it beside the import
        event(Phase.WEIGHT_LOAD, 18.0, 18.5),
        event(Phase.READY, 19.0, 30.0),  # ends after the moment that counts
        event(Phase.MODEL_DOWNLOAD, 18.0, 18.0),
    ]
    assert breakdown(events, 10.0, 20.0) == (
        "ready after 10.0 s: engine_import 5.0, tokenizer_init 2.0, ready 1.0, weight_load 0.5, "
        "unattributed 1.5"
    )
    assert breakdown([], 0.0, 1.0) == "ready after 1.0 s: unattributed 1.0"


def test_metrics_tell_why_a_recording_is_not_used_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: dict[tuple[str, ...], float] = {}

    class Gauge:
        """As much of prometheus-client's, which only the image has, as the engine uses."""

        def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
            self._key: tuple[str, ...] = (name,)
            self._names = tuple(labels)

        def labels(self, *values: str) -> Gauge:
            labelled = Gauge(self._key[0], "")
            labelled._key = (*self._key, *(f"{n}={v}" for n, v in zip(self._names, values, strict=True)))
            return labelled

        def set(self, value: float) -> None:
            shown[self._key] = value

        def set_function(self, function: Callable[[], float]) -> None:
            shown[self._key] = function()

    monkeypatch.setitem(sys.modules, "prometheus_client", SimpleNamespace(Gauge=Gauge))
    recording = {"status": "unused", "reason": "x is damaged", "mode": "eager"}
    lifecycle = Lifecycle(started=0.0, recording=recording, degraded=("no home",))
    engine._export_metrics(lifecycle, Guard(lambda *_: asyncio.sleep(0), (), metrics_open=True, max_bytes=1))
    told = ("coldstart_recording_info", "status=unused", "mode=eager", "reason=x is damaged")
    assert shown[told] == 1
    assert shown["coldstart_cache_hit", "cache=recording"] == 0
    assert shown["coldstart_degraded_info", "reason=no home"] == 1


def test_startup_tells_what_a_start_does_without() -> None:
    assert Lifecycle(started=0.0).snapshot()["degraded"] == []
    lifecycle = Lifecycle(started=0.0, degraded=("no home",))
    assert lifecycle.snapshot()["degraded"] == ["no home"]


@pytest.mark.parametrize(
    ("recording", "told"),
    [
        ({"status": "used", "reason": "", "mode": "compiled", "key": "5f"}, "recording used: compiled"),
        ({"status": "unused", "reason": "x is damaged", "mode": "eager"}, "recording not used: x is damaged"),
        ({"status": "none", "reason": "", "mode": ""}, "no recording"),
        ({}, "no recording"),
    ],
)
def test_what_became_of_the_recording(recording: dict[str, str], told: str) -> None:
    assert describe_recording(recording) == told
