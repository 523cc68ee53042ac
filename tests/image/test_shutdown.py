"""However a start ends, it ends by itself, says why, and leaves nothing behind: real vLLM, real signals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.phases import Phase

NOTHING: dict[str, list[str]] = {"processes": [], "files": [], "shared_memory": [], "ports": []}
# Those that last long enough to be seen under way; the signal comes when the phase has begun.
PHASES = (
    *(Phase.SERVER_BIND, Phase.ENGINE_IMPORT, Phase.MODEL_DOWNLOAD, Phase.TOKENIZER_INIT, Phase.ENGINE_INIT),
    *(Phase.WEIGHT_LOAD, Phase.KV_CACHE_ALLOC, Phase.GRAPH_CAPTURE, Phase.READY),
)


def test_sigterm_in_every_phase_ends_by_itself_and_leaves_nothing(
    plain: Any, bare: Callable[..., dict[str, Any]]
) -> None:
    scenarios = [{"name": phase.value, "when": phase.value, "act": "SIGTERM"} for phase in PHASES]
    stop = {"when": "ready to serve", "act": "SIGTERM", "arguments": ["--drain-delay", "1"]}
    scenarios.append({"name": "serving", **stop})
    for name, result in bare(plain["tag"], scenarios).items():
        assert result["acted"], (name, result["log"])
        assert result["code"] == 0, (name, result["log"])
        assert result["last_line"] == "coldstart: exit 0: stopped as asked", (name, result["log"])
        assert result["left"] == NOTHING, name
        assert result["zombies"] == [], name
        assert 0 < result["resident_kib"] < 60_000, name
