"""Clients that count: did every connection that the server's kernel accepted get a whole answer?"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11

_READ_BYTES = 65536
# Nobody waits longer for an answer: whoever does, hangs.
_ANSWER_SECONDS = 300.0
_PAUSE_SECONDS = 0.2
_LATE_TOKENS = 16


@dataclass
class Tally:
    """answers: whole answers by status; streams: those with every token; late_streams: those of them that
    began after the signal; errors: streams that ended with an error event; closed: whole 200s after which the
    server closes the connection; refused: connections that the kernel never accepted; lost: accepted, yet cut
    short or reset.
    """

    answers: Counter[int] = field(default_factory=Counter)
    streams: int = 0
    late_streams: int = 0
    errors: int = 0
    closed: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        answers = {str(status): count for status, count in sorted(self.answers.items())}
        return {**vars(self), "answers": answers}


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    keep_alive: bool


@dataclass(frozen=True)
class Target:
    """host, port: the server itself; a proxy in between would accept for it. model: the served name."""

    host: str
    port: int
    model: str

    def get(self, path: str) -> list[h11.Event]:
        return [h11.Request(method="GET", target=path, headers=[("host", self.host)]), h11.EndOfMessage()]

    def complete(self, tokens: int, *, stream: bool) -> list[h11.Event]:
        body: dict[str, Any] = {"model": self.model, "prompt": "Once upon a time", "max_tokens": tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        data = json.dumps(body).encode()
        headers = [
            ("host", self.host),
            ("content-type", "application/json"),
            ("content-length", str(len(data))),
        ]
        request = h11.Request(method="POST", target="/v1/completions", headers=headers)
        return [request, h11.Data(data=data), h11.EndOfMessage()]


class Client:
    """One client of `target`; keeps its connection as long as the server does."""

    def __init__(self, target: Target, tally: Tally) -> None:
        self._target, self._tally = target, tally
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._protocol = h11.Connection(h11.CLIENT)

    async def ask(
        self, request: list[h11.Event], first_byte: Callable[[], None] = lambda: None
    ) -> Answer | None:
        """None, and the tally says so, when there is no whole answer."""
        if self._reader is not None and self._reader.at_eof():
            self.close()  # the server closed it while idle; every client looks before it uses one again
        if self._writer is None:
            try:
                self._reader, self._writer = await asyncio.open_connection(
                    self._target.host, self._target.port
                )
            except OSError:
                self._tally.refused += 1
                return None
            self._protocol = h11.Connection(h11.CLIENT)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                answer = await self._exchange(request, first_byte)
        except (OSError, h11.RemoteProtocolError, TimeoutError) as error:
            self._tally.lost.append(f"{type(error).__name__}: {error}")
            self.close()
            return None
        self._tally.answers[answer.status] += 1
        if answer.keep_alive:
            self._protocol.start_next_cycle()
        else:
            self._tally.closed += answer.status == 200
            self.close()
        return answer

    async def _exchange(self, request: list[h11.Event], first_byte: Callable[[], None]) -> Answer:
        assert self._reader is not None
        assert self._writer is not None
        self._writer.write(b"".join(self._protocol.send(event) or b"" for event in request))
        await self._writer.drain()
        status, parts = 0, []
        while True:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                # An end of file in the middle of an answer is h11's RemoteProtocolError.
                self._protocol.receive_data(await self._reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                first_byte()
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status, b"".join(parts), self._protocol.our_state is h11.DONE)
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError("closed without an answer")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def count_stream(answer: Answer, tokens: int, tally: Tally) -> bool:
    """Is this the whole stream (True), or one that ends with an error, or neither?"""
    events = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        tally.lost.append("a stream ended without [DONE]")
        return False
    parsed = [json.loads(event) for event in events[:-1]]
    if any("error" in event for event in parsed):
        tally.errors += 1
    elif (parsed[-1].get("usage") or {}).get("completion_tokens") == tokens:
        tally.streams += 1
        return True
    else:
        tally.lost.append(f"a stream had not {tokens} tokens: {events[-2]}")
    return False


async def repeat(
    target: Target, tally: Tally, stop: asyncio.Event, request: list[h11.Event], *, keep: bool
) -> None:
    """The same short request again and again, on one kept connection or on a new one each."""
    client = Client(target, tally)
    while not stop.is_set():
        await client.ask(request)
        if not keep:
            client.close()
        await asyncio.sleep(_PAUSE_SECONDS)
    client.close()


async def stream(
    target: Target, tally: Tally, stop: asyncio.Event, tokens: int, running: asyncio.Event
) -> None:
    """Stream after stream. running: set with the first token."""
    client = Client(target, tally)
    while not stop.is_set():
        answer = await client.ask(target.complete(tokens, stream=True), running.set)
        if answer is not None and answer.status == 200:
            count_stream(answer, tokens, tally)
        await asyncio.sleep(_PAUSE_SECONDS)
    client.close()


async def late_stream(target: Target, tally: Tally) -> None:
    """One stream on a connection of its own: of a client that has not heard of the shutdown yet."""
    client = Client(target, tally)
    answer = await client.ask(target.complete(_LATE_TOKENS, stream=True))
    client.close()
    if answer is not None and answer.status == 200:
        tally.late_streams += count_stream(answer, _LATE_TOKENS, tally)


async def shut_down_under_load(
    target: Target,
    terminate: Callable[[], object],
    wait: Callable[[], int],
    *,
    streams: int = 4,
    others: int = 4,
    tokens: int = 200,
) -> tuple[Tally, int]:
    """Call `terminate` while streams run and short requests come, on new and on kept connections, until
    `wait` has returned the exit code. One more stream begins when `terminate` has returned. Returns what the
    clients counted, `closed` from just before `terminate` on, and that code.
    """
    tally, stop = Tally(), asyncio.Event()
    running = [asyncio.Event() for _ in range(streams)]
    short = target.complete(1, stream=False)
    clients = [asyncio.create_task(stream(target, tally, stop, tokens, event)) for event in running]
    clients += [
        asyncio.create_task(repeat(target, tally, stop, short, keep=keep))
        for keep in (True, False)
        for _ in range(others)
    ]
    try:
        await asyncio.gather(*(event.wait() for event in running))
        tally.closed = 0
        await asyncio.to_thread(terminate)
        clients.append(asyncio.create_task(late_stream(target, tally)))
        code = await asyncio.to_thread(wait)
    finally:
        stop.set()
        await asyncio.gather(*clients)
    return tally, code


async def storm(target: Target, clients: int, until: Callable[[], bool]) -> Tally:
    """Hundreds of connections, half of them kept, half of them new each time, until `until()`."""
    tally, stop = Tally(), asyncio.Event()
    requests = (target.get("/health"), target.get("/v1/models"))
    tasks = [
        asyncio.create_task(repeat(target, tally, stop, requests[i // 2 % 2], keep=i % 2 == 0))
        for i in range(clients)
    ]
    while not await asyncio.to_thread(until):
        await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*tasks)
    return tally
