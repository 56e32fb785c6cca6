"""repack: rewrite packs that are mostly no longer needed, so that a collection can delete them.

A pack is deleted only as a whole. After many incrementals and a few forgotten backups most of its frames
may be referred to by nobody, while one of them still is. What is still needed of such packs is stored
once more, and every backup that refers to them is committed again (`ops/recommit.py`), oldest first, so
that later ones refer to what was rewritten for the earlier ones. Then the old manifests are forgotten.
Killed at any point it leaves each backup as it was or as it will be.

Memory is bounded whatever the disk: what is needed is counted a window of segments at a time, and what is
rewritten is done in rounds of so many frames (`ops/usage.py`).
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import DamagedError
from nbdpull.model.grain import GRAIN, SEGMENT, segment_count
from nbdpull.model.ids import DiskId, SessionId
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import Manifest, SegmentRef, Summary
from nbdpull.model.outcomes import RepackResult
from nbdpull.model.results import ProgressCallback
from nbdpull.model.retention import STALE_S
from nbdpull.model.segment import Interval, Segment
from nbdpull.nbdio.errors import Cancelled
from nbdpull.ops.meter import Meter
from nbdpull.ops.recommit import Recommit
from nbdpull.ops.threads import in_thread
from nbdpull.ops.usage import HELD, Frames, Pack, PackCounts, Piece, Pieces
from nbdpull.repo.finding import check_there
from nbdpull.repo.repository import Backup, DiskReader, ParentGoneError, Repository, Session

__all__ = ["RATIO", "RepackOptions", "repack"]

RATIO = 1.4

_WINDOW = 128
"""Segments that are counted at a time: some two million frames in each backup at most."""
_ROUND_FRAMES = 1 << 20
"""Frames that are rewritten before all backups are looked at again: 50 MiB of memory."""


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
        self._chosen: set[Pack] = set()
        self._frames = Frames(())
        self._pieces = Pieces(0)
        self._rewritten: dict[DiskId, dict[SessionId, Manifest]] = {}
        self._sparse_bytes = 0
        self._read_bytes = 0
        self._stored_bytes = 0

    def run(self) -> RepackResult:
        began = time.monotonic()
        done: dict[str, None] = {}
        more = True
        while more:
            everything, unreadable = self._repository.everything()
            check_there(everything, unreadable, vm=self._options.vm)
            backups = [one for one in everything if one.forgotten is None]
            if not self._options.dry_run:
                self._drop_superseded(backups)
            sparse, more = self._find_sparse(backups)
            done |= dict.fromkeys(self._round(backups, sparse))
            self._chosen |= sparse.keys()
            self._sparse_bytes += sum(sparse.values())
        return RepackResult(
            backups=tuple(done),
            sparse_packs=len(self._chosen),
            sparse_bytes=self._sparse_bytes,
            read_bytes=self._read_bytes,
            stored_bytes=self._stored_bytes,
            dry_run=self._options.dry_run,
            duration_s=time.monotonic() - began,
        )

    def _round(self, backups: Sequence[Backup], sparse: Mapping[Pack, int]) -> Iterator[str]:
        """Commit every backup again that refers to these packs; their ids."""
        if not self._options.dry_run:
            self._frames = self._collect(backups, sparse)
            self._pieces = Pieces(len(self._frames))
            self._rewritten = defaultdict(dict)
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
                yield backup.id

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

    def _find_sparse(self, backups: Sequence[Backup]) -> tuple[dict[Pack, int], bool]:
        """The packs to be rewritten now, and their bytes; and whether there are more."""
        users = PackCounts()
        for disk, wanted, summary in self._summaries(backups):
            self._check()
            manifest = self._manifest(summary)
            if manifest is not None:
                sids = [ref.sid for ref in manifest.sessions]
                users.use(sids, manifest.packs().rows, disk if wanted else HELD)
        sparse: dict[Pack, int] = {}
        frames = 0
        for disk, summaries in self._by_disk(backups).items():
            for pack, size, count in self._sparse_of(disk, summaries, users):
                if pack in self._chosen:
                    continue  # of a backup that somebody forgets meanwhile
                if frames and frames + count > _ROUND_FRAMES and not self._options.dry_run:
                    return sparse, True
                sparse[pack] = size
                frames += count
        return sparse, False

    def _summaries(self, backups: Sequence[Backup]) -> Iterator[tuple[int, bool, Summary]]:
        """All disks of all backups: number of the disk, whether the backup can be committed again."""
        numbers: dict[DiskId, int] = {}
        for backup in backups:
            # One that can't be holds its packs whatever is rewritten.
            wanted = backup.complete and self._options.vm in {None, backup.vm}
            for summary in backup.disks:
                yield numbers.setdefault(summary.disk_id, len(numbers)), wanted, summary

    def _by_disk(self, backups: Sequence[Backup]) -> Mapping[int, Sequence[Summary]]:
        found: dict[int, list[Summary]] = defaultdict(list)
        for disk, wanted, summary in self._summaries(backups):
            if wanted:
                found[disk].append(summary)
        return found

    def _sparse_of(
        self, disk: int, summaries: Sequence[Summary], users: PackCounts
    ) -> list[tuple[Pack, int, int]]:
        """The sparse packs of a disk, their bytes, and how many frames of each are needed.

        A frame that several windows refer to counts in each: its pack looks a little denser than it is.
        """
        needed: dict[Pack, float] = defaultdict(float)
        counts: dict[Pack, int] = defaultdict(int)
        for window in self._windows(summaries):
            frames = Frames()
            for sids, ref, rows in window:
                frames.add_map(sids, ref)
                frames.add(sids, rows)
            for pack, amount, count in frames.by_pack():
                needed[pack] += amount
                counts[pack] += count
        sizes = self._repository.pack_sizes({sid for sid, _ in needed})
        ratio = self._options.ratio
        if sum(sizes.get(pack, 0) for pack in needed) <= ratio * sum(needed.values()):
            return []
        return [
            (pack, sizes[pack], counts[pack])
            for pack in needed
            # What other disks' backups refer to as well stays where it is.
            if sizes.get(pack, 0) > ratio * needed[pack] and users.user(pack) == disk
        ]

    def _windows(
        self, summaries: Sequence[Summary], sparse: Mapping[Pack, int] | None = None
    ) -> Iterator[Iterator[tuple[list[SessionId], SegmentRef, NDArray[np.int64]]]]:
        """Each distinct map of a disk's backups, some segments at a time; only what touches `sparse`."""
        end = max(segment_count(summary.size) for summary in summaries)
        for first in range(0, end, _WINDOW):
            yield self._window(summaries, first, sparse)

    def _window(
        self, summaries: Sequence[Summary], first: int, sparse: Mapping[Pack, int] | None
    ) -> Iterator[tuple[list[SessionId], SegmentRef, NDArray[np.int64]]]:
        seen: set[tuple[str, int, int]] = set()
        for summary in summaries:
            manifest = self._manifest(summary)
            if manifest is None:
                continue
            reader = self._repository.reader(manifest)
            sids = [ref.sid for ref in manifest.sessions]
            wanted = range(len(manifest.segments)) if sparse is None else _touched(manifest, sparse)
            for index in wanted:
                ref = manifest.segments[index]
                if ref is None or not first <= index < first + _WINDOW:
                    continue
                self._check()
                place = (sids[ref.session], ref.seq, ref.offset)
                if place not in seen:
                    seen.add(place)
                    yield sids, ref, reader.segment(index).rows

    def _collect(self, backups: Sequence[Backup], sparse: Mapping[Pack, int]) -> Frames:
        """What any backup needs of these packs' frames of disk data."""
        frames = Frames(sparse)
        if sparse:
            for summaries in self._by_disk(backups).values():
                for window in self._windows(summaries, sparse):
                    for sids, _ref, rows in window:
                        frames.add(sids, rows)
        return frames

    # -- rewriting ---------------------------------------------------------------------------------

    def _rewrite(
        self, backup: Backup, manifests: Mapping[DiskId, Manifest], sparse: Mapping[Pack, int]
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
        self, disk: DiskId, manifest: Manifest, sparse: Mapping[Pack, int]
    ) -> Iterator[Manifest]:
        """The manifests committed by this run whose packs this one will refer to."""
        reader = self._repository.reader(manifest)
        sids = [ref.sid for ref in manifest.sessions]
        used: set[SessionId] = set()
        for index in _touched(manifest, sparse):
            self._check()
            for at in self._frames.find(sids, reader.segment(index).rows):
                if at >= 0:
                    used.update(piece.sid for piece in self._pieces.get(at))
        for sid in sorted(used):
            yield self._rewritten[disk][sid]

    def _rewrite_disk(
        self, summary: Summary, parent: Manifest, session: Session, sparse: Mapping[Pack, int]
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
            segment = reader.segment(index)
            for row, at in zip(segment, self._frames.find(sids, segment.rows), strict=True):
                self._check()
                if at < 0:
                    rows.append(row)
                    continue
                if not self._pieces.get(at):
                    self._pieces.put(at, self._store(at, row, reader, session))
                rows.append(_moved(row, self._pieces.get(at), places))
            session.put_segment(index, Segment.of(rows))
            meter.add(SEGMENT)
        meter.end()

    def _store(self, at: int, row: Interval, reader: DiskReader, session: Session) -> list[Piece]:
        """Store what any backup needs of a frame, a piece for each run of its grains."""
        raw = memoryview(reader.read(row._replace(n=row.flen, skip=0)))
        self._read_bytes += row.clen
        pieces = []
        for first, n in _runs(self._frames.grains(at), row.flen):
            put = session.put(raw[first * GRAIN : (first + n) * GRAIN])
            pieces.append(Piece(first, n, session.id, put.seq, put.offset, put.clen))
        return pieces


def _touched(manifest: Manifest, sparse: Mapping[Pack, int]) -> list[int]:
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


def _moved(row: Interval, pieces: Iterable[Piece], places: dict[SessionId, int]) -> Interval:
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
