"""What `coldstart bench` measures of real containers, a real engine and a real registry."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import docker
import pytest

from benchmarks import client, page_cache
from benchmarks.docker_host import DockerHost
from benchmarks.harness import Conditions, run_benchmark
from benchmarks.layout import waterfall
from benchmarks.schema import BenchResult, MeasuredPhase, Run, State
from builder.docker_engine import Container, DockerEngine
from builder.errors import InputError
from builder.render import ContextFile, Rendered
from builder.report import SilentReporter
from runtime.phases import Phase
from tests.image.conftest import PREFIX, coldstart
from tests.unit.metronome import Metronome

ROOT = Path(__file__).parents[2]
NO_LABEL = "dev.coldstart.test=none"  # nothing to tell apart


@pytest.fixture(scope="module")
def stock(plain: Any, engine: DockerEngine) -> Iterator[str]:
    """vLLM's own server on the weights of `plain`, as the committed suite builds it."""
    tag = f"{PREFIX}/smollm2:stock"
    text = (ROOT / "benchmarks/stock.Dockerfile").read_text()
    text = text.replace("ARG WEIGHTS", f"ARG WEIGHTS={plain['weights_image']}")
    engine.build(Rendered(text, ()), tag, label=NO_LABEL, platform=None, reporter=SilentReporter())
    yield tag
    engine.remove_image(tag)


@pytest.fixture(scope="module")
def measured(stock: str, plain: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchResult, float]:
    """One start of each, with a new compile cache; and the seconds that all of it took by our own clock."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    before = _volumes()
    began = time.monotonic()
    done = coldstart(
        *("bench", stock, plain["tag"], "--runs", "1", "--compile-cache", "cold", "--json", str(path))
    )
    took = time.monotonic() - began
    assert done.code == 0, done.out + done.err
    assert _volumes() <= before
    return BenchResult.model_validate_json(path.read_text()), took


def _volumes() -> set[str]:
    found = docker.from_env().volumes.list(filters={"label": "dev.coldstart.tool=cli"})
    return {volume.name for volume in found}


def of(run: Run, phase: Phase) -> list[Any]:
    return [event for event in run.phases if event.phase == phase]


def test_at_most_5_percent_of_a_start_are_unattributed(measured: tuple[BenchResult, float]) -> None:
    for run in measured[0].runs:
        assert run.total_seconds is not None
        assert run.unattributed_seconds is not None
        assert run.unattributed_seconds <= 0.05 * run.total_seconds, run
    assert sum(run.total_seconds or 0 for run in measured[0].runs) <= measured[1]


def test_the_critical_path_and_what_is_unattributed_take_as_long_as_a_stopwatch_says(
    measured: tuple[BenchResult, float],
) -> None:
    """Phases are moments of the clocks of container, engine and client; the stopwatch is none of these."""
    for run in measured[0].runs:
        path = sum(segment.seconds for segment in waterfall(run).path if segment.bar)
        assert run.unattributed_seconds is not None
        assert path + run.unattributed_seconds == pytest.approx(run.wall_seconds, rel=0.02), run


def test_what_an_optimisation_saves_is_measured_by_leaving_it_out(plain: Any, tmp_path: Path) -> None:
    path, page = tmp_path / "a.json", tmp_path / "a.html"
    done = coldstart(
        *("bench", "ablate", plain["tag"], "--only", "template", "--runs", "1"),
        *("--json", str(path), "--html", str(page)),
    )
    assert done.code == 0, done.out + done.err
    result = BenchResult.model_validate_json(path.read_text())
    assert [image.off for image in result.images] == [(), ("template",)]
    whole, without = ({event.process for event in of(run, Phase.ENGINE_IMPORT)} for run in result.runs)
    assert (whole, without) == ({"template"}, {"api", "EngineCore"})
    assert "What each optimisation saves" in done.out
    assert "What each optimisation saves" in page.read_text()
    unknown = coldstart("bench", "ablate", plain["tag"], "--only", "temlpate")
    assert unknown.code == 2
    assert "read-ahead" in unknown.err  # what there is


def test_stock_vllm_imports_three_times_and_ours_once(measured: tuple[BenchResult, float]) -> None:
    stock, ours = measured[0].runs
    assert (stock.adapter, stock.phases_from) == ("vllm_log", "log")
    assert (ours.adapter, ours.phases_from) == ("coldstart", "runtime")
    imports = sorted(of(stock, Phase.ENGINE_IMPORT), key=lambda event: event.start)
    assert [event.process for event in imports] == ["APIServer", "registry", "EngineCore"]
    assert len({event.pid for event in imports}) == 3
    assert all(before.start < after.start for before, after in pairwise(imports))
    steps = of(ours, Phase.ENGINE_IMPORT)  # for all processes, and then for the engine core
    assert [(event.process, event.pid) for event in steps] == [("template", steps[0].pid)] * 2
    assert {Phase.WEIGHT_LOAD, Phase.KV_CACHE_ALLOC, Phase.TOKENIZER_INIT} <= {e.phase for e in stock.phases}


def test_each_phase_says_what_it_used(measured: tuple[BenchResult, float]) -> None:
    stock, ours = measured[0].runs
    assert stock.warnings == ()
    assert [("recording" in warning) for warning in ours.warnings] == [True]  # for the cold compile cache
    for run in measured[0].runs:
        assert run.sampler_cpu_seconds is not None
        imports, load = of(run, Phase.ENGINE_IMPORT)[0].resources, of(run, Phase.WEIGHT_LOAD)[-1].resources
        assert imports.cpu_seconds > 1  # seconds of CPU: what it computes, however slow the machine
        assert imports.page_faults > 10_000
        assert load.peak_memory_bytes > 100 << 20
        assert imports.read_bytes is not None


@pytest.fixture
def tiny(engine: DockerEngine, registry: str) -> Iterator[str]:
    """An image that serves nothing, in a registry."""
    tag = f"{registry}/{PREFIX}/nothing:1"
    text = f"FROM scratch\nLABEL {NO_LABEL}\nCOPY file /file\n"
    rendered = Rendered(text, (_noise(1 << 20),))
    engine.build(rendered, tag, label=NO_LABEL, platform=None, reporter=SilentReporter())
    yield tag
    engine.remove_image(tag)


def bench_pull(host: DockerHost, image: str, timeout: float = 600) -> tuple[Run, list[str]]:
    """The run, and what was told on the way."""
    notes: list[str] = []

    class Notes(SilentReporter):
        def note(self, text: str) -> None:
            notes.append(text)

    result = run_benchmark(
        *(host, [image], 1),
        reporter=Notes(),
        save=lambda _: None,
        conditions=Conditions(pull=True),
        timeout=timeout,
    )
    (run,) = result.runs
    return run, notes


def test_a_pull_is_timed_and_an_unconfirmed_image_is_kept(tiny: str, engine: DockerEngine) -> None:
    with pytest.raises(InputError, match="never pushed"):
        bench_pull(DockerHost(engine), tiny)
    engine.push(tiny, SilentReporter())
    before = engine.require_image(tiny).id
    run, _ = bench_pull(DockerHost(engine), tiny)
    assert run.state == State(pulled=True)
    assert [event.phase for event in run.phases][:2] == [Phase.IMAGE_PULL, Phase.IMAGE_UNPACK]
    assert "cannot start" in run.error  # it has no command
    assert engine.require_image(tiny).id == before


@contextmanager
def proxy(port: int, registry: str, rate: float) -> Iterator[subprocess.Popen[str]]:
    """The registry at another port of 127.0.0.1, at `rate` MB/s; 0: as fast as it goes."""
    command = [sys.executable, "-m", "benchmarks.throttle", f"127.0.0.1:{port}", registry, str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def behind_proxy(engine: DockerEngine, registry: str) -> Iterator[tuple[str, int]]:
    """An image of 4 MB in a registry, by the address of a proxy that is not there now; and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tag = f"127.0.0.1:{port}/{PREFIX}/nothing:1"
    rendered = Rendered(f"FROM scratch\nLABEL {NO_LABEL}\nCOPY file /file\n", (_noise(4 << 20),))
    engine.build(rendered, tag, label=NO_LABEL, platform=None, reporter=SilentReporter())
    with proxy(port, registry, 0):
        engine.push(tag, SilentReporter())
    yield tag, port
    engine.remove_image(tag)


def _noise(size: int) -> ContextFile:
    return ContextFile("file", os.urandom(size))


def test_a_slow_registry_ends_at_the_timeout_and_leaves_a_way_back(
    behind_proxy: tuple[str, int], registry: str, engine: DockerEngine
) -> None:
    tag, port = behind_proxy
    with proxy(port, registry, 0.2):
        run, notes = bench_pull(DockerHost(engine), tag, timeout=4)
        assert "It was not pulled within 4 s." in run.error
    assert [event.phase for event in run.phases] == [Phase.IMAGE_PULL]
    assert engine.image(tag) is None
    (way_back,) = (note for note in notes if "docker pull" in note)
    with proxy(port, registry, 0):
        subprocess.run(["sh", "-c", way_back.partition("get it back: ")[2]], check=True)
    assert engine.image(tag) is not None


def test_a_registry_that_fails_is_a_failed_run(
    behind_proxy: tuple[str, int], registry: str, engine: DockerEngine
) -> None:
    tag, port = behind_proxy
    with proxy(port, registry, 0) as process:

        class Leaves(DockerHost):
            def registry_digest(self, reference: str) -> str:
                found = super().registry_digest(reference)
                process.kill()
                process.wait()
                return found

        run, notes = bench_pull(Leaves(engine), tag)
    assert not run.ok
    assert "cannot pull" in run.error
    assert "refused" in run.error
    assert "docker pull" in notes[0]


_BEHAVIOUR = """
import http.server, os, signal, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if how == "hangs":
            time.sleep(600)
        body = b"<html>" if how == "garbage" else b"{}"
        self.send_response(200 if how == "garbage" else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

how = os.environ["HOW"]
if how != "hangs":  # the kernel drops it for a PID 1 without a handler, and bench waits for its deadline
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
if how == "dies":
    print("no such device")
    sys.exit(7)
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def bad_server(engine: DockerEngine, base: str) -> Iterator[str]:
    tag = f"{PREFIX}/bad:1"
    text = f'FROM {base}\nCOPY bad.py /bad.py\nEXPOSE 8000\nENTRYPOINT ["python3", "-u", "/bad.py"]\n'
    rendered = Rendered(text, (ContextFile("bad.py", _BEHAVIOUR.encode()),))
    engine.build(rendered, tag, label=NO_LABEL, platform=None, reporter=SilentReporter())
    yield tag
    engine.remove_image(tag)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("dies", "exited with code 7"),
        ("hangs", "not ready within 6 s"),
        ("never", "GET /v1/models answered 503"),
        ("garbage", "without a model list"),
    ],
)
def test_a_container_that_does_not_serve_is_told_and_gone(
    how: str, told: str, bad_server: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    before = _every_volume()
    done = coldstart(
        "bench", bad_server, "--runs", "1", "--env", f"HOW={how}", "--timeout", "6", "--json", str(path)
    )
    assert done.code == 6, done.out + done.err
    (run,) = BenchResult.model_validate_json(path.read_text()).runs
    assert not run.ok
    assert told in run.error
    assert how != "dies" or "no such device" in run.log_tail
    assert docker.from_env().containers.list(all=True, filters={"ancestor": bad_server}) == []
    assert _every_volume() == before


def _every_volume() -> set[str]:
    """Anonymous ones too."""
    return {volume.name for volume in docker.from_env().volumes.list()}


# Accuracy: a real container, engine, log and sampler around a server whose phases are sleeps.

_PLAN = {"address": ["0.0.0.0", 8000], "startup": "missing", "vllm_log": True, "stamps": False}
_PLAN |= {"ready_after": None, "record": True, "token_seconds": 0.06}
_TOLERANCE_SECONDS = 0.020


@pytest.fixture(scope="module")
def known_server(engine: DockerEngine, base: str) -> Iterator[str]:
    """The stub of bench's unit tests, which logs as vLLM does and knows what it slept."""
    tag = f"{PREFIX}/known:1"
    command = ["python3", "-S", "/stub/bench_stub_server.py", json.dumps(_PLAN)]
    text = (
        f"FROM {base}\nCOPY bench_stub_server.py metronome.py /stub/\nEXPOSE 8000\n"
        f"ENTRYPOINT {json.dumps(command)}\n"
    )
    names = ("bench_stub_server.py", "metronome.py")
    files = tuple(ContextFile(name, (ROOT / "tests/unit" / name).read_bytes()) for name in names)
    engine.build(Rendered(text, files), tag, label=NO_LABEL, platform=None, reporter=SilentReporter())
    yield tag
    engine.remove_image(tag)


class _Asking(DockerHost):
    """Knows which container it started last. As a watcher asks that for what it recorded of its start."""

    follows_log = False

    def __init__(self, engine: DockerEngine) -> None:
        super().__init__(engine)
        self.recorded: list[list[tuple[str, str, float, float]]] = []
        self._last: Container | None = None

    def start(self, image: str, **options: Any) -> Container:
        self._last = super().start(image, **options)
        return self._last

    def begin(self, image: str) -> None: ...

    def poll(self, phase: Phase | None) -> None: ...

    def follow(self, phases: Sequence[MeasuredPhase]) -> None: ...

    def answered(self) -> None:
        assert self._last is not None
        self.recorded.append(json.loads(client.get(self._last.host_port(), "/recorded", 5.0).body))

    def end(self, run: Run) -> None: ...


def test_every_phase_of_a_real_container_is_within_20_ms_of_what_its_server_recorded(
    known_server: str, engine: DockerEngine
) -> None:
    """By the stamps of Docker's log. Beyond that only what a thread that merely sleeps saw the machine stall.

    When a process began, only the kernel knows; the server's first look at the clock comes after that.
    """
    host, mine = _Asking(engine), Metronome()
    result = run_benchmark(
        *(host, [known_server], 3), reporter=SilentReporter(), save=lambda _: None, watcher=host, timeout=60
    )
    errors = []
    for run, recorded in zip(result.runs, host.recorded, strict=True):
        assert run.ok, run.error
        assert run.warnings == ()
        assert run.sampler_cpu_seconds is not None
        assert (run.adapter, run.phases_from) == ("vllm_log", "log")
        theirs = {(name, process): (begin, end) for name, process, begin, end in recorded}
        stalled = max(mine.worst, theirs.pop(("stalled", "machine"))[1])
        within = _TOLERANCE_SECONDS + stalled
        first_look = theirs.pop(("container_start", "client"))[1]
        (born,) = of(run, Phase.CONTAINER_START)
        assert run.created_at == born.start < born.end < first_look + within
        assert len(theirs) == 10
        for (name, process), (begin, end) in theirs.items():
            (event,) = (e for e in run.phases if (e.phase, e.process) == (name, process))
            assert event.end == pytest.approx(end, abs=within), (name, process)
            if (name, process) != ("engine_import", "APIServer"):  # it begins with the process
                assert event.start == pytest.approx(begin, abs=within), (name, process)
            errors.append(abs(event.end - end))
        assert run.wall_seconds == pytest.approx(run.total_seconds, abs=within)
    print(f"the ends of phases are {max(errors):.4f} s off at most; the machine stalled {mine.worst:.4f} s")


def test_the_page_cache_of_an_image_is_found_and_controlled(tiny: str, engine: DockerEngine) -> None:
    folders = engine.layer_folders(tiny)
    assert page_cache.bring(folders, "warm").total == (1 << 20) // 4096
    assert page_cache.bring(folders, "cold").resident == 0
