"""The API process: vLLM's engine behind vLLM's own FastAPI app, on the socket that PID 1 bound.

It is forked from the template, so importing vLLM here costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AsyncExitStack
from http import HTTPStatus
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

from runtime import deferred, logs, shortcuts, state, tokenizer, trace
from runtime.guard import AsgiApp, Guard, Scope, Send
from runtime.lifecycle import Lifecycle, Reply, State
from runtime.listener import Acceptor
from runtime.phases import Phase, now
from runtime.switches import Switch

if TYPE_CHECKING:
    from runtime.settings import Settings

_WATCH_SECONDS = 0.5
_POLL_SECONDS = 0.05
_SWITCH_SECONDS = 0.0005
# How long an accepted connection may take to send its first request, once the port is closed.
_FIRST_REQUEST_SECONDS = 1.0
# What clients may take to read the error that ends their request.
_ERROR_SECONDS = 1.0
# What the engine core and its workers may take to release memory before they are killed.
_SHUTDOWN_SECONDS = 5.0
_APP = (
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.serve",
    "vllm.entrypoints.serve.sagemaker.api_router",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.openai.models.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.scale_out.factories",
)
# Labels of coldstart_recording_info.
_RECORDING = ("status", "mode", "reason")
_CORE_DIED = "the engine core or a worker of it died"


class EngineFailedError(Exception):
    """The engine cannot serve; the message says why and what to do."""


class RefusedError(Exception):
    """vLLM does not take these arguments; the message says which."""


def serve(settings: Settings, listener: socket.socket, channel: Connection, started: float) -> None:
    """Entry of the forked process. Talks to PID 1 through `channel` only; PID 1 owns the signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        lifecycle = Lifecycle(
            started, logs.start_id(), recording=settings.recorded, degraded=settings.degraded
        )
        with asyncio.Runner(loop_factory=lambda: _event_loop(settings.event_loop)) as runner:
            runner.run(_serve(settings, listener, channel, lifecycle))
    except EngineFailedError as error:
        channel.send(("failed", str(error)))
    except RefusedError as error:
        channel.send(("refused", str(error)))
    except Exception as error:
        channel.send(("failed", f"{type(error).__name__}: {error}"))
        raise


def _event_loop(name: str) -> asyncio.AbstractEventLoop:
    """uvloop's, as in vLLM's own server, where it is asked for and installed; else asyncio's."""
    if name == "uvloop":
        with contextlib.suppress(ImportError):
            import uvloop

            loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
            return loop
    return asyncio.new_event_loop()


async def _serve(
    settings: Settings, listener: socket.socket, channel: Connection, lifecycle: Lifecycle
) -> None:
    from runtime import template

    if template.failure:
        print(template.failure, flush=True)
        raise EngineFailedError("vLLM could not be imported, see the traceback above")

    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # As in the template, until all is imported.
    if Switch.GC_PAUSE.on:
        gc.disable()
    # The engine core waits for words of this thread while another one imports.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    if settings.manifest.weights == "download":
        await _receive(channel)  # PID 1 says so when every file is there
    else:
        # The files are on the disk already; the phase is there so that every start has the same rows.
        detail = {"bake": "baked", "mount": "mounted"}[settings.manifest.weights]
        moment = now()
        trace.emit(Phase.MODEL_DOWNLOAD, moment, moment, detail=detail)
    with trace.span(Phase.CONFIG_PARSE):
        # Ours is in place; vLLM would put its own over it.
        own = ["--logging-config", json.dumps({"configure_logging": False})] if logs.is_json() else []
        arguments = _Arguments([*settings.vllm_args(), *own])
        engine_args = arguments.of_engine() if Switch.CORE_BESIDE_TOKENIZER.on else None
        if engine_args is None:
            engine_args = arguments.of_engine_and_app()
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if Switch.CORE_BESIDE_TOKENIZER.on:
        shortcuts.start_core_beside_tokenizer(
            not engine_args.disable_log_stats, lambda renderer: _prepare_app(arguments, renderer)
        )
    engine = AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        disable_log_stats=engine_args.disable_log_stats,
    )
    async with AsyncExitStack() as stack:
        stack.callback(engine.shutdown, timeout=_SHUTDOWN_SECONDS)
        with trace.span(Phase.READY):
            from vllm.entrypoints.launchers.api_server.app_state import init_app_state
            from vllm.entrypoints.launchers.app import build_app

            args = arguments.of_app()
            tasks = await engine.get_supported_tasks()
            app = build_app(args, tasks, engine.model_config)
            await init_app_state(engine, app.state, args, tasks)
            requests = _Requests(app, lifecycle)
            guard = Guard(
                requests,
                settings.api_keys,
                metrics_open=settings.metrics_auth == "open",
                max_bytes=settings.max_request_bytes,
                draining=lambda: lifecycle.state is State.DRAINING,
            )
            server = _server(args, guard, requests, channel)
            app.state.server = server
            if Switch.GC_PAUSE.on:
                gc.freeze()  # vLLM collects garbage there, three times, and freezes what is left
                gc.enable()
            # Before the hand-over, so that the port is never without somebody who accepts for long.
            await stack.enter_async_context(app.router.lifespan_context(app))
        sys.setswitchinterval(interval)
        channel.send(("ready",))
        lifecycle.events = list((await _receive(channel))[1])
        lifecycle.move(State.READY)
        _export_metrics(lifecycle, guard)
        watcher = asyncio.create_task(_watch(engine, lifecycle, server, channel))
        commands = asyncio.create_task(_obey(channel, lifecycle, server))
        await server.serve(sockets=[listener])
        watcher.cancel()
        commands.cancel()
        died = engine.errored
    if died:
        raise EngineFailedError(_CORE_DIED)
    channel.send(("stopped", not requests.cut))


def _prepare_app(arguments: _Arguments, renderer: Any) -> None:
    """What vLLM needs to build its app, and imports only when it does. Beside the engine core's start."""
    from runtime import template

    with trace.span(Phase.TOKENIZER_INIT, "what else the app is made of"):
        try:
            with template.remembering(), deferred.replacing_at_the_end():
                arguments.of_app()
                for name in (*_APP, *deferred.of_api_process(state.folder() / deferred.TOUCHED)):
                    with contextlib.suppress(ImportError):
                        deferred.execute(importlib.import_module(name))
            # vLLM does so once more when it builds the app; what takes long of it, it remembers.
            from vllm.renderers.params import ChatParams

            with tokenizer.is_no_processor():
                renderer.warmup(ChatParams())
        except Exception as error:
            logs.say(f"what the app is made of is imported when it is built: {error!r}", "warning")


class _Arguments:
    """vLLM's command line. The parser of all of it imports what the app is made of, and the engine is not."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = argv
        self._app: Any = None

    def of_engine(self) -> Any:
        """AsyncEngineArgs, by a parser of those only; None where it does not take all that is given."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        class UnknownError(Exception):
            pass

        def refuse(message: str) -> NoReturn:
            raise UnknownError(message)

        parser = AsyncEngineArgs.add_cli_args(_parser())
        parser.error = refuse
        # The whole parser says so too.
        logger = logging.getLogger(type(parser).__module__)
        logger.addFilter(_not_of_duplicates)
        try:
            return AsyncEngineArgs.from_cli_args(parser.parse_args(list(self._argv)))
        except (UnknownError, TypeError, ValueError):  # the whole parser says what is wrong
            return None
        finally:
            logger.removeFilter(_not_of_duplicates)

    def of_app(self) -> Any:
        """The whole namespace. Raises RefusedError."""
        if self._app is None:
            self._app = _parse(self._argv)
        return self._app

    def of_engine_and_app(self) -> Any:
        """AsyncEngineArgs, with what follows for them from the app's. Raises RefusedError."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers import cli_args

        engine_args = AsyncEngineArgs.from_cli_args(self.of_app())
        if propagate := getattr(cli_args, "propagate_flash_late_interaction", None):
            propagate(self.of_app(), engine_args)
        return engine_args


def _not_of_duplicates(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Found duplicate keys")


def _parser() -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # No abbreviations: `--api-k` must not get past who looks for `--api-key`.
    return FlexibleArgumentParser(prog="vllm", usage="", allow_abbrev=False)


def _parse(argv: Sequence[str]) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args

    try:
        args = make_arg_parser(_parser()).parse_args(list(argv))
        validate_parsed_serve_args(args)
    except SystemExit:
        raise RefusedError("vLLM does not accept these arguments, see its message above") from None
    except (TypeError, ValueError) as error:
        raise RefusedError(f"vLLM does not accept these arguments: {error}") from None
    if args.model_tag is not None:
        raise RefusedError(f"{args.model_tag!r} is not the value of any argument")
    return args


def _server(args: Any, app: AsgiApp, requests: _Requests, channel: Connection) -> Any:
    """app: what is served; requests: the layer of it that can end what is under way."""
    import uvicorn
    import vllm.envs as envs

    class Server(uvicorn.Server):  # type: ignore[misc]
        """uvicorn with a shutdown that loses nothing; leaves signals to PID 1."""

        deadline = math.inf

        def stop(self, seconds: float) -> None:
            """Accept nothing more; requests that run have `seconds` to finish. May be called again."""
            self.deadline = min(self.deadline, time.monotonic() + seconds)
            self.should_exit = True

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await self.lifespan.startup()
            assert sockets is not None
            self.servers: list[Any] = []
            self.acceptor = Acceptor(sockets[0], self._connected)
            self.started = True
            channel.send(("accepting",))  # uvicorn has said its words by now

        async def _connected(self, connection: socket.socket) -> None:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(self._protocol, connection)

        def _protocol(self) -> Any:
            return self.config.http_protocol_class(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
            self.acceptor.close()
            channel.send(("closing",))
            connections = self.server_state.connections
            # uvicorn closes a connection that has sent nothing yet; its request may be on the way.
            await _until(
                lambda: (
                    not self.acceptor.tasks
                    and all(_is_websocket(c) or c.cycle is not None for c in connections)
                ),
                time.monotonic() + _FIRST_REQUEST_SECONDS,
            )
            for connection in list(connections):
                if not _is_websocket(connection):  # which uvicorn would cut in the middle
                    connection.shutdown()  # at once, or after the response that it is sending
            await _until(lambda: not connections or time.monotonic() > self.deadline, math.inf)
            if connections:
                requests.end("The server stops before this request is finished.")
                for connection in filter(_is_websocket, list(connections)):
                    requests.cut = True
                    connection.shutdown()  # with code 1012, "service restart"
                await _until(lambda: not connections, time.monotonic() + _ERROR_SECONDS)

    # In JSON, uvicorn's loggers go the way of all others.
    own_format = {"log_config": None} if logs.is_json() else _uvicorn_logs(args)
    config = uvicorn.Config(
        app,
        **own_format,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        lifespan="off",  # entered by _serve, before the port is handed over
    )
    for limit in ("h11_max_incomplete_event_size", "h11_max_header_count"):
        if getattr(args, limit, None) is not None:
            setattr(config, limit, getattr(args, limit))
    config.load()
    return Server(config)


def _uvicorn_logs(args: Any) -> dict[str, Any]:
    """What --log-config-file and --disable-access-log-for-endpoints ask for, as vLLM's own server has it."""
    with contextlib.suppress(ImportError):
        from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

        if (config := get_uvicorn_log_config(args)) is not None:
            return {"log_config": config}
    return {}


def _is_websocket(connection: Any) -> bool:
    """Of uvicorn's protocols, those for HTTP have a request and its response at a time: a cycle."""
    return not hasattr(connection, "cycle")


async def _until(condition: Callable[[], bool], deadline: float) -> None:
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)


class _Requests:
    """Answers what the life cycle decides; everything else is vLLM's. Can end what runs with an error."""

    def __init__(self, app: AsgiApp, lifecycle: Lifecycle) -> None:
        self._app, self._lifecycle = app, lifecycle
        self._running: set[asyncio.Task[Any]] = set()
        self._ended = ""
        self.cut = False

    def end(self, reason: str) -> None:
        """Cancel every request; each gets `reason` as an error where its response still can say so."""
        self._ended = reason
        for task in self._running:
            self.cut = True
            task.cancel()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        response = _Response(send, self._lifecycle)
        reply = self._lifecycle.not_serving() if self._ended else self._lifecycle.answer(scope["path"])
        if reply is not None:
            return await response.send_reply(reply)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            await self._app(scope, receive, response)
        except asyncio.CancelledError:
            if not self._ended:
                raise
            await response.end(self._ended)
        finally:
            self._running.discard(task)


class _Response:
    """ASGI's `send` of one request. While draining, it asks clients to open a new connection, elsewhere."""

    def __init__(self, send: Send, lifecycle: Lifecycle) -> None:
        self._send, self._lifecycle = send, lifecycle
        self._stream = self._started = self._complete = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            self._started = True
            self._stream = dict(headers).get(b"content-type", b"").startswith(b"text/event-stream")
            if self._lifecycle.state is State.DRAINING:
                message["headers"] = [*headers, (b"connection", b"close")]
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def send_reply(self, reply: Reply) -> None:
        headers = [(name.encode(), value.encode()) for name, value in reply.headers]
        await self({"type": "http.response.start", "status": int(reply.status), "headers": headers})
        await self({"type": "http.response.body", "body": reply.content})

    async def end(self, reason: str) -> None:
        """Say `reason` where HTTP still can: a whole 503, or an event in a stream, like vLLM's own errors."""
        error = {"message": reason, "type": "service_unavailable", "param": None, "code": 503}
        if not self._started:
            await self.send_reply(Reply(HTTPStatus.SERVICE_UNAVAILABLE, {"error": error}))
        elif self._stream and not self._complete:
            event = f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n"
            await self({"type": "http.response.body", "body": event.encode()})


async def _receive(channel: Connection) -> tuple[Any, ...]:
    """The next message of PID 1. Its end of the pipe closes only when it dies; then so do we."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(channel.fileno(), wake)
    try:
        await readable
    finally:
        loop.remove_reader(channel.fileno())
    message: tuple[Any, ...] = channel.recv()
    return message


async def _obey(channel: Connection, lifecycle: Lifecycle, server: Any) -> None:
    """Do what PID 1 orders: ("drain", delay, timeout), then perhaps ("abort",)."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            kind, *details = await _receive(channel)
        except EOFError:  # PID 1 is gone, and with it whoever could use the answers
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "drain":
            delay, timeout = details
            lifecycle.move(State.DRAINING, "shutting down")
            loop.call_later(delay, server.stop, timeout)
        else:
            server.stop(0.0)


async def _watch(engine: Any, lifecycle: Lifecycle, server: Any, channel: Connection) -> None:
    """When the engine core dies, say so; vLLM itself ends the requests that wait for it."""
    while not engine.errored:
        await asyncio.sleep(_WATCH_SECONDS)
    lifecycle.move(State.FAILED, _CORE_DIED)
    channel.send(("failed", _CORE_DIED))
    server.stop(_ERROR_SECONDS)


def _export_metrics(lifecycle: Lifecycle, guard: Guard) -> None:
    """Ours beside vLLM's own metrics on /metrics."""
    from prometheus_client import Gauge

    from runtime import template

    phases = Gauge("coldstart_phase_seconds", "Seconds that a start-up phase took", ["phase", "process"])
    for event in lifecycle.events:
        phases.labels(event.phase.value, event.process).inc(event.seconds)
    in_flight = Gauge("coldstart_in_flight_requests", "Requests under way, but for probes and metrics")
    in_flight.set_function(lambda: guard.in_flight)
    cache = Gauge("coldstart_cache_hit", "1 if this start used what the image has recorded", ["cache"])
    cache.labels("imports").set(template.imports_remembered)
    cache.labels("recording").set(lifecycle.recording.get("status") == "used")
    if lifecycle.recording:
        told = Gauge("coldstart_recording_info", "1; whether a recording is used, and why not", [*_RECORDING])
        told.labels(*(lifecycle.recording.get(name, "") for name in _RECORDING)).set(1)
    degraded = Gauge("coldstart_degraded_info", "1 for each thing that this start does without", ["reason"])
    for reason in lifecycle.degraded:
        degraded.labels(reason).set(1)
    compiled = [event.detail for event in lifecycle.events if event.phase is Phase.COMPILE]
    if compiled:
        cache.labels("compile").set(all(detail.startswith("loaded") for detail in compiled))
    draining = Gauge("coldstart_draining", "1 from SIGTERM on")
    draining.set_function(lambda: lifecycle.state is State.DRAINING)
