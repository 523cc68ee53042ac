from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page_cache
from runtime import prefetch, record


def test_files_are_asked_for_in_order_until_the_budget(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 20), ("c", 30)):
        (tmp_path / name).write_bytes(bytes(size))
    paths = [str(tmp_path / name) for name in ("a", "missing", "b", "c")]
    assert prefetch.read_ahead(paths, 1000) == 60
    assert prefetch.read_ahead(paths, 35) == 30
    assert prefetch.read_ahead(paths, 5) == 0


def test_large_files_are_read_to_their_end(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.write(bytes(24 << 20))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert page_cache.residency([tmp_path]).share < 1.0
    prefetch.read_ahead([str(path) for path in tmp_path.iterdir()], 1 << 30)
    assert page_cache.residency([tmp_path]).share == 1.0


def test_recorded_files_come_before_the_weights(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(prefetch, "read_ahead", lambda paths, _: asked.append(list(paths)))
    (tmp_path / prefetch.FILE_LIST).write_text("/lib/a.so\n/lib/b.py\n")
    prefetch.start(Path("/models/m"), ["model.safetensors"], tmp_path).join()
    prefetch.start(Path("/models/m"), ["model.safetensors"], tmp_path / "none").join()
    assert asked == [
        ["/lib/a.so", "/lib/b.py", "/models/m/model.safetensors"],
        ["/models/m/model.safetensors"],
    ]


def test_recordings_come_first(tmp_path: Path) -> None:
    for name in ("a/cache/vllm/x/one", "a/cache/inductor/two", "b/cache/three", "a/golden.json"):
        (tmp_path / "recordings" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "recordings" / name).write_text("x")
    (tmp_path / prefetch.FILE_LIST).write_text("/lib/a.so\n")
    paths = list(prefetch._paths(Path("/models/m"), ["model.safetensors"], tmp_path))
    assert sorted(Path(path).name for path in paths[:3]) == ["one", "three", "two"]
    assert paths[3:] == ["/lib/a.so", "/models/m/model.safetensors"]


def test_no_signal_goes_to_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PID 1 holds signals back at times; the kernel gives one to any thread that takes it."""
    blocked: list[set[int]] = []

    def look(paths: object, budget: int) -> None:
        blocked.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())})

    monkeypatch.setattr(prefetch, "read_ahead", look)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    prefetch.start(Path("/models/m"), [], tmp_path).join()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD} <= blocked[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_files_that_a_process_reads_are_noted_once_and_in_order(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("x")
    code = (
        "import sys; from pathlib import Path; from runtime import record\n"
        f"folder = Path({str(tmp_path)!r}); record.start(folder)\n"
        "for name in ('two', 'one', 'two'): open(folder / name).read()\n"
        "open(folder / 'written', 'w').close()\n"
        "import decimal\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    noted = (tmp_path / record.OPENED).read_text().splitlines()
    assert [Path(path).name for path in noted if path.startswith(str(tmp_path))] == ["two", "one"]
    assert any("decimal" in path for path in noted)
