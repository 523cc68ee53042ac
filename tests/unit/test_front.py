"""PID 1's side of the port, over real sockets: well-formed, broken, slow and vanishing clients."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable

import pytest

from runtime.front import Front
from runtime.lifecycle import Lifecycle, State
from runtime.listener import bind


async def _exchange(port: int, request: bytes, *, half_close: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    if half_close:
        writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer


def _with_front(scenario: Callable[[Front, Lifecycle, int, socket.socket], Awaitable[None]]) -> None:
    async def run() -> None:
        with bind("127.0.0.1", 0) as listener:
            lifecycle = Lifecycle(started=0.0)
            front = Front(listener, lifecycle)
            front.open()
            await scenario(front, lifecycle, listener.getsockname()[1], listener)
            front.close()

    asyncio.run(run())


def _body(answer: bytes) -> bytes:
    return answer.split(b"\r\n\r\n", 1)[1]


def test_probe_is_answered_and_the_connection_closed() -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        answer = await _exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"connection: close" in answer
        assert json.loads(_body(answer))["status"] == "starting"
        lifecycle.move(State.FAILED, "broken")
        answer = await _exchange(port, b"GET /health?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ")

    _with_front(scenario)


def test_request_with_a_large_body_gets_its_503() -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        body = b"x" * 3_000_000
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        answer = await _exchange(port, head + body)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        assert json.loads(_body(answer))["error"]["code"] == "starting"

    _with_front(scenario)


def test_upload_that_does_not_end_in_time_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.front._REQUEST_SECONDS", 0.2)

    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nslow"
        assert (await _exchange(port, request)).startswith(b"HTTP/1.1 503 ")
        assert await _exchange(port, b"POST /v1/chat/comp") == b""

    _with_front(scenario)


def test_client_that_waits_to_be_told_to_go_on_is_answered_at_once() -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        )
        for request in (head, head + b"hello"):  # strict, or not patient
            answer = await asyncio.wait_for(_exchange(port, request), 5)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert json.loads(_body(answer))["error"]["code"] == "starting"

    _with_front(scenario)


def test_head_has_no_body() -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        answer = await _exchange(port, b"HEAD /ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert _body(answer) == b""

    _with_front(scenario)


@pytest.mark.parametrize(
    "request_bytes", [b"\x16\x03\x01\x02\x00garbage\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_not_http_gets_400_and_harms_nobody(request_bytes: bytes) -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        answer = await _exchange(port, request_bytes, half_close=True)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert (await _exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(
            b"HTTP/1.1 200 "
        )

    _with_front(scenario)


def test_client_that_leaves_or_says_nothing_harms_nobody() -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        assert await _exchange(port, b"", half_close=True) == b""
        _, silent = await asyncio.open_connection("127.0.0.1", port)
        assert (await _exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(
            b"HTTP/1.1 200 "
        )
        silent.close()

    _with_front(scenario)


def test_silent_client_does_not_hold_up_the_hand_over() -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
        await writer.drain()
        await asyncio.sleep(0.1)
        front.close()
        heir = Front(listener, lifecycle)
        heir.open()
        assert (await _exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(
            b"HTTP/1.1 200 "
        )
        writer.write(b"others")  # and it is not cut either: what PID 1 accepted, PID 1 answers
        assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        writer.close()
        heir.close()

    _with_front(scenario)


def test_connection_that_comes_between_the_two_servers_waits_and_is_served() -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        front.close()  # nobody accepts now; the kernel does
        pending = asyncio.create_task(_exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))
        await asyncio.sleep(0.2)
        assert not pending.done()
        heir = Front(listener, lifecycle)  # as the engine does, on the same socket
        heir.open()
        assert (await pending).startswith(b"HTTP/1.1 200 ")
        heir.close()

    _with_front(scenario)


def test_closing_in_the_middle_of_a_storm_loses_no_connection() -> None:
    """asyncio's own server drops what it accepted in the moment of its close."""

    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        lifecycle.move(State.READY)  # as at the hand-over: what PID 1 still holds gets a 503
        for step in range(40):
            pending = [
                asyncio.create_task(_exchange(port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n"))
                for _ in range(30)
            ]
            for _ in range(step % 10):  # to every point of connecting, accepting and reading
                await asyncio.sleep(0)
            front.close()
            front.open()
            answers = await asyncio.gather(*pending)
            assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in answers)

    _with_front(scenario)


def test_retiring_answers_what_is_queued_and_resets_nobody() -> None:
    async def scenario(front: Front, lifecycle: Lifecycle, port: int, listener: socket.socket) -> None:
        def ask() -> asyncio.Task[bytes]:
            return asyncio.create_task(_exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))

        front.close()
        queued = [ask() for _ in range(50)]
        await asyncio.sleep(0.1)
        retiring = asyncio.create_task(front.retire())
        late = []
        while not retiring.done():
            late.append(ask())
            await asyncio.sleep(0.001)
        assert listener.fileno() == -1
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in await asyncio.gather(*queued))
        for answer in await asyncio.gather(*late, return_exceptions=True):
            # Accepted and answered, or never accepted; where SYN is dropped the latter is told later.
            refused = isinstance(answer, ConnectionRefusedError)
            assert refused or (isinstance(answer, bytes) and answer.startswith(b"HTTP/1.1 200 ")), answer

    _with_front(scenario)


def test_answers_are_not_held_back() -> None:
    """Nagle's algorithm and delayed acknowledgements cost 40 ms a request on a kept connection."""
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
