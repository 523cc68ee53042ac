"""Every fault of docs/faults.md, caused for real: the last line says what and what next; nothing is left."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from benchmarks import client
from benchmarks.sampler import read_process
from builder.docker_engine import Container
from builder.errors import ColdstartError
from runtime.processes import descendants
from tests.image.conftest import TINY_ARGS, get, record_ends, wait_ready
from tests.image.test_shutdown import NOTHING

_HANG_SECONDS = 30
_END_SECONDS = 240
_DAMAGED = "The weights are damaged or do not fit config.json: copy them again, or build the image again."
_DEAD = ("the engine core or a worker of it died", "output above")
_MORE_MEMORY = "Raise the container's memory limit"


def _check(results: dict[str, Any], expected: dict[str, tuple[str, str]], code: int = 1) -> None:
    """expected: by scenario, what the last line holds: the reason, and the next step."""
    for name, (reason, step) in expected.items():
        result = results[name]
        assert result["reached"], (name, result["log"])
        assert result["code"] == code, (name, result["log"])
        failed = "failed: " if code == 1 else ""
        assert result["last_line"].startswith(f"coldstart: exit {code}: {failed}"), (name, result["log"])
        assert reason in result["last_line"], (name, result["log"])
        assert step in result["last_line"], name
        assert 503 in result["healths"] or code != 1, name
        assert result["left"] == NOTHING, name
        assert result["zombies"] == [], name


def test_damaged_weights(plain: Any, bare: Callable[..., dict[str, Any]]) -> None:
    results = bare(
        plain["tag"],
        [
            {"name": "truncated", "model": "truncated", "when": "weight_load"},
            {"name": "corrupt", "model": "corrupt", "when": "config_parse"},
            {"name": "unreadable", "model": "unreadable", "when": "config_parse"},
        ],
    )
    expected = {
        "truncated": ("weight_load failed: SafetensorError", _DAMAGED),
        "corrupt": ("index-sized integer", _DAMAGED),
        "unreadable": ("Permission denied", "chmod a+r"),
    }
    _check(results, expected)


def test_killed_and_hanging_processes(plain: Any, bare: Callable[..., dict[str, Any]]) -> None:
    serving = "ready to serve"
    # Import and weights get no more than they need; a stopped process makes no progress in either.
    hang = {"COLDSTART_PHASE_TIMEOUT": f"600,tokenizer_init={_HANG_SECONDS},engine_init={_HANG_SECONDS}"}
    no_time = {"COLDSTART_DRAIN_DELAY": "0", "COLDSTART_DRAIN_TIMEOUT": "0"}
    results = bare(
        plain["tag"],
        [
            {"name": "hang", "when": "tokenizer_init", "act": "SIGSTOP api", "environment": hang},
            {"name": "core killed", "when": serving, "act": "SIGKILL EngineCore"},
            {"name": "core killed early", "when": "weight_load", "act": "SIGKILL EngineCore"},
            {"name": "api killed", "when": serving, "act": "SIGKILL api"},
            {"name": "api killed early", "when": "tokenizer_init", "act": "SIGKILL api"},
            {"name": "template killed", "when": "engine_import", "act": "SIGKILL template"},
            {"name": "deaf", "when": serving, "act": "SIGSTOP api; SIGTERM", "environment": no_time},
        ],
    )
    api = ("the engine was killed by SIGKILL", "memory limit")
    expected = {
        "hang": (f"no progress for {_HANG_SECONDS} s in ", "--phase-timeout PHASE=SECONDS"),
        "core killed": _DEAD,
        "core killed early": ("Engine core initialization failed", "output above"),
        "api killed": api,
        "api killed early": api,
        "template killed": ("the process that imports vLLM died", "output above"),
    }
    _check(results, expected)
    _check(results, {"deaf": ("the engine did not stop in time", "Raise --drain-timeout")}, code=6)


def test_full_shared_memory(tiny: Any, bare: Callable[..., dict[str, Any]]) -> None:
    """Enough of it when preflight looks, none when the engine wants it."""
    scenario = {
        "name": "shared memory",
        "when": "engine_import",
        "act": "FILL /dev/shm",
        "arguments": ["--tensor-parallel-size", "2"],
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    }
    results = bare(tiny["tag"], [scenario], "--shm-size", "1g")
    _check(results, {"shared memory": ("Insufficient space in /dev/shm", "--shm-size")})


def test_a_disk_that_fills_up_while_it_starts(tiny: Any, bare: Callable[..., dict[str, Any]]) -> None:
    """vLLM's processes meet through a file in /tmp, which the engine core makes after that."""
    scenario = {"name": "disk", "when": "config_parse", "act": "FILL /tmp"}
    results = bare(tiny["tag"], [scenario], "--tmpfs", "/tmp:exec,size=32m")
    _check(results, {"disk": ("No space left on device", "Free the disk")})


@pytest.fixture(scope="module")
def tiny(build: Callable[..., Any], tiny_folder: Path) -> Any:
    """An image whose model divides by two workers."""
    return build("tiny:tp", folder=tiny_folder, engine_args=TINY_ARGS)


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
            {"name": "stopped early", **start, "when": "weight_load", "act": "SIGTERM"},
            {"name": "worker killed", **start, "act": "SIGKILL worker 1"},
            {"name": "core killed", **start, "act": "SIGKILL EngineCore"},
        ],
        *("--shm-size", "1g"),
    )
    for name in ("stopped", "stopped early"):
        assert results[name]["reached"], (name, results[name]["log"])
        assert results[name]["code"] == 0, (name, results[name]["log"])
        assert results[name]["last_line"] == "coldstart: exit 0: stopped as asked", name
        assert results[name]["left"] == NOTHING, name
        assert results[name]["zombies"] == [], name
    stopped = results["stopped"]
    assert stopped["reachable"] == [8000]  # whatever else listens does so on loopback
    assert stopped["answer"]["usage"]["completion_tokens"] == 4
    loads = {event["process"] for event in stopped["phases"] if event["phase"] == "weight_load"}
    assert loads == {"worker 0", "worker 1"}
    _check(results, {"worker killed": _DEAD, "core killed": _DEAD})


def _follow(container: Container, since: Callable[[], bool] = lambda: True) -> tuple[set[int], float]:
    """What /health answers until the container ends; the seconds to there from when `since` first held."""
    healths: set[int] = set()
    began = time.monotonic()
    held: float | None = None
    try:
        port = container.host_port()
    except ColdstartError:  # it has ended already
        return healths, 0.0
    while container.running() and time.monotonic() < began + _END_SECONDS:
        if held is None and since():
            held = time.monotonic()
        with suppress(OSError, HTTPException):
            healths.add(client.get(port, "/health", 5.0).status)
        time.sleep(0.02)
    return healths, 0.0 if held is None else time.monotonic() - held


_NODES = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))


@pytest.mark.parametrize(
    ("flags", "arguments", "code", "words"),
    [
        (
            ["--memory", "300m", "--memory-swap", "300m"],
            [],
            1,
            ["out of memory", _MORE_MEMORY],
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
        pytest.param(
            ["--shm-size", "1g"],
            ["--tensor-parallel-size", "2"],
            1,
            ["NUMA nodes", "VLLM_CPU_OMP_THREADS_BIND"],
            marks=pytest.mark.skipif(_NODES > 1, reason="each worker gets a NUMA node of its own"),
        ),
    ],
    ids=["memory", "read-only", "shared memory", "disk", "arguments", "cores"],
)
def test_what_the_container_lacks_is_told_in_the_last_line(
    tiny: Any,
    run: Callable[..., Container],
    flags: list[str],
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    container = run(tuple(flags), tiny["tag"], tuple(arguments))
    healths, _ = _follow(container)
    logs = container.logs()
    print(logs[-3000:])
    assert container.wait(10) == code
    last_line = logs.rstrip().rpartition("\n")[2]
    assert last_line.startswith(f"coldstart: exit {code}: ")
    for word in words:
        assert word in last_line
    assert 503 in healths or code != 1


_EAT_MEMORY = """
import json, pathlib, urllib.request
with urllib.request.urlopen("http://127.0.0.1:8000/startup") as answer:
    phases = json.load(answer)["phases"]
core = {event["pid"] for event in phases if event["process"] == "EngineCore"}.pop()
pathlib.Path(f"/proc/{core}/oom_score_adj").write_text("1000")
eaten = []
while True:
    eaten.append(b"x" * (16 << 20))
"""


def test_the_kernel_takes_the_engine_core_for_want_of_memory(
    tiny: Any, run: Callable[..., Container], request: pytest.FixtureRequest
) -> None:
    """While it serves; what eats the memory is beside it, and the core the kernel's first choice."""
    container = run(("--memory", "3g", "--memory-swap", "3g", "--restart", "no"), tiny["tag"])
    wait_ready(container)
    phases = get(container, "/startup").json["phases"]
    inside = next(event["pid"] for event in phases if event["process"] == "EngineCore")
    # Not what Docker runs in it, such as health checks.
    scores = {pid: _oom_score(pid) for pid in descendants(container.pid())}
    assert min(scores.values()) == _oom_score(container.pid()) + 100, scores  # PID 1 is there to say so
    core = next(pid for pid in scores if read_process(pid).pid == inside)
    command = ["docker", "exec", container.id, "python3", "-c", _EAT_MEMORY]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as eater:
        healths, seconds = _follow(container, lambda: _is_gone(core))
        eater.kill()  # where it outlives the container
    code = container.wait(10)
    last_line = container.logs().rstrip().rpartition("\n")[2]
    ended = {"code": code, "seconds": round(seconds, 2), "last_line": last_line}
    print(ended)
    record_ends(request.node.name, {"out of memory": ended})
    assert code == 1
    assert seconds > 0  # the core went first
    assert "out of memory" in last_line
    assert _MORE_MEMORY in last_line
    assert 503 in healths


def _oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended, collected or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True
