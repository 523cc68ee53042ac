"""The proxy that makes a registry slow: all bytes, both ways, and no faster than it is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
from unittest import mock

import pytest

from benchmarks.throttle import Bucket, serve


def _through_proxy(data: bytes, rate: float) -> tuple[bytes, bytes, float]:
    """What the server behind the proxy got, what its client got, and the seconds that this took."""
    got: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readexactly(5))
        writer.write(data)
        await writer.drain()
        writer.close()

    async def run() -> tuple[bytes, float]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        there = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        free = await asyncio.start_server(answer, "127.0.0.1", 0)
        here = free.sockets[0].getsockname()[1]
        free.close()
        proxy = asyncio.create_task(serve(f"127.0.0.1:{here}", there, rate))
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                reader, writer = await asyncio.open_connection("127.0.0.1", here)
                break
            await asyncio.sleep(0.01)
        began = asyncio.get_running_loop().time()
        writer.write(b"hello")
        received = await reader.read(-1)
        took = asyncio.get_running_loop().time() - began
        writer.close()
        proxy.cancel()
        server.close()
        return received, took

    received, took = asyncio.run(run())
    return got[0], received, took


def test_everything_arrives_and_not_faster_than_the_rate() -> None:
    data = os.urandom(1_000_000)
    asked, received, took = _through_proxy(data, 1e6)
    assert (asked, received) == (b"hello", data)
    assert took >= 0.74  # of 1, less the burst: never too fast, however slow the machine


def test_a_late_waker_makes_up_for_what_it_missed() -> None:
    """Else the rate is that of the machine's timers: 28 MB/s instead of 40, as was measured."""
    clock = [100.0]

    class Loop:
        def time(self) -> float:
            return clock[0]

    slept: list[float] = []

    async def late(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += max(0.0, seconds) + 0.01  # every timer is late

    bucket = Bucket(1e6)
    with mock.patch("asyncio.get_running_loop", Loop), mock.patch("asyncio.sleep", late):
        takes = bucket.take(1_000_000), *(bucket.take(50_000) for _ in range(100))
        for take in takes:
            with contextlib.suppress(StopIteration):
                take.send(None)
    # 6 MB at 1 MB/s, the first 0.25 of them saved up.
    assert clock[0] - 100.0 == pytest.approx(5.75, abs=0.02)


def test_without_a_rate_nothing_waits() -> None:
    data = os.urandom(300_000)
    assert _through_proxy(data, 0)[1] == data
