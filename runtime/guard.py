"""Who may ask what: an ASGI layer in front of vLLM's app that denies by default.

vLLM's own check covers some path prefixes only, and leaves /invocations, /tokenize and others open.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any

from runtime.settings import pairs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

PROBES = frozenset({"/health", "/ready", "/startup"})
METRICS = frozenset({"/metrics", "/metrics/"})
# How long the rest of a refused body is read and dropped, so that its sender gets to see the answer.
_LINGER_SECONDS = 2.0
# With these, vLLM's processes talk to those of other nodes.
_MULTI_NODE = ("--nnodes", "-n", "--master-addr", "--data-parallel-address", "-dpa")


class _TooLargeError(Exception):
    """The body went past the limit; `Guard` answers."""


class Guard:
    """keys: any of them opens the server; none: it is open. max_bytes: largest body of a request.

    draining: whether clients are to come back on another connection, to another server.
    """

    def __init__(
        self,
        app: AsgiApp,
        keys: Sequence[str],
        *,
        metrics_open: bool,
        max_bytes: int,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open = PROBES | METRICS if metrics_open else PROBES
        self._max_bytes = max_bytes
        self._draining = draining
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        path = scope["path"]
        is_open = not self._digests or (scope["type"] == "http" and path in self._open)
        if not (is_open or _is_preflight(scope) or self._has_key(scope)):
            return await _refuse(scope, receive, send, close=self._draining())
        if path in PROBES or path in METRICS:
            return await self._bounded(scope, receive, send)
        self.in_flight += 1
        try:
            return await self._bounded(scope, receive, send)
        finally:
            self.in_flight -= 1

    def _has_key(self, scope: Scope) -> bool:
        values = _header(scope, b"authorization")
        if len(values) != 1:
            return False
        scheme, _, token = values[0].partition(b" ")
        # Every key, by digests of one length: the time tells neither which one came close nor how long it is.
        given = _digest(token.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = next(iter(_header(scope, b"content-length")), b"")
        if length.isdigit() and int(length) > self._max_bytes:
            await self._too_large(receive, send)
            return
        received = 0
        too_large = started = False

        async def counted() -> Message:
            nonlocal received, too_large
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                too_large = True
                raise _TooLargeError
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if too_large and not started:
                return  # the app's own words about a body that it could not read
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except Exception:
            if not too_large:
                raise
        if too_large and not started:
            await self._too_large(receive, send)

    async def _too_large(self, receive: Receive, send: Send) -> None:
        message = f"The request is larger than {self._max_bytes} bytes, the limit of this server."
        body = _error(message, "invalid_request_error", "request_too_large")
        await send(_start(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, body, [(b"connection", b"close")]))
        await send({"type": "http.response.body", "body": body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_preflight(scope: Scope) -> bool:
    """A browser asks so before it sends the key; vLLM's CORS layer answers, and nothing behind it."""
    return (
        scope.get("method") == "OPTIONS"
        and bool(_header(scope, b"origin"))
        and bool(_header(scope, b"access-control-request-method"))
    )


async def _refuse(scope: Scope, receive: Receive, send: Send, *, close: bool) -> None:
    body = _error(
        "Give a valid API key in the header `Authorization: Bearer KEY`.",
        "invalid_request_error",
        "invalid_api_key",
    )
    prefix = ""
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            return await send({"type": "websocket.close", "code": 1008})
        prefix = "websocket."
    headers = [(b"www-authenticate", b"Bearer"), *([(b"connection", b"close")] if close else [])]
    start = _start(HTTPStatus.UNAUTHORIZED, body, headers)
    await send({**start, "type": prefix + start["type"]})
    return await send({"type": prefix + "http.response.body", "body": body})


def _start(status: HTTPStatus, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return {"type": "http.response.start", "status": int(status), "headers": [*own, *headers]}


def _error(message: str, kind: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def _header(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def loopback_environment(engine_args: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep the engine's sockets on loopback; none where it spans nodes. Set ones stay."""
    given = dict(pairs(engine_args))
    if given.keys() & set(_MULTI_NODE) or given.get("--distributed-executor-backend") == "ray":
        return {}
    wanted = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return {name: value for name, value in wanted.items() if name not in environ}
