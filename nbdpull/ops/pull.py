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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import NbdError
from nbdpull.model.grain import (
    GRAIN,
    SEGMENT,
    Kind,
    Kinds,
    segment_count,
    segment_grains,
)
from nbdpull.model.results import ProgressCallback
from nbdpull.nbdio.connection import Cancelled, Connection
from nbdpull.nbdio.status import StatusReader, allocation_reader, dirty_reader
from nbdpull.ops.audit import Audit
from nbdpull.ops.extents import mark_changed, plan_changed, zero_where_known
from nbdpull.ops.fairqueue import FairQueue
from nbdpull.ops.order import Foresight, Order
from nbdpull.ops.persist import persist
from nbdpull.ops.puller import Puller, PullState
from nbdpull.ops.pullmeter import Meter
from nbdpull.ops.pulltimes import PullTimes, ThreadTimes
from nbdpull.ops.pullwork import Batch, DiskPull, SegmentWork, finish, left_to_read
from nbdpull.ops.rate import RateLimit
from nbdpull.ops.threads import in_thread, run_all, store_deadline, worker_count
from nbdpull.ops.trimming import Trimmer, long_runs, trim_unchanged

__all__ = ["DiskPull", "pull"]

log = logging.getLogger(__name__)

_QUEUE: Final = 64
_LANES: Final = 4
"""Disks that are pulled at a time: more would only need more of the connections that QEMU allows."""
_LOOK_S: Final = 0.1
_ALLOCATION: Final = ("base:allocation",)


class _Pull:
    """The threads of one pull and what they share."""

    def __init__(
        self,
        disks: Sequence[DiskPull],
        cancel: threading.Event,
        meter: Meter,
        rate: RateLimit | None,
        *,
        pullers: int,
    ) -> None:
        self.cancel = cancel
        self.lanes = min(_LANES, len(disks))
        # What waits there is read before anything that the guest is about to overwrite.
        depth = max(16, 2 * pullers) if any(disk.trims for disk in disks) else _QUEUE
        self.batches: FairQueue[Batch] = FairQueue(self.lanes, depth, cancel)
        self.times = PullTimes(pullers)
        self.state = PullState(cancel, rate, meter, self.batches, self.times)
        self._left = iter(disks)
        self.lock = threading.Lock()
        self.meter = meter
        self.unchanged: FairQueue[DiskPull] = FairQueue(1, len(disks), cancel)
        self._planning = self.lanes
        self._disks = tuple(disks)
        self._pulling = pullers
        self._pulled = threading.Event()

    def close(self) -> None:
        """Close what the threads shared, once they have ended."""
        times = ThreadTimes()
        for connection in self.state.shared.values():
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
        self.state.shared[disk.uri] = connection  # pullers look here before they connect
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
        # Further on there may be what a run that died has trimmed.
        strict = disk.trims and disk.journal is not None and disk.journal.began_before
        if disk.context is None:
            self._plan_segments(disk, lane, None, allocation(strict=strict), read, trimmer)
            return
        if not disk.lie and not _is_audited(disk):
            self._heed_audit(disk, connection, second)
        if disk.lie:
            self._plan_segments(disk, lane, None, allocation(strict=strict), read, trimmer)
            return
        dirty = dirty_reader(second, disk.context, granularity=disk.granularity)
        if disk.trims:
            if disk.waiting is not None:
                disk.waiting.note_audited()
            self.unchanged.give(0, disk)  # not before the audit: it reads what is clean
        self._plan_segments(disk, lane, dirty, allocation(strict=True), read, trimmer)

    def _source(self, disk: DiskPull, connection: Connection) -> Callable[[int, int], bytes]:
        def read(offset: int, length: int) -> bytes:
            buffer = bytearray(length)
            connection.read_into(memoryview(buffer), offset)
            self.meter.add(disk, 0, read=length)
            return bytes(buffer)

        return read

    def _heed_audit(self, disk: DiskPull, connection: Connection, second: Connection) -> None:
        lie = self._audit(disk, connection, second)
        if lie is not None:
            disk.lie.append(lie)
            if disk.on_lie is not None:
                disk.on_lie(lie)
        if disk.kept is not None:
            disk.kept.audited = True

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

        def plan(index: int) -> list[tuple[int, Batch]]:
            if self.cancel.is_set():
                raise Cancelled
            base = index * SEGMENT
            end = min(base + SEGMENT, disk.size)
            if disk.kept is not None and disk.kept.is_finished(index):
                self.meter.add(disk, end - base)
                return []
            kinds = np.full(segment_grains(disk.size, index), Kind.CLEAN, dtype=np.uint8)
            began = time.perf_counter()
            told = _told(disk, index, len(kinds))
            if dirty is None:
                kinds[:] = Kind.DATA
                zero_where_known(kinds, allocation, base, base, end, disk.overwritten, told)
                changed = end - base
            else:
                changed = plan_changed(kinds, dirty, allocation, base, end, disk.overwritten, told)
            times.status_s += time.perf_counter() - began
            work = SegmentWork(disk, index, kinds, [], 0)
            if disk.healer is not None and disk.healer.concerns(index, changed=changed > 0):
                work.before = disk.healer.plan(index, kinds, read)
            if trimmer is not None:
                _trim_zeroes(disk, trimmer, kinds, base, end)
            batches = left_to_read(work)
            # The last grain may be short.
            to_read = sum(
                min((first + n) * GRAIN, end - base) - first * GRAIN
                for batch in batches
                for first, n in batch.runs
            )
            counted = changed if disk.kept is None or disk.kept.counts_first(index) else 0
            self.meter.add(disk, end - base - to_read, changed=counted)
            if (changed or work.before is not None) and not batches:
                finish(work)
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

    def pull(self, puller: Puller) -> None:
        """A puller thread."""
        try:
            puller.run()
        finally:
            with self.lock:
                self._pulling -= 1
                if not self._pulling:
                    self._pulled.set()

    def let_go(self) -> None:
        """A thread: lets go what was read, once whoever would go on with this run finds it again."""
        refused: set[str] = set()
        # A puller that a store lets hang is left behind, and never ends.
        while not self.cancel.is_set() and not self._pulled.wait(_LOOK_S):
            for disk in self._disks:
                ranges = () if disk.waiting is None else disk.waiting.take()
                if not ranges or disk.name in refused:
                    continue
                with Connection.open(disk.uri, cancel=self.cancel) as connection:
                    trimmer = Trimmer(connection)
                    for start, end in ranges:
                        trimmer.trim(start, end)
                    trimmer.settle()
                    if not connection.can_trim:
                        refused.add(disk.name)
                    self.times.add(ThreadTimes(requests=connection.requests))


def _is_audited(disk: DiskPull) -> bool:
    """Whether the audit is through: by this pull, or by a run that died and may have trimmed what is clean."""
    if disk.kept is not None:
        return disk.kept.audited
    return disk.trims and disk.journal is not None and disk.journal.audited


def _told(disk: DiskPull, index: int, grains: int) -> NDArray[np.bool_] | None:
    """What of a segment a run that died may have trimmed: all that it noted; None for nothing."""
    entries = disk.journal.segment(index) if disk.trims and disk.journal is not None else ()
    if not entries:
        return None
    told = np.zeros(grains, dtype=np.bool_)
    for start, length, _ in entries:
        first = (start - index * SEGMENT) // GRAIN
        told[first : first - (-length // GRAIN)] = True
    return told


def _trim_zeroes(disk: DiskPull, trimmer: Trimmer, kinds: Kinds, base: int, end: int) -> None:
    """Let go what reads as zeroes of a segment, [base, end) in bytes, once it is noted that it does."""
    zeroes = list(long_runs(kinds, Kind.ZERO, base, end))
    if zeroes and disk.waiting is not None:
        disk.waiting.note_zeroes(zeroes)
    for start, until in zeroes:
        trimmer.trim(start, until)


def _foresight(disk: DiskPull) -> Foresight | None:
    """Where the guest writes, if knowing that spares it something and can be looked up."""
    # What is read and not trimmed is copied all the same.
    if disk.trims and disk.near and disk.overwritten is not None:
        return Foresight(disk.overwritten, disk.size)
    return None


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

    When it returns or raises, every thread has ended, but those that a store lets hang, and every NBD connection is
    closed. A connection that is
    lost is made again a few times, where all disks are `kept`. The point in time is held until then, at the
    guest's cost: so when it fails, or is stopped or cancelled, no store is waited for.

    Raises:
        NbdError: the source failed.
        RepositoryError: the repository failed.
        Cancelled: it was stopped.
    """
    limit = None if rate is None else RateLimit(rate)
    meter = Meter(progress)
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
            if any(disk.waiting is not None for disk in disks):
                trimming.append(state.let_go)
            threads = [Puller(state.state) for _ in range(pullers)]
            run_all(
                [*planners, *trimming],
                cancel,
                leavable=[(partial(state.pull, puller), puller.leave) for puller in threads],
                on_failure=failed,
            )
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
