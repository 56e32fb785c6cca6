"""Giving back what of a point in time nobody will read any more.

    kept in the repository      what a puller has read and put: once its pack is durable (see `ops.waiting`); where
                                nobody could go on with the run, at once, while its pack may still be open
    zero by block status        when its segment is planned
    clean, in an incremental    before it is read about: all that the dirty bitmap calls unchanged

What is given back leaves the scratch, and the guest's next write to it costs no copy. It can't be read again:
the server refuses it. So nothing is given back that the audit or healing might still want.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final

import numpy as np

from nbdpull.errors import DamagedError
from nbdpull.model.grain import GRAIN, SEGMENT, Kind, Kinds, segment_count, segment_grains
from nbdpull.nbdio.connection import Connection, ReplyError
from nbdpull.nbdio.status import StatusReader
from nbdpull.ops.extents import mark_changed
from nbdpull.ops.heal import Healer
from nbdpull.repo.repository import DiskReader

__all__ = ["Trimmer", "long_runs", "trim_unchanged"]

log = logging.getLogger(__name__)

_LEAST_GRAINS: Final = 16
"""Shorter runs that nobody will read are left: a request would cost QEMU more than it spares the guest."""
_MOST: Final = 1 << 16
"""Requests for the clean runs of a disk: on a huge and scattered one they would keep QEMU busy for minutes."""


class Trimmer:
    """Trims through one connection, whole grains only.

    Never a part of one: a server that keeps 64 KiB blocks (QEMU below 9.1) aborts when it is asked for less.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.sent = 0

    def trim(self, start: int, end: int) -> None:
        """Give [start, end) back, in bytes of the disk, as far as it is whole grains.

        Raises:
            NbdError: the connection is lost.
        """
        first, last = -(-start // GRAIN) * GRAIN, end // GRAIN * GRAIN
        if not self._connection.can_trim or last <= first:
            return
        self.sent += 1
        try:
            self._connection.trim(first, last - first)
        except ReplyError as exc:
            self._stop(exc)

    def trim_kind(self, kinds: Kinds, kind: Kind, base: int, end: int) -> None:
        """Give back the longer runs of one kind in a segment, which is [base, end) in bytes."""
        for start, until in long_runs(kinds, kind, base, end):
            self.trim(start, until)

    def settle(self) -> None:
        """Wait until all that was given back is.

        Raises:
            NbdError: the connection is lost.
        """
        try:
            self._connection.settle()
        except ReplyError as exc:
            self._stop(exc)

    def _stop(self, exc: ReplyError) -> None:
        # It only costs room, and the guest a copy: no reason to give up the backup.
        self._connection.can_trim = False
        log.warning("no more of the scratch is given back: %s", exc)


def long_runs(kinds: Kinds, kind: Kind, base: int, end: int) -> Iterator[tuple[int, int]]:
    """The longer runs of one kind in a segment, which is [base, end); as (start, end) in bytes."""
    edges = np.flatnonzero(np.diff((kinds == kind).astype(np.int8), prepend=0, append=0))
    starts, ends = edges[::2], edges[1::2]
    long = ends - starts >= min(_LEAST_GRAINS, len(kinds))
    for first, last in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
        yield base + first * GRAIN, min(base + last * GRAIN, end)


def trim_unchanged(
    trimmer: Trimmer,
    dirty: StatusReader,
    *,
    size: int,
    parent: DiskReader,
    healer: Healer | None,
) -> None:
    """Give back all that a dirty bitmap calls clean, except where healing may read it.

    Raises:
        NbdError: the source failed.
    """
    for index in range(segment_count(size)):
        if trimmer.sent >= _MOST:
            break
        base = index * SEGMENT
        end = min(base + SEGMENT, size)
        kinds = np.full(segment_grains(size, index), Kind.CLEAN, dtype=np.uint8)
        changed = mark_changed(kinds, dirty, base, end)
        if _may_be_read(index, parent, healer, changed=changed):
            continue
        trimmer.trim_kind(kinds, Kind.CLEAN, base, end)
    trimmer.settle()


def _may_be_read(index: int, parent: DiskReader, healer: Healer | None, *, changed: bool) -> bool:
    if healer is not None and healer.lacks(index):
        return True
    if not changed:
        return False
    try:
        parent.segment(index)
    except DamagedError:
        return True  # then the segment is read in full
    return False
