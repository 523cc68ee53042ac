"""PID 1: owns the port, the probes, the signals and the exit code. Never imports vLLM."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from runtime import faults, guard, logs, modes, preflight, processes, spans, state, switches, trace
from runtime.defaults import TEARDOWN_SECONDS
from runtime.fetch import FETCHED
from runtime.front import Front
from runtime.lifecycle import Lifecycle, State, describe_recording
from runtime.phases import API_PROCESS, Phase, PhaseEvent, breakdown, now
from runtime.settings import KEY_VARIABLES, Settings
from runtime.state import Recording
from runtime.switches import Switch

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_SETTINGS = 2
EXIT_PREFLIGHT = 3
EXIT_FETCH = 4
EXIT_FORCED = 6

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DATAGRAM_BYTES = 65536
# How long a dead engine's port still answers 503, so that probes and clients learn it from us.
_FAILURE_LINGER_SECONDS = 2.0
# What it may take to tell its clients that their requests are cut.
_ABORT_SECONDS = 3.0
# What the kernel may take to end processes that were killed: they may hold much memory.
_KILL_SECONDS = 5.0
# How soon a process is killed that was being started when the others were.
_STARTER_SECONDS = 0.1


class Supervisor:
    """One start, from the bound port to the exit code.

    listener: bound, and nobody accepts yet; it is closed in the end. started: epoch seconds of the
    entrypoint's first line; parsed: when settings were read.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        *,
        started: float,
        parsed: tuple[float, float],
    ) -> None:
        self._settings, self._listener = settings, listener
        self._recording: Recording | None = None
        self._has_home = True
        self._folder: Path | None = None
        self._events: socket.socket | None = None
        self._lifecycle = Lifecycle(started, logs.start_id())
        self._record(Phase.CONFIG_PARSE, *parsed)
        self._exit = asyncio.Event()
        self._exit_code = EXIT_OK
        self._reason = "stopped as asked"
        self._first_error = ""
        self._no_fork = ""
        self._progress = time.monotonic()
        self._oom_kills = processes.oom_kills()
        self._shared_memory: set[Path] = set()
        self._signals = 0
        self._stopped = False
        self._channel: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self) -> int:
        code = self._run()
        # The last line: whoever reads a log from its end finds the reason first.
        logs.say(f"exit {code}: {self._reason}", "error" if code else "info")
        return code

    def _run(self) -> int:
        processes.adopt_orphans()
        # Until the loop handles them, signals wait: the entrypoint's handler would say nothing.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        with self._listener as listener:
            try:
                return asyncio.run(self._main(listener))
            finally:
                self._end_processes()
                if self._folder is not None:
                    shutil.rmtree(self._folder, ignore_errors=True)

    def _end_processes(self) -> None:
        """Nothing of ours survives us: no process, no shared memory."""
        self._shared_memory |= processes.shared_memory(os.getpid())
        processes.end_descendants(os.getpid(), _KILL_SECONDS)
        for path in self._shared_memory:
            path.unlink(missing_ok=True)

    async def _main(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._front = Front(listener, self._lifecycle)
        self._front.open()
        self._record(Phase.SERVER_BIND, self._lifecycle.started, now())
        starter = loop.create_task(self._start(listener))
        watchdog = loop.create_task(self._watch_progress())
        await self._exit.wait()
        watchdog.cancel()
        if self._events is not None:
            loop.remove_reader(self._events.fileno())
            self._events.close()
        if self._lifecycle.state is not State.FAILED:
            self._lifecycle.move(State.STOPPED, self._reason)
        # A starter that waits for the template ends with that; it may be about to make it.
        deadline = time.monotonic() + _KILL_SECONDS
        self._end_processes()
        while not starter.done() and time.monotonic() < deadline:
            await asyncio.wait({starter}, timeout=_STARTER_SECONDS)
            self._end_processes()
        await self._front.retire()
        signal.pthread_sigmask(
            signal.SIG_BLOCK, _SIGNALS
        )  # the loop's handlers go with it; what is left is ours
        return self._exit_code

    async def _start(self, listener: socket.socket) -> None:
        """Nobody waits for this task, so whatever it raises is told here."""
        begun = now()
        self._lifecycle.begin(Phase.CONFIG_PARSE, os.getpid(), begun)
        try:
            await asyncio.to_thread(self._look)
            if self._exit.is_set():
                return
            # Not before: whoever reaps takes the exit code of what preflight has asked.
            asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, processes.reap)
            self._make_folder()
            _log(f"listening on {self._settings.host}:{self._settings.port}, starting the engine")
            for reason in self._settings.degraded:
                _log(reason)
            await asyncio.to_thread(self._use_recording)
            self._record(Phase.CONFIG_PARSE, begun, now())
            if not self._exit.is_set():
                await self._start_engine(listener)
        except preflight.PreflightError as error:
            if not self._exit.is_set():
                self._exit_code, self._reason = EXIT_PREFLIGHT, str(error)
                self._exit.set()
        except Exception as error:
            await self._fail(f"the engine cannot be started: {type(error).__name__}: {error}")

    def _look(self) -> None:
        """Preflight, and which recording fits. For a thread, so that probes are answered meanwhile.

        Raises PreflightError.
        """
        facts = preflight.gather(self._settings.manifest)
        settings, self._recording = modes.find_recording(self._settings, facts, os.environ)
        preflight.check(settings, facts, os.environ)
        self._has_home = not facts.home
        settings = replace(settings, degraded=(*settings.degraded, *preflight.shortcomings(settings, facts)))
        self._settings = settings
        self._lifecycle.recording, self._lifecycle.degraded = settings.recorded, settings.degraded
        os.environ.update(guard.loopback_environment(settings.vllm_args(), os.environ))
        for name in KEY_VARIABLES:  # the key is for the API process alone
            os.environ.pop(name, None)

    def _make_folder(self) -> None:
        """For whatever the engine's processes put beside our socket; it goes with them. Raises OSError."""
        self._folder = Path(tempfile.mkdtemp(prefix="coldstart-"))
        os.environ["TMPDIR"] = tempfile.tempdir = str(self._folder)
        if not self._has_home:
            os.environ["HOME"] = str(self._folder)
        self._events = _event_socket(self._folder)
        asyncio.get_running_loop().add_reader(self._events.fileno(), self._on_event, self._events)

    async def _start_engine(self, listener: socket.socket) -> None:
        fetching = None
        if self._settings.manifest.weights == "download":
            fetching = asyncio.create_task(self._fetch(processes.start_fetch()))
        processes.leave_hub(os.environ)
        process = await self._start_process(listener)
        if process is None:
            return
        assert self._channel is not None
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._on_message)
        loop.add_reader(process.sentinel, self._on_engine_exit, process)
        if fetching and await fetching and self._channel is not None:
            self._channel.send(("fetched",))

    async def _start_process(self, listener: socket.socket) -> BaseProcess | None:
        """The API process, forked or, where that is not safe, spawned. None if it cannot be started."""
        self._channel, theirs = multiprocessing.Pipe()
        try:
            return await asyncio.to_thread(self._fork_engine, listener, theirs)
        except (OSError, EOFError) as error:
            if self._exit.is_set():
                return None
            assert self._events is not None
            self._on_event(self._events)  # what it said before it ended
            if not self._no_fork or not Switch.TEMPLATE.on:
                await self._fail(f"the process that imports vLLM died ({error!r})")
                return None
            _log(f"forking is not safe, {self._no_fork}; every process imports vLLM by itself, which is slow")
            switches.turn_off(Switch.TEMPLATE)
            switches.turn_off(Switch.DEFERRED_IMPORTS)  # which the template goes without when they fail
            self._channel.close()
            return await self._start_process(listener)
        finally:
            theirs.close()

    def _use_recording(self) -> None:
        """Put the recording's files in place; where that fails, start as without one."""
        if self._recording is not None:
            cache = Path(tempfile.gettempdir()) / "cache"
            try:
                state.install(self._recording, cache)
                os.environ.update(state.cache_environment(cache))
                os.environ.update(self._recording.mode.environment)
                os.environ[state.USED_VARIABLE] = "1"
            except state.StateError as error:
                self._settings = modes.unused(self._settings, str(error))
                self._lifecycle.recording = self._settings.recorded
        recorded = self._settings.recorded
        if recorded.get("status") == "used":
            _log(f"using what was recorded for this machine: {recorded['mode']}")
        elif recorded.get("status") == "unused":
            _log(f"what was recorded is not used: {recorded['reason']}")

    def _fork_engine(self, listener: socket.socket, channel: Connection) -> BaseProcess:
        """Returns when the template has imported vLLM. For a thread, so that no probe waits for it."""
        os.environ[trace.LAUNCHED_VARIABLE] = str(now())
        if preload := processes.preload(self._settings.manifest.device, os.environ):
            os.environ["LD_PRELOAD"] = preload
        context = processes.context()
        context.set_forkserver_preload(["runtime.template"])
        arguments = (self._settings, listener, channel, self._lifecycle.started)
        process = context.Process(target=processes.serve, args=arguments, name=API_PROCESS)
        processes.start_tracker()
        process.start()
        return process

    async def _fetch(self, process: subprocess.Popen[str]) -> bool:
        """Wait until the model is there. The pipe tells: the exit code goes to whoever reaps first."""
        assert process.stdout is not None
        said = (await asyncio.to_thread(process.stdout.read)).splitlines() or ["the download died, see above"]
        if said[-1] == FETCHED:
            return True
        if not self._exit.is_set():
            await self._fail(said[-1], EXIT_FETCH)
        return False

    def _on_event(self, events: socket.socket) -> None:
        while True:
            try:
                message = json.loads(events.recv(_DATAGRAM_BYTES))
            except BlockingIOError:
                return
            self._progress = time.monotonic()
            if "begin" in message:
                begin = message["begin"]
                self._lifecycle.begin(
                    Phase(begin["phase"]), begin["pid"], begin["start"], begin.get("detail", "")
                )
            elif "no_fork" in message:
                self._no_fork = message["no_fork"]
            elif "taken_back" in message:
                self._first_error = ""
            elif "error" in message:
                self._first_error = self._first_error or message["error"]
            else:
                self._lifecycle.finish(PhaseEvent.from_json(message["event"]))

    def _on_message(self) -> None:
        assert self._channel is not None
        try:
            kind, *details = self._channel.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel = None
            return
        if kind == "ready":
            self._hand_over()
        elif kind == "accepting":
            self._tell_ready()
        elif kind == "closing":  # the engine stopped accepting; what still arrives gets a 503 from us
            self._front.open()
        elif kind == "failed":
            self._spawn(self._fail(details[0]))
        elif kind == "refused":
            self._spawn(self._fail(details[0], EXIT_SETTINGS))
        elif kind == "stopped":
            self._stopped = True
            if not details[0]:
                self._cut()

    def _hand_over(self) -> None:
        """Stop accepting first, then let the engine accept: between the two, the kernel queues."""
        assert self._channel is not None
        if self._lifecycle.state is not State.STARTING:
            return
        self._front.close()
        self._first_error = ""
        self._lifecycle.move(State.READY)
        self._channel.send(("accept", self._lifecycle.events))
        self._spawn(self._note_shared_memory())
        if spans.wanted():
            self._export_spans(self._lifecycle.ready_at or now())

    def _tell_ready(self) -> None:
        """The last line of a start: the engine has said what it says at its own."""
        ready_at = self._lifecycle.ready_at or now()
        told = breakdown(self._lifecycle.events, self._lifecycle.started, ready_at)
        _log(f"{told}; {describe_recording(self._lifecycle.recording)}")

    async def _note_shared_memory(self) -> None:
        """While the engine still has it mapped: killed processes do not tell."""
        self._shared_memory |= await asyncio.to_thread(processes.shared_memory, os.getpid())

    def _export_spans(self, ready_at: float) -> None:
        snapshot = self._lifecycle.snapshot()
        report = {key: snapshot[key] for key in ("started", "start_id", "phases")}
        try:
            spans.start_export({**report, "ready": ready_at, "model": self._settings.served_model_name})
        except OSError as error:
            _log(f"the spans of this start are not exported: {error}")

    def _on_engine_exit(self, process: Any) -> None:
        asyncio.get_running_loop().remove_reader(process.sentinel)
        process.join()
        code = processes.exit_code(process)
        while self._channel is not None and self._channel.poll() and not self._stopped:
            self._on_message()  # its last words may be in the pipe still
        if self._lifecycle.state is State.DRAINING:
            if not self._stopped:
                self._cut(faults.ended("while draining, the engine", code))
            self._exit.set()
        elif self._lifecycle.state in (State.STARTING, State.READY):
            self._spawn(self._fail(faults.ended("the engine", code)))

    def _on_signal(self) -> None:
        self._signals += 1
        if self._lifecycle.state is State.READY and self._channel is not None:
            settings = self._settings
            self._lifecycle.move(State.DRAINING, "shutting down")
            _log(f"draining: {settings.drain_delay:g} s delay, then up to {settings.drain_timeout:g} s")
            self._channel.send(("drain", settings.drain_delay, settings.drain_timeout))
            deadline = settings.drain_delay + settings.drain_timeout + TEARDOWN_SECONDS
            asyncio.get_running_loop().call_later(deadline, self._force)
        elif self._lifecycle.state is State.DRAINING and self._signals == 2 and self._channel is not None:
            _log("second signal: requests in flight are cut")
            self._channel.send(("abort",))
            asyncio.get_running_loop().call_later(_ABORT_SECONDS, self._force)
        elif self._lifecycle.state is State.DRAINING:
            self._force()
        else:
            self._exit.set()

    def _force(self) -> None:
        self._cut("the engine did not stop in time")
        self._exit.set()

    def _cut(self, reason: str = "requests in flight were cut") -> None:
        self._exit_code = EXIT_FORCED
        self._reason = f"{reason}. Raise --drain-timeout, and the orchestrator's grace period above it."

    async def _watch_progress(self) -> None:
        """End a start that hangs. Every message of any phase is progress; the phase that began last sets the
        limit, since those that began before it wait for it or have their turn when it is over.
        """
        deadlines = self._settings.phase_timeout
        self._progress = time.monotonic()
        while self._lifecycle.state is State.STARTING:
            await asyncio.sleep(min(1.0, deadlines.shortest / 4))
            current = self._lifecycle.current
            limit = deadlines.seconds(current.phase if current else None)
            if time.monotonic() - self._progress > limit and self._lifecycle.state is State.STARTING:
                where = f"{current.phase.value} {current.detail}".strip() if current else "between two phases"
                await self._fail(f"no progress for {limit:g} s in {where}")

    async def _fail(self, reason: str, code: int = EXIT_FAILED) -> None:
        if self._lifecycle.state in (State.FAILED, State.STOPPED) or self._exit.is_set():
            return
        if self._first_error:
            reason = self._first_error
        if processes.oom_kills() > self._oom_kills:
            reason = f"the kernel killed a process of this container, which is out of memory: {reason}"
        self._exit_code = code
        self._reason = f"failed: {reason}"
        if code != EXIT_FETCH:  # whose reason has the next step in it
            self._reason = faults.with_next_step(self._reason)
        self._lifecycle.move(State.FAILED, self._reason)
        self._front.open()
        await asyncio.sleep(_FAILURE_LINGER_SECONDS)
        self._exit.set()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _record(self, phase: Phase, start: float, end: float) -> None:
        self._lifecycle.finish(PhaseEvent(phase, start, end, process="pid1", pid=os.getpid()))


def _event_socket(folder: Path) -> socket.socket:
    path = str(folder / "events.sock")
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        receiver.bind(path)
    except OSError:
        receiver.close()
        raise
    receiver.setblocking(False)
    os.environ[trace.SOCKET_VARIABLE] = path
    return receiver


def _log(message: str) -> None:
    logs.say(message)
