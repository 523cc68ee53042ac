"""What the sampler reads of cgroups of both versions, and how samples become the use of a phase."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.sampler import Cgroup, Sampler, Usage, disk_bytes, read_process, used
from benchmarks.schema import Resources

NET = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs
    lo: 99999       2    0    0    0     0          0         0       99999     2    0
  eth0:   4000      10    0    0    0     0          0         0      70     1    0
"""


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


EXPECTED = {
    "cpu_seconds": 2.5,
    "read_bytes": 5120,
    "net_bytes": 4000,
    "page_faults": 700,
    "memory_bytes": 30 << 20,
}


def cgroup_of(tmp_path: Path) -> Cgroup:
    return Cgroup(42, proc=tmp_path / "proc", root=tmp_path / "cgroup")


def test_cgroup_v1(tmp_path: Path) -> None:
    rows = [f"{i}:{name}:/docker/abc" for i, name in enumerate(["memory", "cpu,cpuacct", "name=systemd"])]
    tree(
        tmp_path,
        {
            "proc/42/cgroup": "\n".join([*rows, "0::/docker/abc"]),
            "proc/42/net/dev": NET,
            "cgroup/cpuacct/docker/abc/cpuacct.usage": "2500000000\n",
            "cgroup/memory/docker/abc/cgroup.procs": "42\n43\n",
            "cgroup/memory/docker/abc/memory.stat": "rss 1\nshmem 1\npgfault 1\n"
            f"total_rss {20 << 20}\ntotal_shmem {10 << 20}\ntotal_cache 99999999\ntotal_pgfault 700\n",
        },
    )
    usage = cgroup_of(tmp_path).usage()
    assert {name: getattr(usage, name) for name in EXPECTED} == {**EXPECTED, "read_bytes": None}
    assert cgroup_of(tmp_path).pids() == [42, 43]


def v2(tmp_path: Path) -> Path:
    scope = "cgroup/system.slice/docker-abc.scope"
    tree(
        tmp_path,
        {
            "proc/42/cgroup": "0::/system.slice/docker-abc.scope\n",
            "proc/42/net/dev": NET,
            f"{scope}/cgroup.procs": "42\n",
            f"{scope}/cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\n",
            f"{scope}/memory.stat": f"anon {20 << 20}\nfile 99999999\nshmem {10 << 20}\npgfault 700\n",
            f"{scope}/io.stat": "8:0 rbytes=4096 wbytes=7 rios=1 wios=1\n9:0 rbytes=1024 wbytes=0\n",
        },
    )
    return tmp_path / scope


def test_cgroup_v2(tmp_path: Path) -> None:
    v2(tmp_path)
    usage = cgroup_of(tmp_path).usage()
    assert {name: getattr(usage, name) for name in EXPECTED} == EXPECTED


def test_without_the_io_controller_bytes_read_are_unknown(tmp_path: Path) -> None:
    (v2(tmp_path) / "io.stat").unlink()
    assert cgroup_of(tmp_path).usage().read_bytes is None


def test_bytes_read_of_a_process(tmp_path: Path) -> None:
    tree(tmp_path, {"42/io": "rchar: 7\nread_bytes: 4096\ncancelled_write_bytes: 1\n"})
    assert disk_bytes(42, tmp_path) == 4096


def test_a_process_of_another_machine_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cgroup"):
        cgroup_of(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_process_that_has_only_the_number_is_not_sampled() -> None:
    with pytest.raises(ProcessLookupError):
        Sampler(os.getpid(), time.time() + 1000)


# At 10 s: 1 s of CPU; at 12 s: 3 s; then idle. Memory peaks at 12 s.
SAMPLES = [
    Usage(10.0, 1.0, 0, None, 100, 50),
    Usage(12.0, 3.0, 1000, None, 300, 900),
    Usage(14.0, 3.0, 1000, None, 300, 60),
    Usage(16.0, 3.0, 1000, None, 300, 70),
]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (10.0, 12.0, (2.0, 1000, None, 200, 900)),
        (10.5, 11.0, (0.5, 250, None, 50, 900)),  # between two samples: their share
        (11.0, 13.0, (1.0, 500, None, 100, 900)),
        (14.0, 16.0, (0.0, 0, None, 0, 70)),
    ],
)
def test_use_of_a_phase(start: float, end: float, expected: tuple[float | None, ...]) -> None:
    names = ("cpu_seconds", "read_bytes", "net_bytes", "page_faults", "peak_memory_bytes")
    assert used(SAMPLES, start, end) == Resources.model_validate(dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize(("start", "end"), [(12.0, 12.0), (1.0, 9.0), (17.0, 18.0)])
def test_a_moment_and_an_unsampled_phase_have_no_use(start: float, end: float) -> None:
    assert used(SAMPLES, start, end) is None


def test_phases_one_after_the_other_share_the_counters_without_gap_or_overlap() -> None:
    edges = [10.0, 10.3, 11.9, 12.5, 16.0]
    parts = [used(SAMPLES, a, b) for a, b in pairwise(edges)]
    assert sum(part.cpu_seconds or 0 for part in parts if part) == pytest.approx(2.0)
    assert sum(part.read_bytes or 0 for part in parts if part) == 1000


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_process_tells_when_it_started() -> None:
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        after = time.time()
        while "input()" not in (process := read_process(child.pid)).command:  # forked, not yet executed
            time.sleep(0.01)
        child.communicate(b"\n")
    assert process.pid > 0
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert before - 2 * tick <= process.started <= after + 2 * tick
    assert process.ended is None
