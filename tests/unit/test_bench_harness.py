"""The harness against a real HTTP server process on loopback, started as a container would be."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks import client, harness
from benchmarks.harness import Conditions, describe_machine, interleave, run_benchmark
from benchmarks.schema import BenchResult, ImageFacts, MeasuredPhase, Run
from builder.errors import HostError, InputError
from builder.report import SilentReporter
from runtime.phases import Phase

STUB = Path(__file__).with_name("bench_stub_server.py")
REPORTED_SECONDS = {Phase.SERVER_BIND: 0.02, Phase.ENGINE_IMPORT: 0.05, Phase.WEIGHT_LOAD: 0.04}


class StubContainer:
    """A subprocess with the life of a container: it can die, be stopped, and must be removed."""

    def __init__(self, name: str, plan: dict[str, Any]) -> None:
        self.id = name
        self.created_at = time.time()
        self.removed = 0
        command = [sys.executable, "-S", str(STUB), json.dumps(plan)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stderr = self._process.stderr
        self._lines: list[tuple[float, str]] = []
        self._port = int(self._process.stdout.readline())
        # As a container engine does it: a line is stamped when it arrives.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stderr:
            text, at = line.decode().rstrip("\n"), time.time()
            if text.startswith("@"):  # it has a stamp already
                stamp, text = text[1:].split(" ", 1)
                at = float(stamp)
            self._lines.append((at, text))

    def pid(self) -> int:
        return self._process.pid

    def started_at(self) -> float:
        return self.created_at

    def host_port(self) -> int:
        return self._port

    def running(self) -> bool:
        return self._process.poll() is None

    def exit_code(self) -> int | None:
        return self._process.poll()

    def logs(self) -> str:
        if not self.running():
            self._reader.join()
        return "\n".join(line for _, line in self._lines)

    def timed_logs(self) -> list[tuple[float, str]]:
        return list(self._lines)

    def stop(self, timeout: int) -> int:
        self._process.terminate()
        return self._process.wait(timeout)

    def remove(self) -> None:
        self.removed += 1
        self._process.kill()
        self._process.wait()
        self._reader.join()


NewContainer = Callable[[str, dict[str, Any]], StubContainer]


class StubVolume:
    def __init__(self, number: int, stays_empty: bool) -> None:
        self.name, self.folder = f"volume-{number}", Path("/nowhere")
        self.stays_empty = stays_empty
        self.removed = 0

    def empty(self) -> bool:
        return self.stays_empty

    def remove(self) -> None:
        self.removed += 1


class StubHost:
    """Images are plans of the stub server, by name; the id of image NAME is id-NAME."""

    def __init__(self, new: NewContainer = StubContainer, **plans: dict[str, Any]) -> None:
        self.new = new
        self.plans = plans
        self.containers: list[StubContainer] = []
        self.started: list[tuple[Mapping[str, str], Mapping[str, str]]] = []
        self.volumes: list[StubVolume] = []
        self.volumes_stay_empty = False
        self.folders: list[Path] = []

    def image_facts(self, image: str) -> ImageFacts:
        if image.partition(" ")[0] not in self.plans:
            raise InputError(f"There is no image {image}.", fix="Build it.")
        name, *arguments = image.split()
        labels = {"org.opencontainers.image.title": image}
        return ImageFacts(image, f"id-{name}", 1000, labels, arguments=tuple(arguments))

    def start(
        self,
        image: str,
        *,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        volumes: Mapping[str, str],
    ) -> StubContainer:
        self.started.append((environment, volumes))
        container = self.new(image, self.plans[image.removeprefix("id-")])
        self.containers.append(container)
        return container

    def image_folders(self, image: str) -> list[Path]:
        return self.folders

    def new_volume(self, image: str) -> StubVolume:
        self.volumes.append(StubVolume(len(self.volumes), self.volumes_stay_empty))
        return self.volumes[-1]

    def registry_digest(self, reference: str) -> str:
        raise NotImplementedError

    def remove_image(self, reference: str) -> None:
        raise NotImplementedError

    def pull(self, digest: str, tag: str, patience: float) -> Iterator[Mapping[str, Any]]:
        raise NotImplementedError


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def bench(host: StubHost, *images: str, runs: int = 1, **options: Any) -> BenchResult:
    defaults: dict[str, Any] = {"reporter": SilentReporter(), "save": lambda _: None, "timeout": 20.0}
    options = {**defaults, "conditions": Conditions(sample=False), **options}
    result = run_benchmark(host, images, runs, **options)
    assert [c.removed for c in host.containers] == [1] * len(host.containers)
    return result


def only_run(host: StubHost, **options: Any) -> Run:
    (run,) = bench(host, *host.plans, **options).runs
    return run


def seconds_by_phase(run: Run) -> dict[Phase, float]:
    return {event.phase: event.seconds for event in run.phases}


# One start


@pytest.fixture(scope="module")
def good() -> tuple[Run, str]:
    """A run of an image like ours, and what the server logged."""
    logs: list[str] = []

    class Logging(StubContainer):
        def remove(self) -> None:
            logs.append(self.logs())
            super().remove()

    return only_run(StubHost(Logging, ours={})), logs[0]


def test_a_start_is_measured_to_the_first_token(good: tuple[Run, str]) -> None:
    run, _ = good
    assert run.ok
    assert run.error == run.log_tail == ""
    assert run.ready_seconds is not None
    assert run.total_seconds is not None
    assert 0.1 <= run.ready_seconds <= run.total_seconds


def test_reported_phases_are_kept_as_they_were_reported(good: tuple[Run, str]) -> None:
    run, _ = good
    found = seconds_by_phase(run)
    assert run.phases_from == "runtime"
    assert {phase: found[phase] for phase in REPORTED_SECONDS} == pytest.approx(REPORTED_SECONDS, abs=1e-5)


def test_the_client_adds_what_only_it_sees(good: tuple[Run, str]) -> None:
    run, _ = good
    start, *_, ready, first_token = run.phases
    assert [e.phase for e in (start, ready, first_token)] == [
        Phase.CONTAINER_START,
        Phase.READY,
        Phase.FIRST_TOKEN,
    ]
    assert {e.process for e in (start, ready, first_token)} == {"client"}
    assert start.start == run.created_at < start.end
    assert start.end == pytest.approx(next(e.start for e in run.phases if e.phase == Phase.SERVER_BIND))
    assert ready.start == ready.end == first_token.start <= first_token.end == pytest.approx(run.end)


def test_what_no_phase_covers_is_unattributed(good: tuple[Run, str]) -> None:
    run, _ = good
    assert run.total_seconds is not None
    found = seconds_by_phase(run)
    # The stub's phases overlap: together they cover 0.09 s from the start of the process.
    explained = found[Phase.CONTAINER_START] + 0.09 + found[Phase.FIRST_TOKEN]
    assert run.unattributed_seconds is not None
    assert 0 < run.unattributed_seconds == pytest.approx(run.total_seconds - explained, abs=1e-5)


def test_the_answer_and_the_stop_are_kept(good: tuple[Run, str]) -> None:
    run, _ = good
    assert run.answer == " Paris."
    assert run.exit_code == 0
    assert run.stop_seconds is not None
    assert run.warnings == ()


def test_the_request_is_greedy_fixed_and_names_the_served_model(good: tuple[Run, str]) -> None:
    _, log = good
    assert json.loads(log.split("asked:")[1]) == {
        "model": "stub",
        "prompt": "The capital of France is",
        "max_tokens": 16,
        "temperature": 0,
        "stream": True,
    }


def test_an_image_without_startup_has_only_the_clients_view() -> None:
    run = only_run(StubHost(stock={"startup": "missing"}))
    assert run.ok
    assert run.phases_from == "client"
    assert [event.phase for event in run.phases] == [Phase.READY, Phase.FIRST_TOKEN]
    assert run.unattributed_seconds == pytest.approx(run.ready_seconds)
    assert run.warnings == ()


@pytest.mark.parametrize(
    "garbage",
    [
        "<html>",
        '{"schema": 2, "started": 1, "phases": []}',
        '{"schema": 1, "started": 1, "phases": [{"phase": "coffee"}]}',
        '{"schema": 1, "started": NaN, "phases": []}',
    ],
)
def test_a_startup_that_is_no_report_is_ignored_with_a_warning(garbage: str) -> None:
    run = only_run(StubHost(odd={"startup": garbage}))
    assert run.ok
    assert run.phases_from == "client"
    assert run.warnings == ("GET /startup answered 200, not a start-up report",)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_phases_from_another_clock_are_not_mixed_in(shift: float) -> None:
    run = only_run(StubHost(adrift={"started_shift": shift}))
    assert run.ok
    assert run.phases_from == "client"
    assert "clock" in run.warnings[0]


def test_an_unclean_exit_is_a_warning_and_the_measurement_stands() -> None:
    run = only_run(StubHost(rude={"exit_code": 7}))
    assert run.ok
    assert run.exit_code == 7
    assert run.warnings == ("exit code 7 after SIGTERM",)


# Failures


def test_a_server_that_dies_is_kept_as_failed_with_its_exit_code() -> None:
    run = only_run(StubHost(dies={"ready_after": None, "die_after": 0.05}))
    assert not run.ok
    assert run.total_seconds is run.unattributed_seconds is None
    assert "exited with code 3" in run.error
    assert run.exit_code == 3


def test_a_server_that_dies_while_it_answers_leaves_its_log_without_terminal_codes() -> None:
    run = only_run(StubHost(dies={"die_in_answer": True}))
    assert not run.ok
    assert "exited with code 9" in run.error
    assert run.ready_seconds is not None
    assert run.log_tail.endswith("out of memory here")


def test_a_server_that_never_gets_ready_is_stopped_and_its_finished_phases_are_kept() -> None:
    run = only_run(StubHost(slow={"ready_after": None}), timeout=1.5)
    assert not run.ok
    assert "not ready within 1.5 s" in run.error
    assert "GET /v1/models answered 503" in run.error
    assert run.exit_code == 0
    assert run.phases_from == "runtime"
    assert Phase.FIRST_TOKEN not in seconds_by_phase(run)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"models": "hello"}, "without a model list"),
        ({"models": '{"data": []}'}, "without a model list"),
        ({"models_status": 401, "ready_after": None}, "wants an API key"),
        ({"completion_status": 404}, "it answered 404: 'no such thing'"),
        ({"stream": "garbage\n"}, "ended early"),
        ({"stream": "data: garbage\n\n"}, "the stream holds 'garbage'"),
        ({"stream": 'data: {"error": {"message": "boom"}}\n\n'}, "boom"),
        ({"stream": "data: [DONE]\n\n"}, "without a token"),
        ({"stream": 'data: {"choices": [{"text": "a"}]}\n\n'}, "ended early"),
    ],
)
def test_an_answer_that_is_none_fails_the_run_with_the_reason(plan: dict[str, Any], reason: str) -> None:
    run = only_run(StubHost(garbage=plan))
    assert not run.ok
    assert reason in run.error


def test_an_endless_answer_ends() -> None:
    run = only_run(StubHost(endless={"stream": "x" * 1024, "stream_times": 2048}))
    assert "more than 1048576 bytes" in run.error


def test_a_container_that_cannot_start_is_a_failed_run_and_the_others_go_on() -> None:
    class NoStart(StubHost):
        def start(self, image: str, **options: Any) -> StubContainer:
            if image == "id-broken":
                raise HostError("no space left", fix="Free some.")
            return super().start(image, **options)

    result = bench(NoStart(broken={}, fine={}), "broken", "fine")
    assert [run.ok for run in result.runs] == [False, True]
    assert result.failed[0].error == "no space left. Free some."


def test_a_container_without_a_port_is_a_failed_run() -> None:
    class NoPort(StubContainer):
        def host_port(self) -> int:
            raise HostError("It publishes no port.")

    assert "publishes no port" in only_run(StubHost(NoPort, closed={})).error


def test_a_container_that_cannot_be_removed_is_told_and_its_run_kept() -> None:
    class Sticky(StubContainer):
        def remove(self) -> None:
            super().remove()
            raise HostError("Device busy.")

    notes = Notes()
    assert only_run(StubHost(Sticky, sticky={}), reporter=notes).ok
    assert any("docker rm -f id-sticky" in note for note in notes.notes)


@pytest.mark.parametrize("method", ["host_port", "running", "stop"])
def test_ctrl_c_removes_the_container_and_keeps_what_was_saved(method: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def make(name: str, plan: dict[str, Any]) -> StubContainer:
        container = StubContainer(name, plan)
        if name == "id-second":
            setattr(container, method, interrupt)
        return container

    host = StubHost(make, first={}, second={})
    saved: list[BenchResult] = []
    with pytest.raises(KeyboardInterrupt):
        bench(host, "first", "second", save=saved.append)
    assert [c.removed for c in host.containers] == [1, 1]
    assert [run.image for run in saved[-1].runs] == ["first"]


def test_a_save_that_fails_leaves_no_container() -> None:
    def full(_: BenchResult) -> None:
        raise OSError("disk full")

    host = StubHost(one={})
    with pytest.raises(OSError, match="disk full"):
        bench(host, "one", save=full)
    assert [c.removed for c in host.containers] == [1]


@pytest.mark.parametrize(
    ("images", "runs", "timeout"), [([], 1, 9.0), (["a"], 0, 9.0), (["a"], 1, 0.0), (["a", "a"], 1, 9.0)]
)
def test_arguments_that_measure_nothing_are_refused_before_anything_starts(
    images: list[str], runs: int, timeout: float
) -> None:
    host = StubHost(a={})
    with pytest.raises(InputError) as caught:
        bench(host, *images, runs=runs, timeout=timeout)
    assert caught.value.fix
    assert host.containers == []


def test_an_unknown_image_is_refused_before_anything_starts() -> None:
    host = StubHost(a={})
    with pytest.raises(InputError, match="no image b"):
        bench(host, "a", "b")
    assert host.containers == []


# Several


def test_images_take_turns() -> None:
    assert interleave("AB", 3) == [("A", 0), ("B", 0), ("B", 1), ("A", 1), ("A", 2), ("B", 2)]


def test_more_runs_follow_until_they_are_enough_in_whole_rounds() -> None:
    asked: list[int] = []

    def enough(result: BenchResult) -> bool:
        asked.append(len(result.runs))
        return len(result.runs) >= 4

    result = bench(StubHost(a={}, b={}), "a", "b", runs=1, until=0.05, max_runs=3, enough=enough)
    assert asked == [2, 4]
    assert [run.image for run in result.runs] == ["a", "b", "b", "a"]
    assert (result.runs_per_image, result.until, result.max_runs_per_image) == (1, 0.05, 3)


def test_runs_end_at_the_most_that_is_allowed() -> None:
    assert len(bench(StubHost(a={}), "a", runs=1, max_runs=2).runs) == 2


def test_fewer_runs_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(InputError, match="fewer"):
        bench(StubHost(a={}), "a", runs=3, max_runs=2)


def test_a_watcher_sees_each_run_and_the_phase_that_the_image_tells() -> None:
    seen = Watching()
    result = bench(StubHost(a={}), "a", watcher=seen)
    assert seen.all == ["a", Phase.ENGINE_IMPORT, "answered", *result.runs]


class Watching:
    """A watcher that keeps what it is told; of a log how many phases ended."""

    def __init__(self, follows_log: bool = True) -> None:
        self.follows_log = follows_log
        self.all: list[object] = []

    def begin(self, image: str) -> None:
        self.all.append(image)

    def poll(self, phase: Phase | None) -> None:
        if phase is not None and phase != self.all[-1]:
            self.all.append(phase)

    def follow(self, phases: Sequence[MeasuredPhase]) -> None:
        self.all.append(len(phases))

    def answered(self) -> None:
        self.all.append("answered")

    def end(self, run: Run) -> None:
        self.all.append(run)


class Counting(StubContainer):
    """Counts how often its log was read."""

    looks = 0

    def timed_logs(self) -> list[tuple[float, str]]:
        self.looks += 1
        return super().timed_logs()


STOCK: dict[str, Any] = {"vllm_log": True, "startup": "missing", "ready_after": None}


def refused(port: int, path: str, timeout: float) -> client.Reply:
    """As of stock vLLM, which does not listen before it is ready."""
    reply = GET(port, path, timeout)
    if reply.status == 503:
        raise ConnectionRefusedError
    return reply


GET = client.get


def watched(
    monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], **flags: bool
) -> tuple[Watching, Run, int]:
    """What was told of one start with a look each 0.1 s, and how often the log was read."""
    monkeypatch.setattr(harness, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(harness, "_LOOK_BUSY_SHARE", 1.0)
    if plan is STOCK:
        monkeypatch.setattr(client, "get", refused)
    seen, host = Watching(**flags), StubHost(Counting, a=plan)
    (run,) = bench(host, "a", watcher=seen).runs
    assert isinstance(host.containers[0], Counting)
    return seen, run, host.containers[0].looks


def test_a_watcher_follows_the_log_of_an_image_that_answers_nothing_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, run, looks = watched(monkeypatch, STOCK)
    told = [entry for entry in seen.all if isinstance(entry, int)]
    assert run.ok
    assert looks == len(told) > 2
    assert told == sorted(told)
    assert 0 < told[0] < told[-1]
    reported = [event for event in run.phases if event.process != "client"]
    assert told[-1] == len(reported)
    assert seen.all[-2:] == ["answered", run]


@pytest.mark.parametrize(
    ("plan", "flags"), [(STOCK, {"follows_log": False}), ({"ready_after": 0.5}, {})], ids=["unseen", "ours"]
)
def test_a_log_is_read_once_where_nobody_watches_or_the_image_tells_its_phase(
    monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], flags: dict[str, bool]
) -> None:
    _, run, looks = watched(monkeypatch, plan, **flags)
    assert run.ok
    assert looks == 1


def test_a_look_that_fails_leaves_the_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute(StubContainer):
        def timed_logs(self) -> list[tuple[float, str]]:
            raise HostError("no log driver")

    monkeypatch.setattr(harness, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(client, "get", refused)
    seen = Watching()
    (run,) = bench(StubHost(Mute, a=STOCK), "a", watcher=seen).runs
    assert run.ok
    assert seen.all == ["a", "answered", run]
    assert run.warnings == ("no log driver",)


@pytest.fixture(scope="module")
def pair() -> tuple[BenchResult, list[BenchResult]]:
    """Two runs of ours and of a foreign image, and everything that was saved on the way."""
    saved: list[BenchResult] = []
    host = StubHost(ours={}, stock={"startup": "missing", "ready_after": 0.2})
    return bench(host, "ours", "stock", runs=2, save=saved.append), saved


def test_runs_are_started_in_turn_and_numbered(pair: tuple[BenchResult, list[BenchResult]]) -> None:
    result, _ = pair
    assert [(r.image, r.index, r.order) for r in result.runs] == [
        ("ours", 0, 0),
        ("stock", 0, 1),
        ("stock", 1, 2),
        ("ours", 1, 3),
    ]
    starts = [run.created_at for run in result.runs]
    assert starts == sorted(starts)


def test_everything_so_far_is_saved_after_each_run(pair: tuple[BenchResult, list[BenchResult]]) -> None:
    result, saved = pair
    assert [len(s.runs) for s in saved] == [1, 2, 3, 4]
    assert saved[-1] == result


def test_the_result_file_reads_back_as_it_was(pair: tuple[BenchResult, list[BenchResult]]) -> None:
    result, _ = pair
    text = result.model_dump_json(indent=2)
    assert BenchResult.model_validate_json(text) == result
    assert json.loads(text)["runs"][0]["phases"][0]["phase"] == "container_start"


def test_a_result_file_with_an_unknown_field_is_refused(pair: tuple[BenchResult, list[BenchResult]]) -> None:
    data = json.loads(pair[0].model_dump_json())
    data["runs"][0]["phases"][0]["colour"] = "red"
    with pytest.raises(ValidationError, match="colour"):
        BenchResult.model_validate(data)


def test_a_run_is_measured_or_explained() -> None:
    with pytest.raises(ValidationError, match="has an error"):
        Run(image="a", index=0, order=0, ok=False, created_at=1.0)
    with pytest.raises(ValidationError, match="total_seconds"):
        Run(image="a", index=0, order=0, ok=True, created_at=1.0)


def test_the_machine_is_described() -> None:
    machine = describe_machine(engine_version="20.10.24")
    assert machine.cores >= 1
    assert machine.memory > 1 << 20
    assert machine.cpu_model
    assert machine.docker_engine == "20.10.24"
