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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks import client, page_cache
from benchmarks.adapters import Report, Seen, adapters
from benchmarks.pull import Pull
from benchmarks.sampler import Sampler
from benchmarks.schema import (
    BenchResult,
    Cache,
    ImageFacts,
    Machine,
    MeasuredPhase,
    Run,
    State,
    Workload,
)
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
_PULL_PATIENCE_SECONDS = 60.0
# Of the log, for whoever watches; rarer where it is long, since polls wait meanwhile.
_LOOK_SECONDS = 1.0
_LOOK_BUSY_SHARE = 0.02
_LOG_LINES = 40
_CLOCK_SHARE = 0.02

# Of the runtime: nobody else sends requests, for whom it would go on serving after SIGTERM.
_DRAIN_VARIABLE = "COLDSTART_DRAIN_DELAY"
# The optimisations that a start goes without.
_OFF_VARIABLE = "COLDSTART_OFF"
# Where a controlled compile cache is mounted, and what makes vLLM and Inductor use it.
_CACHE_FOLDER = "/coldstart-compile-cache"
_CACHE_ROOT = "VLLM_CACHE_ROOT"
_CACHE_VARIABLES = {
    _CACHE_ROOT: f"{_CACHE_FOLDER}/vllm",
    "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE_FOLDER}/inductor",
}

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

    def pid(self) -> int:
        """Of its first process, as the engine's machine counts."""

    def started_at(self) -> float:
        """When the engine started its first process, in epoch seconds."""

    def logs(self) -> str:
        """Output so far, also after the exit."""

    def timed_logs(self) -> list[tuple[float, str]]:
        """Lines of output so far, and when the engine received each, in epoch seconds."""

    def stop(self, timeout: int) -> int:
        """SIGTERM, SIGKILL after `timeout` seconds; returns the exit code."""

    def remove(self) -> None:
        """Leaves no container and no anonymous volume, running or not."""


class Volume(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path:
        """On the engine's machine."""

    def empty(self) -> bool: ...

    def remove(self) -> None: ...


class ContainerHost(Protocol):
    """A container engine. Every method raises ColdstartError when it refuses."""

    def image_facts(self, image: str) -> ImageFacts:
        """Raises ColdstartError when there is no such image."""

    def start(
        self,
        image: str,
        *,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        volumes: Mapping[str, str],
    ) -> RunningContainer:
        """Creates and starts a container of image id `image`, its serving port on 127.0.0.1 at a free port.

        volumes: name -> folder inside; a name that is an absolute path is a folder of the engine's machine,
        mounted read-only. Leaves nothing behind when it fails, or is interrupted, before it
        returns.
        """

    def image_folders(self, image: str) -> list[Path]:
        """Where the files of an image lie on the engine's machine."""

    def new_volume(self, image: str) -> Volume:
        """An empty volume that any user may write to, prepared with a program of image id `image`."""

    def registry_digest(self, reference: str) -> str:
        """`repository@sha256:...`, confirmed by the registry to be there now."""

    def remove_image(self, reference: str) -> None:
        """Nothing happens if it is not there."""

    def pull(self, digest: str, tag: str, patience: float) -> Iterator[Mapping[str, Any]]:
        """The engine's progress messages of pulling `digest` as `tag`; at most `patience` seconds apart."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What every run is made to find. environment: added to that of the containers.

    page_cache: the image's files, cold or warm, verified page by page. compile_cache: cold is a new, empty
    vLLM cache for each run; warm is one that a start which does not count has filled, one for each image.
    pull: the image is removed, and pulled from its registry within the run. sample: read what the container
    uses, 20 times a second. mount: the folder of the weights, for images that mount them.
    """

    page_cache: Cache = "as_is"
    compile_cache: Cache = "as_is"
    pull: bool = False
    sample: bool = True
    mount: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> State:
        return State(page_cache=self.page_cache, compile_cache=self.compile_cache, pulled=self.pull)


class Watcher(Protocol):
    """Sees each run as it goes, from what the harness asks anyway. Its time is the benchmark's: be quick."""

    @property
    def follows_log(self) -> bool:
        """Whether the log of an image that tells no phase is read for `follow` while it starts."""

    def begin(self, image: str) -> None: ...

    def poll(self, phase: Phase | None) -> None:
        """It is not ready; `phase` began last, where the image says so."""

    def follow(self, phases: Sequence[MeasuredPhase]) -> None:
        """All phases that ended so far, as the log tells them."""

    def answered(self) -> None:
        """Its whole answer is there; what follows is not measured."""

    def end(self, run: Run) -> None: ...


class _NoWatcher:
    follows_log = False

    def begin(self, image: str) -> None: ...

    def poll(self, phase: Phase | None) -> None: ...

    def follow(self, phases: Sequence[MeasuredPhase]) -> None: ...

    def answered(self) -> None: ...

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
    conditions: Conditions | None = None,
    ablate: Sequence[str] = (),
    engine_version: str | None = None,
) -> BenchResult:
    """Starts each image `runs` times, in turn, and measures from the create call to the first token.

    A run that fails is kept as failed and the benchmark goes on; `save` gets all runs so far after each one.
    max_runs: of each image, where `enough`, asked after each round from `runs` on, does not end it before;
    until: what `enough` waits for, for the record.
    ablate: optimisations; the image, then the only one, is also started without each, and without them all.
    timeout: seconds that a run may take to its complete answer; stop_timeout: seconds from SIGTERM to
    SIGKILL; engine_version: Docker Engine's, for the record. Raises InputError for arguments that measure
    nothing, HostError for conditions that cannot be made here, and what `host` and `save` raise. Containers
    and volumes are removed whatever happens, Ctrl-C included.
    """
    wanted = conditions or Conditions()
    _check(images, runs, max_runs, timeout, wanted)
    facts = [host.image_facts(image) for image in images]
    _check_distinct(facts)
    if ablate:
        (image,) = facts
        facts += [image.without(name) for name in ablate]
        facts += [image.without(*ablate, name="all of them")] if len(ablate) > 1 else []
    digests = _check_conditions(host, facts, wanted)
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
    bench = _Bench(host, result.workload, timeout, stop_timeout, reporter, watcher, wanted, digests)
    slots = interleave(facts, max_runs or runs)
    with bench, reporter.task("Benchmark", len(slots), unit="runs") as task:
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


def _check(
    images: Sequence[str], runs: int, max_runs: int | None, timeout: float, conditions: Conditions
) -> None:
    if not images:
        raise InputError("There is no image to benchmark.", fix="Name at least one image.")
    if runs < 1:
        raise InputError(f"{runs} runs measure nothing.", fix="Pass --runs 1 or more.")
    if max_runs is not None and max_runs < runs:
        raise InputError(f"At most {max_runs} runs are fewer than {runs}.", fix="Raise --max-runs.")
    if timeout <= 0:
        raise InputError(f"A timeout of {timeout} s leaves no time to start.", fix="Pass a positive number.")
    if conditions.pull and conditions.page_cache != "as_is":
        raise InputError(
            "A pulled image cannot also have its page cache controlled.",
            why="A pull leaves in memory what it has just written; that is part of what is measured.",
            fix="Leave out --pull or --page-cache.",
        )


def _check_distinct(facts: Sequence[ImageFacts]) -> None:
    references = [image.reference for image in facts]
    twice = next((name for name in references if references.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{twice} is named twice.",
            why="Its runs could not be told apart.",
            fix=f"To compare it with itself, give it a second tag: docker tag {twice} IMAGE:again.",
        )


def _check_conditions(
    host: ContainerHost, facts: Sequence[ImageFacts], conditions: Conditions
) -> dict[str, str]:
    """Reference -> digest to pull. Raises before anything is started or removed."""
    if conditions.page_cache != "as_is":
        for image in facts:
            page_cache.check(host.image_folders(image.id))
    for image in facts:
        if image.weights == "mount" and conditions.mount is None:
            raise InputError(
                f"{image.reference} has no weights in it", fix="Give the folder of its model: --mount FOLDER."
            )
    if not conditions.pull:
        return {}
    return {image.reference: host.registry_digest(image.tag) for image in facts}


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

    began: float
    began_monotonic: float = field(default_factory=time.monotonic)
    created_at: float | None = None
    ready_at: float | None = None
    first_token_at: float | None = None
    wall_seconds: float | None = None
    answer: str = ""
    pull: tuple[MeasuredPhase, ...] = ()
    report: Report | None = None
    adapter: str | None = None
    sampler: Sampler | None = None
    exit_code: int | None = None
    stop_seconds: float | None = None
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    log_tail: str = ""

    def to_run(self, slot: _Slot, state: State) -> Run:
        reported = self.report.phases if self.report else ()
        events = (*self.pull, *map(self._with_resources, (*self._client_events(), *reported)))
        total = unattributed = None
        if self.first_token_at is not None and not self.error:
            total = self.first_token_at - self.began
            unattributed = max(0.0, total - covered_seconds(events, self.began, self.first_token_at))
            self._compare_clocks(total)
        return Run(
            image=slot.facts.reference,
            index=slot.index,
            order=slot.order,
            ok=not self.error,
            error=self.error,
            created_at=self.began,
            ready_seconds=None if self.ready_at is None else self.ready_at - self.began,
            total_seconds=total,
            unattributed_seconds=unattributed,
            wall_seconds=self.wall_seconds,
            phases=tuple(sorted(events, key=lambda event: (event.start, event.end))),
            phases_from="client" if self.report is None else self.report.source,
            adapter=self.adapter,
            state=state,
            sampler_cpu_seconds=None if self.sampler is None else round(self.sampler.cpu_seconds, 4),
            answer=self.answer,
            exit_code=self.exit_code,
            stop_seconds=self.stop_seconds,
            warnings=tuple(self.warnings),
            log_tail=self.log_tail,
        )

    def _compare_clocks(self, total: float) -> None:
        """Phases are told by the machine's clock, which somebody may set while a start is measured."""
        if self.wall_seconds is not None and abs(total - self.wall_seconds) > _CLOCK_SHARE * total:
            self.warnings.append(
                f"this machine's clock was set during the run, {total:.2f} s by it and "
                f"{self.wall_seconds:.2f} s by a stopwatch: measure again"
            )

    def _client_events(self) -> Iterator[MeasuredPhase]:
        if self.report is not None and self.report.started is not None and self.created_at is not None:
            yield _client_event(Phase.CONTAINER_START, self.created_at, self.report.started)
        if self.ready_at is None:
            return
        if self.report is None or all(event.phase != Phase.READY for event in self.report.phases):
            # A moment, not a stretch: it must not claim time that nothing explains.
            yield _client_event(Phase.READY, self.ready_at, self.ready_at)
        if self.first_token_at is not None:
            yield _client_event(Phase.FIRST_TOKEN, self.ready_at, self.first_token_at)

    def _with_resources(self, event: MeasuredPhase) -> MeasuredPhase:
        used = None if self.sampler is None else self.sampler.used(event.start, event.end)
        return event if used is None else replace(event, resources=used)


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
    conditions: Conditions
    digests: Mapping[str, str]
    warm_volumes: dict[_Server, Volume] = field(default_factory=dict)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for volume in self.warm_volumes.values():
            self._remove_volume(volume)

    def run(self, slot: _Slot, task: Task) -> Run:
        sample = _Sample(now())
        try:
            with self._compile_cache(slot, sample, task) as volumes:
                if not sample.error:
                    self._prepare_and_start(slot, volumes, sample, task)
        except ColdstartError as error:
            sample.error = _told(error)
        return sample.to_run(slot, self.conditions.state)

    def _prepare_and_start(self, slot: _Slot, volumes: Sequence[Volume], sample: _Sample, task: Task) -> None:
        state, image = self.conditions.page_cache, slot.facts
        if state != "as_is":
            task.detail(f"making the page cache {state} for {image.reference}")
            folders = [*self.host.image_folders(image.id), *(volume.folder for volume in volumes)]
            folders += [self.conditions.mount] if self.conditions.mount and image.weights == "mount" else []
            page_cache.bring(folders, state)
        sample.began, sample.began_monotonic = now(), time.monotonic()
        deadline = sample.began_monotonic + self.timeout
        if self.conditions.pull:
            self._pull(image, sample, deadline, task)
        task.detail(f"starting {image.reference}")
        self._start(image, volumes, sample, deadline, task)

    def _start(
        self, image: ImageFacts, volumes: Sequence[Volume], sample: _Sample, deadline: float, task: Task
    ) -> None:
        ours = {_DRAIN_VARIABLE: "0"} if image.weights else {}
        environment = {**ours, **(_CACHE_VARIABLES if volumes else {}), **self.conditions.environment}
        if image.off:
            environment[_OFF_VARIABLE] = ",".join(image.off)
        if image.weights and _CACHE_ROOT in environment:  # see runtime.modes
            sample.warnings.append(
                f"{_CACHE_ROOT} is set, by --compile-cache or --env: a recording in the image is not used"
            )
        mounts = {volume.name: _CACHE_FOLDER for volume in volumes}
        if image.weights == "mount" and image.model_path:
            mounts[str(self.conditions.mount)] = image.model_path
        if not self.conditions.pull:
            sample.began_monotonic = time.monotonic()
        container = self.host.start(
            image.id, arguments=image.arguments, environment=environment, volumes=mounts
        )
        sample.created_at = container.created_at
        if not self.conditions.pull:
            sample.began = container.created_at
        try:
            self._sample(container, sample)
            self._observe(container, image, sample, deadline, task)
            self.watcher.answered()
            task.detail(f"stopping {image.reference}")
            self._stop(container, sample)
        finally:
            if sample.sampler is not None:
                sample.sampler.stop()
            self._remove(container)

    @contextmanager
    def _compile_cache(self, slot: _Slot, sample: _Sample, task: Task) -> Iterator[list[Volume]]:
        """The volume to mount, if any. A priming start that fails is the run's error."""
        image, state = slot.facts, self.conditions.compile_cache
        if state == "warm":
            if _server(image) not in self.warm_volumes:
                task.detail(f"filling a compile cache for {image.reference}")
                self._prime(image, sample, task)
                self.watcher.begin(image.reference)  # anew: that start was none of the run
            yield [self.warm_volumes[_server(image)]] if not sample.error else []
        elif state == "cold":
            volume = self.host.new_volume(image.id)
            try:
                yield [volume]
            finally:
                self._remove_volume(volume)
        else:
            yield []

    def _prime(self, image: ImageFacts, sample: _Sample, task: Task) -> None:
        volume = self.warm_volumes[_server(image)] = self.host.new_volume(image.id)
        priming = _Sample(now())
        try:
            self._start(image, [volume], priming, time.monotonic() + self.timeout, task)
            if not priming.error and volume.empty():
                priming.error = "it wrote nothing to its cache"
        except ColdstartError as error:
            priming.error = _told(error)
        if priming.error:
            sample.error = f"The start that fills the compile cache failed: {priming.error}"
            sample.log_tail = priming.log_tail
            self._remove_volume(self.warm_volumes.pop(_server(image)))

    def _remove_volume(self, volume: Volume) -> None:
        try:
            volume.remove()
        except ColdstartError as error:
            self.reporter.note(
                f"volume {volume.name} is left: {_told(error)} Remove it: docker volume rm {volume.name}"
            )

    def _pull(self, image: ImageFacts, sample: _Sample, deadline: float, task: Task) -> None:
        digest = self.digests[image.reference]
        task.detail(f"pulling {digest}")
        self.host.remove_image(digest)
        self.host.remove_image(image.tag)
        sample.began, sample.began_monotonic = now(), time.monotonic()
        pull = Pull(sample.began)
        done = False
        try:
            messages = self.host.pull(digest, image.tag, min(_PULL_PATIENCE_SECONDS, self.timeout))
            pull.follow(_timed(messages, deadline, self.timeout))
            done = True
        finally:
            sample.pull = tuple(pull.phases())
            if not done:
                back = f"docker pull {digest} && docker tag {digest} {image.tag}"
                self.reporter.note(f"{image.reference} is not here now; get it back: {back}")
        if not pull.layers:
            sample.warnings.append("nothing was pulled: another image keeps every layer here")

    def _sample(self, container: RunningContainer, sample: _Sample) -> None:
        if not self.conditions.sample:
            return
        try:
            sample.sampler = Sampler(container.pid(), container.started_at())
        except (OSError, LookupError, ColdstartError):
            sample.warnings.append("resources are not sampled: its processes are not on this machine")

    def _observe(
        self,
        container: RunningContainer,
        image: ImageFacts,
        sample: _Sample,
        deadline: float,
        task: Task,
    ) -> None:
        port = None
        try:
            port = container.host_port()
            view = _View(self.watcher, container, image, sample)
            model, sample.ready_at = _wait_ready(container, port, deadline, self.timeout, task, view)
            done = client.complete(port, model, self.workload, deadline)
            sample.first_token_at, sample.answer = done.first_token_at, done.text
            sample.wall_seconds = done.first_token_monotonic - sample.began_monotonic
        except ColdstartError as error:
            _fail(container, sample, error)
        if sample.sampler is not None:
            sample.sampler.stop()
        # Asked for last, so that the question does not delay the token; also of a run that failed, because
        # the finished phases say how far it came.
        _read_phases(container, port, image, sample)
        if sample.report is not None and sample.report.source == "log":
            self.watcher.follow(sample.report.phases)

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


def _timed(
    messages: Iterator[Mapping[str, Any]], deadline: float, timeout: float
) -> Iterator[tuple[float, Mapping[str, Any]]]:
    for message in messages:
        yield now(), message
        if time.monotonic() >= deadline:
            raise VerifyError(f"It was not pulled within {timeout:g} s.", fix="Raise the timeout.")


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


_Server = tuple[str, tuple[str, ...]]


def _server(image: ImageFacts) -> _Server:
    """What a filled compile cache is good for: other arguments compile other code."""
    return image.id, image.arguments


@dataclass(slots=True)
class _View:
    """What a watcher is told of a start: the phase that the image answers, else what its log says."""

    watcher: Watcher
    container: RunningContainer
    image: ImageFacts
    sample: _Sample
    answers: bool = False
    look_at: float = field(default_factory=lambda: time.monotonic() + _LOOK_SECONDS)

    def poll(self, phase: Phase | None) -> None:
        self.answers = self.answers or phase is not None
        self.watcher.poll(phase)

    def look(self) -> None:
        """Nothing is recorded of it: what stops it now is found out, and told, after the start."""
        began = time.monotonic()
        if self.answers or not self.watcher.follows_log or began < self.look_at:
            return
        with suppress(ColdstartError, ValueError):
            seen = _seen(self.container, self.image, self.sample, None)
            adapter = next((each for each in adapters() if each.recognises(seen)), None)
            if adapter is not None:
                self.watcher.follow(adapter.read(seen).phases)
        ended = time.monotonic()
        self.look_at = ended + max(_LOOK_SECONDS, (ended - began) / _LOOK_BUSY_SHARE)


def _wait_ready(
    container: RunningContainer, port: int, deadline: float, timeout: float, task: Task, view: _View
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
            view.poll(_phase_told(reply.body))
        took = time.monotonic() - polled_at
        view.look()
        _pause(took)
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


def _read_phases(container: RunningContainer, port: int | None, image: ImageFacts, sample: _Sample) -> None:
    """Fills in the image's own phases. An image that shows none is an ordinary case, not a failure."""
    try:
        startup = None if port is None else _get_startup(port, sample)
        seen = _seen(container, image, sample, startup)
    except ColdstartError as error:
        sample.warnings.append(_told(error).rstrip("."))
        return
    for adapter in adapters():
        if adapter.recognises(seen):
            try:
                sample.report = adapter.read(seen)
            except ValueError as error:
                sample.warnings.append(str(error))
            else:
                sample.adapter = adapter.NAME
                return


def _seen(
    container: RunningContainer, image: ImageFacts, sample: _Sample, startup: client.Reply | None
) -> Seen:
    return Seen(
        labels=image.labels,
        created_at=container.created_at,
        started_at=container.started_at(),
        ready_at=sample.ready_at,
        startup=startup,
        log=container.timed_logs(),
        processes=sample.sampler.processes if sample.sampler else (),
    )


def _get_startup(port: int, sample: _Sample) -> client.Reply | None:
    try:
        reply = client.get(port, "/startup", _REQUEST_SECONDS)
    except (OSError, HTTPException) as error:
        if sample.ready_at is not None:
            sample.warnings.append(f"GET /startup failed: {client.describe(error)}")
        return None
    return None if reply.status == 404 else reply
