"""A puller: reads, hashes, compresses and stores what batches ask for, the whole way of each byte in one thread.

begin the next frame -> store the last one -> take what has come meanwhile
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from nbdpull.errors import NbdError
from nbdpull.model.grain import FRAME_MAX, GRAIN, SEGMENT
from nbdpull.model.segment import Interval
from nbdpull.nbdio.connection import Cancelled, Connection
from nbdpull.nbdio.readahead import ReadAhead
from nbdpull.ops.fairqueue import FairQueue
from nbdpull.ops.pullmeter import Meter
from nbdpull.ops.pulltimes import PullTimes, ThreadTimes
from nbdpull.ops.pullwork import Batch, DiskPull, SegmentWork, finish
from nbdpull.ops.rate import RateLimit
from nbdpull.ops.threads import give_way
from nbdpull.ops.trimming import Trimmer
from nbdpull.repo.repository import Found, KnownFrame
from nbdpull.source.journal import ZEROES

__all__ = ["PullState", "Puller"]

_ZERO: Final = bytearray(FRAME_MAX)
_DISKS: Final = 2
"""That a puller keeps connected, by `DiskPull.connections`: QEMU accepts 100 from version 9.2 on (`nbd-server-start`)."""


@dataclass(frozen=True, slots=True)
class PullState:
    """What all threads of a pull share.

    Attributes:
        batches: what is to be read, with a lane for each disk.
        shared: the connection that all use, by the address of an export that may take one only.
        lock: for what several threads change in the work.
    """

    cancel: threading.Event
    rate: RateLimit | None
    meter: Meter
    batches: FairQueue[Batch]
    times: PullTimes
    shared: dict[str, Connection] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Reader:
    """A puller's way to one export: `connections` of them, or the one that all threads share."""

    def __init__(
        self, disk: DiskPull, shared: Connection | None, state: PullState, times: ThreadTimes
    ) -> None:
        self._shared = shared
        self._state = state
        self._times = times
        self._pace = None if state.rate is None else self._take_turn
        self._asked: tuple[memoryview, int] | None = None
        self.own: list[Connection] = []
        if shared is None:
            try:
                for _ in range(disk.connections):
                    self.own.append(Connection.open(disk.uri, cancel=state.cancel))
            except BaseException:
                for connection in self.own:
                    connection.close()
                raise
            self._ahead = ReadAhead(self.own, self._pace)
        self.trimmer = Trimmer(shared or self.own[0])

    def begin(self, buffer: memoryview, offset: int) -> None:
        """See `ReadAhead.begin`. What all share is not asked before somebody waits for the answer."""
        if self._shared is None:
            self._ahead.begin(buffer, offset)
        else:
            self._asked = (buffer, offset)

    def finish(self) -> None:
        """See `ReadAhead.finish`."""
        if self._shared is None:
            self._ahead.finish()
        elif self._asked is not None:
            if self._pace is not None:
                self._pace(len(self._asked[0]))
            self._shared.read_into(*self._asked)

    def _take_turn(self, length: int) -> None:
        """Wait for the turn of one request: whole frames would come in bursts, which a guest's write waits behind."""
        if self._state.rate is not None:
            began = time.perf_counter()
            self._state.rate.take(length, self._state.cancel)
            # It is not the source that is waited for.
            self._times.source_s -= time.perf_counter() - began

    def close(self) -> None:
        """Close what is the puller's own."""
        if self.own:
            # QEMU complains of a client that goes before it was told that its last range is trimmed.
            with suppress(NbdError, Cancelled):
                self.trimmer.settle()
        for connection in self.own:
            self._times.close(connection)


class _Readers:
    """A puller's readers, one a disk: it keeps that of the last disk when it goes to another one."""

    def __init__(self, state: PullState, times: ThreadTimes) -> None:
        self._state = state
        self._times = times
        self._lock = threading.Lock()
        self._readers: OrderedDict[str, _Reader] = OrderedDict()

    def of(self, disk: DiskPull) -> _Reader:
        """The reader of a disk; all but this one and the last one are closed."""
        reader = self._readers.get(disk.uri)
        if reader is None:
            if len(self._readers) >= _DISKS:
                self._readers.popitem(last=False)[1].close()
            reader = _Reader(disk, self._state.shared.get(disk.uri), self._state, self._times)
            self._readers[disk.uri] = reader
        self._readers.move_to_end(disk.uri)
        return reader

    def close(self) -> None:
        """Close all; a second call, also from another thread, does nothing."""
        with self._lock:
            readers, self._readers = self._readers, OrderedDict()
        for reader in readers.values():
            reader.close()


@dataclass(frozen=True, slots=True)
class _Frame:
    """A run of grains that is being read, or was.

    Attributes:
        first: its first grain in the segment.
        ends_batch: nothing of its batch comes after it.
    """

    work: SegmentWork
    first: int
    raw: memoryview
    reader: _Reader
    ends_batch: bool


class Puller:
    """One of the threads."""

    def __init__(self, state: PullState) -> None:
        self._state = state
        self._times = ThreadTimes()
        self._readers = _Readers(state, self._times)

    def run(self) -> None:
        """All of it, in a thread that goes behind the VMs."""
        give_way()
        try:
            for frame in self._frames():
                self._keep(frame)
        finally:
            self._readers.close()
            self._state.times.add(self._times)

    def leave(self) -> None:
        """Close its connections, while its thread hangs in a call to a store: see `run_all`."""
        self._readers.close()

    def _frames(self) -> Iterator[_Frame]:
        """All that is to be read, frame by frame; the next one is begun before one is handed out.

        A frame's bytes are there until the next one but one is begun.
        """
        buffers = (memoryview(bytearray(FRAME_MAX)), memoryview(bytearray(FRAME_MAX)))
        read: _Frame | None = None
        for number, (batch, first, count, last) in enumerate(self._runs()):
            work = batch.work
            offset = work.index * SEGMENT + first * GRAIN
            length = min(count * GRAIN, work.disk.size - offset)
            reader = self._readers.of(work.disk)
            frame = _Frame(work, first, buffers[number % 2][:length], reader, last)
            began = time.perf_counter()
            reader.begin(frame.raw, offset)
            self._times.source_s += time.perf_counter() - began
            if read is not None:
                yield read
            began = time.perf_counter()
            reader.finish()
            self._times.source_s += time.perf_counter() - began
            read = frame
        if read is not None:
            yield read

    def _runs(self) -> Iterator[tuple[Batch, int, int, bool]]:
        """The runs of grains of the batches that a puller gets, and which is the last one of its batch."""
        lane: int | None = None
        while True:
            began = time.perf_counter()
            taken = self._state.batches.take(lane)
            self._times.idle_s += time.perf_counter() - began
            if taken is None:
                return
            lane, batch = taken
            for first, count in batch.runs:
                yield batch, first, count, (first, count) == batch.runs[-1]

    def _keep(self, frame: _Frame) -> None:
        """Store a frame; whoever stores the last one of a segment writes its map."""
        work = frame.work
        self._store(work, frame.first, frame.raw)
        waiting = work.disk.waiting
        if work.disk.trims and (waiting is None or waiting.ended):
            start = work.index * SEGMENT + frame.first * GRAIN
            frame.reader.trimmer.trim(start, start + len(frame.raw))
        self._state.meter.add(work.disk, len(frame.raw), read=len(frame.raw))
        if frame.ends_batch:
            with self._state.lock:
                work.open_batches -= 1
                last = work.open_batches == 0
            if last:
                finish(work)

    def _store(self, work: SegmentWork, first: int, raw: memoryview) -> None:
        """Keep a run of grains: what an earlier backup has at this place is only referred to."""
        grains = -(-len(raw) // GRAIN)
        at = 0
        begin = bisect_left(work.known, first, key=_start)
        for known in work.known[begin : bisect_left(work.known, first + grains, key=_start)]:
            start = (known.start - first) * GRAIN
            end = start + known.length
            if end % GRAIN and end != len(raw):
                continue  # it ends where the disk ended then; now the disk goes on
            if work.disk.session.refer(known, raw[start:end]):
                self._store_new(work, first + at // GRAIN, raw[at:start])
                self._add(work, known.start, known.found)
                _note(work, known.start, known.length, known.digest, None)
                at = end
        self._store_new(work, first + at // GRAIN, raw[at:])

    def _store_new(self, work: SegmentWork, first: int, raw: memoryview) -> None:
        """Keep the frame without the zero grains at its edges; nothing when it is all zero."""
        begin, end = 0, len(raw)
        while begin < end and _is_zero(raw[begin : begin + GRAIN]):
            begin += GRAIN
        begin = min(begin, end)
        _note(work, first, begin, ZEROES, None)
        if begin == end:
            return
        while _is_zero(raw[(end - 1) // GRAIN * GRAIN : end]):
            end = (end - 1) // GRAIN * GRAIN
        found, digest = work.disk.session.put_named(raw[begin:end])
        self._add(work, first + begin // GRAIN, found)
        _note(work, first + begin // GRAIN, end - begin, digest, found)
        _note(work, first + end // GRAIN, len(raw) - end, ZEROES, None)

    def _add(self, work: SegmentWork, start: int, found: Found) -> None:
        interval = Interval(
            start=start,
            n=found.grains,
            session=found.session,
            seq=found.seq,
            offset=found.offset,
            clen=found.clen,
            skip=0,
            flen=found.grains,
        )
        with self._state.lock:
            work.intervals.append(interval)
        if work.disk.kept is not None:
            work.disk.kept.note(work.index, start, found.grains, interval)


def _note(work: SegmentWork, first: int, length: int, digest: bytes, found: Found | None) -> None:
    """Note for whoever reads this point in time again that a range is read; see `Waiting.add` for `found`."""
    if not length:
        return
    if work.disk.journal is not None:
        work.disk.journal.note(work.index * SEGMENT + first * GRAIN, length, digest)
    if work.disk.kept is not None and digest == ZEROES:
        work.disk.kept.note(work.index, first, -(-length // GRAIN), None)
    if work.disk.waiting is not None:
        start = work.index * SEGMENT + first * GRAIN
        work.disk.waiting.add(start, start + length, found)


def _start(known: KnownFrame) -> int:
    return known.start


def _is_zero(view: memoryview) -> bool:
    # bytearray compares with any buffer by memcmp; a memoryview on the left would go byte by byte.
    return view[0] == 0 and _ZERO[: len(view)] == view
