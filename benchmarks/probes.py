"""How long a probe waits for its answer while Python imports gigabytes next door, in whole starts.

A probe is what a kubelet sends: a new connection, `GET /health`, one answer. For slow ones the kernel tells
whether PID 1 was busy, waited for a core, or neither. Raw samples go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import client
from benchmarks.harness import describe_machine
from builder.docker_engine import Container, DockerEngine
from runtime.phases import now

_PORT = 8000
_PAUSE_SECONDS = 0.01
_TIMEOUT_SECONDS = 10.0
_READY_SECONDS = 600.0
# Probes go on after the hand-over, which is part of what is measured.
_AFTER_SECONDS = 2.0
_LIMIT_MILLISECONDS = 50.0
_REQUEST = b"GET /health HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n"
_PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


def _probe(address: str) -> bool:
    """False when nobody listens yet. Raises SystemExit on any other answer than 200: the start is healthy."""
    try:
        with socket.create_connection((address, _PORT), _TIMEOUT_SECONDS) as connection:
            connection.sendall(_REQUEST)
            answer = connection.recv(4096)
            while connection.recv(4096):
                pass
    except ConnectionRefusedError:
        return False
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"/health answered {answer!r}")
    return True


@dataclass(frozen=True)
class _Sample:
    """at: seconds since the Unix epoch at the begin; the rest in milliseconds, until the answer's end.

    busy: PID 1 ran; queued: it could have run and had no core; stolen: the hypervisor ran somebody else.
    """

    at: float
    taken: float
    busy: float
    queued: float
    stolen: float


class _Prober(threading.Thread):
    """pid: of PID 1, as this machine numbers it."""

    def __init__(self, address: str, pid: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[_Sample] = []
        self.over = threading.Event()
        self._address, self._pid = address, pid

    def run(self) -> None:
        while not self.over.wait(_PAUSE_SECONDS):
            before, at, begun = self._clocks(), now(), time.perf_counter()
            if _probe(self._address):
                taken = 1000 * (time.perf_counter() - begun)
                spent = [after - start for after, start in zip(self._clocks(), before, strict=True)]
                self.samples.append(_Sample(at, taken, *spent))

    def _clocks(self) -> tuple[float, float, float]:
        """Milliseconds so far: PID 1's main thread on a core, waiting for one; stolen from all cores."""
        ran, waited, _ = Path(f"/proc/{self._pid}/schedstat").read_text().split()
        stolen = Path("/proc/stat").read_text().split(maxsplit=9)[8]
        return int(ran) / 1e6, int(waited) / 1e6, 1000 * int(stolen) / os.sysconf("SC_CLK_TCK")


def _run_first() -> bool:
    """Never wait for a core: the server's time is wanted, not the client's. False if not allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False
    return True


def _startup(container: Container) -> Any:
    """The body of /startup once it is 200; asked seldom, since whoever asks is load too."""
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and container.running():
        try:
            reply = client.get(container.host_port(), "/startup", _TIMEOUT_SECONDS)
        except OSError:
            reply = None
        if reply is not None and reply.status == 200:
            return json.loads(reply.body)
        time.sleep(0.5)
    raise SystemExit(f"the container did not get ready:\n{container.logs()[-2000:]}")


def one_start(engine: DockerEngine, image: str, arguments: list[str]) -> dict[str, Any]:
    container = engine.start(image, arguments=arguments)
    try:
        prober = _Prober(container.address(), container.pid())
        prober.start()
        body = _startup(container)
        time.sleep(_AFTER_SECONDS)
        prober.over.set()
        prober.join()
    finally:
        container.remove()
    slow = [_explain(s, body) for s in prober.samples if s.taken > _LIMIT_MILLISECONDS / 2]
    samples = [[round(s.at - body["started"], 3), round(s.taken, 2)] for s in prober.samples]
    return {"ready_seconds": body["elapsed"], "slow": slow, "samples": samples}


def _explain(sample: _Sample, startup: Any) -> dict[str, Any]:
    end = sample.at + sample.taken / 1000
    found = asdict(sample) | {"at": sample.at - startup["started"]}
    phases = [p["phase"] for p in startup["phases"] if p["start"] <= end and sample.at <= p["end"]]
    return {**{name: round(value, 3) for name, value in found.items()}, "phases": phases}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("image")
    parser.add_argument("arguments", nargs="*", help="of the server")
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True, help="where the raw samples go")
    options = parser.parse_args()
    engine, first = DockerEngine(), _run_first()
    starts = [one_start(engine, options.image, options.arguments) for _ in range(options.starts)]
    taken = sorted(sample[1] for start in starts for sample in start["samples"])
    summary = {
        "image": options.image,
        "machine": describe_machine(engine.version).model_dump(),
        "client_runs_first": first,
        "starts": len(starts),
        "probes": len(taken),
        "milliseconds": {name: taken[int(share * (len(taken) - 1))] for name, share in _PERCENTILES.items()},
        "above_50_ms": sum(milliseconds > _LIMIT_MILLISECONDS for milliseconds in taken),
        "slowest": sorted((s for start in starts for s in start["slow"]), key=lambda s: -s["taken"])[:10],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"summary": summary, "starts": starts}))
    print(json.dumps(summary, indent=2))
    return 1 if summary["above_50_ms"] else 0


if __name__ == "__main__":
    sys.exit(main())
