"""PID 1's side of the port: answers probes with h11 until the engine has the socket, and after it died."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus

import h11

from runtime.lifecycle import Lifecycle, Reply
from runtime.listener import Acceptor, refuse_new

_READ_BYTES = 65536
_REQUEST_SECONDS = 10.0
# How long a client that got its answer may take to close.
_LINGER_SECONDS = 1.0
# Handshakes that began before `retire` end within a round trip.
_SETTLE_SECONDS = 0.1


class Front:
    """Answers on the listening socket whenever the engine does not.

    One request per connection (`Connection: close`): at the hand-over no idle connection of a client
    is left with PID 1, so none has to be cut.
    """

    def __init__(self, listener: socket.socket, lifecycle: Lifecycle) -> None:
        self._listener = listener
        self._lifecycle = lifecycle
        self._acceptor: Acceptor | None = None
        self._busy: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        if self._acceptor is None:
            self._acceptor = Acceptor(self._listener, self._client)

    def close(self) -> None:
        """Stop accepting. Requests of connections that were accepted are still answered."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None

    async def retire(self) -> None:
        """Close the listening socket, and answer whatever the kernel had accepted by then."""
        refuse_new(self._listener)
        self.open()
        await asyncio.sleep(_SETTLE_SECONDS)
        assert self._acceptor is not None
        accepted = self._acceptor.accept()
        self.close()
        self._listener.close()  # at once: a connection that is queued when this happens is reset
        if accepted or self._busy:
            await asyncio.wait(accepted | self._busy, timeout=_LINGER_SECONDS)

    async def _client(self, connection: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        loop = asyncio.get_running_loop()
        try:
            answer = await self._exchange(connection)
            async with asyncio.timeout(_REQUEST_SECONDS):
                await loop.sock_sendall(connection, answer)
            connection.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(
                _LINGER_SECONDS
            ):  # a close before the client's resets what it has not read
                while await loop.sock_recv(connection, _READ_BYTES):
                    pass
        except (OSError, TimeoutError):
            pass  # the client went away or never finished its request
        finally:
            self._busy.discard(task)
            connection.close()

    async def _exchange(self, client: socket.socket) -> bytes:
        """Read one request; with its body if that comes in time, for an unread one would reset the answer."""
        loop = asyncio.get_running_loop()
        connection = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                while True:
                    event = connection.next_event()
                    if event is h11.NEED_DATA:
                        if connection.they_are_waiting_for_100_continue:
                            break  # its body stays with it
                        connection.receive_data(await loop.sock_recv(client, _READ_BYTES))
                    elif isinstance(event, h11.Request):
                        request = event
                    elif isinstance(event, h11.EndOfMessage):
                        break
                    elif isinstance(event, h11.ConnectionClosed):
                        return b""
        except TimeoutError:
            if request is None:
                return b""
        except h11.RemoteProtocolError:
            return _encode(connection, Reply(HTTPStatus.BAD_REQUEST, {"error": {"message": "bad request"}}))
        assert request is not None
        path = request.target.decode("ascii", "replace").split("?", 1)[0]
        reply = self._lifecycle.answer(path)
        if reply is None:  # the engine has the port by now; this connection came a moment too early
            reply = self._lifecycle.not_serving()
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
