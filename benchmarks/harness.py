"""Starts images in turn, watches each start as a client does, and keeps every raw sample.

The container engine is behind ContainerHost; the clock is the one that the runtime uses, so that events of
both can lie on one time line.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from benchmarks import client
from benchmarks.schema import BenchResult, ImageFacts, Machine, MeasuredPhase, Run, Workload
from builder.errors import ColdstartError, InputError, VerifyError
from builder.report import Reporter, Task
from runtime.phases import Phase, covered_seconds, now

__all__ = [
    "ContainerHost",
    "ImageFacts",
    "RunningContainer",
    "describe_machine",
    "interleave",
    "run_benchmark",
]

_T = TypeVar("_T")

_POLL_SECONDS = 0.02
_POLL_SECONDS_MAX = 0.1
_POLL_BUSY_SHARE = 0.2
_LIVENESS_SECONDS = 0.5  # asking the engine costs it CPU that the start needs
_REQUEST_SECONDS = 5.0
_EXIT_NOTICE_SECONDS = 1.0
_LOG_LINES = 40

# What only a client sees both ends of; a runtime that reports these too is not believed.
_CLIENT_PHASES = frozenset({Phase.CONTAINER_START, Phase.FIRST_TOKEN})

_TERMINAL_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class RunningContainer(Protocol):
    """A container that `start` created. Every method raises ColdstartError when the engine refuses."""

    @property
    def id(self) -> str: ...

    @property
    def created_at(self) -> float:
        """Seconds since the Unix epoch, just before the create call."""

    def host_port(self) -> int:
        """Where the serving port answers on 127.0.0.1."""

    def running(self) -> bool: ...

    def exit_code(self) -> int | None:
        """None while it runs."""

    def logs(self) -> str:
        """Output so far, also after the exit."""

    def stop(self, timeout: int) -> int:
        """SIGTERM, SIGKILL after `timeout` seconds; returns the exit code."""

    def remove(self) -> None:
        """Leaves no container and no anonymous volume, running or not."""


class ContainerHost(Protocol):
    def image_facts(self, image: str) -> ImageFacts:
        """Raises ColdstartError when there is no such image."""

    def start(self, image: str) -> RunningContainer:
        """Creates and starts a container of image id `image`, its serving port on 127.0.0.1 at a free port.

        Leaves nothing behind when it fails, or is interrupted, before it returns.
        """


class Watcher(Protocol):
    """Sees each run as it goes, from what the harness asks anyway. Its time is the benchmark's: be quick."""

    def begin(self, image: str) -> None: ...

    def poll(self, phase: Phase | None) -> None:
        """It is not ready; `phase` began last, where the image says so."""

    def end(self, run: Run) -> None: ...


class _NoWatcher:
    def begin(self, image: str) -> None: ...

    def poll(self, phase: Phase | None) -> None: ...

    def end(self, run: Run) -> None: ...


def run_benchmark(
    host: ContainerHost,
    images: Sequence[str],
    runs: int,
    *,
    reporter: Reporter,
    save: Callable[[BenchResult], None],
    until: float | None = None,
    max_runs: int | None = None,
    enough: Callable[[BenchResult], bool] = lambda _: False,
    watcher: Watcher | None = None,
    timeout: float = 600,
    stop_timeout: int = 40,
    workload: Workload | None = None,
    engine_version: str | None = None,
) -> BenchResult:
    """Starts each image `runs` times, in turn, and measures from the create call to the first token.

    A run that fails is kept as failed and the benchmark goes on; `save` gets all runs so far after each one.
    max_runs: of each image, where `enough`, asked after each round from `runs` on, does not end it before;
    until: what `enough` waits for, for the record.
    timeout: seconds that a run may take to its complete answer; stop_timeout: seconds from SIGTERM to
    SIGKILL; engine_version: Docker Engine's, for the record. Raises InputError for arguments that measure
    nothing, and what `host.image_facts` and `save` raise. Containers are removed whatever happens, Ctrl-C
    included.
    """
    _check(images, runs, max_runs, timeout)
    facts = [host.image_facts(image) for image in images]
    _check_distinct(facts)
    result = BenchResult(
        created=datetime.now(UTC),
        machine=describe_machine(engine_version),
        workload=workload or Workload(),
        images=tuple(facts),
        runs_per_image=runs,
        until=until,
        max_runs_per_image=max_runs,
    )
    watcher = watcher or _NoWatcher()
    bench = _Bench(host, result.workload, timeout, stop_timeout, reporter, watcher)
    slots = interleave(facts, max_runs or runs)
    with reporter.task("Benchmark", len(slots), unit="runs") as task:
        for order, (image, index) in enumerate(slots):
            if index >= runs and order % len(facts) == 0 and enough(result):
                reporter.note(f"precise enough after {index} runs of each")
                break
            watcher.begin(image.reference)
            run = bench.run(_Slot(image, index, order), task)
            watcher.end(run)
            result = result.model_copy(update={"runs": (*result.runs, run)})
            save(result)
            task.advance(1)
            reporter.note(f"run {order + 1} of {len(slots)}, {run.image}: {_outcome(run)}")
    return result


def interleave(images: Sequence[_T], runs: int) -> list[tuple[_T, int]]:
    """(image, index) in the order to run: A B, B A, A B, so that a drifting machine hits all alike."""
    rounds = (images if index % 2 == 0 else list(reversed(images)) for index in range(runs))
    return [(image, index) for index, order in enumerate(rounds) for image in order]


def describe_machine(engine_version: str | None = None) -> Machine:
    """This machine, from /proc and uname. engine_version: Docker Engine's, where the caller knows it."""
    return Machine(
        cpu_model=_cpu_model(),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        platform=f"{platform.system()} {platform.machine()}",
        docker_engine=engine_version,
    )


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    # Arm kernels print no model name.
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _check(images: Sequence[str], runs: int, max_runs: int | None, timeout: float) -> None:
    if not images:
        raise InputError("There is no image to benchmark.", fix="Name at least one image.")
    if runs < 1:
        raise InputError(f"{runs} runs measure nothing.", fix="Pass --runs 1 or more.")
    if max_runs is not None and max_runs < runs:
        raise InputError(f"At most {max_runs} runs are fewer than {runs}.", fix="Raise --max-runs.")
    if timeout <= 0:
        raise InputError(f"A timeout of {timeout} s leaves no time to start.", fix="Pass a positive number.")


def _check_distinct(facts: Sequence[ImageFacts]) -> None:
    references = [image.reference for image in facts]
    twice = next((name for name in references if references.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{twice} is named twice.",
            why="Its runs could not be told apart.",
            fix=f"To compare it with itself, give it a second tag: docker tag {twice} IMAGE:again.",
        )


def _outcome(run: Run) -> str:
    if run.total_seconds is None or not run.ok:
        return f"failed: {run.error}"
    return f"first token after {run.total_seconds:.2f} s"


@dataclass(frozen=True, slots=True)
class _Slot:
    facts: ImageFacts
    index: int
    order: int


@dataclass(slots=True)
class _Sample:
    """What a start has shown so far: filled in order, so that a failure keeps what came before it."""

    created_at: float
    ready_at: float | None = None
    first_token_at: float | None = None
    answer: str = ""
    started: float | None = None
    reported: tuple[MeasuredPhase, ...] | None = None
    exit_code: int | None = None
    stop_seconds: float | None = None
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    log_tail: str = ""

    def to_run(self, slot: _Slot) -> Run:
        events = (*self._client_events(), *(self.reported or ()))
        total = unattributed = None
        if self.first_token_at is not None and not self.error:
            total = self.first_token_at - self.created_at
            unattributed = max(0.0, total - covered_seconds(events, self.created_at, self.first_token_at))
        return Run(
            image=slot.facts.reference,
            index=slot.index,
            order=slot.order,
            ok=not self.error,
            error=self.error,
            created_at=self.created_at,
            ready_seconds=None if self.ready_at is None else self.ready_at - self.created_at,
            total_seconds=total,
            unattributed_seconds=unattributed,
            phases=tuple(sorted(events, key=lambda event: (event.start, event.end))),
            phases_from="client" if self.reported is None else "runtime",
            answer=self.answer,
            exit_code=self.exit_code,
            stop_seconds=self.stop_seconds,
            warnings=tuple(self.warnings),
            log_tail=self.log_tail,
        )

    def _client_events(self) -> Iterator[MeasuredPhase]:
        if self.started is not None:
            yield _client_event(Phase.CONTAINER_START, self.created_at, self.started)
        if self.ready_at is None:
            return
        if all(event.phase != Phase.READY for event in self.reported or ()):
            # A moment, not a stretch: it must not claim time that nothing explains.
            yield _client_event(Phase.READY, self.ready_at, self.ready_at)
        if self.first_token_at is not None:
            yield _client_event(Phase.FIRST_TOKEN, self.ready_at, self.first_token_at)


def _client_event(phase: Phase, start: float, end: float) -> MeasuredPhase:
    return MeasuredPhase(phase, start, end, process="client", pid=os.getpid())


@dataclass(frozen=True, slots=True)
class _Bench:
    host: ContainerHost
    workload: Workload
    timeout: float
    stop_timeout: int
    reporter: Reporter
    watcher: Watcher

    def run(self, slot: _Slot, task: Task) -> Run:
        task.detail(f"starting {slot.facts.reference}")
        created_at, deadline = now(), time.monotonic() + self.timeout
        try:
            container = self.host.start(slot.facts.id)
        except ColdstartError as error:
            return _Sample(created_at, error=_told(error)).to_run(slot)
        try:
            sample = _Sample(container.created_at)
            self._observe(container, sample, deadline, task)
            self._stop(container, sample)
        finally:
            self._remove(container)
        return sample.to_run(slot)

    def _observe(self, container: RunningContainer, sample: _Sample, deadline: float, task: Task) -> None:
        try:
            port = container.host_port()
        except ColdstartError as error:
            _fail(container, sample, error)
            return
        try:
            model, sample.ready_at = _wait_ready(container, port, deadline, self.timeout, task, self.watcher)
            sample.first_token_at, sample.answer = client.complete(port, model, self.workload, deadline)
        except ColdstartError as error:
            _fail(container, sample, error)
        # Asked for last, so that the question does not delay the token; also of a run that failed, because
        # the finished phases say how far it came.
        _read_startup(port, sample)

    def _stop(self, container: RunningContainer, sample: _Sample) -> None:
        try:
            if not container.running():
                sample.exit_code = container.exit_code()
                return
            began = time.monotonic()
            sample.exit_code = container.stop(self.stop_timeout)
            sample.stop_seconds = time.monotonic() - began
        except ColdstartError as error:
            sample.warnings.append(_told(error).rstrip("."))
            return
        if sample.exit_code:
            sample.warnings.append(f"exit code {sample.exit_code} after SIGTERM")

    def _remove(self, container: RunningContainer) -> None:
        try:
            container.remove()
        except ColdstartError as error:
            # The measurement stands; the user must hear what is left.
            self.reporter.note(
                f"container {container.id} is left: {_told(error)} Remove it: docker rm -f {container.id}"
            )


def _fail(container: RunningContainer, sample: _Sample, error: ColdstartError) -> None:
    sample.error = _cause(container, error)
    sample.log_tail = _log_tail(container)


def _cause(container: RunningContainer, error: ColdstartError) -> str:
    """A dead container explains whatever its client saw."""
    connection_broke = isinstance(error.__cause__, (OSError, HTTPException))
    try:
        if not _exited(container, patience=_EXIT_NOTICE_SECONDS if connection_broke else 0):
            return _told(error)
        code = container.exit_code()
    except ColdstartError:
        return _told(error)
    return f"The container exited with code {code}. {_told(error)}"


def _told(error: ColdstartError) -> str:
    parts = (part.rstrip(".") for part in (error.what, error.why, error.fix) if part)
    return _plain(". ".join(parts) + ".")


def _exited(container: RunningContainer, patience: float) -> bool:
    """Patient, because a connection breaks a moment before the engine notes the exit."""
    deadline = time.monotonic() + patience
    while container.running():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _log_tail(container: RunningContainer) -> str:
    try:
        return "\n".join(_plain(line) for line in container.logs().splitlines()[-_LOG_LINES:])
    except ColdstartError:
        return ""


def _plain(text: str) -> str:
    """Without what an image's output could do to a terminal."""
    return _TERMINAL_CONTROL.sub("", text)


def _wait_ready(
    container: RunningContainer, port: int, deadline: float, timeout: float, task: Task, watcher: Watcher
) -> tuple[str, float]:
    """Polls /v1/models until it answers 200: the served model's name, and when the answer was there."""
    began = time.monotonic()
    asked_at, told = began - _LIVENESS_SECONDS, 0
    seen = "nothing answered"
    while (polled_at := time.monotonic()) < deadline:
        if polled_at - asked_at >= _LIVENESS_SECONDS:
            asked_at = polled_at
            if not container.running():
                raise VerifyError("It ended before it was ready.", why=f"Last seen: {seen}.")
        if (waited := int(polled_at - began)) > told:
            told = waited
            task.detail(f"waiting for /v1/models, {waited} s")
        try:
            reply = client.get(port, "/v1/models", min(_REQUEST_SECONDS, deadline - polled_at))
        except (OSError, HTTPException) as error:
            if time.monotonic() < deadline:  # a poll that our own deadline cut short says nothing
                seen = client.describe(error)
        else:
            if reply.status == 200:
                return client.model_name(reply.body), reply.at
            seen = f"GET /v1/models answered {reply.status}"
            _refuse_locked(reply.status)
            watcher.poll(_phase_told(reply.body))
        _pause(time.monotonic() - polled_at)
    raise VerifyError(
        f"It was not ready within {timeout:g} s.",
        why=f"Last seen: {seen}.",
        fix="Read the log, or raise the timeout.",
    )


def _pause(poll_seconds: float) -> None:
    """Polls share the cores with the start that they watch: slow answers make them rarer."""
    wanted = poll_seconds * (1 / _POLL_BUSY_SHARE - 1)
    time.sleep(min(max(_POLL_SECONDS, wanted), _POLL_SECONDS_MAX))


def _phase_told(body: bytes) -> Phase | None:
    """The runtime's 503 names the phase that it is in."""
    try:
        return Phase(json.loads(body)["error"]["phase"])
    except (ValueError, KeyError, TypeError):
        return None


def _refuse_locked(status: int) -> None:
    """With an API key /v1/models never becomes 200 for us: waiting would only end in a wrong reason."""
    if status in (401, 403):
        raise VerifyError(
            f"GET /v1/models answered {status}.",
            why="The image wants an API key.",
            fix="Benchmark it without one.",
        )


class _Startup(BaseModel):
    """The runtime's answer at /startup. Further fields are welcome; a wrong type in a known one is not."""

    model_config = ConfigDict(allow_inf_nan=False)

    schema_: Literal[1] = Field(alias="schema")
    started: float | None = None
    phases: tuple[MeasuredPhase, ...]


def _read_startup(port: int, sample: _Sample) -> None:
    """Fills in the runtime's own phases. An image that reports none is an ordinary case, not a failure."""
    try:
        reply = client.get(port, "/startup", _REQUEST_SECONDS)
    except (OSError, HTTPException) as error:
        if sample.ready_at is not None:
            sample.warnings.append(f"GET /startup failed: {client.describe(error)}")
        return
    if reply.status == 404:
        return
    try:
        report = _Startup.model_validate_json(reply.body)
    except ValueError:
        sample.warnings.append(f"GET /startup answered {reply.status}, not a start-up report")
        return
    _accept(report, sample, reply.at)


def _accept(report: _Startup, sample: _Sample, read_at: float) -> None:
    events = tuple(event for event in report.phases if event.phase not in _CLIENT_PHASES)
    started = report.started
    if started is None:
        started = min((event.start for event in events), default=None)
    if started is not None and not sample.created_at <= started <= read_at:
        sample.warnings.append(
            "the phases at /startup do not lie within this start: is the container's clock right?"
        )
        return
    if any(event.end < event.start for event in events):
        sample.warnings.append("GET /startup reports a phase that ends before it starts")
        return
    sample.started, sample.reported = started, events
