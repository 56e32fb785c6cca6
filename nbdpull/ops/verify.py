"""Verify: what backups refer to is looked at again, each object and each frame once.

    level   packs are there      maps, and    every   what stands around the
            with their size      a share      frame   frames of a pack
    list         x
    sample       x                   x
    full         x                            x                x

    backups, oldest first       maps not seen before      frames not seen before     workers
    one manifest in memory  ->  one segment decoded   ->  batches in pack order  ->  read and re-hash

Memory holds eight bytes for each frame seen. What is damaged is only noted on the way; at the end the
backups are gone through again, to tell exactly which ranges of which disks are lost, and to put it on
record for the next backup, which heals what its source still holds.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import DamagedError, WrongKeyError
from nbdpull.model.damage import DamagedFrame, Place
from nbdpull.model.frame import HEADER_SIZE, FrameKind
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import Manifest, SegmentRef, Summary
from nbdpull.model.outcomes import VerifyLevel, VerifyResult
from nbdpull.model.results import ProgressCallback
from nbdpull.model.segment import Interval, Segment
from nbdpull.nbdio.errors import Cancelled
from nbdpull.ops.disknames import disk_names
from nbdpull.ops.findings import Damages, Findings, Keys, Seen
from nbdpull.ops.lost import PARTIAL, Suspect, damaged_frame, mend_indexes, record_damage, suspects
from nbdpull.ops.meter import Meter
from nbdpull.ops.threads import in_thread, run_all, worker_count
from nbdpull.repo.damage import KNOWN_MAX, Pack
from nbdpull.repo.finding import check_there
from nbdpull.repo.ranges import RANGE_MAX
from nbdpull.repo.repository import Backup, DiskReader, Repository

__all__ = ["VerifyOptions", "verify"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_BATCH_FRAMES = 256
_MEMORY = 32 << 20
"""Bytes of all batches together, as they are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What to verify.

    Attributes:
        repository: where the backups are.
        backups: ids, unique prefixes or ``latest``; empty for all.
        vm: only backups of this VM; None for any.
        level: how much to read.
        share: of the frames, above 0 to 1, that a sample reads.
        seed: chooses the frames of a sample; None for a random one.
        record: put damage on record in the repository, for the next backup to heal.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    backups: tuple[str, ...] = ()
    vm: str | None = None
    level: VerifyLevel = VerifyLevel.FULL
    share: float = 0.01
    seed: int | None = None
    record: bool = True
    keys: KeySource | None = None


async def verify(
    options: VerifyOptions, *, progress: ProgressCallback | None = None
) -> VerifyResult:
    """Look at what the backups refer to, and tell what is lost.

    Damage is part of the result, not an error.

    Raises:
        RepositoryNotFoundError: there is none.
        BackupNotFoundError: no such backup.
        StoreError: the storage failed in a way that says nothing about what is stored.
    """
    return await in_thread(lambda cancel: _Verify(options, progress, cancel).run())


class _Verify:
    """One run; `run` blocks."""

    def __init__(
        self, options: VerifyOptions, progress: ProgressCallback | None, cancel: threading.Event
    ) -> None:
        self._options = options
        self._progress = progress
        self._cancel = cancel
        self._repository = Repository.open(
            options.repository, mend=options.record, keys=options.keys
        )
        self._repository.check_restorable()
        self._findings = Findings()
        self._damages = Damages()
        self._seen: dict[str, Seen] = {}
        self._packs_seen: dict[str, Seen] = {}
        self._maps: set[Place] = set()
        self._short: dict[
            Pack, int
        ] = {}  # packs that are cut or gone, and the bytes that are there
        self._healed: set[Place] = set()
        self._seed = secrets.randbits(32) if options.seed is None else options.seed

    def run(self) -> VerifyResult:
        options = self._options
        began = time.monotonic()
        backups = sorted(self._chosen(), key=lambda backup: (backup.time, backup.id))
        for backup in backups:
            if not backup.complete:
                self._report_incomplete(backup)
            for summary in backup.disks:
                self._verify_disk(summary)
        rows: dict[DamagedFrame, None] = {}
        if self._findings.bad or self._short:
            for backup in backups:
                for summary in backup.disks:
                    self._locate(summary, rows)
        told = self._damages.keys()
        for key, problem in self._findings.packs.items():
            if key not in told:
                self._damages.add(key, f"{problem}; no frame in it is lost because of that")
        damaged = self._damages.result()
        sample = options.level is VerifyLevel.SAMPLE
        return VerifyResult(
            ok=not damaged,
            backups=tuple(backup.id for backup in backups),
            frames=self._findings.frames,
            read_bytes=self._findings.read_bytes,
            damaged=damaged,
            duration_s=time.monotonic() - began,
            level=options.level,
            healed=len(self._healed),
            recorded=record_damage(self._repository, list(rows)) if rows and options.record else 0,
            share=options.share if sample else None,
            seed=self._seed if sample else None,
        )

    def _chosen(self) -> Sequence[Backup]:
        options = self._options
        if options.backups:
            found = [self._repository.find(name, vm=options.vm) for name in options.backups]
            return list({backup.id: backup for backup in found}.values())
        everything, unreadable = self._repository.everything()
        sealed = [one for one in unreadable if isinstance(one.error, WrongKeyError)]
        if sealed:
            raise WrongKeyError(
                f"{len(sealed)} manifests of {self._repository.location} are closed to this key, so nothing"
                f" can be said of their backups: {sealed[0].error}; verify with the newest key"
            )
        for one in unreadable:
            self._damages.add(one.key, str(one.error))
        check_there(everything, unreadable, vm=options.vm)
        backups = [one for one in everything if one.forgotten is None]
        return [one for one in backups if options.vm in {None, one.vm}]

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

    # -- one disk ----------------------------------------------------------------------------------

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
        packs = list(self._check_packs(summary, reader))
        if self._options.level is not VerifyLevel.LIST:
            self._read_frames(manifest, reader, meter)
        if self._options.level is VerifyLevel.FULL:
            self._read_around(reader, packs)
        meter.end()
        self._healed |= reader.healed
        self._tell_indexes(reader)

    def _tell_indexes(self, reader: DiskReader) -> None:
        """Tell of indexes that their packs stood in for, and put those back that are gone."""
        mended = mend_indexes(self._repository, reader) if self._options.record else set()
        for index, damage in reader.rebuilt.items():
            if index in reader.partial:
                self._damages.add(damage.key, f"{damage}; {PARTIAL}")
                continue
            what = "no frame is lost because of that: its packs say the same"
            done = (
                "it is put back"
                if damage.key in mended
                else "delete it and verify again to have it made anew"
            )
            self._damages.add(damage.key, f"{damage}; {what}; {done}")

    def _check_packs(self, summary: Summary, reader: DiskReader) -> Iterator[tuple[int, int]]:
        """Compare the sizes of the packs with what the store lists; those that are as written."""
        fresh: dict[int, list[int]] = {}
        for session, seq in reader.packs():
            fresh.setdefault(session, []).append(seq)
        for session, seqs in fresh.items():
            sid = reader.manifest.sessions[session].sid
            keys = np.array(sorted(seqs), dtype=np.uint64)
            new = keys[self._packs_seen.setdefault(sid, Seen()).add(keys)].tolist()
            if not new:
                continue
            listed = self._repository.pack_sizes([sid])
            for seq in new:
                if self._cancel.is_set():
                    raise Cancelled
                try:
                    size = reader.pack_place(session, seq).size
                except DamagedError as exc:
                    self._damages.add(exc.key, str(exc), summary)
                    continue
                there = listed.get((sid, seq), 0)
                if there == size:
                    yield session, seq
                    continue
                key = reader.key(session, seq)
                problem = f"pack {key} has {there} bytes, expected {size}"
                if there < size:
                    self._short[sid, seq] = there
                    if self._repository.damage.has_copies((sid, seq)):
                        continue  # known, and dealt with: only what is still lost is told
                self._findings.add_pack(DamagedError(problem, key=key))

    def _read_frames(self, manifest: Manifest, reader: DiskReader, meter: Meter) -> None:
        sids = [session.sid for session in manifest.sessions]

        def check(batch: list[Interval]) -> None:
            there = [frame for frame in batch if not self._is_gone(place_of(frame), frame.clen)]
            fetched = reader.fetch(there)
            fetched.load(there)
            for frame in batch:
                if self._cancel.is_set():
                    raise Cancelled
                if not self._is_gone(place_of(frame), frame.clen):
                    try:
                        reader.read(frame, fetched)
                    except DamagedError as exc:
                        self._findings.add(place_of(frame), exc)
                self._findings.count(1, frame.clen)
                meter.add(frame.clen)

        def place_of(frame: Interval) -> Place:
            return Place(sids[frame.session], frame.seq, frame.offset)

        self._each(self._batches(manifest, reader), check)

    def _read_around(self, reader: DiskReader, packs: Sequence[tuple[int, int]]) -> None:
        def check(pack: tuple[int, int]) -> None:
            try:
                reader.check_pack(*pack)
            except DamagedError as exc:
                self._findings.add_pack(exc)

        self._each(iter(packs), check)

    def _each(self, work_list: Iterator[_T], check: Callable[[_T], None]) -> None:
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    one = next(work_list, None)
                if one is None:
                    return
                if self._cancel.is_set():
                    raise Cancelled
                check(one)

        run_all([work] * worker_count(), self._cancel)

    def _is_gone(self, place: Place, clen: int) -> bool:
        """Whether a frame lies where its pack has no bytes any more, and was not stored anew."""
        there = self._short.get(place[:2])
        return (
            there is not None
            and place.offset + HEADER_SIZE + clen > there
            and not self._repository.damage.copies(place)
        )

    def _batches(self, manifest: Manifest, reader: DiskReader) -> Iterator[list[Interval]]:
        """Frames that nobody verified yet, whole."""
        limit = min(RANGE_MAX, _MEMORY // worker_count())
        batch: list[Interval] = []
        size = 0
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
                if batch and (size + frame.clen > limit or len(batch) >= _BATCH_FRAMES):
                    yield batch
                    batch, size = [], 0
                batch.append(frame)
                size += frame.clen + HEADER_SIZE
        if batch:
            yield batch

    def _segment(self, reader: DiskReader, index: int, place: Place) -> Segment | None:
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
            wanted = self._seen.setdefault(sid, Seen()).add(distinct)
            if self._options.level is VerifyLevel.SAMPLE:
                wanted &= _drawn(distinct, int(sid, 16) ^ self._seed, self._options.share)
            for row in part[first[wanted]].tolist():
                interval = Interval(*row)
                yield interval._replace(start=0, n=interval.flen, skip=0)

    # -- what it costs -----------------------------------------------------------------------------

    def _locate(self, summary: Summary, rows: dict[DamagedFrame, None]) -> None:
        """Note which ranges of the disk are lost, and what is to be put on record."""
        opened = self._open(summary)
        if opened is None:
            return
        _, reader = opened
        packs = {(place.session, place.seq) for place in self._findings.bad} | self._short.keys()
        for one in suspects(reader, packs, self._cancel):
            found = self._problem(one)
            if found is None:
                continue
            key, problem = found
            self._damages.add(key, problem, summary, [(one.start, one.end)])
            if len(rows) < KNOWN_MAX:
                rows |= dict.fromkeys(damaged_frame(self._repository, reader, one))

    def _problem(self, one: Suspect) -> tuple[str, str] | None:
        """The damaged object, and what is wrong with it; None when the frame is sound."""
        known = self._findings.bad.get(one.place)
        if known is not None:
            return known
        there = self._short.get(one.place[:2])
        if there is None or one.place.offset + HEADER_SIZE + one.clen <= there:
            return None
        key = f"d/{one.place.session}/{one.place.seq:08x}"
        state = f"has only {there} bytes" if there else "is missing or empty"
        if not self._repository.damage.copies(one.place) or one.kind is not FrameKind.DATA:
            return key, f"pack {key} {state}"
        try:
            one.read()
        except DamagedError as exc:
            return key, str(exc)
        self._healed.add(one.place)
        return None


def _place_of(manifest: Manifest, ref: SegmentRef) -> Place:
    return Place(manifest.sessions[ref.session].sid, ref.seq, ref.offset)


def _keys(rows: NDArray[np.int64]) -> Keys:
    """Where the frames of these intervals, all of one session, lie."""
    seq, offset = rows[:, 3].astype(np.uint64), rows[:, 4].astype(np.uint64)
    keys: Keys = (seq << np.uint64(32)) | offset
    return keys


def _drawn(keys: Keys, seed: int, share: float) -> NDArray[np.bool_]:
    """A random share of the frames; which ones depends on nothing but the frame and the seed."""
    # splitmix64: each bit of a key changes half of the bits of what comes out.
    mixed = keys ^ np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    drawn: NDArray[np.bool_] = mixed < np.uint64(min(int(share * 2**64), 2**64 - 1))
    return drawn
