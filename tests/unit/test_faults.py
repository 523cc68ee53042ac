from __future__ import annotations

import re

import pytest

from runtime import faults


@pytest.mark.parametrize(
    ("reason", "step"),
    [
        ("weight_load failed: SafetensorError: incomplete metadata", "The weights are damaged"),
        ("config_parse failed: PermissionError: [Errno 13] Permission denied: '/models/a'", "chmod a+r"),
        ("engine_init failed: RuntimeError: Insufficient space in /dev/shm: 64 MiB free", "--shm-size 1g"),
        ("weight_load failed: OSError: [Errno 28] No space left on device", "Free the disk"),
        ("kv_cache_alloc failed: ValueError: no memory for the KV cache", "Lower --max-model-len"),
        ("the engine was killed by SIGKILL", "memory limit"),
        ("the engine cannot be started: RuntimeError: can't start new thread", "--pids-limit"),
        ("the engine cannot be started: OSError: AF_UNIX path too long", "Give TMPDIR a shorter path"),
        ("ValueError: Not enough allowed NUMA nodes to bind threads of 2 local CPU", "OMP_THREADS_BIND"),
        ("the engine core or a worker of it died", "kernel log, or raise the container's memory limit"),
        ("something\nnobody has\tseen", "output above"),
    ],
)
def test_every_reason_is_one_line_with_a_next_step(reason: str, step: str) -> None:
    line = faults.with_next_step(reason)
    assert line.startswith(" ".join(reason.split()))
    assert step in line
    assert "\n" not in line
    assert not re.search(r"\.\.|[^.] The |[^.] Free", line)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, "the engine was killed by SIGKILL"),
        (3, "the engine ended with code 3"),
        (None, "the engine ended"),
    ],
)
def test_how_a_process_ended(code: int | None, text: str) -> None:
    assert faults.ended("the engine", code).startswith(text)
