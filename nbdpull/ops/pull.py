r"""The pull: from block status to frames in the repository, with every core busy and memory bounded.

    planners (one a disk, at most 4)       pullers (two a core), each with a connection of its own
    ------------------------------------   --------------------------------------------------------
    segment by segment: what changed,      read -> cut zero grains off -> hash, compress, append
    what of that is zero, what to read     meanwhile the next read has begun
                                           the last one of a segment writes its map
              \\____ a bounded lane for each one ____/

No queue stands between reading and storing: a puller does the whole way of its bytes, because libnbd,
zstandard, blake3 and write(2) all let go of the interpreter's lock. Two pullers a core keep the core busy
while one waits for its 128 KiB reply (more in flight could freeze the guest, see `nbdio.connection`).
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from nbdpull.errors import NbdError
from nbdpull.model.grain import (
    FRAME_MAX,
    GRAIN,
    SEGMENT,
    Kind,
    Kinds,
    frame_runs,
    segment_count,
    segment_grains,
)
from nbdpull.model.results import Progress, ProgressCallback, ProgressKind
from nbdpull.model.segment import Interval, Segment
from nbdpull.nbdio.connection import Cancelled, Connection
from nbdpull.nbdio.readahead import ReadAhead
from nbdpull.nbdio.status import StatusReader, allocation_reader, dirty_reader
from nbdpull.ops.audit import Audit
from nbdpull.ops.extents import Overwritten, mark_changed, plan_changed, zero_where_known
from nbdpull.ops.fairqueue import FairQueue
from nbdpull.ops.heal import Healer
from nbdpull.ops.kept import Kept
from nbdpull.ops.order import Foresight, Order
from nbdpull.ops.persist import persist
from nbdpull.ops.pulltimes import PullTimes, ThreadTimes
from nbdpull.ops.rate import RateLimit
from nbdpull.ops.resuming import take_stored
from nbdpull.ops.threads import give_way, in_thread, run_all, store_deadline, worker_count
from nbdpull.ops.trimming import Trimmer, trim_unchanged
from nbdpull.repo.repository import DiskReader, Found, KnownFrame, Session
from nbdpull.source.journal import ZEROES, DiskJournal

__all__ = ["DiskPull", "PullCounts", "pull"]

log = logging.getLogger(__name__)

_ZERO: Final = bytearray(FRAME_MAX)
_BATCH_BYTES: Final = 4 << 20
_BATCH_FRAMES: Final = 64
_QUEUE: Final = 16
_LANES: Final = 4
"""Disks that are pulled at a time: more would only need more of the connections that QEMU allows."""
_DISKS: Final = 2
"""That a puller keeps connected, by `DiskPull.connections`: QEMU accepts 100 from version 9.2 on (`nbd-server-start`)."""
_PROGRESS_S: Final = 0.25
_ALLOCATION: Final = ("base:allocation",)


@dataclass(slots=True)
class PullCounts:
    """What one disk's pull did, in bytes."""

    changed: int = 0
    read: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPull:
    """One disk to pull.

    Attributes:
        name: for progress.
        size: bytes.
        uri: its export.
        context: meta context of what changed; None reads everything that is not known to be zero.
        granularity: bytes of the smallest change that it can tell.
        overwritten: tells after a block status which of its ranges the source may have overwritten meanwhile;
            None where nobody writes.
        trims: what is not read any more is given back, see `nbdpull.ops.trimming`.
        near: `overwritten` may be asked for the whole disk, often.
        connections: that each puller may read through at a time.
        parent: where unchanged grains are looked up; set when `context` is.
        session: where frames and maps go.
        audit: how many clean frames, and clean zeroes, are looked at although the bitmap calls them clean, besides
            the last ones; None where what is clean can't be read.
        lie: set when the audit found that it is wrong: then the disk was read in full.
        healer: what of this disk the repository lost; None when nothing is known to be.
        journal: what a run that died had read of this point in time, and where to note what is read.
        kept: set where a lost connection may be made again: its export is of this point in time, and no other.
    """

    name: str
    size: int
    uri: str
    context: str | None
    parent: DiskReader | None
    session: Session
    audit: int | None = None
    lie: list[str] = field(default_factory=list)
    healer: Healer | None = None
    journal: DiskJournal | None = None
    kept: Kept | None = None
    granularity: int = GRAIN
    overwritten: Overwritten | None = None
    trims: bool = False
    near: bool = False
    connections: int = 1
    counts: PullCounts = field(default_factory=PullCounts)


@dataclass(slots=True)
class _SegmentWork:
    """A segment under way: what is to become of its grains, and how much of it is still out.

    Attributes:
        before: what clean grains are taken from, where that is not simply the parent's map.
    """

    disk: DiskPull
    index: int
    kinds: Kinds
    intervals: list[Interval]
    open_batches: int
    known: Sequence[KnownFrame] = ()
    """What an earlier backup has at these places, sorted."""
    before: Segment | None = None


@dataclass(frozen=True, slots=True)
class _Batch:
    work: _SegmentWork
    runs: Sequence[tuple[int, int]]


class _Reader:
    """A puller's way to one export: `connections` of them, or the one that all threads share."""

    def __init__(
        self, disk: DiskPull, shared: Connection | None, pull: _Pull, times: ThreadTimes
    ) -> None:
        self._shared = shared
        self._pace = None if pull.rate is None else partial(_take_turn, pull, times)
        self._asked: tuple[memoryview, int] | None = None
        self.own: list[Connection] = []
        if shared is None:
            try:
                for _ in range(disk.connections):
                    self.own.append(Connection.open(disk.uri, cancel=pull.cancel))
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

    def close(self, times: ThreadTimes) -> None:
        """Close what is the puller's own."""
        if self.own:
            # QEMU complains of a client that goes before it was told that its last range is trimmed.
            with suppress(NbdError, Cancelled):
                self.trimmer.settle()
        for connection in self.own:
            times.close(connection)


class _Readers:
    """A puller's readers, one a disk: it keeps that of the last disk when it goes to another one."""

    def __init__(self, pull: _Pull, times: ThreadTimes) -> None:
        self._pull = pull
        self._times = times
        self._readers: OrderedDict[str, _Reader] = OrderedDict()

    def of(self, disk: DiskPull) -> _Reader:
        """The reader of a disk; all but this one and the last one are closed."""
        reader = self._readers.get(disk.uri)
        if reader is None:
            if len(self._readers) >= _DISKS:
                self._readers.popitem(last=False)[1].close(self._times)
            reader = _Reader(disk, self._pull.shared.get(disk.uri), self._pull, self._times)
            self._readers[disk.uri] = reader
        self._readers.move_to_end(disk.uri)
        return reader

    def close(self) -> None:
        """Close all."""
        for reader in self._readers.values():
            reader.close(self._times)


@dataclass(frozen=True, slots=True)
class _Frame:
    """A run of grains that is being read, or was.

    Attributes:
        first: its first grain in the segment.
        ends_batch: nothing of its batch comes after it.
    """

    work: _SegmentWork
    first: int
    raw: memoryview
    reader: _Reader
    ends_batch: bool


class _Meter:
    """Counts bytes and tells the callback, at most a few times a second for each disk."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._told: dict[str, float] = {}

    def start(self, disk: DiskPull) -> None:
        with self._lock:
            again = disk.name in self._done
            self._done[disk.name] = 0
            if again:
                return
            self._tell(ProgressKind.DISK_START, disk, 0)

    def add(self, disk: DiskPull, done: int, *, read: int = 0, changed: int = 0) -> None:
        with self._lock:
            disk.counts.read += read
            disk.counts.changed += changed
            total = self._done[disk.name] = self._done[disk.name] + done
            now = time.monotonic()
            if total >= disk.size:
                self._tell(ProgressKind.DISK, disk, total)
                self._tell(ProgressKind.DISK_END, disk, total)
            elif now - self._told.get(disk.name, 0.0) >= _PROGRESS_S:
                self._told[disk.name] = now
                self._tell(ProgressKind.DISK, disk, total)

    def _tell(self, kind: ProgressKind, disk: DiskPull, done: int) -> None:
        if self._callback is not None:
            self._callback(
                Progress(
                    kind=kind,
                    verb="backup",
                    disk=disk.name,
                    done=done,
                    total=disk.size,
                    fields={
                        "read_bytes": disk.counts.read,
                        "changed_bytes": disk.counts.changed,
                        "stored_bytes": disk.session.stored_bytes,
                        "reused_bytes": disk.session.reused_bytes,
                    },
                )
            )


def _batches(work: _SegmentWork, left: Kinds) -> list[_Batch]:
    """What is to be read of a segment: all that is still DATA in `left`."""
    batches: list[_Batch] = []
    runs: list[tuple[int, int]] = []
    grains = 0
    for run in frame_runs(left):
        runs.append(run)
        grains += run[1]
        if grains * GRAIN >= _BATCH_BYTES or len(runs) >= _BATCH_FRAMES:
            batches.append(_Batch(work, runs))
            runs, grains = [], 0
    if runs:
        batches.append(_Batch(work, runs))
    work.open_batches = len(batches)
    return batches


def _left_to_read(work: _SegmentWork) -> list[_Batch]:
    """What of a segment is to be read, and what an earlier backup has there."""
    disk, left = work.disk, work.kinds
    if disk.kept is not None:
        left = disk.kept.take(work.index, left, work.intervals)
    if disk.journal is not None:
        left = take_stored(disk.journal, disk.session, work.index, left, work.intervals)
    batches = _batches(work, left)
    if batches:
        work.known = disk.session.known(work.index, left)
    return batches


class _Pull:
    """The threads of one pull and what they share."""

    def __init__(
        self,
        disks: Sequence[DiskPull],
        cancel: threading.Event,
        meter: _Meter,
        rate: RateLimit | None,
        *,
        pullers: int,
    ) -> None:
        self.rate = rate
        self.cancel = cancel
        self.lanes = min(_LANES, len(disks))
        # What waits there is read before anything that the guest is about to overwrite.
        depth = max(4, pullers // 2) if any(disk.trims for disk in disks) else _QUEUE
        self.batches: FairQueue[_Batch] = FairQueue(self.lanes, depth, cancel)
        self.times = PullTimes(pullers)
        self._left = iter(disks)
        self.lock = threading.Lock()
        self.meter = meter
        self.shared: dict[str, Connection] = {}
        self.unchanged: FairQueue[DiskPull] = FairQueue(1, len(disks), cancel)
        self._planning = self.lanes

    def close(self) -> None:
        """Close what the threads shared, once they have ended."""
        times = ThreadTimes()
        for connection in self.shared.values():
            times.close(connection)
        self.times.add(times)

    def plan(self, lane: int) -> None:
        """A planner thread: plans one disk after the other, as long as there are any."""
        while (disk := self._next()) is not None:
            self._plan_disk(disk, lane)
        self.batches.close(lane)
        with self.lock:
            self._planning -= 1
            if not self._planning:
                self.unchanged.close(0)

    def _next(self) -> DiskPull | None:
        with self.lock:
            return next(self._left, None)

    def _plan_disk(self, disk: DiskPull, lane: int) -> None:
        self.meter.start(disk)
        with Connection.open(disk.uri, optional=_ALLOCATION, cancel=self.cancel) as connection:
            if not connection.multi_conn:
                connection.close()
                self._plan_shared(disk, lane)
                return
            self._check_size(disk, connection)
            if disk.context is None:
                self._plan_with(disk, lane, connection, connection)
                self.times.add(ThreadTimes(requests=connection.requests))
                return
            # Its own connection: where the point in time shows changed ranges only, an error reply
            # to two contexts at once breaks the connection.
            contexts = (disk.context,)
            with Connection.open(disk.uri, contexts=contexts, cancel=self.cancel) as second:
                self._plan_with(disk, lane, connection, second)
                self.times.add(ThreadTimes(requests=connection.requests + second.requests))

    def _plan_shared(self, disk: DiskPull, lane: int) -> None:
        """Plan a disk whose server may have room for one connection only: all threads use that.

        A second client of such a server (``qemu-nbd`` without ``--shared``) waits for ever.
        """
        contexts = () if disk.context is None else (disk.context,)
        connection = Connection.open(
            disk.uri, contexts=contexts, optional=_ALLOCATION, cancel=self.cancel
        )
        self.shared[disk.uri] = connection  # pullers look here before they connect
        self._check_size(disk, connection)
        self._plan_with(disk, lane, connection, connection)

    @staticmethod
    def _check_size(disk: DiskPull, connection: Connection) -> None:
        if connection.size != disk.size:
            raise NbdError(
                f"export of disk '{disk.name}' has {connection.size} bytes, expected {disk.size};"
                " the disk was resized just now, or --nbd-address names another server: try again"
            )

    def _plan_with(
        self, disk: DiskPull, lane: int, connection: Connection, second: Connection
    ) -> None:
        """Plan with a connection for ``base:allocation`` and one for what changed."""

        def allocation(*, strict: bool) -> StatusReader | None:
            if not connection.contexts.issuperset(_ALLOCATION):
                return None
            return allocation_reader(connection, strict=strict)

        read = self._source(disk, connection)
        trimmer = Trimmer(connection) if disk.trims else None
        if disk.context is None:
            self._plan_segments(disk, lane, None, allocation(strict=False), read, trimmer)
            return
        if disk.kept is None or not disk.kept.audited:
            lie = self._audit(disk, connection, second)
            if lie is not None:
                disk.lie.append(lie)
            if disk.kept is not None:
                disk.kept.audited = True
        if disk.lie:
            self._plan_segments(disk, lane, None, allocation(strict=False), read, trimmer)
            return
        dirty = dirty_reader(second, disk.context, granularity=disk.granularity)
        if disk.trims:
            self.unchanged.give(0, disk)  # not before the audit: it reads what is clean
        self._plan_segments(disk, lane, dirty, allocation(strict=True), read, trimmer)

    def _source(self, disk: DiskPull, connection: Connection) -> Callable[[int, int], bytes]:
        def read(offset: int, length: int) -> bytes:
            buffer = bytearray(length)
            connection.read_into(memoryview(buffer), offset)
            self.meter.add(disk, 0, read=length)
            return bytes(buffer)

        return read

    def _audit(self, disk: DiskPull, connection: Connection, second: Connection) -> str | None:
        parent = disk.parent
        if disk.audit is None or parent is None or disk.context is None:
            return None
        dirty = dirty_reader(second, disk.context, granularity=disk.granularity)

        def kinds_of(index: int) -> Kinds:
            base = index * SEGMENT
            kinds = np.full(segment_grains(disk.size, index), Kind.CLEAN, dtype=np.uint8)
            mark_changed(kinds, dirty, base, min(base + SEGMENT, disk.size))
            return kinds

        def read(offset: int, length: int) -> bytes:
            buffer = bytearray(length)
            connection.read_into(memoryview(buffer), offset)
            return bytes(buffer)

        audit = Audit(
            count=disk.audit,
            size=disk.size,
            parent=parent,
            session=disk.session,
            kinds_of=kinds_of,
            read=read,
        )
        return audit.lie()

    def _plan_segments(
        self,
        disk: DiskPull,
        lane: int,
        dirty: StatusReader | None,
        allocation: StatusReader | None,
        read: Callable[[int, int], bytes],
        trimmer: Trimmer | None,
    ) -> None:
        times = ThreadTimes()

        def plan(index: int) -> list[tuple[int, _Batch]]:
            if self.cancel.is_set():
                raise Cancelled
            base = index * SEGMENT
            end = min(base + SEGMENT, disk.size)
            if disk.kept is not None and disk.kept.is_finished(index):
                self.meter.add(disk, end - base)
                return []
            kinds = np.full(segment_grains(disk.size, index), Kind.CLEAN, dtype=np.uint8)
            began = time.perf_counter()
            if dirty is None:
                kinds[:] = Kind.DATA
                zero_where_known(kinds, allocation, base, base, end, disk.overwritten)
                changed = end - base
            else:
                changed = plan_changed(kinds, dirty, allocation, base, end, disk.overwritten)
            times.status_s += time.perf_counter() - began
            work = _SegmentWork(disk, index, kinds, [], 0)
            if disk.healer is not None and disk.healer.concerns(index, changed=changed > 0):
                work.before = disk.healer.plan(index, kinds, read)
            if trimmer is not None:
                trimmer.trim_kind(kinds, Kind.ZERO, base, end)
            batches = _left_to_read(work)
            # The last grain may be short.
            to_read = sum(
                min((first + n) * GRAIN, end - base) - first * GRAIN
                for batch in batches
                for first, n in batch.runs
            )
            counted = changed if disk.kept is None or disk.kept.counts_first(index) else 0
            self.meter.add(disk, end - base - to_read, changed=counted)
            if (changed or work.before is not None) and not batches:
                self._finish(work)
            return [(base + batch.runs[0][0] * GRAIN, batch) for batch in batches]

        for batch in Order(segment_count(disk.size), plan, _foresight(disk)):
            self.batches.give(lane, batch)
        if trimmer is not None:
            trimmer.settle()
        self.times.add(times)

    def trim(self) -> None:
        """A thread: lets go what is clean, of one disk after the other, while others are read."""
        while (taken := self.unchanged.take()) is not None:
            disk = taken[1]
            if disk.parent is None or disk.context is None:
                continue
            contexts = (disk.context,)
            with Connection.open(disk.uri, contexts=contexts, cancel=self.cancel) as connection:
                trim_unchanged(
                    Trimmer(connection),
                    dirty_reader(connection, disk.context, granularity=disk.granularity),
                    size=disk.size,
                    parent=disk.parent,
                    healer=disk.healer,
                )
                self.times.add(ThreadTimes(requests=connection.requests))

    def puller(self) -> None:
        """A puller thread."""
        give_way()
        times = ThreadTimes()
        readers = _Readers(self, times)
        try:
            for frame in self._frames(readers, times):
                self._keep(frame)
        finally:
            readers.close()
            self.times.add(times)

    def _frames(self, readers: _Readers, times: ThreadTimes) -> Iterator[_Frame]:
        """All that is to be read, frame by frame; the next one is begun before one is handed out.

        A frame's bytes are there until the next one but one is begun.
        """
        buffers = (memoryview(bytearray(FRAME_MAX)), memoryview(bytearray(FRAME_MAX)))
        read: _Frame | None = None
        for number, (batch, first, count, last) in enumerate(self._runs(times)):
            work = batch.work
            offset = work.index * SEGMENT + first * GRAIN
            length = min(count * GRAIN, work.disk.size - offset)
            reader = readers.of(work.disk)
            frame = _Frame(work, first, buffers[number % 2][:length], reader, last)
            began = time.perf_counter()
            reader.begin(frame.raw, offset)
            times.source_s += time.perf_counter() - began
            if read is not None:
                yield read
            began = time.perf_counter()
            reader.finish()
            times.source_s += time.perf_counter() - began
            read = frame
        if read is not None:
            yield read

    def _runs(self, times: ThreadTimes) -> Iterator[tuple[_Batch, int, int, bool]]:
        """The runs of grains of the batches that a puller gets, and which is the last one of its batch."""
        lane: int | None = None
        while True:
            began = time.perf_counter()
            taken = self.batches.take(lane)
            times.idle_s += time.perf_counter() - began
            if taken is None:
                return
            lane, batch = taken
            for first, count in batch.runs:
                yield batch, first, count, (first, count) == batch.runs[-1]

    def _keep(self, frame: _Frame) -> None:
        """Store a frame; whoever stores the last one of a segment writes its map."""
        work = frame.work
        self._store(work, frame.first, frame.raw)
        if work.disk.trims:
            start = work.index * SEGMENT + frame.first * GRAIN
            frame.reader.trimmer.trim(start, start + len(frame.raw))
        self.meter.add(work.disk, len(frame.raw), read=len(frame.raw))
        if frame.ends_batch:
            with self.lock:
                work.open_batches -= 1
                last = work.open_batches == 0
            if last:
                self._finish(work)

    def _store(self, work: _SegmentWork, first: int, raw: memoryview) -> None:
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
                _note(work, known.start, known.length, known.digest)
                at = end
        self._store_new(work, first + at // GRAIN, raw[at:])

    def _store_new(self, work: _SegmentWork, first: int, raw: memoryview) -> None:
        """Keep the frame without the zero grains at its edges; nothing when it is all zero."""
        begin, end = 0, len(raw)
        while begin < end and _is_zero(raw[begin : begin + GRAIN]):
            begin += GRAIN
        begin = min(begin, end)
        _note(work, first, begin, ZEROES)
        if begin == end:
            return
        while _is_zero(raw[(end - 1) // GRAIN * GRAIN : end]):
            end = (end - 1) // GRAIN * GRAIN
        found, digest = work.disk.session.put_named(raw[begin:end])
        self._add(work, first + begin // GRAIN, found)
        _note(work, first + begin // GRAIN, end - begin, digest)
        _note(work, first + end // GRAIN, len(raw) - end, ZEROES)

    def _add(self, work: _SegmentWork, start: int, found: Found) -> None:
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
        with self.lock:
            work.intervals.append(interval)
        if work.disk.kept is not None:
            work.disk.kept.note(work.index, start, found.grains, interval)

    def _finish(self, work: _SegmentWork) -> None:
        """Every byte of the segment is in: write its map."""
        disk = work.disk
        before = work.before
        if before is None:
            before = disk.parent.segment(work.index) if disk.parent else Segment.empty()
        work.intervals.sort(key=lambda interval: interval.start)
        disk.session.put_segment(work.index, before.overlay(work.kinds, work.intervals))
        if disk.kept is not None:
            disk.kept.finish(work.index)


def _note(work: _SegmentWork, first: int, length: int, digest: bytes) -> None:
    """Note for whoever reads this point in time again that a range is read."""
    if not length:
        return
    if work.disk.journal is not None:
        work.disk.journal.note(work.index * SEGMENT + first * GRAIN, length, digest)
    if work.disk.kept is not None and digest == ZEROES:
        work.disk.kept.note(work.index, first, -(-length // GRAIN), None)


def _foresight(disk: DiskPull) -> Foresight | None:
    """Where the guest writes, if knowing that spares it something and can be looked up."""
    # What is read and not trimmed is copied all the same.
    if disk.trims and disk.near and disk.overwritten is not None:
        return Foresight(disk.overwritten, disk.size)
    return None


def _take_turn(pull: _Pull, times: ThreadTimes, length: int) -> None:
    """Wait for the turn of one request: whole frames would come in bursts, which a guest's write waits behind."""
    if pull.rate is not None:
        began = time.perf_counter()
        pull.rate.take(length, pull.cancel)
        times.source_s -= time.perf_counter() - began  # it is not the source that is waited for


def _start(known: KnownFrame) -> int:
    return known.start


def _is_zero(view: memoryview) -> bool:
    # bytearray compares with any buffer by memcmp; a memoryview on the left would go byte by byte.
    return view[0] == 0 and _ZERO[: len(view)] == view


async def pull(
    disks: Sequence[DiskPull],
    *,
    rate: int | None = None,
    progress: ProgressCallback | None = None,
    on_start: Callable[[Callable[[], None]], None] = lambda _stop: None,
) -> PullTimes:
    """Read all disks into their sessions.

    Args:
        disks: what to pull. Up to four at a time share the pullers evenly, whatever their speed.
        rate: most bytes to read in a second, all disks together; None for no limit.
        progress: is told how far each disk is.
        on_start: is given, from a thread, a function that stops the pull; the call then raises `Cancelled`.

    Returns:
        Where the time went.

    When it returns or raises, every thread has ended and every NBD connection is closed. A connection that is
    lost is made again a few times, where all disks are `kept`. The point in time is held until then, at the
    guest's cost: so when it fails, or is stopped or cancelled, no store is waited for.

    Raises:
        NbdError: the source failed.
        RepositoryError: the repository failed.
        Cancelled: it was stopped.
    """
    limit = None if rate is None else RateLimit(rate)
    meter = _Meter(progress)
    deadline = store_deadline()
    again = all(disk.kept is not None for disk in disks)

    def give_up() -> None:
        deadline.set_in(0)

    def failed() -> None:
        if not again:  # else what is on its way to the store is still wanted
            give_up()

    def once(cancel: threading.Event) -> PullTimes:
        pullers = worker_count()
        state = _Pull(disks, cancel, meter, limit, pullers=pullers)
        planners = [partial(state.plan, lane) for lane in range(state.lanes)]
        try:
            trimming = [state.trim] if any(disk.trims for disk in disks) else []
            run_all([*planners, *trimming, *[state.puller] * pullers], cancel, on_failure=failed)
        finally:
            state.close()
        return state.times

    def work(cancel: threading.Event) -> PullTimes:
        def stop() -> None:
            cancel.set()
            give_up()

        on_start(stop)
        return persist(once, cancel) if again else once(cancel)

    return await in_thread(work, grace_s=0)
