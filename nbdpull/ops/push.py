"""The push: from verified frames in the repository into a target, with every core busy.

    plan (under a lock, in disk order)          workers (two a core)
    ----------------------------------          -----------------------------------------------
    segment by segment: batches of pieces  ->   read, verify, decompress all of a batch, then
    of at most 4 MiB of data; gaps              write it: nothing unverified reaches the target

Batches are handed out in disk order and written whole, so a target that takes bytes in order only
lets each worker wait for its turn. Each worker has a buffer for one batch, as long as it lasts. What is
stored is read for 8 or 16 MiB of the disk at a time, which the workers share: a backup's workers took
turns in the pack, so the frames of one batch mostly have those of the next ones between them.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from nbdpull.errors import DamagedError
from nbdpull.model.grain import FRAME_MAX, GRAIN, SEGMENT, segment_count
from nbdpull.model.segment import Interval, Segment
from nbdpull.nbdio.errors import Cancelled
from nbdpull.ops.findings import joined
from nbdpull.ops.meter import Meter
from nbdpull.ops.threads import run_all, worker_count
from nbdpull.repo.ranges import RANGE_MAX, Fetched
from nbdpull.repo.repository import DiskReader
from nbdpull.target.base import Target

__all__ = ["FAR", "NEAR", "DiskPush", "LostRanges", "push"]

_RANGES_MAX = 1 << 16
_BATCH_PIECES = 256
_BATCH_MAX = 4 << 20
_MEMORY = 8 << 20
"""Bytes of all batches together, unpacked."""
_MAX_WORKERS = 12
"""The interpreter's lock binds a restore at seven cores (docs/performance.md); more would only take memory."""
FAR = 16 << 20
"""Bytes of the disk whose frames are read together from a store where a request costs; two such lots are in memory
at a time, mostly."""
NEAR = 8 << 20
"""The same, from a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPush:
    """One disk to restore.

    Attributes:
        name: for messages.
        size: bytes.
        reader: its map and frames in the repository.
        target: where it goes, open.
        meter: its progress.
        together: bytes of it whose frames are read together; see `FAR` and `NEAR`.
        lost: where what can't be read is noted, which then reads as zeroes; None ends the push with the first.
    """

    name: str
    size: int
    reader: DiskReader
    target: Target
    meter: Meter
    together: int = FAR
    lost: LostRanges | None = None


class LostRanges:
    """What of a disk could not be read. Any thread may call `add`.

    Attributes:
        keys: of the objects that something is wrong with.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranges: list[tuple[int, int]] = []
        self.keys: dict[str, None] = {}

    def add(self, start: int, end: int, exc: DamagedError) -> None:
        """Bytes of the disk, from and to, and why they can't be read."""
        with self._lock:
            self.keys[exc.key] = None
            self._ranges.append((start, end))
            if len(self._ranges) > _RANGES_MAX:
                self._ranges = list(joined(self._ranges))

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Bytes of the disk, from and to, sorted and joined."""
        with self._lock:
            return tuple(joined(self._ranges))


@dataclass(frozen=True, slots=True)
class _Piece:
    """One range of the disk; without an interval it reads as zero."""

    start: int
    end: int
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class _Batch:
    """Neighbouring pieces for one worker, and where their stored frames are found."""

    pieces: list[_Piece]
    fetched: Fetched


class _Plan:
    """Hands out the disk in batches, in order. Any thread may call `take`."""

    def __init__(self, disk: DiskPush, batch: int, longest: int) -> None:
        self._disk = disk
        self._longest = longest
        self._grains = batch // GRAIN
        self._batches = self._all()
        self._lock = threading.Lock()

    def take(self) -> _Batch | None:
        with self._lock:
            return next(self._batches, None)

    def _all(self) -> Iterator[_Batch]:
        for index in range(segment_count(self._disk.size)):
            base = index * SEGMENT
            end = min(base + SEGMENT, self._disk.size)
            try:
                segment = self._disk.reader.segment(index)
            except DamagedError as exc:
                if self._disk.lost is None:
                    raise _lost(self._disk.name, base, end, exc) from exc
                self._disk.lost.add(base, end, exc)
                segment = Segment.empty()
            for start, stop in segment.runs():
                begin = base + start * GRAIN
                self._disk.target.expect(begin, min(base + stop * GRAIN, end) - begin)
            lot: list[list[_Piece]] = []
            weight = 0
            for batch in _batches(segment, base, end, self._grains):
                lot.append(batch)
                weight += sum(map(_weight, batch))
                if weight >= self._disk.together // GRAIN:
                    yield from self._lot(lot)
                    lot, weight = [], 0
            yield from self._lot(lot)

    def _lot(self, lot: list[list[_Piece]]) -> Iterator[_Batch]:
        intervals = [one for batch in lot for one in _intervals(batch)]
        fetched = self._disk.reader.fetch(intervals, limit=self._longest)
        for batch in lot:
            yield _Batch(batch, fetched)


def _intervals(batch: list[_Piece]) -> list[Interval]:
    return [piece.interval for piece in batch if piece.interval is not None]


def _weight(piece: _Piece) -> int:
    """Grains of memory that a piece takes: of a frame that is used in part, all of it is read."""
    interval = piece.interval
    return 0 if interval is None else max(interval.n, -(-interval.clen // GRAIN))


def _batches(segment: Segment, base: int, end: int, most: int) -> Iterator[list[_Piece]]:
    """The pieces of one segment, which is [base, end) of the disk, without a gap between them.

    A batch has `most` grains at most, of data and of what is read for it.
    """
    batch: list[_Piece] = []
    grains = 0
    position = base
    for interval in segment:
        start = base + interval.start * GRAIN
        piece = _Piece(start, min(start + interval.n * GRAIN, end), interval)
        if batch and (grains + _weight(piece) > most or len(batch) >= _BATCH_PIECES):
            yield batch
            batch, grains = [], 0
        if start > position:
            batch.append(_Piece(position, start, None))
        position = piece.end
        batch.append(piece)
        grains += _weight(piece)
    if batch:
        yield batch
    if position < end:
        yield [_Piece(position, end, None)]


def _lost(disk: str, start: int, end: int, exc: DamagedError) -> DamagedError:
    return DamagedError(
        f"disk '{disk}' can't be restored: bytes {start} to {end} are lost: {exc}; 'nbdpull verify'"
        " lists all of the damage, --salvage restores the rest",
        key=exc.key,
        offset=exc.offset,
    )


class _Push:
    def __init__(self, disk: DiskPush, cancel: threading.Event, workers: int) -> None:
        self._disk = disk
        self._cancel = cancel
        self._batch = max(FRAME_MAX, min(_BATCH_MAX, _MEMORY // workers))
        # Each thread's allocator keeps room for the longest that it read.
        longest = max(FRAME_MAX, disk.together // workers) + GRAIN
        self._plan = _Plan(disk, self._batch, min(longest, RANGE_MAX))

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
            pieces = batch.pieces
            self._disk.meter.add(pieces[-1].end - pieces[0].start, written_bytes=written)
            del batch  # what was read for it is not needed while waiting for the next one

    def _read(self, batch: _Batch, buffer: memoryview) -> list[tuple[int, int, memoryview | None]]:
        """All of the batch, with neighbours joined: one larger write is cheaper than many."""
        pieces, fetched = batch.pieces, batch.fetched
        fetched.load(_intervals(pieces))
        ready: list[tuple[int, int, memoryview | None]] = []
        begin = at = 0
        for position, piece in enumerate(pieces):
            if self._cancel.is_set():
                raise Cancelled
            if piece.interval is None:
                ready.append((piece.start, piece.end, None))
                continue
            self._read_piece(piece, piece.interval, fetched, buffer[at:])
            at += piece.end - piece.start
            if position + 1 == len(pieces) or pieces[position + 1].interval is None:
                ready.append((piece.end - (at - begin), piece.end, buffer[begin:at]))
                begin = at
        return ready

    def _read_piece(
        self, piece: _Piece, interval: Interval, fetched: Fetched, out: memoryview
    ) -> None:
        try:
            length = self._disk.reader.read_into(interval, fetched, out)
        except DamagedError as exc:
            if self._disk.lost is None:
                raise _lost(self._disk.name, piece.start, piece.end, exc) from exc
            self._disk.lost.add(piece.start, piece.end, exc)
            length = piece.end - piece.start
            out[:length] = bytes(length)
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
    workers = min(worker_count(), _MAX_WORKERS)
    state = _Push(disk, cancel, workers)
    run_all([state.work] * workers, cancel)
    return disk.meter.count("written_bytes")
