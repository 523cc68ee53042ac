"""`python -m benchmarks.throttle HOST:PORT TO:PORT RATE`: a proxy that makes a server's answers slow.

RATE is in MB/s, of all connections together; 0 is as fast as it goes. Prints a line once it listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable

_CHUNK = 64 << 10
# Late by up to this, a wait is made up for, as by a token bucket: else timers and busy cores lower the rate.
_BURST_SECONDS = 0.25


class Bucket:
    """Lets `rate` bytes per second pass, and what a pause of up to _BURST_SECONDS would have let pass."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        if not self._rate:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - _BURST_SECONDS) + size / self._rate
        await asyncio.sleep(self._free_at - now)


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, take: Callable[[int], Awaitable[None]]
) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            await take(len(data))
            writer.write(data)
            await writer.drain()
    writer.close()


async def serve(listen: str, to: str, rate: float) -> None:
    """Until it is cancelled. rate: bytes per second, 0 for no limit."""
    bucket = Bucket(rate)

    async def at_once(_: int) -> None: ...

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = to.rsplit(":", 1)
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_copy(reader, back, at_once), _copy(there, writer, bucket.take))

    host, port = listen.rsplit(":", 1)
    server = await asyncio.start_server(relay, host, int(port))
    print(f"{listen} -> {to}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(sys.argv[1], sys.argv[2], float(sys.argv[3]) * 1e6))
