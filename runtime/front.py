"""PID 1's side of the port: answers probes with h11 until the engine has the socket, and after it died."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from http import HTTPStatus

import h11

from runtime.lifecycle import Lifecycle, Reply

_READ_BYTES = 65536
_REQUEST_SECONDS = 10.0
_CLOSE_SECONDS = 0.5


class Front:
    """Accepts on a duplicate of the listening socket, so that closing it leaves the queue untouched.

    One request per connection (`Connection: close`): at the hand-over no idle connection of a client
    is left with PID 1, so none has to be cut.
    """

    def __init__(self, listener: socket.socket, lifecycle: Lifecycle, backlog: int) -> None:
        self._listener = listener
        self._backlog = backlog
        self._lifecycle = lifecycle
        self._server: asyncio.Server | None = None
        self._busy: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._client, sock=self._listener.dup(), backlog=self._backlog
            )

    async def close(self) -> None:
        """Stop accepting and finish the requests that were already accepted."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        if self._busy:
            _, slow = await asyncio.wait(self._busy, timeout=_CLOSE_SECONDS)
            for task in slow:  # whoever has not sent a whole request by now must not hold up the others
                task.cancel()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                writer.write(await self._exchange(reader))
                await writer.drain()
        except (OSError, TimeoutError):
            pass  # the client went away or never finished its request
        finally:
            self._busy.discard(task)
            with contextlib.suppress(OSError):
                writer.close()

    async def _exchange(self, reader: asyncio.StreamReader) -> bytes:
        """Read one whole request, body included (an unread body would reset the answer)."""
        connection = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(_READ_BYTES))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.EndOfMessage):
                    break
                elif isinstance(event, h11.ConnectionClosed):
                    return b""
        except h11.RemoteProtocolError:
            return _encode(connection, Reply(HTTPStatus.BAD_REQUEST, {"error": {"message": "bad request"}}))
        assert request is not None
        path = request.target.decode("ascii", "replace").split("?", 1)[0]
        reply = self._lifecycle.answer(path)
        if reply is None:  # the engine has the port by now; this connection came a moment too early
            reply = Reply(HTTPStatus.SERVICE_UNAVAILABLE, {"error": {"message": "try again"}})
        return _encode(connection, reply, head=request.method == b"HEAD")


def _encode(connection: h11.Connection, reply: Reply, head: bool = False) -> bytes:
    content = reply.content
    headers = [*reply.headers, ("content-length", str(len(content))), ("connection", "close")]
    status = h11.Response(status_code=reply.status, headers=headers, reason=reply.status.phrase.encode())
    parts = [connection.send(status)]
    if not head:
        parts.append(connection.send(h11.Data(data=content)))
    parts.append(connection.send(h11.EndOfMessage()))
    return b"".join(part for part in parts if part)
