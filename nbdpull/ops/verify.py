"""Verify: everything that backups refer to is read again and hashed again, each frame once.

    backups, oldest first       maps not seen before      frames not seen before     workers
    one manifest in memory  ->  one segment decoded   ->  batches in pack order  ->  read and re-hash

Memory holds eight bytes for each frame seen. What is damaged is only noted on the way; at the end the
backups are gone through again, to tell exactly which ranges of which disks refer to it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import DamagedError
from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import Manifest, SegmentRef, Summary
from nbdpull.model.results import Damage, ProgressCallback, VerifyResult
from nbdpull.model.segment import Interval, Segment
from nbdpull.nbdio.connection import Cancelled
from nbdpull.ops.disknames import disk_names
from nbdpull.ops.meter import Meter
from nbdpull.ops.threads import in_thread, run_all, worker_count
from nbdpull.repo.repository import Backup, DiskReader, Repository

__all__ = ["VerifyOptions", "verify"]

_log = logging.getLogger(__name__)

_BATCH_GRAINS = 64
_BATCH_FRAMES = 64

_Keys = NDArray[np.uint64]
"""Places in the packs of one session: seq << 32 | offset."""
_Place = tuple[str, int, int]
"""(session, seq, offset) of a frame, the same in every manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What to verify.

    Attributes:
        repository: where the backups are.
        backups: ids, unique prefixes or ``latest``; empty for all.
        vm: only backups of this VM; None for any.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    backups: tuple[str, ...] = ()
    vm: str | None = None
    keys: KeySource | None = None


async def verify(
    options: VerifyOptions, *, progress: ProgressCallback | None = None
) -> VerifyResult:
    """Read and re-hash every frame that the backups refer to, and tell what is lost.

    Damage is part of the result, not an error.

    Raises:
        RepositoryNotFoundError: there is none.
        BackupNotFoundError: no such backup.
        StoreError: the storage failed in a way that says nothing about what is stored.
    """
    return await in_thread(lambda cancel: _Verify(options, progress, cancel).run())


class _Seen:
    """A growing set of keys of one session."""

    def __init__(self) -> None:
        self._keys: _Keys = np.empty(1024, dtype=np.uint64)
        self._count = 0

    def add(self, keys: _Keys) -> NDArray[np.bool_]:
        """Add sorted, distinct `keys`; True for each that was not there."""
        known = self._keys[: self._count]
        place = np.searchsorted(known, keys)
        fresh = np.ones(len(keys), dtype=np.bool_)
        inside = place < self._count
        fresh[inside] = known[place[inside]] != keys[inside]
        new = keys[fresh]
        if len(new):
            self._insert(new)
        return fresh

    def _insert(self, new: _Keys) -> None:
        count = self._count + len(new)
        if count > len(self._keys):
            # Doubling would leave half of it unused in a large repository.
            self._keys = np.resize(self._keys, max(count, len(self._keys) * 5 // 4))
        ordered = not self._count or new[0] > self._keys[self._count - 1]
        self._keys[self._count : count] = new
        self._count = count
        if not ordered:
            self._keys[:count].sort(kind="stable")


@dataclass(slots=True)
class _Findings:
    """What was found, from any thread."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    frames: int = 0
    read_bytes: int = 0
    bad: dict[_Place, DamagedError] = field(default_factory=dict)

    def count(self, frames: int, read_bytes: int) -> None:
        with self.lock:
            self.frames += frames
            self.read_bytes += read_bytes

    def add(self, place: _Place, exc: DamagedError) -> None:
        with self.lock:
            self.bad[place] = exc


class _Damages:
    """Collects damage by object and disk, so that a lost pack is one entry with all its ranges."""

    def __init__(self) -> None:
        self._problems: dict[tuple[str, str | None, str | None], list[str]] = {}
        self._ranges: dict[tuple[str, str | None, str | None], list[tuple[int, int]]] = {}

    def add(
        self,
        key: str,
        problem: str,
        summary: Summary | None = None,
        ranges: Sequence[tuple[int, int]] = (),
    ) -> None:
        where = (key, summary.backup if summary else None, summary.disk if summary else None)
        problems = self._problems.setdefault(where, [])
        if problem not in problems:
            problems.append(problem)
        self._ranges.setdefault(where, []).extend(ranges)

    def keys(self) -> set[str]:
        return {key for key, _, _ in self._problems}

    def result(self) -> tuple[Damage, ...]:
        return tuple(
            Damage(
                key=where[0],
                problem=_first_and_count(problems),
                backup=where[1],
                disk=where[2],
                ranges=tuple(_joined(self._ranges[where])),
            )
            for where, problems in self._problems.items()
        )


def _first_and_count(problems: Sequence[str]) -> str:
    more = len(problems) - 1
    return f"{problems[0]} (and {more} more like it)" if more else problems[0]


def _joined(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    begin = end = -1
    for first, last in sorted(ranges):
        if first > end:
            if end > begin:
                yield begin, end
            begin, end = first, last
        else:
            end = max(end, last)
    if end > begin:
        yield begin, end


class _Verify:
    """One run; `run` blocks."""

    def __init__(
        self, options: VerifyOptions, progress: ProgressCallback | None, cancel: threading.Event
    ) -> None:
        self._options = options
        self._progress = progress
        self._cancel = cancel
        self._repository = Repository.open(options.repository, keys=options.keys)
        self._repository.check_restorable()
        self._findings = _Findings()
        self._damages = _Damages()
        self._seen: dict[str, _Seen] = {}
        self._maps: set[_Place] = set()

    def run(self) -> VerifyResult:
        began = time.monotonic()
        backups = sorted(self._chosen(), key=lambda backup: (backup.time, backup.id))
        for backup in backups:
            if not backup.complete:
                self._report_incomplete(backup)
            for summary in backup.disks:
                self._verify_disk(summary)
        if self._findings.bad:
            for backup in backups:
                for summary in backup.disks:
                    self._locate(summary)
        damaged = self._damages.result()
        return VerifyResult(
            ok=not damaged,
            backups=tuple(backup.id for backup in backups),
            frames=self._findings.frames,
            read_bytes=self._findings.read_bytes,
            damaged=damaged,
            duration_s=time.monotonic() - began,
        )

    def _chosen(self) -> Sequence[Backup]:
        options = self._options
        if options.backups:
            found = [self._repository.find(name, vm=options.vm) for name in options.backups]
            return list({backup.id: backup for backup in found}.values())
        for exc in self._repository.scan()[1]:
            self._damages.add(exc.key, str(exc))
        return [
            backup
            for backup in self._repository.backups()
            if options.vm is None or backup.vm == options.vm
        ]

    def _report_incomplete(self, backup: Backup) -> None:
        missing = ", ".join(f"'{name}'" for name in disk_names(self._repository, backup.missing))
        there = backup.disks[0]
        self._damages.add(
            f"m/{there.disk_id}/{there.session}",
            f"backup {backup.id} is incomplete: disk {missing} was never committed, or is lost",
            there,
        )

    def _open(self, summary: Summary) -> tuple[Manifest, DiskReader] | None:
        """The disk's reader; None, and noted, when its manifest is damaged."""
        try:
            manifest = self._repository.manifest(summary)
            return manifest, self._repository.reader(manifest)
        except DamagedError as exc:
            self._damages.add(exc.key, str(exc), summary, [(0, summary.size)])
            return None

    def _verify_disk(self, summary: Summary) -> None:
        opened = self._open(summary)
        if opened is None:
            return
        manifest, reader = opened
        meter = Meter(
            self._progress,
            verb="verify",
            disk=f"{summary.backup}/{summary.disk}",
            total=summary.stored_bytes,
        )
        meter.start()
        batches = self._batches(manifest, reader)
        lock = threading.Lock()
        sids = [session.sid for session in manifest.sessions]

        def work() -> None:
            while True:
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    return
                for frame in batch:
                    if self._cancel.is_set():
                        raise Cancelled
                    try:
                        reader.read(frame)
                    except DamagedError as exc:
                        self._findings.add((sids[frame.session], frame.seq, frame.offset), exc)
                    self._findings.count(1, frame.clen)
                    meter.add(frame.clen)

        run_all([work] * worker_count(), self._cancel)
        meter.end()
        self._check_packs(summary, reader)

    def _check_packs(self, summary: Summary, reader: DiskReader) -> None:
        """Note objects that make a restore refuse although every frame in them is sound."""
        known = self._damages.keys() | {exc.key for exc in self._findings.bad.values()}
        for key in reader.missing_packs():
            if key not in known:
                problem = f"{key} is missing, or has another size than when it was written"
                self._damages.add(key, problem, summary)

    def _batches(self, manifest: Manifest, reader: DiskReader) -> Iterator[list[Interval]]:
        """Frames that nobody verified yet, whole."""
        batch: list[Interval] = []
        grains = 0
        for index, ref in enumerate(manifest.segments):
            if self._cancel.is_set():
                raise Cancelled
            if ref is None:
                continue
            place = _place_of(manifest, ref)
            if place in self._maps:
                continue
            self._maps.add(place)
            segment = self._segment(reader, index, place)
            self._findings.count(1, ref.clen)
            if segment is None:
                continue
            for frame in self._fresh(manifest, segment):
                batch.append(frame)
                grains += frame.flen
                if grains >= _BATCH_GRAINS or len(batch) >= _BATCH_FRAMES:
                    yield batch
                    batch, grains = [], 0
        if batch:
            yield batch

    def _segment(self, reader: DiskReader, index: int, place: _Place) -> Segment | None:
        try:
            return reader.segment(index)
        except DamagedError as exc:
            self._findings.add(place, exc)
            return None

    def _fresh(self, manifest: Manifest, segment: Segment) -> Iterator[Interval]:
        rows = np.array(list(segment), dtype=np.int64).reshape(-1, len(Interval._fields))
        rows = rows[np.lexsort((rows[:, 4], rows[:, 3], rows[:, 2]))]
        for part in np.split(rows, np.flatnonzero(np.diff(rows[:, 2])) + 1):
            if not len(part):
                continue
            # A frame that was partly overwritten is referred to more than once.
            distinct, first = np.unique(_keys(part), return_index=True)
            sid = manifest.sessions[int(part[0, 2])].sid
            seen = self._seen.setdefault(sid, _Seen())
            for row in part[first[seen.add(distinct)]].tolist():
                interval = Interval(*row)
                yield interval._replace(start=0, n=interval.flen, skip=0)

    def _locate(self, summary: Summary) -> None:
        """Note which ranges of the disk are lost."""
        opened = self._open(summary)
        if opened is None:
            return
        manifest, reader = opened
        bad_packs = {(sid, seq) for sid, seq, _ in self._findings.bad}
        sids = [session.sid for session in manifest.sessions]
        for index, ref in enumerate(manifest.segments):
            if self._cancel.is_set():
                raise Cancelled
            if ref is None:
                continue
            base = index * SEGMENT
            lost = self._findings.bad.get(_place_of(manifest, ref))
            if lost is not None:
                whole = (base, min(base + SEGMENT, summary.size))
                self._damages.add(lost.key, str(lost), summary, [whole])
            elif any((sids[session], seq) in bad_packs for session, seq in ref.packs):
                self._locate_frames(summary, sids, base, reader.segment(index))

    def _locate_frames(
        self, summary: Summary, sids: Sequence[str], base: int, segment: Segment
    ) -> None:
        for interval in segment:
            place = (sids[interval.session], interval.seq, interval.offset)
            exc = self._findings.bad.get(place)
            if exc is not None:
                start = base + interval.start * GRAIN
                end = min(start + interval.n * GRAIN, summary.size)
                self._damages.add(exc.key, str(exc), summary, [(start, end)])


def _place_of(manifest: Manifest, ref: SegmentRef) -> _Place:
    return (manifest.sessions[ref.session].sid, ref.seq, ref.offset)


def _keys(rows: NDArray[np.int64]) -> _Keys:
    """Where the frames of these intervals, all of one session, lie."""
    seq, offset = rows[:, 3].astype(np.uint64), rows[:, 4].astype(np.uint64)
    keys: _Keys = (seq << np.uint64(32)) | offset
    return keys
