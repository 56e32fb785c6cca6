"""repack: rewrite packs that are mostly no longer needed, so that a collection can delete them.

A pack is deleted only as a whole. After many incrementals and a few forgotten backups most of its frames
may be referred to by nobody, while one of them still is. What is still needed of such packs is stored
once more, and every backup that refers to them is committed again (`ops/recommit.py`), oldest first, so
that later ones refer to what was rewritten for the earlier ones. Then the old manifests are forgotten.
Killed at any point it leaves each backup as it was or as it will be.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import DamagedError
from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.model.ids import DiskId, SessionId
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.results import ProgressCallback, RepackResult
from nbdpull.model.retention import STALE_S
from nbdpull.model.segment import Interval, Segment
from nbdpull.nbdio.connection import Cancelled
from nbdpull.ops.meter import Meter
from nbdpull.ops.recommit import Recommit
from nbdpull.ops.threads import in_thread
from nbdpull.repo.repository import Backup, DiskReader, ParentGoneError, Repository, Session

__all__ = ["RATIO", "RepackOptions", "repack"]

RATIO = 1.4

_Pack = tuple[str, int]
"""(session, seq), the same in every manifest."""
_Frame = tuple[str, int, int]
"""(session, seq, offset)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackOptions:
    """What to repack.

    Attributes:
        vm: only backups of this VM; None for any.
        ratio: a disk is repacked when its backups' packs have so many bytes for each byte needed, and
            then those of its packs that do.
        dry_run: only tell.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    vm: str | None = None
    ratio: float = RATIO
    dry_run: bool = False
    keys: KeySource | None = None


async def repack(
    options: RepackOptions, *, progress: ProgressCallback | None = None
) -> RepackResult:
    """Rewrite sparse packs.

    Raises:
        DamagedError: what is to be rewritten is damaged; no backup was changed by it.
        StoreError: the storage failed.
    """
    return await in_thread(lambda cancel: _Repack(options, progress, cancel).run())


@dataclass(slots=True)
class _Usage:
    """Which grains of which frames of one disk are still needed, over all its backups."""

    grains: dict[_Frame, int] = field(default_factory=dict)
    needed: dict[_Pack, float] = field(default_factory=lambda: defaultdict(float))
    _lengths: dict[_Frame, tuple[int, int]] = field(default_factory=dict)

    def add(self, sids: Sequence[str], rows: NDArray[np.int64]) -> None:
        for _start, n, session, seq, offset, clen, skip, flen in rows.tolist():
            frame = (sids[session], seq, offset)
            self.grains[frame] = self.grains.get(frame, 0) | ((1 << n) - 1) << skip
            self._lengths[frame] = (clen, flen)

    def add_map(self, frame: _Frame, clen: int) -> None:
        self.grains[frame] = 1
        self._lengths[frame] = (clen, 1)

    def finish(self) -> None:
        for frame, mask in self.grains.items():
            clen, flen = self._lengths[frame]
            self.needed[frame[:2]] += clen * mask.bit_count() / flen
        self._lengths.clear()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Grains [first, first + n) of a rewritten frame, where they are now."""

    first: int
    n: int
    sid: SessionId
    seq: int
    offset: int
    clen: int


class _Repack:
    """One run; `run` blocks."""

    def __init__(
        self, options: RepackOptions, progress: ProgressCallback | None, cancel: threading.Event
    ) -> None:
        self._options = options
        self._progress = progress
        self._cancel = cancel
        self._repository = Repository.open(
            options.repository, write=not options.dry_run, keys=options.keys
        )
        self._repository.check_restorable()
        self._usage: dict[DiskId, _Usage] = {}
        self._pieces: dict[_Frame, list[_Piece]] = {}
        self._rewritten: dict[DiskId, dict[SessionId, Manifest]] = defaultdict(dict)
        self._read_bytes = 0
        self._stored_bytes = 0

    def run(self) -> RepackResult:
        began = time.monotonic()
        backups = self._repository.backups()
        if not self._options.dry_run:
            self._drop_superseded(backups)
        sparse = self._find_sparse(backups)
        done: list[str] = []
        for backup in backups:
            if not backup.complete or not sparse:
                continue
            manifests = {one.disk_id: self._manifest(one) for one in backup.disks}
            there = {disk: one for disk, one in manifests.items() if one is not None}
            if len(there) < len(manifests) or not any(
                _touched(manifest, sparse) for manifest in there.values()
            ):
                continue
            if self._options.dry_run or self._rewrite(backup, there, sparse):
                done.append(backup.id)
        return RepackResult(
            backups=tuple(done),
            sparse_packs=len(sparse),
            sparse_bytes=sum(sparse.values()),
            read_bytes=self._read_bytes,
            stored_bytes=self._stored_bytes,
            dry_run=self._options.dry_run,
            duration_s=time.monotonic() - began,
        )

    def _check(self) -> None:
        if self._cancel.is_set():
            raise Cancelled

    def _manifest(self, summary: Summary) -> Manifest | None:
        """The manifest; None when it was deleted meanwhile."""
        try:
            return self._repository.manifest(summary)
        except DamagedError:
            if self._repository.is_alive(f"{summary.disk_id}/{summary.session}"):
                raise
            return None

    def _drop_superseded(self, backups: Sequence[Backup]) -> None:
        """Forget what runs that were killed left: manifests of backups that others are shown for."""
        newest = max((backup.stored for backup in backups), default=0.0)
        for backup in backups:
            if not backup.complete:
                continue
            pins = {entry.pin for entry in backup.superseded}
            self._repository.forget_replaced(
                entry.pin
                for entry in backup.superseded
                if pins.issuperset(f"{disk}/{sid}" for disk, sid in entry.summary.siblings)
                or newest - entry.stored > STALE_S
            )

    # -- what is sparse ----------------------------------------------------------------------------

    def _find_sparse(self, backups: Sequence[Backup]) -> dict[_Pack, int]:
        """The packs to be rewritten, and their bytes."""
        users: dict[_Pack, set[DiskId | None]] = defaultdict(set)
        for backup in backups:
            for summary in backup.disks:
                self._check()
                manifest = self._manifest(summary)
                if manifest is None:
                    continue
                # One that can't be committed again holds its packs whatever is rewritten.
                wanted = backup.complete and self._options.vm in {None, backup.vm}
                for session, seq in manifest.packs():
                    pack = (manifest.sessions[session].sid, seq)
                    users[pack].add(summary.disk_id if wanted else None)
                if wanted:
                    self._count(summary, manifest)
        sizes = self._repository.pack_sizes({sid for sid, _ in users})
        sparse: dict[_Pack, int] = {}
        for disk, usage in self._usage.items():
            usage.finish()
            own = {pack: sizes.get(pack, 0) for pack in usage.needed}
            if sum(own.values()) <= self._options.ratio * sum(usage.needed.values()):
                continue
            sparse |= {
                pack: size
                for pack, size in own.items()
                # What other disks' backups refer to as well stays where it is.
                if size > self._options.ratio * usage.needed[pack] and users[pack] == {disk}
            }
        return sparse

    def _count(self, summary: Summary, manifest: Manifest) -> None:
        usage = self._usage.setdefault(summary.disk_id, _Usage())
        reader = self._repository.reader(manifest)
        sids = [ref.sid for ref in manifest.sessions]
        for index, ref in enumerate(manifest.segments):
            if ref is None:
                continue
            self._check()
            frame = (sids[ref.session], ref.seq, ref.offset)
            if frame in usage.grains:
                continue  # the same map, counted for an earlier backup
            usage.add_map(frame, ref.clen)
            usage.add(sids, _rows(reader.segment(index)))

    # -- rewriting ---------------------------------------------------------------------------------

    def _rewrite(
        self, backup: Backup, manifests: Mapping[DiskId, Manifest], sparse: dict[_Pack, int]
    ) -> bool:
        """Commit one backup again without the sparse packs; False when it is being forgotten."""
        beside = {
            disk: list(self._beside(disk, manifest, sparse)) for disk, manifest in manifests.items()
        }
        try:
            again = Recommit(self._repository, backup, role="repack", beside=beside)
        except ParentGoneError:
            return False
        try:
            for summary in backup.disks:
                disk = summary.disk_id
                self._rewrite_disk(summary, again.parents[disk], again.sessions[disk], sparse)
            committed = again.commit()
        except BaseException:
            again.abandon()
            raise
        for manifest in committed:
            own = manifest.summary
            self._rewritten[own.disk_id][own.session] = manifest
        self._stored_bytes += sum(session.stored_bytes for session in again.sessions.values())
        self._repository.forget_replaced(backup.pins)
        return True

    def _beside(
        self, disk: DiskId, manifest: Manifest, sparse: dict[_Pack, int]
    ) -> Iterator[Manifest]:
        """The manifests committed by this run whose packs this one will refer to."""
        reader = self._repository.reader(manifest)
        sids = [ref.sid for ref in manifest.sessions]
        used: set[SessionId] = set()
        for index in _touched(manifest, sparse):
            self._check()
            for row in reader.segment(index):
                pieces = self._pieces.get((sids[row.session], row.seq, row.offset), ())
                used.update(piece.sid for piece in pieces)
        for sid in sorted(used):
            yield self._rewritten[disk][sid]

    def _rewrite_disk(
        self, summary: Summary, parent: Manifest, session: Session, sparse: dict[_Pack, int]
    ) -> None:
        reader = self._repository.reader(parent)
        sids = [ref.sid for ref in parent.sessions]
        places = {sid: place for place, sid in enumerate(sids)} | {session.id: session.index}
        touched = _touched(parent, sparse)
        meter = Meter(
            self._progress,
            verb="repack",
            disk=f"{summary.backup}/{summary.disk}",
            total=len(touched) * SEGMENT,
        )
        meter.start()
        for index in touched:
            rows: list[Interval] = []
            for row in reader.segment(index):
                self._check()
                if (sids[row.session], row.seq) not in sparse:
                    rows.append(row)
                    continue
                frame = (sids[row.session], row.seq, row.offset)
                if frame not in self._pieces:
                    self._pieces[frame] = self._store(summary.disk_id, frame, row, reader, session)
                rows.append(_moved(row, self._pieces[frame], places))
            session.put_segment(index, Segment.of(rows))
            meter.add(SEGMENT)
        meter.end()

    def _store(
        self, disk: DiskId, frame: _Frame, row: Interval, reader: DiskReader, session: Session
    ) -> list[_Piece]:
        """Store what any backup needs of a frame, a piece for each run of its grains."""
        raw = memoryview(reader.read(row._replace(n=row.flen, skip=0)))
        self._read_bytes += row.clen
        pieces = []
        for first, n in _runs(self._usage[disk].grains[frame], row.flen):
            put = session.put(raw[first * GRAIN : (first + n) * GRAIN])
            pieces.append(_Piece(first, n, session.id, put.seq, put.offset, put.clen))
        return pieces


def _touched(manifest: Manifest, sparse: dict[_Pack, int]) -> list[int]:
    """The segments whose map or data is in a sparse pack."""
    sids = [ref.sid for ref in manifest.sessions]
    return [
        index
        for index, ref in enumerate(manifest.segments)
        if ref is not None
        and (
            (sids[ref.session], ref.seq) in sparse
            or any((sids[session], seq) in sparse for session, seq in ref.packs)
        )
    ]


def _moved(row: Interval, pieces: Iterable[_Piece], places: dict[SessionId, int]) -> Interval:
    """The interval, referring to the piece that its grains are in now."""
    for piece in pieces:
        if piece.first <= row.skip and row.skip + row.n <= piece.first + piece.n:
            return Interval(
                start=row.start,
                n=row.n,
                session=places[piece.sid],
                seq=piece.seq,
                offset=piece.offset,
                clen=piece.clen,
                skip=row.skip - piece.first,
                flen=piece.n,
            )
    raise ValueError("a needed grain was not rewritten")


def _runs(mask: int, flen: int) -> Iterator[tuple[int, int]]:
    """(first, n) of each run of set bits."""
    at = 0
    for bit, run in groupby(range(flen), key=lambda grain: mask >> grain & 1):
        n = len(list(run))
        if bit:
            yield at, n
        at += n


def _rows(segment: Segment) -> NDArray[np.int64]:
    return np.array(list(segment), dtype=np.int64).reshape(-1, len(Interval._fields))
