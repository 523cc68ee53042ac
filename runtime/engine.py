"""The API process: vLLM's engine behind vLLM's own FastAPI app, on the socket that PID 1 bound.

It is forked from the template, so importing vLLM here costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from runtime import logs, trace
from runtime.guard import AsgiApp, Guard, Scope, Send
from runtime.lifecycle import Lifecycle, State
from runtime.phases import Phase, now

if TYPE_CHECKING:
    from runtime.settings import Settings

_WATCH_SECONDS = 0.5


class EngineFailedError(Exception):
    """The engine cannot serve; the message says why and what to do."""


class RefusedError(Exception):
    """vLLM does not take these arguments; the message says which."""


def serve(settings: Settings, listener: socket.socket, channel: Connection, started: float) -> None:
    """Entry of the forked process. Talks to PID 1 through `channel` only; PID 1 owns the signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        asyncio.run(_serve(settings, listener, channel, Lifecycle(started, logs.start_id())))
    except EngineFailedError as error:
        channel.send(("failed", str(error)))
    except RefusedError as error:
        channel.send(("refused", str(error)))


async def _serve(
    settings: Settings, listener: socket.socket, channel: Connection, lifecycle: Lifecycle
) -> None:
    from runtime import template

    if template.failure:
        print(template.failure, flush=True)
        raise EngineFailedError("vLLM could not be imported, see the traceback above")

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    with trace.span(Phase.CONFIG_PARSE):
        args = _parse(settings.vllm_args())
        engine_args = AsyncEngineArgs.from_cli_args(args)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    # Baked weights are on the disk already; the phase is there so that every start has the same rows.
    trace.emit(Phase.MODEL_DOWNLOAD, now(), now(), detail="baked")
    engine = AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        disable_log_stats=engine_args.disable_log_stats,
    )
    clean = True
    async with AsyncExitStack() as stack:
        stack.callback(engine.shutdown, timeout=0)
        with trace.span(Phase.READY):
            tasks = await engine.get_supported_tasks()
            app = build_app(args, tasks, engine.model_config)
            await init_app_state(engine, app.state, args, tasks)
            guard = Guard(
                _Front(app, lifecycle),
                settings.api_keys,
                metrics_open=settings.metrics_auth == "open",
                max_bytes=settings.max_request_bytes,
            )
            server = _server(args, guard, channel)
            app.state.server = server
            # Before the hand-over, so that the port is never without somebody who accepts for long.
            await stack.enter_async_context(app.router.lifespan_context(app))
        channel.send(("ready",))
        lifecycle.events = list((await _receive(channel))[1])
        lifecycle.move(State.READY)
        _export_metrics(lifecycle, guard)
        watcher = asyncio.create_task(_watch(engine, lifecycle, server, channel))
        commands = asyncio.create_task(_obey(channel, lifecycle, server))
        await server.serve(sockets=[listener])
        watcher.cancel()
        if commands.done():
            clean = commands.result()
        commands.cancel()
    if lifecycle.state is State.DRAINING:
        channel.send(("stopped", clean and not server.cut_requests))


def _parse(argv: list[str]) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # No abbreviations: `--api-k` must not get past who looks for `--api-key`.
    parser = FlexibleArgumentParser(prog="vllm", usage="", allow_abbrev=False)
    try:
        args = make_arg_parser(parser).parse_args(argv)
        validate_parsed_serve_args(args)
    except SystemExit:
        raise RefusedError("vLLM does not accept these arguments, see its message above") from None
    except (TypeError, ValueError) as error:
        raise RefusedError(f"vLLM does not accept these arguments: {error}") from None
    if args.model_tag is not None:
        raise RefusedError(f"{args.model_tag!r} is not the value of any argument")
    return args


def _server(args: Any, app: AsgiApp, channel: Connection) -> Any:
    import uvicorn
    import vllm.envs as envs

    class Server(uvicorn.Server):  # type: ignore[misc]
        """Leaves signals to PID 1 and tells it when the port stops being served from here."""

        cut_requests = False

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            channel.send(("closing",))
            limit = self.config.timeout_graceful_shutdown
            begun = now()
            await super().shutdown(sockets)
            self.cut_requests = self.force_exit or (limit is not None and now() - begun >= limit)

    # In JSON, uvicorn's loggers go the way of all others.
    own_format = {"log_config": None} if logs.is_json() else {}
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


class _Front:
    """Answers what the life cycle decides; everything else is vLLM's."""

    def __init__(self, app: AsgiApp, lifecycle: Lifecycle) -> None:
        self._app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        reply = self._lifecycle.answer(scope["path"])
        if self._lifecycle.state is State.DRAINING:
            send = _closing(send)
        if reply is None:
            return await self._app(scope, receive, send)
        headers = [(name.encode(), value.encode()) for name, value in reply.headers]
        await send({"type": "http.response.start", "status": int(reply.status), "headers": headers})
        return await send({"type": "http.response.body", "body": reply.content})


def _closing(send: Send) -> Send:
    """While draining, every answer asks its client to open a new connection, elsewhere."""

    async def wrapped(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
        await send(message)

    return wrapped


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


async def _obey(channel: Connection, lifecycle: Lifecycle, server: Any) -> bool:
    """Wait for PID 1's order to drain, and do so. False when PID 1 is gone."""
    try:
        _, delay, timeout = await _receive(channel)
    except EOFError:
        server.should_exit = server.force_exit = True
        return False
    lifecycle.move(State.DRAINING, "shutting down")
    await asyncio.sleep(delay)
    server.config.timeout_graceful_shutdown = timeout
    server.should_exit = True
    return True


async def _watch(engine: Any, lifecycle: Lifecycle, server: Any, channel: Connection) -> None:
    while not engine.errored:
        await asyncio.sleep(_WATCH_SECONDS)
    reason = f"the engine core died: {engine.dead_error}"
    if lifecycle.state is not State.FAILED:
        lifecycle.move(State.FAILED, reason)
    channel.send(("failed", reason))
    server.should_exit = server.force_exit = True


def _export_metrics(lifecycle: Lifecycle, guard: Guard) -> None:
    """Ours beside vLLM's own metrics on /metrics."""
    from prometheus_client import Gauge

    phases = Gauge("coldstart_phase_seconds", "Seconds that a start-up phase took", ["phase", "process"])
    for event in lifecycle.events:
        phases.labels(event.phase.value, event.process).inc(event.seconds)
    in_flight = Gauge("coldstart_in_flight_requests", "Requests under way, but for probes and metrics")
    in_flight.set_function(lambda: guard.in_flight)
    draining = Gauge("coldstart_draining", "1 from SIGTERM on")
    draining.set_function(lambda: lifecycle.state is State.DRAINING)
