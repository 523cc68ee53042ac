"""Phases out of a log of vLLM 0.32 as it was, and out of a stub's whose phases are known exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.adapters import Report, Seen, vllm_log
from benchmarks.sampler import Process
from benchmarks.schema import MeasuredPhase, Run
from builder.docker_engine import parse_timed_log
from runtime.phases import Phase, covered_seconds
from tests.unit.metronome import Metronome
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


def test_what_an_inspection_forks_is_no_import_of_its_own() -> None:
    inspection = PROCESSES[1]
    assert inspection.ended is not None
    fork = Process(19, inspection.started + 1, inspection.started + 1.1, REGISTRY)
    imports = of(read(processes=(*PROCESSES, fork)), Phase.ENGINE_IMPORT)
    assert [event.pid for event in imports if event.process == "registry"] == [18]


def test_on_cpu_compiling_is_told_by_its_warm_up() -> None:
    """Lines of a start of benchmarks/stock-default.Dockerfile, two seconds apart."""
    lines = """(APIServer pid=1) INFO non-default args: {}
(EngineCore pid=9) INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config
(EngineCore pid=9) INFO [torch_utils.py:295] Reducing Torch threads from 2 to 1 for serving.
(EngineCore pid=9) INFO [cpu_model_runner.py:87] Warming up model for the compilation...
(EngineCore pid=9) INFO [monitor.py:92] Initial profiling/warmup run took 2.00 s
(EngineCore pid=9) INFO [cpu_model_runner.py:91] Warming up done.
(EngineCore pid=9) INFO [kv_cache_utils.py:2327] CPU KV cache size: 93,184 tokens"""
    log = [(2.0 * number, line) for number, line in enumerate(lines.splitlines(), start=1)]
    report = vllm_log.read(Seen({}, 0.0, 0.0, 15.0, None, log, ()))
    assert [(event.start, event.end) for event in of(report, Phase.COMPILE)] == [(6.0, 10.0), (10.0, 12.0)]
    assert [(event.start, event.end) for event in of(report, Phase.KV_CACHE_ALLOC)] == [(12.0, 14.0)]


# Accuracy: sleeps that are known, and what the stub says of them by its own clock.

SLEEPS = {"vllm_log": True, "startup": "missing", "ready_after": None}
REPORTS = {"ready_after": 0.3}


@pytest.mark.parametrize("plan", [SLEEPS, REPORTS], ids=["by its log", "by its report"])
def test_every_phase_of_every_start_is_within_20_ms(plan: dict[str, Any]) -> None:
    """Beyond that only what a thread that merely sleeps, in either process, saw the machine stall."""
    for _ in range(3):
        run, recorded, stalled = _known_start(plan)
        assert len(recorded) == (11 if plan is SLEEPS else 5)
        for name, process, begin, end in recorded:
            (event,) = (e for e in run.phases if (e.phase, e.process) == (name, process))
            assert event.end == pytest.approx(end, abs=0.020 + stalled), (name, process)
            if begin and (name, process) != ("engine_import", "APIServer"):  # it begins with the process
                assert event.start == pytest.approx(begin, abs=0.020 + stalled), (name, process)
        assert run.total_seconds is not None
        assert run.wall_seconds == pytest.approx(run.total_seconds, abs=0.020 + stalled)


def _known_start(plan: dict[str, Any]) -> tuple[Run, list[tuple[str, str, float, float]], float]:
    """A start of the stub, what the stub recorded of it, and how many seconds the machine stalled at most."""
    logs: list[str] = []
    mine = Metronome()

    class Logging(StubContainer):
        def started_at(self) -> float:
            return next(end for name, _, _, end in _recorded(self.logs()) if name == "container_start")

        def remove(self) -> None:
            logs.append(self.logs())
            super().remove()

    (run,) = bench(StubHost(Logging, stub={**plan, "record": True, "token_seconds": 0.06}), "stub").runs
    assert run.ok
    assert run.adapter == ("vllm_log" if plan is SLEEPS else "coldstart")
    recorded = _recorded(logs[0])
    theirs = next(end for name, _, _, end in recorded if name == "stalled")
    return run, [entry for entry in recorded if entry[0] != "stalled"], max(mine.worst, theirs)


def _recorded(log: str) -> list[tuple[str, str, float, float]]:
    lines = [line.removeprefix("recorded:") for line in log.splitlines() if line.startswith("recorded:")]
    return [tuple(json.loads(line)) for line in lines]


def test_an_error_of_30_ms_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: this is the error that it looks for."""
    late = vllm_log._Known.stretch

    def stretch(self: Any, phase: Phase, start: float, end: float, detail: str = "") -> MeasuredPhase:
        return late(self, phase, start, end + 0.03, detail)

    monkeypatch.setattr(vllm_log._Known, "stretch", stretch)
    run, recorded, _ = _known_start(SLEEPS)
    ends = {(event.phase, event.process): event.end for event in run.phases}
    errors = [abs(ends[Phase(name), process] - end) for name, process, _, end in recorded]
    assert max(errors) > 0.02
