"""Shutdowns under load, again and again, and SIGTERM in every phase of start-up: `make soak`.

Prints one line a round, and a summary; raw figures to a JSON file. Exits 1 if anything was lost or cut short,
if clients were not told to go elsewhere while requests were still served, or if PID 1 took too much memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from typing import Any

from benchmarks import client
from benchmarks.harness import describe_machine
from benchmarks.load import Target, shut_down_under_load
from benchmarks.stats import summarize
from builder.docker_engine import Container, DockerEngine
from runtime.phases import Phase

_PORT = 8000
_READY_SECONDS = 600.0
_STOP_SECONDS = 600
_PROBE_SECONDS = 0.05
# What a stop in start-up may take.
_START_UP_STOP_SECONDS = 2.0
# What PID 1 may have had resident at its peak.
_PEAK_BYTES = 60e6
# A start that compiles, for minutes: nothing that was recorded is used.
_COMPILE_ARGUMENTS = ("--off", "recording", "--no-enforce-eager")
_COMPILE_ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "0"}
# The moments of a SIGTERM in start-up, one a round.
_PHASES = (
    *(Phase.SERVER_BIND, Phase.ENGINE_IMPORT, Phase.MODEL_DOWNLOAD, Phase.CONFIG_PARSE, Phase.TOKENIZER_INIT),
    *(Phase.ENGINE_INIT, Phase.WEIGHT_LOAD, Phase.COMPILE, Phase.KV_CACHE_ALLOC, Phase.GRAPH_CAPTURE),
    Phase.READY,
)


@contextmanager
def _started(
    engine: DockerEngine, image: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[Container]:
    container = engine.start(image, arguments=arguments, environment=environment)
    try:
        yield container
    finally:
        container.remove()


def _startup(container: Container, latencies: list[float] | None = None) -> Iterator[tuple[int, Any]]:
    """The answers of /startup until 200. latencies: gets the seconds that each took."""
    port, deadline = container.host_port(), time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        begun = time.monotonic()
        try:
            reply = client.get(port, "/startup", 10.0)
        except (OSError, HTTPException):
            reply = None
        if reply is not None:
            if latencies is not None:
                latencies.append(time.monotonic() - begun)
            yield reply.status, json.loads(reply.body)
            if reply.status == 200:
                return
        elif not container.running():
            break
        time.sleep(_PROBE_SECONDS)
    raise SystemExit(f"the container did not get ready:\n{container.logs()[-2000:]}")


def _reached(phase: Phase, body: Any) -> bool:
    """Whether `phase` runs or is over. PID 1 binds and reads settings before anybody can ask: any other phase
    is one of another process.
    """
    rows = [row for row in body["running"] + body["phases"] if row["pid"] != 1 or phase is Phase.SERVER_BIND]
    return phase.value in [row["phase"] for row in rows]


def _peak_kib(pid: int) -> int:
    """The most that a process had resident, read until it ends; 0 where it is not on this machine."""
    peak = 0
    with suppress(OSError, StopIteration):
        while True:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            # One that ended and was not collected yet has no such line.
            peak = int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
            time.sleep(_PROBE_SECONDS)
    return peak


def under_load(engine: DockerEngine, image: str) -> dict[str, Any]:
    """One start and one shutdown with streams and short requests under way."""
    latencies: list[float] = []
    with _started(engine, image, ("--drain-delay", "5", "--drain-timeout", "300")) as container:
        *_, (_, body) = _startup(container, latencies)
        bind = next(p["end"] - p["start"] for p in body["phases"] if p["phase"] == Phase.SERVER_BIND)
        model = client.model_name(client.get(container.host_port(), "/v1/models", 10.0).body)
        begun: list[float] = []
        peaks: list[int] = []
        pid1 = container.pid()

        def terminate() -> None:
            begun.append(time.monotonic())
            container.signal("SIGTERM")

        def wait() -> int:
            peaks.append(_peak_kib(pid1))
            return container.wait(_STOP_SECONDS)

        target = Target(container.address(), _PORT, model)
        tally, code = asyncio.run(shut_down_under_load(target, terminate, wait))
        return {
            "tally": tally.to_json(),
            "exit_code": code,
            "seconds": time.monotonic() - begun[0],
            "peak_memory_kib": peaks[0],
            "server_bind_seconds": bind,
            "probe_seconds": latencies,
        }


def in_start_up(engine: DockerEngine, image: str, phase: Phase) -> dict[str, Any]:
    """SIGTERM as soon as /startup shows `phase`."""
    compiles = (_COMPILE_ARGUMENTS, _COMPILE_ENVIRONMENT) if phase is Phase.COMPILE else ((), None)
    with _started(engine, image, *compiles) as container:
        for _, body in _startup(container):
            if _reached(phase, body):
                break
        else:
            raise SystemExit(f"a start of {image} had no {phase.value}")
        begun = time.monotonic()
        container.signal("SIGTERM")
        code = container.wait(_STOP_SECONDS)
        return {"phase": phase.value, "exit_code": code, "seconds": time.monotonic() - begun}


def _failed(round_: Mapping[str, Any]) -> bool:
    tally = round_["tally"]
    cut = round_["exit_code"] or tally["lost"] or tally["errors"]
    served = tally["late_streams"] and tally["closed"]
    return bool(cut) or not served or not 0 < round_["peak_memory_kib"] * 1024 < _PEAK_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("image")
    parser.add_argument("--count", type=int, default=50, help="rounds")
    parser.add_argument("--json", type=Path, required=True, help="where the raw figures go")
    options = parser.parse_args()
    engine = DockerEngine()
    rounds, starts = [], []
    for index in range(options.count):
        rounds.append(under_load(engine, options.image))
        starts.append(in_start_up(engine, options.image, _PHASES[index % len(_PHASES)]))
        tally, start = rounds[-1]["tally"], starts[-1]
        print(
            f"{index + 1}/{options.count}: exit {rounds[-1]['exit_code']} "
            f"after {rounds[-1]['seconds']:.1f} s, "
            f"{tally['streams']} streams whole ({tally['late_streams']} of them late), "
            f"{tally['errors']} ended, {len(tally['lost'])} lost, answers {tally['answers']}, "
            f"{tally['closed']} closed; PID 1 had {rounds[-1]['peak_memory_kib']} KiB; "
            f"in {start['phase']}: exit {start['exit_code']} after {start['seconds']:.2f} s",
            flush=True,
        )
    failed = [r for r in rounds if _failed(r)]
    failed_starts = [s for s in starts if s["exit_code"] or s["seconds"] > _START_UP_STOP_SECONDS]
    probes = sorted(seconds for r in rounds for seconds in r["probe_seconds"])
    summary = {
        "image": options.image,
        "machine": describe_machine(engine.version).model_dump(),
        "rounds": len(rounds),
        "failed_rounds": len(failed),
        "streams": sum(r["tally"]["streams"] for r in rounds),
        "late_streams": sum(r["tally"]["late_streams"] for r in rounds),
        "closed": sum(r["tally"]["closed"] for r in rounds),
        "answers": sum(sum(r["tally"]["answers"].values()) for r in rounds),
        "lost": sum(len(r["tally"]["lost"]) for r in rounds),
        "peak_memory_kib_max": max(r["peak_memory_kib"] for r in rounds),
        "peak_memory_kib_allowed": int(_PEAK_BYTES / 1024),
        "failed_starts": len(failed_starts),
        "start_up_stop_seconds_max": max(s["seconds"] for s in starts),
        "server_bind_seconds": asdict(summarize([r["server_bind_seconds"] for r in rounds])),
        "probe_seconds": {
            name: probes[int(share * (len(probes) - 1))] for name, share in _PERCENTILES.items()
        },
        "probes": len(probes),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"summary": summary, "rounds": rounds, "starts": starts}, indent=1))
    print(json.dumps(summary, indent=2))
    return 1 if failed or failed_starts else 0


_PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


if __name__ == "__main__":
    sys.exit(main())
