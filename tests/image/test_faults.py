"""Every fault of docs/faults.md, caused for real: the last line says what and what next, and nothing is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.docker_engine import Container
from tests.image.conftest import wait_until
from tests.image.test_shutdown import NOTHING
from tests.models import write_llama

# Nothing else may take so long on a slow machine; the fault itself is noticed after this time.
_HANG_SECONDS = "30"
_DAMAGED = "The weights are damaged or do not fit config.json: copy them again, or build the image again."


def _check(results: dict[str, Any], expected: dict[str, tuple[str, str]]) -> None:
    """expected: by scenario, what the last line holds: the reason, and the next step."""
    for name, (reason, step) in expected.items():
        result = results[name]
        assert result["code"] == 1, (name, result["log"])
        assert result["last_line"].startswith("coldstart: exit 1: failed: "), (name, result["log"])
        assert reason in result["last_line"], (name, result["log"])
        assert step in result["last_line"], name
        assert 503 in result["healths"], name
        assert result["left"] == NOTHING, name
        assert result["zombies"] == [], name


def test_damaged_weights_hangs_and_killed_processes(plain: Any, bare: Callable[..., dict[str, Any]]) -> None:
    results = bare(
        plain["tag"],
        [
            {"name": "truncated", "model": "truncated"},
            {"name": "corrupt", "model": "corrupt"},
            {"name": "unreadable", "model": "unreadable"},
            {
                "name": "hang",
                "when": "tokenizer_init",
                "act": "SIGSTOP api",
                "environment": {"COLDSTART_PHASE_TIMEOUT": _HANG_SECONDS},
            },
            {"name": "core killed", "when": "ready to serve", "act": "SIGKILL EngineCore"},
            {"name": "api killed", "when": "ready to serve", "act": "SIGKILL api"},
            {"name": "template killed", "when": "engine_import", "act": "SIGKILL template"},
        ],
    )
    expected = {
        "truncated": ("weight_load failed: SafetensorError", _DAMAGED),
        "corrupt": ("weight_load failed: SafetensorError", _DAMAGED),
        "unreadable": ("Permission denied", "chmod a+r"),
        "hang": (f"no progress for {_HANG_SECONDS} s", "raise COLDSTART_PHASE_TIMEOUT"),
        "core killed": ("the engine core or a worker of it died", "output above"),
        "api killed": ("the engine ended with code", "output above"),
        "template killed": ("the process that imports vLLM died", "output above"),
    }
    _check(results, expected)


@pytest.fixture(scope="module")
def tiny(build: Callable[..., Any], model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An image whose model divides by two workers."""
    folder = write_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama", Path(model), shards=3)
    return build(
        "tiny:tp",
        source=str(folder),
        engine_args=("--max-model-len", "512", "--kv-cache-memory-bytes", "100000000"),
    )
