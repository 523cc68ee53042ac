"""However a start ends, it ends by itself, says why, and leaves nothing behind: real vLLM, real signals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.load import Target, shut_down_under_load
from builder.docker_engine import Container
from runtime import modes
from runtime.phases import Phase
from tests.image.conftest import get, in_base, wait_ready, wait_until

NOTHING: dict[str, list[str]] = {"processes": [], "files": [], "shared_memory": [], "ports": []}
# Those that last long enough to be seen under way; the signal comes when the phase has begun.
PHASES = (
    *(Phase.SERVER_BIND, Phase.ENGINE_IMPORT, Phase.MODEL_DOWNLOAD, Phase.CONFIG_PARSE, Phase.TOKENIZER_INIT),
    *(Phase.ENGINE_INIT, Phase.WEIGHT_LOAD, Phase.KV_CACHE_ALLOC, Phase.GRAPH_CAPTURE, Phase.READY),
)
# A start that compiles, for minutes: nothing that was recorded is used.
_COMPILES = {
    "arguments": ["--off", "recording", *modes._COMPILED_CPU.engine_args],
    "environment": dict(modes._COMPILED_CPU.environment),
}
_RESIDENT_BYTES = 60e6


def test_sigterm_in_every_phase_ends_by_itself_and_leaves_nothing(
    plain: Any, bare: Callable[..., dict[str, Any]]
) -> None:
    scenarios: list[dict[str, Any]] = [
        {"name": phase.value, "when": phase.value, "act": "SIGTERM"} for phase in PHASES
    ]
    scenarios.append({"name": "compile", "when": "compile", "act": "SIGTERM", **_COMPILES})
    stop = {"when": "ready to serve", "act": "SIGTERM", "arguments": ["--drain-delay", "1"]}
    scenarios.append({"name": "serving", **stop})
    for name, result in bare(plain["tag"], scenarios).items():
        assert result["reached"], (name, result["log"])
        assert result["code"] == 0, (name, result["log"])
        assert result["last_line"] == "coldstart: exit 0: stopped as asked", (name, result["log"])
        assert result["left"] == NOTHING, name
        assert result["zombies"] == [], name
        assert 0 < result["resident_kib"] * 1024 < _RESIDENT_BYTES, name


def _metrics(container: Container) -> dict[str, float]:
    """Those without labels."""
    lines = [line.split() for line in get(container, "/metrics").body.decode().splitlines()]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2 and line[0].startswith("coldstart_")}


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "no time", "second signal"])
def test_shutdown_under_load(how: str, plain: Any, start: Callable[..., Container]) -> None:
    """Streams of 200 tokens, one that begins after the signal, and short requests on new and kept connections
    all the while.

    With time to drain, nothing that was accepted is lost or cut short. Without, streams end with an error.
    """
    drains = how.startswith("SIG")
    delay, timeout = ("0", "0") if how == "no time" else ("5", "240")
    container = start(plain["tag"], arguments=["--drain-delay", delay, "--drain-timeout", timeout])
    wait_ready(container)

    def terminate() -> None:
        container.signal("SIGINT" if how == "SIGINT" else "SIGTERM")
        if how == "second signal":
            container.signal("SIGTERM")
        if drains:
            wait_until(lambda: _metrics(container)["coldstart_draining"] == 1, container, seconds=30)
            assert _metrics(container)["coldstart_in_flight_requests"] > 0
            assert get(container, "/ready").status == 503

    target = Target(container.address(), 8000, "SmolLM2-135M-Instruct")
    tally, code = asyncio.run(shut_down_under_load(target, terminate, lambda: container.wait(400)))
    print(tally)
    assert tally.lost == [], container.logs()[-3000:]
    assert set(tally.answers) <= {200, 503}
    assert tally.answers[503] > 0 or not drains  # what came after the delay was told to go elsewhere
    last_line = container.logs().rstrip().rpartition("\n")[2]
    if drains:
        assert (code, tally.errors) == (0, 0)
        assert tally.streams >= 5
        assert tally.late_streams == 1  # it came while endpoints are still being removed
        assert tally.closed > 0  # clients were told to connect anew, elsewhere
        assert last_line == "coldstart: exit 0: stopped as asked"
    else:
        assert code == 6
        assert tally.errors >= 1
        assert last_line.startswith("coldstart: exit 6: requests in flight were cut. Raise --drain-timeout")


def test_a_websocket_goes_on_until_its_client_leaves_or_time_is_up(base: str) -> None:
    """No model here has one, so the server is asked for it around an app that echoes."""
    assert in_base(base, "websockets_drained.py") == {
        "leaves": {"answers": ["before", "after"], "code": 1000, "cut": False},
        "stays": {"answers": ["before", "after"], "code": 1012, "cut": True},
    }
