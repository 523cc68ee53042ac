"""What a container's processes use while it starts, from its cgroup (v1 or v2) and /proc, 20 times a second.

A thread of this process: its own CPU time is counted and reported.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.schema import Resources
from runtime.phases import now

INTERVAL_SECONDS = 0.05
# A process that was just forked still shows its parent's command line.
_YOUNG_SECONDS = 1.0
# The engine may be elsewhere, and a process here have the same number: it was not born with the container.
_BIRTH_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Counters of a container at a moment, since it started; None where the kernel does not tell.

    memory_bytes: anonymous and shared memory now; the page cache is not in it.
    """

    at: float
    cpu_seconds: float | None = None
    read_bytes: int | None = None
    net_bytes: int | None = None
    page_faults: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """pid: as the container counts. started is exact to 10 ms, ended (None: it still runs) to a sample."""

    pid: int
    started: float
    ended: float | None
    command: str


class Cgroup:
    """The files of one container's cgroup. Raises OSError once it is gone."""

    def __init__(self, pid: int, *, proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> None:
        """pid: a process of the container. Raises OSError when this kernel has no such process."""
        self._network = proc / str(pid) / "net/dev"
        rows = [line.split(":", 2) for line in (proc / str(pid) / "cgroup").read_text().splitlines()]
        paths = {name: path.lstrip("/") for _, names, path in rows for name in names.split(",")}
        self.v2 = "memory" not in paths
        if self.v2:
            self._cpu = self._memory = root / paths[""]
        else:
            self._cpu, self._memory = (root / name / paths[name] for name in ("cpuacct", "memory"))

    def pids(self) -> list[int]:
        """Of its processes, as this machine counts."""
        return [int(pid) for pid in (self._memory / "cgroup.procs").read_text().split()]

    def usage(self) -> Usage:
        memory = dict(line.split() for line in (self._memory / "memory.stat").read_text().splitlines())
        at = now()
        if self.v2:
            cpu = dict(line.split() for line in (self._cpu / "cpu.stat").read_text().splitlines())
            cpu_seconds, prefix, anonymous = int(cpu["usage_usec"]) / 1e6, "", "anon"
        else:
            cpu_seconds = int((self._cpu / "cpuacct.usage").read_text()) / 1e9
            prefix, anonymous = "total_", "rss"
        return Usage(
            at,
            cpu_seconds=cpu_seconds,
            read_bytes=self._read_bytes(),
            net_bytes=_received(self._network.read_text()),
            page_faults=int(memory[f"{prefix}pgfault"]),
            memory_bytes=int(memory[f"{prefix}{anonymous}"]) + int(memory[f"{prefix}shmem"]),
        )

    def _read_bytes(self) -> int | None:
        """None where the io controller is off; version 1 counts nothing on kernels of today."""
        try:
            text = (self._cpu / "io.stat").read_text() if self.v2 else None
        except FileNotFoundError:
            text = None
        if text is None:
            return None
        pairs = (word.partition("=") for word in text.split())
        return sum(int(value) for name, _, value in pairs if name == "rbytes")


def _received(net_dev: str) -> int:
    """Bytes that arrived on every interface but loopback, from /proc/PID/net/dev."""
    rows = (line.split(":", 1) for line in net_dev.splitlines() if ":" in line)
    return sum(int(counters.split()[0]) for name, counters in rows if name.strip() != "lo")


class Sampler:
    """Samples from construction to `stop`. Raises OSError when the container is not on this machine.

    pid: the container's first process, as this machine counts; started: when it did.
    """

    def __init__(self, pid: int, started: float) -> None:
        if abs(read_process(pid).started - started) > _BIRTH_SECONDS:
            raise ProcessLookupError(f"process {pid} here is not the container's")
        self._cgroup = Cgroup(pid)
        self._usages = [Usage(started, 0, 0, 0, 0, 0)]
        self._processes: dict[int, Process] = {}
        self._read_bytes: dict[int, int] = {}
        self.cpu_seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def processes(self) -> tuple[Process, ...]:
        return tuple(self._processes.values())

    def used(self, start: float, end: float) -> Resources | None:
        """What the whole container used from `start` to `end`; phases that overlap share it."""
        return used(self._usages, start, end)

    def _sample_until_stopped(self) -> None:
        with suppress(OSError, ValueError, KeyError):  # the container ended: what was sampled stands
            while True:
                usage = self._cgroup.usage()
                pids = set(self._cgroup.pids())
                self._look_at_processes(pids)
                self._usages.append(usage if usage.read_bytes is not None else self._with_reads(usage, pids))
                self.cpu_seconds = time.thread_time()
                if self._stop.wait(INTERVAL_SECONDS):
                    break

    def _with_reads(self, usage: Usage, pids: set[int]) -> Usage:
        """Bytes read as the processes' own counters tell, those of ended ones included; needs root."""
        for pid in pids:
            try:
                self._read_bytes[pid] = disk_bytes(pid)
            except PermissionError:
                return usage
            except (FileNotFoundError, ProcessLookupError):  # it ended since
                continue
        return replace(usage, read_bytes=sum(self._read_bytes.values()))

    def _look_at_processes(self, pids: set[int]) -> None:
        at = now()
        for pid in pids:
            known = self._processes.get(pid)
            if known is None or at - known.started < _YOUNG_SECONDS:
                with suppress(OSError, ValueError):  # it may end between two looks
                    self._processes[pid] = read_process(pid)
        for pid, process in self._processes.items():
            if pid not in pids and process.ended is None:
                self._processes[pid] = replace(process, ended=at)


def disk_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Bytes that a process had read from disk so far."""
    lines = (proc / str(pid) / "io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def read_process(pid: int, proc: Path = Path("/proc")) -> Process:
    folder = proc / str(pid)
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    # The name in parentheses may hold anything, so count from the last one.
    ticks = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    started = now() - since_boot + ticks / os.sysconf("SC_CLK_TCK")
    status = (folder / "status").read_text().splitlines()
    inside = next((line.split()[-1] for line in status if line.startswith("NSpid:")), str(pid))
    return Process(int(inside), started, None, command)


def used(usages: Sequence[Usage], start: float, end: float) -> Resources | None:
    """Counters are interpolated between samples. None for a moment, or where no sample reaches."""
    inside = [usage for usage in usages if start <= usage.at <= end]
    before = [usage for usage in usages if usage.at < start]
    after = [usage for usage in usages if usage.at > end]
    if end <= start or not (inside or (before and after)) or start < usages[0].at - INTERVAL_SECONDS:
        return None
    if not inside or inside[0].at > start:
        inside = [*before[-1:], *inside]
    near = inside if inside[-1].at == end else [*inside, *after[:1]]
    peaks = [usage.memory_bytes for usage in near if usage.memory_bytes is not None]
    counters: dict[str, Any] = {}
    for field in fields(Usage):
        if field.name not in ("at", "memory_bytes"):
            difference = _at(near, end, field.name) - _at(near, start, field.name)
            whole = field.name != "cpu_seconds"
            counters[field.name] = round(difference) if whole else round(difference, 4)
            if any(getattr(usage, field.name) is None for usage in near):
                counters[field.name] = None
    return Resources(**counters, peak_memory_bytes=max(peaks, default=None))


def _at(usages: Sequence[Usage], moment: float, name: str) -> float:
    previous = usages[0]
    for usage in usages:
        if usage.at >= moment:
            share = (moment - previous.at) / (usage.at - previous.at) if usage.at > previous.at else 1.0
            low, high = getattr(previous, name) or 0, getattr(usage, name) or 0
            return float(low + (high - low) * max(0.0, share))
        previous = usage
    return float(getattr(previous, name) or 0)
