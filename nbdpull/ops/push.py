"""The push: from verified frames in the repository into a target, with every core busy.

    plan (under a lock, in disk order)          workers (two a core)
    ----------------------------------          -----------------------------------------------
    segment by segment: batches of pieces  ->   read, verify, decompress all of a batch, then
    of at most 4 MiB of data; gaps              write it: nothing unverified reaches the target

Batches are handed out in disk order and written whole, so a target that takes bytes in order only
lets each worker wait for its turn, and memory holds one batch for each worker: once as it is stored,
once unpacked, in a buffer that lasts as long as the worker does.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from nbdpull.errors import DamagedError
from nbdpull.model.grain import FRAME_MAX, GRAIN, SEGMENT, segment_count
from nbdpull.model.segment import Interval, Segment
from nbdpull.nbdio.connection import Cancelled
from nbdpull.ops.meter import Meter
from nbdpull.ops.threads import run_all, worker_count
from nbdpull.repo.ranges import Fetched
from nbdpull.repo.repository import DiskReader
from nbdpull.target.base import Target

__all__ = ["DiskPush", "push"]

_BATCH_PIECES = 256
_BATCH_MAX = 4 << 20
_MEMORY = 32 << 20
"""Bytes of all batches together, unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPush:
    """One disk to restore.

    Attributes:
        name: for messages.
        size: bytes.
        reader: its map and frames in the repository.
        target: where it goes, open.
        meter: its progress.
    """

    name: str
    size: int
    reader: DiskReader
    target: Target
    meter: Meter


@dataclass(frozen=True, slots=True)
class _Piece:
    """One range of the disk; without an interval it reads as zero."""

    start: int
    end: int
    interval: Interval | None


class _Plan:
    """Hands out the disk in batches, in order. Any thread may call `take`."""

    def __init__(self, disk: DiskPush, batch: int) -> None:
        self._disk = disk
        self._grains = batch // GRAIN
        self._batches = self._all()
        self._lock = threading.Lock()

    def take(self) -> list[_Piece] | None:
        with self._lock:
            return next(self._batches, None)

    def _all(self) -> Iterator[list[_Piece]]:
        for index in range(segment_count(self._disk.size)):
            base = index * SEGMENT
            end = min(base + SEGMENT, self._disk.size)
            try:
                segment = self._disk.reader.segment(index)
            except DamagedError as exc:
                raise _lost(self._disk.name, base, end, exc) from exc
            yield from _batches(segment, base, end, self._grains)


def _batches(segment: Segment, base: int, end: int, most: int) -> Iterator[list[_Piece]]:
    """The pieces of one segment, which is [base, end) of the disk, without a gap between them.

    A batch has `most` grains of data at most.
    """
    batch: list[_Piece] = []
    grains = 0
    position = base
    for interval in segment:
        start = base + interval.start * GRAIN
        if batch and (grains + interval.n > most or len(batch) >= _BATCH_PIECES):
            yield batch
            batch, grains = [], 0
        if start > position:
            batch.append(_Piece(position, start, None))
        position = min(start + interval.n * GRAIN, end)
        batch.append(_Piece(start, position, interval))
        grains += interval.n
    if batch:
        yield batch
    if position < end:
        yield [_Piece(position, end, None)]


def _lost(disk: str, start: int, end: int, exc: DamagedError) -> DamagedError:
    return DamagedError(
        f"disk '{disk}' can't be restored: bytes {start} to {end} are lost: {exc}; 'nbdpull verify'"
        " lists all of the damage",
        key=exc.key,
        offset=exc.offset,
    )


class _Push:
    def __init__(self, disk: DiskPush, cancel: threading.Event, workers: int) -> None:
        self._disk = disk
        self._cancel = cancel
        self._batch = max(FRAME_MAX, min(_BATCH_MAX, _MEMORY // workers))
        self._plan = _Plan(disk, self._batch)

    def work(self) -> None:
        """A worker thread."""
        # Whole pages, so that a target can hand them to the storage as they are.
        buffer = memoryview(mmap.mmap(-1, self._batch))
        while (batch := self._plan.take()) is not None:
            written = 0
            for start, end, data in self._read(batch, buffer):
                if self._cancel.is_set():
                    raise Cancelled
                if data is None:
                    self._disk.target.zero(start, end - start)
                else:
                    written += self._disk.target.write(start, data)
            self._disk.meter.add(batch[-1].end - batch[0].start, written_bytes=written)

    def _read(
        self, batch: list[_Piece], buffer: memoryview
    ) -> list[tuple[int, int, memoryview | None]]:
        """All of the batch, with neighbours joined: one larger write is cheaper than many."""
        fetched = self._disk.reader.fetch(
            [piece.interval for piece in batch if piece.interval is not None]
        )
        ready: list[tuple[int, int, memoryview | None]] = []
        begin = at = 0
        for position, piece in enumerate(batch):
            if self._cancel.is_set():
                raise Cancelled
            if piece.interval is None:
                ready.append((piece.start, piece.end, None))
                continue
            self._read_piece(piece, piece.interval, fetched, buffer[at:])
            at += piece.end - piece.start
            if position + 1 == len(batch) or batch[position + 1].interval is None:
                ready.append((piece.end - (at - begin), piece.end, buffer[begin:at]))
                begin = at
        return ready

    def _read_piece(
        self, piece: _Piece, interval: Interval, fetched: Fetched, out: memoryview
    ) -> None:
        try:
            length = self._disk.reader.read_into(interval, fetched, out)
        except DamagedError as exc:
            raise _lost(self._disk.name, piece.start, piece.end, exc) from exc
        if length != piece.end - piece.start:
            # The map and the frame were both written as they are: a bug, not damage.
            msg = f"disk '{self._disk.name}' at {piece.start}: expected {piece.end - piece.start} bytes"
            raise ValueError(f"{msg}, the frame has {length}")


def push(disk: DiskPush, *, cancel: threading.Event) -> int:
    """Write one disk into its target; the bytes of data written.

    Blocks until every worker has ended, also when it raises. The target is neither finished nor
    aborted. `cancel` is set when it fails, so that what waits in the target ends too.

    Raises:
        DamagedError: part of the disk is lost; it says which.
        TargetError: the target failed.
        Cancelled: `cancel` was set.
    """
    workers = worker_count()
    state = _Push(disk, cancel, workers)
    run_all([state.work] * workers, cancel)
    return disk.meter.count("written_bytes")
