"""Reading through several connections to one export, the next bytes begun while the caller works on the last ones.

    begin   |r|r|r|r|  requests, to the connections in turn, until each has as much in flight as it may
    ...                the caller compresses; the server answers into the sockets, which hold that much
    finish  take the first reply, send the next request to the same connection, and so on

The bytes in flight on each connection stay as few as they were (see `nbdio.connection`): a client that is
stopped leaves replies that fit the sockets' buffers, and the server goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from nbdpull.nbdio.errors import ReplyError

if TYPE_CHECKING:
    from nbdpull.nbdio.connection import Connection

__all__ = ["ReadAhead"]


class ReadAhead:
    """One read at a time, in two steps. Owned by one thread.

    Args:
        connections: to one export, not used by anybody else between `begin` and the end of `finish`.
        pace: told the length of each request before it is sent; returns when it may be.
    """

    def __init__(
        self, connections: Sequence[Connection], pace: Callable[[int], None] | None = None
    ) -> None:
        self._connections = connections
        self._pace = pace
        self._window = len(connections) * min(one.window for one in connections)
        self._pending: deque[tuple[Connection, int, int, int]] = deque()
        self._buffer = memoryview(b"")
        self._offset = 0
        self._position = 0
        self._sent = 0

    def begin(self, buffer: memoryview, offset: int) -> None:
        """Ask for the first of the export's bytes from `offset` on, as many as may be in flight.

        `buffer` belongs to the server until `finish` has returned.

        Raises:
            NbdError: the connection is lost.
        """
        if self._pending:
            raise ValueError("a read was begun and not finished")
        self._buffer, self._offset, self._position, self._sent = buffer, offset, 0, 0
        self._send()

    def finish(self) -> None:
        """Wait until the buffer is full.

        Raises:
            ReplyError: the server refused one of the requests; the buffer is undefined, and nothing is
                written into it any more.
            NbdError: the connection is lost.
            Cancelled: the owner's event was set.
        """
        while self._pending:
            connection, *request = self._pending.popleft()
            try:
                connection.wait_read(*request)
            except Exception as exc:
                self._drain(exc)
                raise
            self._send()

    def _send(self) -> None:
        total = len(self._buffer)
        while self._position < total and len(self._pending) < self._window:
            connection = self._connections[self._sent % len(self._connections)]
            at = self._offset + self._position
            length = connection.piece(at, total - self._position)
            if self._pace is not None:
                self._pace(length)
            piece = self._buffer[self._position : self._position + length]
            cookie = connection.start_read(piece, at)
            self._pending.append((connection, cookie, at, length))
            self._position += length
            self._sent += 1

    def _drain(self, exc: Exception) -> None:
        pending, self._pending = self._pending, deque()
        if isinstance(exc, ReplyError):
            # The caller may use the buffer again: what is still to come must not land in it then.
            for connection, *request in pending:
                with suppress(ReplyError):
                    connection.wait_read(*request)
