"""Block status of long ranges, from the short and uneven replies that servers send.

    asked        |<------------------ step ------------------>|
    single       |####|                                          one extent, though more follow
    short        |####|....|####|                                fewer than asked: ask on from there
    long         |####|....|####|.............................|..... the last one reaches further
    same type    |####|####|....|                                neighbours that could be one

A reader hands out exactly the range that is asked for, keeps what a reply said beyond it for the next
call, and sizes its requests so that a reply stays small: an extent is 8 bytes on the wire, and a reply
that a stopped client leaves on its socket must fit the socket's buffer (see `connection`).
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nbdpull.nbdio.connection import Connection

__all__ = ["Allocation", "Dirty", "StatusReader", "allocation_reader", "dirty_reader"]

_MAX_LENGTH: Final = (4 << 30) - (64 << 10)


class Allocation(IntFlag):
    """Flags of the context ``base:allocation`` (NBD specification)."""

    HOLE = 1
    ZERO = 2


class Dirty(IntFlag):
    """Flags of a context ``qemu:dirty-bitmap:NAME`` (QEMU docs/interop/nbd.txt)."""

    DIRTY = 1


class StatusReader:
    """Block status of one context of one connection, in rising order of offsets.

    Args:
        step: bytes to ask for at first.
        largest: bytes to ask for at most, once replies turn out short. Equal to `step` where a
            reply's size is bounded by the step alone (a bitmap of known granularity).
        strict: never ask past the range that is read: a point in time that shows changed ranges
            only answers anything else with EINVAL.
    """

    def __init__(
        self,
        connection: Connection,
        context: str,
        *,
        step: int,
        largest: int,
        strict: bool = False,
    ) -> None:
        self._strict = strict
        self._connection = connection
        self._context = context
        self._smallest = step
        self._step = step
        self._largest = min(largest, _MAX_LENGTH)
        self._start = 0
        self._ends: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._flags: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def _fetch(self, offset: int, end: int) -> None:
        limit = end if self._strict else self._connection.size
        length = min(self._step, limit - offset)
        rows = self._connection.block_status(self._context, offset, length)
        self._start = offset
        self._ends = offset + np.cumsum(rows[:, 0])
        self._flags = rows[:, 1]
        if len(rows) > 4096:
            self._step = max(self._smallest, self._step // 4)
        elif len(rows) < 512:
            self._step = min(self._largest, self._step * 2)

    def read(
        self, start: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Starts, ends and flags of the extents of [start, end), clipped to it and gapless.

        Raises:
            NbdError: as `Connection.block_status`.
        """
        starts: list[NDArray[np.int64]] = []
        ends: list[NDArray[np.int64]] = []
        flags: list[NDArray[np.int64]] = []
        position = start
        while position < end:
            if not (len(self._ends) and self._start <= position < self._ends[-1]):
                self._fetch(position, end)
            first = int(np.searchsorted(self._ends, position, side="right"))
            last = int(np.searchsorted(self._ends, end, side="left")) + 1
            part_ends = np.minimum(self._ends[first:last], end)
            part_starts = np.concatenate(([position], part_ends[:-1]))
            starts.append(part_starts)
            ends.append(part_ends)
            flags.append(self._flags[first:last])
            position = int(part_ends[-1])
        if len(starts) == 1:
            return starts[0], ends[0], flags[0]
        return np.concatenate(starts), np.concatenate(ends), np.concatenate(flags)


def dirty_reader(connection: Connection, context: str) -> StatusReader:
    """A reader of a dirty bitmap of 64 KiB granularity: 512 MiB a request is at most 64 KiB of reply."""
    return StatusReader(connection, context, step=512 << 20, largest=512 << 20)


def allocation_reader(connection: Connection, *, strict: bool) -> StatusReader:
    """A reader of ``base:allocation``: extents can be as small as the server's 4 KiB blocks.

    32 MiB a request is at most 64 KiB of reply; longer ones only while replies are short.
    """
    return StatusReader(
        connection, "base:allocation", step=32 << 20, largest=1 << 30, strict=strict
    )
