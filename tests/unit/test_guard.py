"""The guard in front of an app, spoken to in ASGI: who gets in, and how much."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, MutableMapping
from typing import Any

import pytest

from runtime.guard import Guard, Receive, Scope, Send, loopback_environment

KEYS = ("first-key", "second-key")


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the whole body as FastAPI does, which turns every failure to read into a 400 of its own."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        return
    size, more, status = 0, True, 200
    try:
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
    except Exception:
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def _ask(
    guard: Guard,
    path: str,
    headers: Iterable[tuple[str, str]] = (),
    *,
    method: str = "GET",
    kind: str = "http",
    chunks: Iterable[bytes] = (b"",),
    extensions: Iterable[str] = (),
) -> list[MutableMapping[str, Any]]:
    """What the guard and its app send, in order."""
    parts = list(chunks)
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if kind == "websocket":
            return {"type": "websocket.connect"}
        if not parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": kind,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in headers],
        "extensions": {name: {} for name in extensions},
        **({"method": method} if kind == "http" else {}),
    }
    asyncio.run(guard(scope, receive, send))
    return sent


def _guard(
    keys: tuple[str, ...] = KEYS,
    *,
    app: Any = _echo,
    metrics_open: bool = True,
    max_bytes: int = 100,
    draining: bool = False,
) -> Guard:
    return Guard(app, keys, metrics_open=metrics_open, max_bytes=max_bytes, draining=lambda: draining)


def _status(sent: list[MutableMapping[str, Any]]) -> int:
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models", "/v1/chat/completions", "/invocations", "/tokenize", "/pooling", "/score", "/ping"),
        *("/docs", "/openapi.json", "/", "", "/health/", "//health", "/health/../v1/models", "/metricsx"),
        *("/Health", "/metrics/x"),
    ],
)
def test_every_route_but_the_probes_wants_the_key(path: str) -> None:
    sent = _ask(_guard(), path)
    assert _status(sent) == 401
    assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "invalid_api_key"
    for key in KEYS:
        assert _status(_ask(_guard(), path, [("authorization", f"Bearer {key}")])) == 200


def test_who_is_refused_while_draining_is_sent_elsewhere() -> None:
    close = (b"connection", b"close")
    assert close not in _ask(_guard(), "/v1/models")[0]["headers"]
    assert close in _ask(_guard(draining=True), "/v1/models")[0]["headers"]
    sent = _ask(
        _guard((), draining=True), "/v1/completions", [("content-length", "101")], chunks=[b"x" * 101]
    )
    assert (_status(sent), sent[0]["headers"].count(close)) == (413, 1)


@pytest.mark.parametrize("path", ["/health", "/ready", "/startup"])
def test_probes_are_open(path: str) -> None:
    assert _status(_ask(_guard(metrics_open=False), path)) == 200


def test_metrics_are_open_or_not_as_set() -> None:
    assert _status(_ask(_guard(), "/metrics")) == 200
    assert _status(_ask(_guard(metrics_open=False), "/metrics")) == 401
    assert _status(_ask(_guard(metrics_open=False), "/metrics/")) == 401


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer first-ke")],
        [("authorization", "Bearer first-key2")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer")],
        [("authorization", "Basic first-key")],
        [("authorization", "first-key")],
        [("authorization", "Bearer first-key"), ("authorization", "Bearer wrong")],
        [("x-api-key", "first-key")],
    ],
)
def test_what_is_not_the_key_is_refused(headers: list[tuple[str, str]]) -> None:
    assert _status(_ask(_guard(), "/v1/models", headers)) == 401


def test_scheme_is_read_without_case() -> None:
    assert _status(_ask(_guard(), "/v1/models", [("authorization", "bearer first-key")])) == 200


def test_without_a_key_the_server_is_open() -> None:
    assert _status(_ask(_guard(()), "/v1/models")) == 200


def test_a_browsers_preflight_passes_and_other_options_do_not() -> None:
    preflight = [("origin", "https://a.example"), ("access-control-request-method", "POST")]
    assert _status(_ask(_guard(), "/v1/models", preflight, method="OPTIONS")) == 200
    for headers in ([], preflight[:1], preflight[1:]):
        assert _status(_ask(_guard(), "/v1/models", headers, method="OPTIONS")) == 401
    assert _status(_ask(_guard(), "/v1/models", preflight, method="POST")) == 401


def test_websockets_want_the_key() -> None:
    refused = _ask(_guard(), "/v1/realtime", kind="websocket")
    assert refused == [{"type": "websocket.close", "code": 1008}]
    told = _ask(_guard(), "/v1/realtime", kind="websocket", extensions=["websocket.http.response"])
    assert (told[0]["type"], told[0]["status"]) == ("websocket.http.response.start", 401)
    assert told[1]["type"] == "websocket.http.response.body"
    allowed = _ask(_guard(), "/v1/realtime", [("authorization", "Bearer first-key")], kind="websocket")
    assert allowed == [{"type": "websocket.accept"}]
    for path in ("/health", "/metrics"):  # open for HTTP only
        assert _ask(_guard(), path, kind="websocket")[0]["type"] == "websocket.close"


@pytest.mark.parametrize("chunks", [[b"x" * 100], [b"x" * 60, b"x" * 40]])
def test_body_up_to_the_limit_passes(chunks: list[bytes]) -> None:
    sent = _ask(_guard(()), "/v1/completions", [("content-length", "100")], chunks=chunks)
    assert (_status(sent), sent[1]["body"]) == (200, b"100")


@pytest.mark.parametrize(
    ("headers", "chunks"),
    [
        ([("content-length", "101")], [b"x" * 101]),
        ([("transfer-encoding", "chunked")], [b"x" * 60, b"x" * 41, b"x" * 10]),
        # Whoever announces less than it sends.
        ([("content-length", "1")], [b"x" * 101]),
    ],
)
def test_larger_body_is_answered_413_and_the_apps_words_are_dropped(
    headers: list[tuple[str, str]], chunks: list[bytes]
) -> None:
    sent = _ask(_guard(()), "/v1/completions", headers, chunks=chunks)
    assert _status(sent) == 413
    assert (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert sent[-1].get("more_body", False) is False


def test_announced_size_is_refused_before_the_app_sees_the_request() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])

    sent = _ask(_guard((), app=app), "/v1/completions", [("content-length", "101")], chunks=[b"x" * 101])
    assert (_status(sent), seen) == (413, [])


def test_requests_in_flight_are_counted_without_probes_and_refused_ones() -> None:
    seen: dict[str, int] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen[scope["path"]] = guard.in_flight
        await _echo(scope, receive, send)
        if scope["path"] == "/fails":
            raise RuntimeError

    guard = _guard(app=app)
    bearer = [("authorization", "Bearer first-key")]
    for path in ("/v1/models", "/health", "/metrics"):
        _ask(guard, path, bearer)
    with pytest.raises(RuntimeError):
        _ask(guard, "/fails", bearer)
    _ask(guard, "/refused")
    assert seen == {"/v1/models": 1, "/health": 0, "/metrics": 0, "/fails": 1}
    assert guard.in_flight == 0


def test_engine_stays_on_loopback_unless_it_spans_nodes() -> None:
    loopback = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    assert loopback_environment(["-tp", "2"], {}) == loopback
    assert "VLLM_HOST_IP" not in loopback_environment([], {"VLLM_HOST_IP": "10.0.0.1"})
    assert loopback_environment(["--nnodes=2"], {}) == {}
    assert loopback_environment(["--distributed-executor-backend", "ray"], {}) == {}
    assert loopback_environment(["--distributed-executor-backend", "mp"], {}) == loopback
