"""Block status of long ranges, from the short and uneven replies that servers send.

    asked        |<------------------ step ------------------>|
    single       |####|                                          one extent, though more follow
    short        |####|....|####|                                fewer than asked: ask on from there
    long         |####|....|####|.............................|..... the last one reaches further
    same type    |####|####|....|                                neighbours that could be one

A reader hands out exactly the range that is asked for, and keeps what a reply said beyond it for the next
call. It never asks for more than a socket's buffer holds, because a stopped client leaves the reply there
(see `connection`), and how many extents will come can't be known before: 8 bytes each, in QEMU up to 1 MiB
a reply. So it asks in one of two ways:

    near         |<-- step -->|                            all extents; a step has no room for too many
    far          |<------------- largest ------------->|   the first extent only: one, however long it is

Far where the last answer was one extent all along (a thin disk's holes), near elsewhere.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nbdpull.nbdio.connection import Connection

__all__ = ["Allocation", "Dirty", "StatusReader", "allocation_reader", "dirty_reader"]

_MAX_LENGTH: Final = (4 << 30) - (64 << 10)
_MAX_EXTENTS: Final = 8192
"""In one reply: 64 KiB, half of what a unix socket was seen to hold without harm."""
_SMALLEST: Final = 512
"""Bytes of the smallest extent of ``base:allocation``: qcow2's smallest cluster, a disk's sector."""


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
        smallest: bytes of the smallest extent there can be; by it a reply has at most 64 KiB.
        strict: never ask past the range that is read: a point in time that shows changed ranges
            only answers anything else with EINVAL.
    """

    def __init__(
        self, connection: Connection, context: str, *, smallest: int, strict: bool = False
    ) -> None:
        self._strict = strict
        self._connection = connection
        self._context = context
        self._step = min(_MAX_EXTENTS * smallest, _MAX_LENGTH)
        self._far = False
        self._start = 0
        self._ends: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._flags: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def _fetch(self, offset: int, end: int) -> None:
        left = (end if self._strict else self._connection.size) - offset
        far = self._far and left > self._step
        length = min(_MAX_LENGTH if far else self._step, left)
        rows = self._connection.block_status(self._context, offset, length, one=far)
        self._start = offset
        self._ends = offset + np.cumsum(rows[:, 0])
        self._flags = rows[:, 1]
        self._far = len(rows) == 1 and bool(rows[0, 0] >= self._step)

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


def dirty_reader(
    connection: Connection, context: str, *, granularity: int = 64 * 1024
) -> StatusReader:
    """A reader of a dirty bitmap: no extent is smaller than the bitmap's granularity."""
    return StatusReader(connection, context, smallest=granularity)


def allocation_reader(connection: Connection, *, strict: bool) -> StatusReader:
    """A reader of ``base:allocation``."""
    return StatusReader(connection, "base:allocation", smallest=_SMALLEST, strict=strict)
