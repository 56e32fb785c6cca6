"""Copying backups into a repository with other keys: `copy --rekey`.

    source frame  ->  read, proved, decrypted  ->  stored as an ordinary session stores  ->  same map, other places

Each backup becomes one under the same backup id, committed like any other; so all that holds for backups
holds for it. A frame that several backups share is stored once: what the earlier backup of the disk has in
the target at the same place is referred to, and what anything else has is found by its digest. Memory does
not grow with the disk: one segment's maps, and a file on disk for the digests.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from nbdpull.errors import DamagedError, UsageError
from nbdpull.model.damage import Place
from nbdpull.model.ids import BackupId, DiskId, SessionId
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.results import ProgressCallback
from nbdpull.model.segment import Interval, Segment
from nbdpull.ops.heal import lost_segments
from nbdpull.ops.meter import Meter
from nbdpull.repo.digestcache import DigestCache
from nbdpull.repo.repository import (
    Backup,
    DiskReader,
    Found,
    ParentGoneError,
    Repository,
    Session,
)
from nbdpull.version import __version__

__all__ = ["Rekeyed", "rekeying"]

_log = logging.getLogger(__name__)

_WORKERS: Final = 4  # each holds a frame
_REMEMBERED: Final = 1 << 16

_Frame = tuple[SessionId, int, int]
"""(session, seq, offset) in the source."""


class Rekeyed:
    """One run, from one repository into another. Made by `rekeying`.

    Attributes:
        objects, written_bytes: what was stored.
    """

    def __init__(
        self,
        source: Repository,
        target: Repository,
        cache: DigestCache,
        *,
        progress: ProgressCallback | None,
        check: Callable[[], None],
    ) -> None:
        self._source = source
        self._here = {one.id: one for one in source.backups(forgotten=True)}
        self._made: set[BackupId] = set()
        self._target = target
        self._cache = cache
        self._progress = progress
        self._check = check
        self._there = {one.id: one for one in target.backups(forgotten=True)}
        self._lost = target.damage.lost()
        self._learned = False
        self.objects = 0
        self.written_bytes = 0

    def find(self, backup: BackupId) -> Backup | None:
        """The backup in the target, forgotten or not, if it is whole there."""
        found = self._there.get(backup)
        return found if found is not None and found.complete else None

    def copy(self, backup: Backup) -> None:
        """Copy one backup that is not there, all its disks.

        Raises:
            DamagedError: what it needs can't be read; nothing of it is listed in the target.
            StoreError: a store failed.
        """
        self._learn()
        sessions: dict[str, Session] = {}
        try:
            for summary in backup.disks:
                sessions[summary.disk] = self._write(backup, summary)
            siblings = tuple((one.disk_id, one.id) for one in sessions.values())
            manifests = [
                session.commit(self._summary(backup, summary, session, siblings))
                for summary in backup.disks
                for session in [sessions[summary.disk]]
            ]
        except BaseException:
            for session in sessions.values():
                session.abandon()
            raise
        for session in sessions.values():
            self.objects += session.objects + 1
            self.written_bytes += session.stored_bytes
        # What a run that was killed between two commits left of it.
        part = self._there.get(backup.id)
        if part is not None:
            self._target.forget_replaced(part.pins)
        self._made.add(backup.id)
        self._there[backup.id] = replace(
            backup, disks=tuple(one.summary for one in manifests), superseded=()
        )
        for manifest in manifests:
            self._target.learn(self._cache, manifest)

    def _summary(
        self,
        backup: Backup,
        old: Summary,
        session: Session,
        siblings: tuple[tuple[DiskId, SessionId], ...],
    ) -> Summary:
        return replace(
            old,
            disk_id=session.disk_id,
            session=session.id,
            siblings=siblings,
            stored_bytes=session.stored_bytes,
            stored=self._source.stored(backup),
            tool=f"nbdpull {__version__}",
        )

    def _learn(self) -> None:
        """Know of what the target has already: an earlier run may have brought it."""
        if self._learned:
            return
        self._learned = True
        for backup in self._there.values():
            if backup.complete and backup.forgotten is None:
                for summary in backup.disks:
                    self._check()
                    self._target.learn(self._cache, self._target.manifest(summary))

    # -- one disk ----------------------------------------------------------------------------------

    def _write(self, backup: Backup, summary: Summary) -> Session:
        """A sealed session with the whole disk."""
        manifest = self._source.manifest(summary)
        earlier = self._earlier(backup, summary)
        try:
            session = self._begin(summary, None if earlier is None else earlier[1])
        except ParentGoneError:
            earlier = None
            session = self._begin(summary, None)
        disk = _Disk(
            self._source.reader(manifest),
            session,
            None
            if earlier is None
            else (self._source.reader(earlier[0]), self._target.reader(earlier[1])),
            lost=self._lost,
            check=self._check,
        )
        meter = Meter(
            self._progress,
            verb="copy",
            disk=f"{summary.backup}/{summary.disk}",
            total=summary.size,
        )
        try:
            disk.write(meter)
            session.seal()
        except BaseException:
            session.abandon()
            raise
        return session

    def _begin(self, summary: Summary, parent: Manifest | None) -> Session:
        session = self._target.begin(
            vm=summary.vm, disk=summary.disk, parent=parent, cache=self._cache, role="rekey"
        )
        session.lost = frozenset(
            row.digest for rows in self._lost.values() for row in rows if row.rlen
        )
        return session

    def _earlier(self, backup: Backup, summary: Summary) -> tuple[Manifest, Manifest] | None:
        """The manifests, in both repositories, of the earlier backup that the disk has most in common with.

        That is its parent, or else the newest one before it.
        """
        there = [
            one
            for one in self._there.values()
            if one.complete
            and one.forgotten is None
            and one.vm == backup.vm
            and one.id != backup.id
        ]
        there.sort(key=lambda one: (one.id == summary.parent, one.time <= backup.time, one.time))
        for one in reversed(there):
            for old in one.disks:
                if (old.disk, old.size) == (summary.disk, summary.size):
                    return self._pair(one.id, old)
        return None

    def _pair(self, backup: BackupId, there: Summary) -> tuple[Manifest, Manifest] | None:
        """The manifests of one disk of a backup, here and there; None where one can't be built on."""
        found = self._here.get(backup)
        disks = () if found is None else found.disks
        here = next(
            (one for one in disks if (one.disk, one.size) == (there.disk, there.size)), None
        )
        if here is None:
            return None
        try:
            pair = self._source.manifest(here), self._target.manifest(there)
        except DamagedError:
            return None  # or it was collected just now
        # What this run made was seen in a listing.
        if backup not in self._made and self._target.missing(pair[1]):
            return None
        return pair


class _Disk:
    """One disk on its way.

    Args:
        reader: of the disk in the source.
        session: in the target.
        earlier: readers of one earlier backup of the disk in both; in the target the session's parent.
        lost: frames that the target has on record as lost: nothing new refers to them.
        check: called often; what it raises ends it.
    """

    def __init__(
        self,
        reader: DiskReader,
        session: Session,
        earlier: tuple[DiskReader, DiskReader] | None,
        *,
        lost: Mapping[Place, object],
        check: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._session = session
        self._earlier = earlier
        self._lost = lost
        self._lost_there = set() if earlier is None else lost_segments(lost, earlier[1].manifest)
        self._check = check
        self._sids = [one.sid for one in reader.manifest.sessions]
        self._stored: OrderedDict[_Frame, Found] = OrderedDict()

    def write(self, meter: Meter) -> None:
        """Store what is to be stored, and the maps that are others than the earlier backup's."""
        manifest = self._reader.manifest
        size = manifest.summary.size
        meter.start()
        count = len(manifest.segments)
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="nbdpull-rekey") as threads:
            for index in range(count):
                self._check()
                if not self._is_as_before(index):
                    self._session.put_segment(index, self._segment(index, threads))
                meter.add(size * (index + 1) // count - size * index // count)
        meter.end()

    def _is_as_before(self, index: int) -> bool:
        """Whether the earlier backup has the very same map there: then the session has it from its parent."""
        if self._earlier is None:
            return self._reader.manifest.segments[index] is None
        if index in self._lost_there:
            return False
        before = self._earlier[0].manifest
        return _place(before, index) == _place(self._reader.manifest, index)

    def _segment(self, index: int, threads: ThreadPoolExecutor) -> Segment:
        rows = list(self._reader.segment(index))
        known = self._known(index)
        placed = [_covering(known[self._frame(row)], row) for row in rows]
        wanted: dict[_Frame, Interval] = {}
        for row, found in zip(rows, placed, strict=True):
            if found is None:
                wanted.setdefault(self._frame(row), row)
        stored = self._store(wanted, threads)
        return Segment.of(
            [
                _moved(row, found or stored[self._frame(row)])
                for row, found in zip(rows, placed, strict=True)
            ]
        )

    def _frame(self, row: Interval) -> _Frame:
        return (self._sids[row.session], row.seq, row.offset)

    def _known(self, index: int) -> Mapping[_Frame, Sequence[tuple[Interval, Found]]]:
        """Frames of the earlier backup's segment: the grains it has of each, and where these are in the target.

        The two maps are of the same backup. Where both have the same part of a frame of the same length, the
        one frame's grains are the other's, as far as that part goes.
        """
        known: dict[_Frame, list[tuple[Interval, Found]]] = defaultdict(list)
        if self._earlier is None:
            return known
        here, there = self._earlier
        sids = [one.sid for one in here.manifest.sessions]
        owners = [one.sid for one in there.manifest.sessions]
        try:
            ahead = {row.start: row for row in there.segment(index)}
        except DamagedError as exc:
            _log.debug("the frames of segment %d are looked for by their digests: %s", index, exc)
            return known
        for row in here.segment(index):
            new = ahead.get(row.start)
            if new is not None and Place(owners[new.session], new.seq, new.offset) in self._lost:
                continue
            if new is not None and (row.n, row.skip, row.flen) == (new.n, new.skip, new.flen):
                found = Found(new.session, new.seq, new.offset, new.clen, new.flen)
                known[sids[row.session], row.seq, row.offset].append((row, found))
        return known

    def _store(
        self, wanted: Mapping[_Frame, Interval], threads: ThreadPoolExecutor
    ) -> Mapping[_Frame, Found]:
        """Store frames as wholes; those of this disk that were stored lately are not read again."""

        def store(item: tuple[_Frame, Interval]) -> Found:
            self._check()
            frame, row = item
            found = self._stored.get(frame)
            if found is None:
                found = self._session.put(self._reader.read(row._replace(n=row.flen, skip=0)))
            return found

        done = dict(zip(wanted, threads.map(store, wanted.items()), strict=True))
        for frame, found in done.items():
            self._stored[frame] = found
            self._stored.move_to_end(frame)
        while len(self._stored) > _REMEMBERED:
            self._stored.popitem(last=False)
        return done


def _place(manifest: Manifest, index: int) -> tuple[_Frame, int] | None:
    """Where a segment's map is, the same in every manifest of a repository."""
    ref = manifest.segments[index]
    if ref is None:
        return None
    return (manifest.sessions[ref.session].sid, ref.seq, ref.offset), ref.clen


def _covering(known: Sequence[tuple[Interval, Found]], row: Interval) -> Found | None:
    for old, found in known:
        if old.skip <= row.skip and row.skip + row.n <= old.skip + old.n and old.flen == row.flen:
            return found
    return None


def _moved(row: Interval, found: Found) -> Interval:
    return row._replace(session=found.session, seq=found.seq, offset=found.offset, clen=found.clen)


@contextmanager
def rekeying(
    source: Repository,
    target: Repository,
    *,
    progress: ProgressCallback | None,
    check: Callable[[], None],
) -> Iterator[Rekeyed]:
    """A run of `copy --rekey`.

    Raises:
        UsageError: the target is a replica, or the same repository.
        WrongKeyError: the source's key does not open disk data.
    """
    if source.id == target.id:
        raise UsageError(
            f"{target.location} is the same repository as {source.location}, or a replica of it; leave"
            " --rekey out, or make another one with 'nbdpull init'"
        )
    source.check_restorable()
    target.check_original()
    with TemporaryDirectory(prefix="nbdpull-rekey-") as folder:
        cache = DigestCache(Path(folder), target.id)
        try:
            yield Rekeyed(source, target, cache, progress=progress, check=check)
        finally:
            cache.close()
