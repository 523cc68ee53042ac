"""Requests that have to end before they are finished get an error that a client can read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from runtime.engine import AsgiApp, _Requests
from runtime.lifecycle import Lifecycle, State

_Messages = list[MutableMapping[str, Any]]


def _ready() -> Lifecycle:
    lifecycle = Lifecycle(started=0.0)
    lifecycle.move(State.READY)
    return lifecycle


def _cut(app: AsgiApp) -> tuple[_Messages, _Requests]:
    """What a client gets from `app` when the request is ended under way."""
    messages: _Messages = []

    async def send(message: MutableMapping[str, Any]) -> None:
        messages.append(message)

    async def run() -> _Requests:
        requests = _Requests(app, _ready())
        task = asyncio.create_task(requests({"type": "http", "path": "/v1/completions"}, None, send))
        await asyncio.sleep(0.01)
        requests.end("the server stops")
        await task
        return requests

    return messages, asyncio.run(run())


def test_a_stream_ends_with_an_error_event() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await asyncio.sleep(60)

    messages, requests = _cut(app)
    error, done = messages[-1]["body"].decode().strip().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the server stops"
    assert done == "data: [DONE]"
    assert not messages[-1].get("more_body", False)
    assert requests.cut


def test_what_has_not_begun_to_answer_gets_a_whole_503() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    messages, _ = _cut(app)
    assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]
    assert messages[0]["status"] == 503
    assert (b"retry-after", b"1") in messages[0]["headers"]
    assert json.loads(messages[1]["body"])["error"]["type"] == "service_unavailable"


def test_a_response_that_is_half_sent_is_not_made_longer() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"10")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await asyncio.sleep(60)

    messages, _ = _cut(app)
    assert len(messages) == 1


def test_a_cancelled_request_of_a_client_that_left_stays_cancelled() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        requests = _Requests(app, _ready())
        task = asyncio.create_task(requests({"type": "http", "path": "/x"}, None, lambda _: asyncio.sleep(0)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not requests.cut

    asyncio.run(run())


@pytest.mark.parametrize("draining", [False, True])
def test_only_while_draining_clients_are_sent_elsewhere(draining: bool) -> None:
    """The state when the answer begins counts, not when the request came."""
    messages: _Messages = []
    lifecycle = _ready()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if draining:
            lifecycle.move(State.DRAINING)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def send(message: MutableMapping[str, Any]) -> None:
        messages.append(message)

    asyncio.run(_Requests(app, lifecycle)({"type": "http", "path": "/x"}, None, send))
    assert ((b"connection", b"close") in messages[0]["headers"]) is draining
