"""Which blocks lie in a scratch image on another host, asked through an export of it."""

from __future__ import annotations

import logging

from nbdpull.errors import NbdError
from nbdpull.nbdio.connection import Connection
from nbdpull.nbdio.errors import ReplyError
from nbdpull.nbdio.status import Allocation, StatusReader
from nbdpull.source.base import GRANULARITY

__all__ = ["OverwrittenElsewhere"]

log = logging.getLogger(__name__)


class OverwrittenElsewhere:
    """See `Overwritten`: which blocks lie in a scratch image, asked through an export of it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._connection: Connection | None = None

    def close(self) -> None:
        """End the connection; a second call does nothing, and the next question makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __call__(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges of [start, end), as (start, end) in bytes; one thread at a time may ask."""
        if self._connection is not None:
            try:
                return self._ask(self._connection, start, end)
            except ReplyError:
                raise
            except NbdError as exc:
                # Lost together with those that the pull reads by, which makes them again: so is this one.
                log.debug("%s", exc)
                self.close()
        self._connection = Connection.open(self._uri, contexts=("base:allocation",))
        return self._ask(self._connection, start, end)

    def _ask(self, connection: Connection, start: int, end: int) -> list[tuple[int, int]]:
        # A new reader each time: what an earlier reply said may be out of date.
        reader = StatusReader(connection, "base:allocation", smallest=GRANULARITY, strict=True)
        try:
            rows = zip(*reader.read(start, end), strict=True)
        except NbdError:
            self.close()
            raise
        return [(int(at), int(to)) for at, to, flags in rows if not flags & Allocation.HOLE]
