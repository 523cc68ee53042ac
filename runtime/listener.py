"""The one listening socket: bound by PID 1, accepted on by PID 1 and by the engine in turn."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

_BACKLOG = 2048
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_RETRY_SECONDS = 0.2
_SO_ATTACH_FILTER = 26


def bind(host: str, port: int) -> socket.socket:
    """A listening, non-blocking socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Connections inherit it. asyncio sets it only where it sees that protocol, and without it every
        # answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


class Acceptor:
    """Gives every connection of `listener` to `connected`, until closed. The queue outlives it.

    asyncio's own Server loses, when closed, what it accepted in that moment (cpython#109564).
    """

    def __init__(
        self, listener: socket.socket, connected: Callable[[socket.socket], Coroutine[Any, Any, None]]
    ) -> None:
        self._listener, self._connected = listener, connected
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._listen()

    @property
    def tasks(self) -> frozenset[asyncio.Task[None]]:
        """The calls of `connected` that have not returned."""
        return frozenset(self._tasks)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener.fileno())

    def _listen(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def accept(self) -> frozenset[asyncio.Task[None]]:
        """Accept what is queued. Returns every call of `connected` that has not returned."""
        self._accept()
        return self.tasks

    def _accept(self) -> None:
        for _ in range(_BACKLOG):
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno in _FULL:  # no descriptor is free: let some be closed first
                    self._loop.remove_reader(self._listener.fileno())
                    self._loop.call_later(_RETRY_SECONDS, self._listen)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._connected(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


def refuse_new(listener: socket.socket) -> None:
    """Let no further connection begin; those that the kernel has completed stay in the queue.

    Closing a listening socket resets what is queued, and a handshake may end between the last accept and
    the close. A socket filter that drops SYN prevents that: a client sends SYN again after a second, and
    then finds the port closed.
    """
    # tcpdump's `tcp[13] & 2 != 0`: load the flags; is SYN set? drop : keep
    program = struct.pack(
        "HBBI" * 4, *(0x30, 0, 0, 13), *(0x45, 0, 1, 2), *(0x06, 0, 0, 0), *(0x06, 0, 0, 0xFFFFFFFF)
    )
    code = ctypes.create_string_buffer(program, len(program))
    # Some kernels want CAP_NET_ADMIN for it: there the microseconds between accept and close stay.
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(code))
        )
