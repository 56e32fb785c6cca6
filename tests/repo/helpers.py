"""Repositories of a few small backups, written without any VM."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbdpull.model.crypto import Kdf, KdfName
from nbdpull.model.grain import FRAME_GRAINS, GRAIN, SEGMENT, Kind, segment_count, segment_grains
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.results import Level
from nbdpull.model.segment import Interval, Segment
from nbdpull.repo.repository import DiskReader, Repository, Session

Changes = Mapping[int, bytes | None]
"""Grain number on the disk -> its new bytes, or None where it was zeroed."""


PASSWORD = b"correct horse"
CHEAP = Kdf(KdfName.ARGON2ID, memory_kib=8, passes=1, lanes=1)
"""What no real repository should use."""


def encrypted(root: Path) -> Repository:
    """A new repository under `PASSWORD`."""
    return Repository.create(str(root), password=PASSWORD, kdf=CHEAP)


def summary_for(session: Session, *, size: int, **changes: object) -> Summary:
    fields: dict[str, object] = {
        "backup": BackupId("00" * 8),
        "vm": "vm",
        "chain": "default",
        "level": Level.FULL,
        "parent": None,
        "time": 1.0,
        "duration_s": 1.0,
        "disk": "vda",
        "disk_id": session.disk_id,
        "session": session.id,
        "size": size,
        "disk_level": Level.FULL,
        "reason": "test",
        "checkpoint": None,
        "full_checkpoint": None,
        "changed_bytes": 0,
        "read_bytes": 0,
        "stored_bytes": session.stored_bytes,
        "siblings": ((session.disk_id, session.id),),
        "tool": "test",
    }
    return Summary(**(fields | changes))  # type: ignore[arg-type]


def interval(session: Session, start: int, raw: bytes) -> Interval:
    """Put one frame."""
    ref = session.put(raw)
    return Interval(start, ref.grains, ref.session, ref.seq, ref.offset, ref.clen, 0, ref.grains)


def store_changes(session: Session, reader: DiskReader | None, size: int, changes: Changes) -> None:
    """Put what changed, a frame for each run of grains."""
    for index in sorted({number * GRAIN // SEGMENT for number in changes}):
        base = index * SEGMENT // GRAIN
        kinds = np.full(segment_grains(size, index), Kind.CLEAN, dtype=np.uint8)
        new: list[Interval] = []
        run: list[int] = []
        here = [number for number in sorted(changes) if 0 <= number - base < len(kinds)]
        for number in here:
            kinds[number - base] = Kind.ZERO if changes[number] is None else Kind.DATA
        for number in [*here, -1]:
            ends = not run or number != run[-1] + 1 or number % FRAME_GRAINS == 0
            if run and (ends or changes[number] is None):
                raw = b"".join(changes[one] or b"" for one in run)
                new.append(interval(session, run[0] - base, raw))
                run = []
            if number >= 0 and changes[number] is not None:
                run.append(number)
        before = reader.segment(index) if reader else Segment.empty()
        session.put_segment(index, before.overlay(kinds, new))


def backup(
    repository: Repository,
    size: int,
    changes: Changes,
    parent: Manifest | None = None,
    **summary: object,
) -> Manifest:
    """Commit one backup of disk 'vda'."""
    session = repository.begin(vm="vm", disk="vda", parent=parent)
    reader = repository.reader(parent) if parent else None
    store_changes(session, reader, size, changes)
    session.seal()
    return session.commit(summary_for(session, size=size, **summary))


def restore(reader: DiskReader) -> bytes:
    """The whole disk."""
    size = reader.manifest.summary.size
    out = bytearray(size)
    for index in range(segment_count(size)):
        for one in reader.segment(index):
            raw = reader.read(one)
            at = index * SEGMENT + one.start * GRAIN
            assert len(raw) == min(one.n * GRAIN, size - at)
            out[at : at + len(raw)] = raw
    return bytes(out)


@dataclass(frozen=True)
class History:
    """Some backups of one disk, and what the disk held at each."""

    manifests: Sequence[Manifest]
    contents: Sequence[bytes]


def grain(seed: int, length: int = GRAIN) -> bytes:
    """Bytes that pack to about a quarter, and never are all zero."""
    rng = random.Random(seed)
    return bytes(rng.choices(b"abcd", k=length))


def small_history(repository: Repository) -> History:
    """A full and two increments of a disk of 5.3 grains: small enough to damage every byte."""
    size = 5 * GRAIN + 20_000
    last = {5: b"z" * 20_000}
    states: list[Changes] = [
        {0: b"a" * GRAIN, 1: b"b" * GRAIN, 2: b"c" * GRAIN, 3: None, 4: None, **last},
        {1: None, 3: b"d" * GRAIN},
        {5: b"y" * 20_000, 2: random.Random(2).randbytes(16) * (GRAIN // 16)},
    ]
    disk = bytearray(size)
    manifests: list[Manifest] = []
    contents: list[bytes] = []
    for number, changes in enumerate(states):
        for at, raw in changes.items():
            length = min(GRAIN, size - at * GRAIN)
            disk[at * GRAIN : at * GRAIN + length] = raw or bytes(length)
        manifests.append(
            backup(
                repository,
                size,
                changes,
                manifests[-1] if manifests else None,
                backup=BackupId(f"{number:016x}"),
                time=float(number),
            )
        )
        contents.append(bytes(disk))
    return History(manifests, contents)
