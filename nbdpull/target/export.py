"""An NBD export, written over several connections at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import LifoQueue

from nbdpull.errors import NbdError, TargetError, UsageError
from nbdpull.nbdio.connection import Connection
from nbdpull.target.base import Buffer, runs

__all__ = ["Export"]

_BLOCK = 64 * 1024
"""Zeroes inside data become requests of their own from this length on: a qcow2 cluster, below
which QEMU would have to write them anyway."""
_MIN_BLOCK_LIMIT = 64 * 1024  # the NBD specification allows no larger minimum block size
_BLANK = memoryview(bytes(1024 * 1024))


class Export:
    """A writable NBD export.

    Attributes:
        name: its URI.
        note: which of its bytes are left alone, when it is larger than the disk.
    """

    def __init__(
        self,
        uri: str,
        size: int,
        *,
        cancel: threading.Event,
        connections: int = 4,
        blank: bool = False,
    ) -> None:
        """Connect.

        Args:
            uri: NBD URI.
            size: bytes of the disk to restore.
            cancel: once set, every call raises `Cancelled` soon.
            connections: how many, where the server says that they see each other's writes.
            blank: the export reads as zeroes all over, so zeroes need not be written.

        Raises:
            UsageError: not an NBD URI, a read-only export, or one that is too small.
            TargetError: no connection.
        """
        self.name = uri
        self.note = ""
        self._blank = blank
        self._all: list[Connection] = []
        self._free: LifoQueue[Connection] = LifoQueue()
        with ExitStack() as cleanup:
            cleanup.callback(self.abort)
            first = self._connect(cancel)
            self._size = first.size
            self._min_block = first.min_block
            self._can_zero = first.can_zero
            self._check(first, size)
            if first.multi_conn:
                for _ in range(connections - 1):
                    self._connect(cancel)
            cleanup.pop_all()
        if first.size > size:
            self.note = f"bytes {size} to {first.size} of {uri} are left as they were"

    def _check(self, export: Connection, size: int) -> None:
        uri = self.name
        if export.read_only:
            raise UsageError(f"export {uri} is read-only; start its server with writing allowed")
        if export.size < size:
            raise UsageError(
                f"export {uri} has {export.size} bytes, the disk has {size}; choose a larger one"
            )
        if export.min_block > _MIN_BLOCK_LIMIT:
            raise TargetError(
                f"export {uri} wants blocks of at least {export.min_block} bytes; the NBD"
                f" specification allows {_MIN_BLOCK_LIMIT}"
            )

    def _connect(self, cancel: threading.Event) -> Connection:
        try:
            connection = Connection.open(self.name, cancel=cancel)
        except NbdError as exc:
            raise TargetError(str(exc)) from exc
        self._all.append(connection)
        self._free.put(connection)
        return connection

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        connection = self._free.get()
        try:
            yield connection
        except NbdError as exc:
            raise TargetError(str(exc)) from exc
        finally:
            self._free.put(connection)

    def expect(self, offset: int, length: int) -> None:
        """Nothing to do: there is no room to be made."""

    def write(self, offset: int, data: Buffer) -> int:
        """See `Target.write`."""
        view = memoryview(data)
        written = 0
        with self._connection() as connection:
            for start, end, zero in runs(view, _BLOCK):
                if zero:
                    self._zero(connection, offset + start, end - start)
                else:
                    self._write(connection, offset + start, view[start:end])
                    written += end - start
        return written

    def zero(self, offset: int, length: int) -> None:
        """See `Target.zero`."""
        if not self._blank:
            with self._connection() as connection:
                self._zero(connection, offset, length)

    def _zero(self, connection: Connection, offset: int, length: int) -> None:
        if self._blank:
            return
        end = offset + length
        aligned = end - end % self._min_block
        if self._can_zero and offset < aligned:
            connection.zero(offset, aligned - offset)
            offset = aligned
        while offset < end:
            step = min(len(_BLANK), end - offset)
            self._write(connection, offset, _BLANK[:step])
            offset += step

    def _write(self, connection: Connection, offset: int, data: memoryview) -> None:
        short = len(data) % self._min_block
        head = len(data) - short
        if head:
            connection.write(data[:head], offset)
        if short:
            # Only the disk's last block can be short: the server takes whole blocks, and what
            # follows the disk in that block is not ours to change.
            at = offset + head
            block = bytearray(min(self._min_block, self._size - at))
            connection.read_into(memoryview(block), at)
            block[:short] = data[head:]
            connection.write(block, at)

    def finish(self) -> None:
        """Flush, then disconnect."""
        try:
            # With multi-conn one flush covers what was completed on every connection.
            with self._connection() as connection:
                connection.flush()
        finally:
            self.abort()

    def abort(self) -> None:
        """Disconnect; what was written stays."""
        for connection in self._all:
            connection.close()
        self._all.clear()
