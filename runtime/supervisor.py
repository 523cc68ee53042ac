"""PID 1: owns the port, the probes, the signals and the exit code. Never imports vLLM."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from runtime import logs, prefetch, processes, spans, trace
from runtime.defaults import TEARDOWN_SECONDS
from runtime.front import Front
from runtime.lifecycle import Lifecycle, State
from runtime.phases import Phase, PhaseEvent, breakdown, now
from runtime.settings import Settings

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_SETTINGS = 2
EXIT_PORT = 5
EXIT_FORCED = 6

_BACKLOG = 2048
_DATAGRAM_BYTES = 65536
# How long a dead engine's port still answers 503, so that probes and clients learn it from us.
_FAILURE_LINGER_SECONDS = 1.0


class Supervisor:
    """One start, from the bound port to the exit code.

    started: epoch seconds of the entrypoint's first line; parsed: when settings were read.
    """

    def __init__(self, settings: Settings, *, started: float, parsed: tuple[float, float]) -> None:
        self._settings = settings
        self._lifecycle = Lifecycle(started=started, start_id=logs.start_id())
        self._record(Phase.CONFIG_PARSE, *parsed)
        self._exit = asyncio.Event()
        self._exit_code = EXIT_OK
        self._signals = 0
        self._stopped = False
        self._channel: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self) -> int:
        try:
            listener = _bind(self._settings.host, self._settings.port)
        except OSError as error:
            where = f"{self._settings.host}:{self._settings.port}"
            _log(f"cannot listen on {where}: {error.strerror}. Free the port or choose another with --port.")
            return EXIT_PORT
        folder = tempfile.mkdtemp(prefix="coldstart-")
        try:
            with listener:
                return asyncio.run(self._main(listener, Path(folder)))
        finally:
            processes.kill_descendants(os.getpid())
            processes.reap()
            shutil.rmtree(folder, ignore_errors=True)

    async def _main(self, listener: socket.socket, folder: Path) -> int:
        loop = asyncio.get_running_loop()
        self._front = Front(listener, self._lifecycle, _BACKLOG)
        await self._front.open()
        self._record(Phase.SERVER_BIND, self._lifecycle.started, now())
        manifest = self._settings.manifest
        prefetch.start(Path(manifest.model_path), manifest.shards)
        _log(f"listening on {self._settings.host}:{self._settings.port}, starting the engine")
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGCHLD, processes.reap)
        with _event_socket(folder) as events:
            loop.add_reader(events.fileno(), self._on_event, events)
            starter = loop.create_task(self._start_engine(listener))
            await self._exit.wait()
            loop.remove_reader(events.fileno())
        processes.kill_descendants(os.getpid())  # also ends a starter that waits for the template
        await asyncio.wait({starter}, timeout=2)
        self._lifecycle.state = State.STOPPED
        _log(f"exit {self._exit_code}")
        return self._exit_code

    async def _start_engine(self, listener: socket.socket) -> None:
        from runtime import engine

        preload = processes.openmp_preload(self._settings.manifest.device, os.environ)
        if preload:
            os.environ["LD_PRELOAD"] = preload
        context = processes.CONTEXT
        context.set_forkserver_preload(["runtime.template"])
        self._channel, theirs = multiprocessing.Pipe()
        process = context.Process(
            target=engine.serve, args=(self._settings, listener, theirs, self._lifecycle.started), name="api"
        )
        try:
            await asyncio.to_thread(process.start)  # returns when the template has imported vLLM
        except (OSError, EOFError) as error:
            if not self._exit.is_set():
                await self._fail(f"the template process died while importing vLLM ({error!r}), see above")
            return
        theirs.close()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._on_message)
        loop.add_reader(process.sentinel, self._on_engine_exit, process)

    def _on_event(self, events: socket.socket) -> None:
        while True:
            try:
                message = json.loads(events.recv(_DATAGRAM_BYTES))
            except BlockingIOError:
                return
            if "begin" in message:
                begin = message["begin"]
                self._lifecycle.begin(Phase(begin["phase"]), begin["pid"], begin["start"])
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
            self._spawn(self._hand_over())
        elif kind == "closing":  # the engine stopped accepting; what still arrives gets a 503 from us
            self._spawn(self._front.open())
        elif kind == "failed":
            self._spawn(self._fail(details[0]))
        elif kind == "refused":
            self._spawn(self._fail(details[0], EXIT_SETTINGS))
        elif kind == "stopped":
            self._stopped = True
            self._exit_code = EXIT_OK if details[0] else EXIT_FORCED

    async def _hand_over(self) -> None:
        """Stop accepting first, then let the engine accept: between the two, the kernel queues."""
        assert self._channel is not None
        if self._lifecycle.state is not State.STARTING:
            return
        await self._front.close()
        self._lifecycle.move(State.READY)
        self._channel.send(("accept", self._lifecycle.events))
        ready_at = self._lifecycle.ready_at or now()
        _log(breakdown(self._lifecycle.events, self._lifecycle.started, ready_at))
        if spans.wanted():
            self._export_spans(ready_at)

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
        while self._channel is not None and self._channel.poll() and not self._stopped:
            self._on_message()  # its last words may be in the pipe still
        if self._lifecycle.state is State.DRAINING:
            if not self._stopped:
                _log(f"the engine died while draining, with code {process.exitcode}")
                self._exit_code = EXIT_FORCED
            self._exit.set()
        elif self._lifecycle.state in (State.STARTING, State.READY):
            self._spawn(self._fail(f"the engine exited with code {process.exitcode}, see its output above"))

    def _on_signal(self) -> None:
        self._signals += 1
        if self._lifecycle.state is State.READY and self._channel is not None:
            settings = self._settings
            self._lifecycle.move(State.DRAINING, "shutting down")
            _log(f"draining: {settings.drain_delay:g} s delay, then up to {settings.drain_timeout:g} s")
            self._channel.send(("drain", settings.drain_delay, settings.drain_timeout))
            deadline = settings.drain_delay + settings.drain_timeout + TEARDOWN_SECONDS
            asyncio.get_running_loop().call_later(deadline, self._force)
        elif self._lifecycle.state is State.DRAINING and self._signals > 1:
            self._force()
        else:
            self._exit.set()

    def _force(self) -> None:
        _log("not waiting any longer: requests in flight are cut")
        self._exit_code = EXIT_FORCED
        self._exit.set()

    async def _fail(self, reason: str, code: int = EXIT_FAILED) -> None:
        if self._lifecycle.state in (State.FAILED, State.STOPPED):
            return
        self._lifecycle.move(State.FAILED, reason)
        _log(f"failed: {reason}")
        self._exit_code = code
        await self._front.open()
        await asyncio.sleep(_FAILURE_LINGER_SECONDS)
        self._exit.set()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _record(self, phase: Phase, start: float, end: float) -> None:
        self._lifecycle.finish(PhaseEvent(phase, start, end, process="pid1", pid=os.getpid()))


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _event_socket(folder: Path) -> socket.socket:
    path = str(folder / "events.sock")
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(path)
    receiver.setblocking(False)
    os.environ[trace.SOCKET_VARIABLE] = path
    return receiver


def _log(message: str) -> None:
    logs.say(message)
