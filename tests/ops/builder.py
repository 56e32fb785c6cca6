"""Repositories with known disks in them, written without any VM."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nbdpull.model.grain import (
    GRAIN,
    SEGMENT,
    Kind,
    Kinds,
    frame_runs,
    segment_count,
    segment_grains,
)
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.results import Level
from nbdpull.model.segment import Interval, Segment
from nbdpull.repo.repository import Repository

VM = "vm1"


@dataclass
class Disk:
    """A sparse disk: what is not among `grains` (by number) reads as zero."""

    size: int
    grains: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, content: bytes) -> Disk:
        parts = {at // GRAIN: content[at : at + GRAIN] for at in range(0, len(content), GRAIN)}
        return cls(len(content), {number: part for number, part in parts.items() if any(part)})

    def write_to(self, path: Path) -> Path:
        """The disk as a raw file."""
        with path.open("wb") as file:
            file.truncate(self.size)
            for number, part in self.grains.items():
                file.seek(number * GRAIN)
                file.write(part)
        return path

    def content(self) -> bytes:
        out = bytearray(self.size)
        for number, part in self.grains.items():
            out[number * GRAIN : number * GRAIN + len(part)] = part
        return bytes(out)

    def changed(self, seed: int, *, count: int = 20) -> Disk:
        """A later state: some grains overwritten, some zeroed."""
        rng = random.Random(seed)
        grains = dict(self.grains)
        for _ in range(count):
            number = rng.randrange(-(-self.size // GRAIN))
            length = min(GRAIN, self.size - number * GRAIN)
            if rng.random() < 0.3:
                grains.pop(number, None)
            else:
                grains[number] = rng.randbytes(length)
        return Disk(self.size, grains)


def _kinds(disk: Disk, old: Disk | None, index: int) -> Kinds:
    """What became of each grain of a segment since `old`; without it everything is to be stored."""
    count = segment_grains(disk.size, index)
    kinds = np.full(count, Kind.ZERO if old is None else Kind.CLEAN, dtype=np.uint8)
    before = {} if old is None else old.grains
    base = index * SEGMENT // GRAIN
    for number in before.keys() | disk.grains.keys():
        if base <= number < base + count and before.get(number) != disk.grains.get(number):
            kinds[number - base] = Kind.DATA if number in disk.grains else Kind.ZERO
    return kinds


def add_backup(
    repository: Repository,
    disks: Mapping[str, Disk],
    *,
    before: Mapping[str, Disk] | None = None,
    parents: Mapping[str, Manifest] | None = None,
    commit: frozenset[str] | None = None,
    time: float = 1000.0,
    vm: str = VM,
) -> dict[str, Manifest]:
    """Commit one backup of all `disks`; only what differs from `before` is stored when that is given.

    `commit` names the disks that are committed (all by default): the others are left out, as when
    the client was killed between two commits.
    """
    parents = parents or {}
    backup = BackupId(secrets.token_hex(8))
    sessions = {
        name: repository.begin(vm=vm, disk=name, parent=parents.get(name)) for name in disks
    }
    siblings = tuple((session.disk_id, session.id) for session in sessions.values())
    manifests = {}
    for name, session in sessions.items():
        disk = disks[name]
        old = before[name] if before else None
        reader = repository.reader(parents[name]) if name in parents else None
        for index in range(segment_count(disk.size)):
            base = index * SEGMENT // GRAIN
            kinds = _kinds(disk, old, index)
            new = []
            for first, n in frame_runs(kinds):
                ref = session.put(
                    b"".join(disk.grains[base + number] for number in range(first, first + n))
                )
                new.append(
                    Interval(
                        start=first,
                        n=n,
                        session=ref.session,
                        seq=ref.seq,
                        offset=ref.offset,
                        clen=ref.clen,
                        skip=0,
                        flen=n,
                    )
                )
            if (kinds != Kind.CLEAN).any():
                under = reader.segment(index) if reader else Segment.empty()
                session.put_segment(index, under.overlay(kinds, new))
        session.seal()
        if commit is not None and name not in commit:
            continue
        level = Level.INCREMENTAL if before else Level.FULL
        manifests[name] = session.commit(
            Summary(
                backup=backup,
                vm=vm,
                chain="default",
                level=level,
                parent=parents[name].summary.backup if name in parents else None,
                time=time,
                duration_s=1.0,
                disk=name,
                disk_id=session.disk_id,
                session=session.id,
                size=disk.size,
                disk_level=level,
                reason="asked for",
                checkpoint=None,
                full_checkpoint=None,
                changed_bytes=disk.size,
                read_bytes=disk.size,
                stored_bytes=session.stored_bytes,
                siblings=siblings,
                tool="test",
            )
        )
    return manifests
