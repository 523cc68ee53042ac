"""Phases of a process reach PID 1 as datagrams, over a real socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import trace
from runtime.phases import Phase


@pytest.fixture
def messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that returns what has arrived so far."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "events"))
        receiver.setblocking(False)
        monkeypatch.setenv(trace.SOCKET_VARIABLE, str(tmp_path / "events"))

        def arrived() -> list[Any]:
            found = []
            while True:
                try:
                    found.append(json.loads(receiver.recv(65536)))
                except BlockingIOError:
                    return found

        yield arrived


def test_a_failing_phase_says_why_once(messages: Any) -> None:
    with pytest.raises(ValueError, match="damaged"), trace.span(Phase.WEIGHT_LOAD):
        raise ValueError("damaged")
    begin, error, event = messages()
    assert begin["begin"]["phase"] == "weight_load"
    assert error == {"error": "weight_load failed: ValueError: damaged"}
    assert event["event"]["phase"] == "weight_load"


def test_a_process_knows_when_it_started() -> None:
    code = (
        "import time; time.sleep(0.2); from runtime import trace; print(trace.process_started(), time.time())"
    )
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    started, asked = map(float, done.stdout.split())
    assert before - 0.02 < started < asked - 0.2  # a tick is 10 ms


def test_a_burst_of_messages_waits_for_who_reads(tmp_path: Path) -> None:
    code = """
from runtime import trace
from runtime.phases import Phase
for number in range(400):
    trace.announce(Phase.WEIGHT_LOAD, 1.0, str(number))
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "events"))
        receiver.settimeout(30)
        environment = {**os.environ, trace.SOCKET_VARIABLE: str(tmp_path / "events")}
        with subprocess.Popen([sys.executable, "-c", code], env=environment) as sender:
            details = []
            for _ in range(400):
                details.append(json.loads(receiver.recv(65536))["begin"]["detail"])
                time.sleep(0.001)
            assert sender.wait(30) == 0
    assert details == [str(number) for number in range(400)]


def test_a_phase_may_have_begun_before_its_block(messages: Any) -> None:
    with trace.span(Phase.ENGINE_IMPORT, since=5.0):
        pass
    begin, event = messages()
    assert begin["begin"]["start"] == event["event"]["start"] == 5.0


def test_shards_are_counted_as_the_weights_are_read(
    messages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_PROGRESS_SECONDS", -1.0)  # tell every tensor
    files = []
    for index in range(3):
        files.append(str(tmp_path / f"{index}.safetensors"))
        Path(files[-1]).write_bytes(bytes(1_000_000))

    def iterator(files: list[str], tqdm: bool) -> Iterator[tuple[str, Any]]:
        for file in files:
            for half in range(2):
                yield f"{file}{half}", SimpleNamespace(nbytes=500_000)

    with trace.span(Phase.WEIGHT_LOAD):
        assert len(list(trace._shards(iterator)(files, True))) == 6
    details = [message["begin"]["detail"] for message in messages() if "begin" in message]
    assert details == [
        "",
        "shard 1 of 3, 0 of 3 MB",
        "shard 1 of 3, 0 of 3 MB",
        "shard 2 of 3, 1 of 3 MB",
        "shard 2 of 3, 2 of 3 MB",
        "shard 3 of 3, 2 of 3 MB",
        "shard 3 of 3, 2 of 3 MB",
    ]


def test_a_process_of_pid_1_was_launched_when_that_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trace.LAUNCHED_VARIABLE, "12.5")
    assert trace.launched() == 12.5
    assert trace.launched() == pytest.approx(trace.process_started(), abs=0.02)  # no other process is told
