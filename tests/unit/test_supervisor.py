"""PID 1 as a real process, in front of an import of vLLM that hangs, fails or is killed: no engine."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runtime.processes import descendants

ROOT = Path(__file__).parents[2]
HANGS = "import time\ntime.sleep(600)\n"
# Nothing here takes as long; whoever waits longer hangs.
_PATIENCE = 60


@dataclass
class Server:
    """The runtime as an ordinary process. answers: status of /health, as often as somebody looked."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    health: set[int] = field(default_factory=set)

    def get(self, path: str) -> tuple[int, Any] | None:
        """None while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except (OSError, ValueError):
            return None

    def startup(self) -> Any:
        """The body of /startup, once somebody answers."""
        assert self.process.poll() is None, self.log()
        found: list[Any] = []
        _until(
            lambda: found.append(answer) if (answer := self.get("/startup")) else None, lambda: bool(found)
        )
        return found[0][1]

    def wait(self) -> tuple[int, str]:
        """Exit code and last line; looks at /health meanwhile."""
        _until(self._look, lambda: self.process.poll() is not None)
        return self.process.wait(), self.log().rstrip().rpartition("\n")[2]

    def _look(self) -> None:
        answer = self.get("/health")
        if answer:
            self.health.add(answer[0])

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def left(self) -> list[str]:
        return [str(path) for path in (self.folder / "tmp").iterdir()]


def _until(step: Callable[[], object], over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not over():
        assert time.monotonic() < deadline
        step()
        time.sleep(0.02)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """serve(source of the module vllm, *flags) -> a server that starts.

    patch: source that every process of it runs first; environ: variables, with "{}" for the server's folder.
    """
    servers: list[Server] = []
    shared = set(Path("/dev/shm").iterdir())
    above = Path(tempfile.mkdtemp(prefix="h-"))  # pytest's own paths are too long for a socket's address

    def start(vllm: str, *flags: str, device: str = "cpu", patch: str = "", **environ: str) -> Server:
        folder = above / str(len(servers))
        (folder / "tmp").mkdir(parents=True)
        (folder / "vllm.py").write_text(vllm)
        (folder / "sitecustomize.py").write_text(patch)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        model = {"path": str(folder / "model"), "served_name": "tiny", "files": []}
        (folder / "manifest.json").write_text(
            json.dumps({"device": device, "engine_args": [], "model": model})
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{folder}:{ROOT}",
            "TMPDIR": str(folder / "tmp"),
            "COLDSTART_MANIFEST": str(folder / "manifest.json"),
            # One worker in the engine's process, as in our CPU images, needs no shared memory.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **{name: value.replace("{}", str(folder)) for name, value in environ.items()},
        }
        with (folder / "log").open("wb") as log:
            command = [sys.executable, "-m", "runtime", "--host", "127.0.0.1", "--port", str(port), *flags]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        servers.append(Server(process, port, folder))
        return servers[-1]

    yield start
    for server in servers:
        for pid in (*descendants(server.process.pid), server.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()
    left = [path for server in servers for path in server.left()]
    shutil.rmtree(above)
    assert left == []
    ours = {path for path in set(Path("/dev/shm").iterdir()) - shared if path.stat().st_uid == os.getuid()}
    assert not ours, ours


def test_a_hang_ends_at_the_deadline_of_its_phase(serve: Callable[..., Server]) -> None:
    server = serve(HANGS, "--phase-timeout", "600,engine_import=2")
    code, last_line = server.wait()
    assert (code, 503 in server.health) == (1, True)
    assert last_line == (
        "coldstart: exit 1: failed: no progress for 2 s in engine_import. Look at what holds it up, "
        "or give a slow phase more time: --phase-timeout PHASE=SECONDS."
    )


def test_a_phase_with_a_longer_deadline_outlives_the_others(serve: Callable[..., Server]) -> None:
    server = serve(HANGS, "--phase-timeout", "1,engine_import=600")
    _until(lambda: None, lambda: server.startup()["elapsed"] > 4)
    assert server.startup()["phase"] == "engine_import"
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == (0, "coldstart: exit 0: stopped as asked")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_at_any_moment_of_the_first_second_ends_it(serve: Callable[..., Server], name: str) -> None:
    """From the interpreter's own start on, through settings, preflight, binding and the first import."""
    chosen = random.Random(7)
    for _ in range(10):
        server = serve(HANGS)
        time.sleep(chosen.random())
        server.process.send_signal(signal.Signals[name])
        time.sleep(chosen.random() / 4)
        server.process.send_signal(signal.Signals[name])  # does nothing to one that has ended
        code, last_line = server.wait()
        print(code, last_line)
        if code:  # before the entrypoint's first line it is Python's to say how it ends
            log = server.log()
            assert "coldstart" not in log.replace(str(ROOT), "")
            interrupted = name == "SIGINT" and "KeyboardInterrupt" in log
            assert code == -signal.Signals[name] or (code in (1, 130) and interrupted), (code, log)
        assert server.left() == []


_SLOW_TEMPLATE = """
import time
from multiprocessing import forkserver
own = forkserver.ForkServer.ensure_running
def ensure_running(self):
    print("about to make the template", flush=True)
    time.sleep(1)
    own(self)
forkserver.ForkServer.ensure_running = ensure_running
"""


def test_a_template_that_is_made_after_the_others_were_killed_is_ended_too(
    serve: Callable[..., Server],
) -> None:
    server = serve(HANGS, patch=_SLOW_TEMPLATE)
    _until(lambda: None, lambda: "about to make" in server.log())
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == (0, "coldstart: exit 0: stopped as asked")


def test_import_that_fails_is_told(serve: Callable[..., Server]) -> None:
    server = serve("raise ImportError('libcuda.so.1: cannot open shared object file')")
    code, last_line = server.wait()
    assert (code, 503 in server.health) == (1, True)
    assert "libcuda.so.1: cannot open shared object file" in last_line
    assert "Traceback" in server.log()


def test_an_error_that_was_taken_back_is_not_the_reason(serve: Callable[..., Server]) -> None:
    first = (
        "from runtime import trace\ntrace._send({'error': 'a first try failed'})\ntrace.take_back_error()\n"
    )
    code, last_line = serve(first + HANGS, "--phase-timeout", "600,engine_import=2").wait()
    assert code == 1
    assert "failed: no progress for 2 s in engine_import" in last_line


def test_killed_template_is_told(serve: Callable[..., Server]) -> None:
    server = serve(HANGS)
    running: list[Any] = []
    _until(
        lambda: running.extend(r for r in server.startup()["running"] if r["phase"] == "engine_import"),
        lambda: bool(running),
    )
    os.kill(running[0]["pid"], signal.SIGKILL)
    code, last_line = server.wait()
    assert (code, 503 in server.health) == (1, True)
    assert "the process that imports vLLM died" in last_line


def test_port_that_is_taken_is_told(serve: Callable[..., Server]) -> None:
    first = serve(HANGS)
    first.startup()
    second = serve(HANGS, "--port", str(first.port))
    code, last_line = second.wait()
    assert code == 5
    assert f"cannot listen on 127.0.0.1:{first.port}: Address already in use. Free the port" in last_line
    first.process.send_signal(signal.SIGTERM)
    assert first.wait()[0] == 0


def test_probes_are_answered_while_preflight_waits_for_the_gpus(serve: Callable[..., Server]) -> None:
    patch = (
        "import pathlib\nfrom runtime import preflight\npreflight._GPU_NODES = (pathlib.Path('/dev/null'),)\n"
    )
    tools = Path(tempfile.mkdtemp(prefix="h-"))
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\ntouch {tools}/asked\nexec sleep 30\n")
    (tools / "nvidia-smi").chmod(0o755)
    server = serve(HANGS, device="cuda", patch=patch, PATH=f"{tools}:{os.environ['PATH']}")
    _until(lambda: None, (tools / "asked").exists)
    begun = time.monotonic()
    assert server.get("/health") == (200, {"status": "starting", "reason": ""})
    assert server.startup()["phase"] == "config_parse"
    assert time.monotonic() - begun < 0.5
    assert server.log() == ""
    _until(lambda: None, lambda: server.startup()["phase"] == "engine_import")
    looked = [event for event in server.startup()["phases"] if event["phase"] == "config_parse"][-1]
    assert 0.7 < looked["end"] - looked["start"] < 1.5  # the budget of nvidia-smi
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == (0, "coldstart: exit 0: stopped as asked")
    shutil.rmtree(tools)


def test_a_signal_ends_preflight(serve: Callable[..., Server]) -> None:
    patch = "from runtime import preflight\nimport time\npreflight.gather = lambda _: time.sleep(1)\n"
    server = serve(HANGS, patch=patch)
    server.startup()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == (0, "coldstart: exit 0: stopped as asked")
    assert server.log().count("\n") == 1


def test_a_machine_that_cannot_serve_is_told_in_one_line(serve: Callable[..., Server]) -> None:
    server = serve(HANGS, device="cuda")
    code, last_line = server.wait()
    assert (code, server.log()) == (3, f"{last_line}\n")
    assert last_line.startswith("coldstart: exit 3: no NVIDIA GPU is visible in this container")
    server = serve(HANGS, "--log-format", "json", device="cuda")
    code, last_line = server.wait()
    record = json.loads(last_line)
    assert (code, server.log(), record["level"]) == (3, f"{last_line}\n", "error")
    assert record["message"].startswith("exit 3: no NVIDIA GPU is visible")


def test_a_home_that_is_not_writable_is_replaced_and_told(serve: Callable[..., Server]) -> None:
    server = serve(f"import os\nprint('at', os.environ['HOME'], flush=True)\n{HANGS}", HOME="/none")
    _until(lambda: None, lambda: "at " in server.log())
    told = "/none, the home folder, is not writable: caches are kept for this start only"
    assert server.startup()["degraded"] == [told]
    assert f"coldstart: {told}\n" in server.log()
    assert f"at {server.folder}/tmp/coldstart-" in server.log()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait()[0] == 0


def test_what_the_starter_raises_ends_the_start(serve: Callable[..., Server]) -> None:
    patch = (
        "from runtime import supervisor\n"
        'def fail(*_): raise RuntimeError("can\'t start new thread")\n'
        "supervisor.Supervisor._start_process = fail\n"
    )
    server = serve(HANGS, patch=patch)
    code, last_line = server.wait()
    assert (code, 503 in server.health) == (1, True)
    assert last_line == (
        "coldstart: exit 1: failed: the engine cannot be started: RuntimeError: can't start new thread. "
        "Allow the container more processes: `docker run --pids-limit`, in Kubernetes the kubelet's "
        "podPidsLimit."
    )


def test_a_folder_that_no_socket_can_be_in_is_told(serve: Callable[..., Server]) -> None:
    patch = "import os\nos.makedirs(os.environ['TMPDIR'], exist_ok=True)\n"
    server = serve(HANGS, patch=patch, TMPDIR=f"{{}}/{'x' * 100}")
    code, last_line = server.wait()
    assert (code, 503 in server.health) == (1, True)
    assert last_line == (
        "coldstart: exit 1: failed: the engine cannot be started: OSError: AF_UNIX path too long. "
        "Give TMPDIR a shorter path, such as /tmp."
    )
    assert list((server.folder / ("x" * 100)).iterdir()) == []
