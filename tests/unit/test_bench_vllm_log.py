"""Phases out of a log of vLLM 0.32 as it was, and out of a stub's whose phases are known exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.adapters import Report, Seen, vllm_log
from benchmarks.sampler import Process
from benchmarks.schema import MeasuredPhase
from builder.docker_engine import parse_timed_log
from runtime.phases import Phase, covered_seconds
from tests.unit.test_bench_harness import StubContainer, StubHost, bench

# A start of benchmarks/stock.Dockerfile: lines as the Docker API gave them, routes and the banner left out.
LOG = parse_timed_log(Path(__file__).with_name("vllm_0.32_server.log").read_text())
ENGINE_STARTED = LOG[0][0] - 7.12  # PID 1 was seen to start then
REGISTRY = "/opt/vllm/bin/python3 -m vllm.model_executor.models.registry"
PROCESSES = (
    Process(1, ENGINE_STARTED, None, "python3 -m vllm.entrypoints.openai.api_server --model /models/x"),
    Process(18, ENGINE_STARTED + 7.3, ENGINE_STARTED + 14.4, REGISTRY),
    Process(24, ENGINE_STARTED + 15.0, None, "python3 -c from multiprocessing.resource_tracker import main"),
    Process(25, ENGINE_STARTED + 15.0, None, "python3 -c from multiprocessing.spawn import spawn_main"),
)
READY = LOG[-2][0]


def read(log: list[tuple[float, str]] = LOG, processes: tuple[Process, ...] = PROCESSES) -> Report:
    seen = Seen({}, ENGINE_STARTED - 0.3, ENGINE_STARTED, READY, None, log, processes)
    assert vllm_log.recognises(seen)
    return vllm_log.read(seen)


def of(report: Report, phase: Phase) -> list[MeasuredPhase]:
    return [event for event in report.phases if event.phase == phase]


def stamp(part: str) -> float:
    return next(at for at, line in LOG if part in line)


def test_three_imports_in_three_processes_are_three_events() -> None:
    imports = sorted(of(read(), Phase.ENGINE_IMPORT), key=lambda event: event.start)
    assert [(event.process, event.pid) for event in imports] == [
        ("APIServer", 1),
        ("registry", 18),
        ("EngineCore", 25),
    ]
    assert imports[0].start == ENGINE_STARTED
    assert imports[0].end == stamp("non-default args") or imports[0].end < stamp("non-default args")
    assert imports[2].start == PROCESSES[3].started
    assert imports[2].end == stamp("Initializing a V1 LLM engine")


def test_weights_are_loaded_from_the_first_line_about_them_to_the_last() -> None:
    loads = of(read(), Phase.WEIGHT_LOAD)
    assert loads[0].start == stamp("Starting to load model")
    assert loads[-1].end == stamp("Reducing Torch threads")
    assert {event.process for event in loads} == {"EngineCore"}


def test_every_phase_of_a_start_is_found_in_order() -> None:
    first: dict[Phase, float] = {}
    for event in read().phases:
        first[event.phase] = min(event.start, first.get(event.phase, event.start))
    assert sorted(first, key=lambda phase: first[phase]) == [
        Phase.ENGINE_IMPORT,
        Phase.CONFIG_PARSE,
        Phase.TOKENIZER_INIT,
        Phase.ENGINE_INIT,
        Phase.WEIGHT_LOAD,
        Phase.KV_CACHE_ALLOC,
        Phase.GRAPH_CAPTURE,
        Phase.READY,
    ]


@pytest.mark.parametrize("processes", [PROCESSES, ()], ids=["processes seen", "remote engine"])
def test_no_second_between_start_and_ready_is_unexplained(processes: tuple[Process, ...]) -> None:
    report = read(processes=processes)
    assert report.started == ENGINE_STARTED
    assert covered_seconds(report.phases, ENGINE_STARTED, READY) == pytest.approx(READY - ENGINE_STARTED)


def test_a_line_that_is_missing_loses_no_time() -> None:
    short = [
        (at, line) for at, line in LOG if not re.search("Loading weights took|init engine|KV cache", line)
    ]
    report = read(short)
    assert covered_seconds(report.phases, ENGINE_STARTED, READY) == pytest.approx(READY - ENGINE_STARTED)


def test_a_start_that_died_keeps_the_phases_it_finished() -> None:
    seen = Seen({}, ENGINE_STARTED - 0.3, ENGINE_STARTED, None, None, LOG[:40], PROCESSES)
    found = {event.phase for event in vllm_log.read(seen).phases}
    assert Phase.WEIGHT_LOAD in found
    assert Phase.READY not in found


WORKERS = """(APIServer pid=1) INFO non-default args: {}
(APIServer pid=1) INFO Resolved architecture: LlamaForCausalLM
(EngineCore_DP0 pid=9) INFO Initializing a V1 LLM engine
(Worker_TP0 pid=20) INFO hello
(Worker_TP1 pid=21) INFO hello
(Worker_TP0 pid=20) INFO Starting to load model x...
(Worker_TP1 pid=21) INFO Starting to load model x...
(Worker_TP0 pid=20) INFO Time spent downloading weights for x: 3.0 seconds
(Worker_TP0 pid=20) INFO Loading weights took 1.0 seconds
(Worker_TP1 pid=21) INFO Loading weights took 1.0 seconds
(Worker_TP0 pid=20) INFO torch.compile took 1.0 s in total
(EngineCore_DP0 pid=9) INFO GPU KV cache size: 9 tokens
(Worker_TP0 pid=20) INFO Graph capturing finished in 1 secs, took 1 GiB
(EngineCore_DP0 pid=9) INFO init engine (profile, create kv cache, warmup model) took 1 s
(APIServer pid=1) INFO Supported tasks: ['generate']
(APIServer pid=1) INFO Starting vLLM server on http://0.0.0.0:8000"""


def test_workers_each_have_their_own_stretches_and_who_waits_has_none() -> None:
    """One line a second, from second 1; nothing was seen of the processes."""
    log = [(float(second), line) for second, line in enumerate(WORKERS.splitlines(), start=1)]
    report = vllm_log.read(Seen({}, 0.0, 0.0, 17.0, None, log, ()))
    found = {(event.phase, event.process, event.start, event.end) for event in report.phases}
    assert (Phase.MODEL_DOWNLOAD, "Worker", 6.0, 8.0) in found
    assert (Phase.WEIGHT_LOAD, "Worker", 8.0, 9.0) in found
    assert (Phase.WEIGHT_LOAD, "Worker", 7.0, 10.0) in found
    assert (Phase.COMPILE, "Worker", 9.0, 11.0) in found
    assert (Phase.KV_CACHE_ALLOC, "EngineCore", 11.0, 12.0) in found
    assert (Phase.GRAPH_CAPTURE, "Worker", 12.0, 13.0) in found
    assert (Phase.GRAPH_CAPTURE, "EngineCore", 13.0, 14.0) in found
    assert (Phase.ENGINE_INIT, "APIServer", 14.0, 15.0) in found


def test_every_phase_of_a_stub_is_within_20_ms_of_the_stubs_own_clock() -> None:
    """The stub sleeps in known phases, logs as vLLM does, and records when; two clocks are compared.

    A busy machine may wake our reader of lines late in one start or another; an error of the tool is in each.
    """
    assert min(_largest_error() for _ in range(5)) <= 0.02


def _largest_error() -> float:
    """Seconds between what bench says of a start of the stub, and what the stub itself recorded."""
    logs: list[str] = []

    class Logging(StubContainer):
        def remove(self) -> None:
            logs.append(self.logs())
            super().remove()

    plan: dict[str, Any] = {"startup": "missing", "ready_after": None, "vllm_log": True}
    (run,) = bench(StubHost(Logging, stock=plan), "stock").runs
    assert run.ok
    assert (run.adapter, run.phases_from) == ("vllm_log", "log")
    # What the phases cover and what they do not is the client's own wall time.
    assert run.total_seconds is not None
    assert run.unattributed_seconds is not None
    covered = covered_seconds(run.phases, run.created_at, run.end)
    assert covered + run.unattributed_seconds == pytest.approx(run.total_seconds, rel=1e-6)

    recorded = json.loads(logs[0].split("recorded:")[1].splitlines()[0])
    assert len(recorded) == 8
    errors: list[float] = []
    for name, process, begin, end in recorded:
        (event,) = (e for e in run.phases if (e.phase, e.process) == (name, process))
        errors.append(abs(event.end - end))
        if (name, process) != ("engine_import", "APIServer"):  # that one begins with the process
            errors.append(abs(event.start - begin))
    return max(errors)
