"""Every fault of docs/faults.md, caused for real: the last line says what and what next; nothing is left."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from builder.docker_engine import CONTAINER_PREFIX
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
        "corrupt": ("index-sized integer", _DAMAGED),
        "unreadable": ("Permission denied", "chmod a+r"),
        "hang": (f"no progress for {_HANG_SECONDS} s", "raise COLDSTART_PHASE_TIMEOUT"),
        "core killed": ("the engine core or a worker of it died", "output above"),
        "api killed": ("the engine was killed by SIGKILL", "memory limit"),
        "template killed": ("the process that imports vLLM died", "output above"),
    }
    _check(results, expected)


@pytest.fixture(scope="module")
def tiny(build: Callable[..., Any], model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An image whose model divides by two workers."""
    folder = write_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama", Path(model), shards=3)
    return build(
        "tiny:tp",
        folder=folder,
        engine_args=("--max-model-len", "512", "--kv-cache-memory-bytes", "100000000"),
    )


def test_two_workers_serve_and_a_killed_one_ends_the_server(
    tiny: Any, bare: Callable[..., dict[str, Any]]
) -> None:
    """Tensor parallelism for real, on two cores; every engine process is forked from the template."""
    start = {
        "arguments": ["--tensor-parallel-size", "2"],
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        "when": "ready to serve",
    }
    results = bare(
        tiny["tag"],
        [
            {"name": "stopped", **start, "act": "SIGTERM"},
            {"name": "worker killed", **start, "act": "SIGKILL worker 1"},
            {"name": "core killed", **start, "act": "SIGKILL EngineCore"},
        ],
        *("--shm-size", "1g"),
    )
    stopped = results["stopped"]
    assert stopped["code"] == 0, stopped["log"]
    assert stopped["left"] == NOTHING
    assert stopped["answer"]["usage"]["completion_tokens"] == 4
    loads = {event["process"] for event in stopped["phases"] if event["phase"] == "weight_load"}
    assert loads == {"worker 0", "worker 1"}
    dead = ("the engine core or a worker of it died", "output above")
    _check(results, {"worker killed": dead, "core killed": dead})


def _run(image: str, *arguments: str, flags: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and last line of a container that ends by itself."""
    name = f"{CONTAINER_PREFIX}fault-{uuid.uuid4().hex[:8]}"
    command = ["docker", "run", "--rm", "--name", name, *flags, image, *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    print(done.stdout[-3000:])
    return done.returncode, done.stdout.rstrip().rpartition("\n")[2]


@pytest.mark.parametrize(
    ("flags", "arguments", "code", "words"),
    [
        (
            ["--memory", "300m", "--memory-swap", "300m"],
            [],
            1,
            ["out of memory", "Raise the container's memory limit"],
        ),
        (["--read-only"], [], 3, ["/tmp is not writable", "--tmpfs /tmp"]),
        (
            ["--shm-size", "170m"],
            ["--tensor-parallel-size", "2"],
            3,
            ["/dev/shm", "--shm-size 1g"],
        ),
        (["--tmpfs", "/tmp:size=4k"], [], 1, ["No space left on device", "Free the disk"]),
        ([], ["--max-model-len", "many"], 2, ["does not accept", "Mend the arguments"]),
    ],
    ids=["memory", "read-only", "shared memory", "disk", "arguments"],
)
def test_what_the_container_lacks_is_told_in_the_last_line(
    tiny: Any, flags: list[str], arguments: list[str], code: int, words: list[str]
) -> None:
    ended, last_line = _run(tiny["tag"], *arguments, flags=flags)
    assert ended == code
    assert last_line.startswith(f"coldstart: exit {code}: ")
    for word in words:
        assert word in last_line
