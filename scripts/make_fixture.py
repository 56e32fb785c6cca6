#!/usr/bin/env python3
"""Write a tiny repository that has every case of the format in it; how tests/fixtures/format-1 was made.

    scripts/make_fixture.py NEW-FOLDER [--encrypt] [--life]

With --encrypt it is encrypted under the password `fixture`, and its exported keys lie beside it. With --life it has also what lies
beside backups (tests/fixtures/format-1-life): backup 2 is forgotten, backup 3 is forgotten for good, backup 1 is protected;
registers that were revoked and adopted, a record of damage; and `replica`, a copy of what is shown.
A fixture is made once and never again: what it holds must restore for ever. Ids are random, so another
run writes other bytes. Beside the repository it leaves `expected.json`: for each backup and disk its size
and a SHA-256 of its grains that are not zero, each led by its number (hashing 1 GiB of zeroes takes long).

    vda   1 GiB + 200 KiB + 700 bytes: two segments and a short last grain
    vdb   3 grains: a second disk of the same backups; a zero disk in the first one
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import nbdpull
from nbdpull.model.damage import DamagedFrame, Place
from nbdpull.model.frame import FrameKind
from nbdpull.model.grain import GRAIN, SEGMENT, Kind, segment_count, segment_grains
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import REVOKED, Manifest, Summary
from nbdpull.model.results import Level
from nbdpull.model.segment import Interval, Segment
from nbdpull.repo import session as session_module
from nbdpull.repo.location import open_store
from nbdpull.repo.repository import DiskReader, Repository, Session

VDA = SEGMENT + 200 * 1024 + 700
VDB = 3 * GRAIN
Changes = Mapping[int, tuple[bytes, ...] | int]
"""First grain -> the grains of one frame, or how many grains from there became zero."""


def text(number: int) -> bytes:
    """A grain that packs to about nothing."""
    return (f"grain {number:06d} " * (GRAIN // 13 + 1)).encode()[:GRAIN]


def noise(length: int) -> bytes:
    """Bytes that don't pack: their frame is stored as it is."""
    return random.Random(length).randbytes(length)  # noqa: S311


STATES: list[tuple[Level, Mapping[str, Changes]]] = [
    (
        Level.FULL,
        {
            "vda": {
                0: (text(0),),
                14: (text(14), text(15)),
                16: tuple(text(n) for n in range(16, 32)),
                5000: (bytes(8) + text(1)[8:], bytes(GRAIN), text(2)),
                16384: (text(3), text(4)),
                16387: (noise(VDA % GRAIN),),
            },
            "vdb": {},
        },
    ),
    (
        Level.INCREMENTAL,
        {
            "vda": {20: (text(1000), text(1001)), 25: 1, 16384: 1},
            "vdb": {0: (text(5), text(6), text(7))},
        },
    ),
    (
        Level.DIFFERENTIAL,
        {"vda": {16: 16, 16387: (noise(VDA % GRAIN - 1) + b"\7",)}, "vdb": {1: 1}},
    ),
    (Level.COPY, {"vda": {3: (text(8),)}, "vdb": {0: 3}}),
]


def store(session: Session, before: DiskReader | None, size: int, changes: Changes) -> None:
    """Write what changed of one disk."""
    for index in range(segment_count(size)):
        base = index * SEGMENT // GRAIN
        kinds = [Kind.CLEAN] * segment_grains(size, index)
        new = []
        for at, what in sorted(changes.items()):
            if not base <= at < base + len(kinds):
                continue
            count = what if isinstance(what, int) else len(what)
            kind = Kind.ZERO if isinstance(what, int) else Kind.DATA
            kinds[at - base : at - base + count] = [kind] * count
            if not isinstance(what, int):
                ref = session.put(b"".join(what))
                new.append(
                    Interval(
                        at - base, count, ref.session, ref.seq, ref.offset, ref.clen, 0, ref.grains
                    )
                )
        if set(kinds) != {Kind.CLEAN}:
            under = before.segment(index) if before else Segment.empty()
            session.put_segment(index, under.overlay(np.array(kinds, dtype=np.uint8), new))


def apply(disk: bytearray, changes: Changes) -> None:
    """The same on a plain disk."""
    for at, what in changes.items():
        raw = bytes(what * GRAIN) if isinstance(what, int) else b"".join(what)
        disk[at * GRAIN : at * GRAIN + len(raw)] = raw[: len(disk) - at * GRAIN]


def digest(content: bytearray) -> str:
    """See above."""
    found = hashlib.sha256()
    for at in range(0, len(content), GRAIN):
        part = content[at : at + GRAIN]
        if part.count(0) != len(part):
            found.update((at // GRAIN).to_bytes(8, "little") + part)
    return found.hexdigest()


def main(folder: Path, *, encrypt: bool, life: bool) -> None:
    """Write it."""
    # Several packs a session, as large disks have; and nobody's host name.
    setattr(session_module, "FRAMES_PER_PACK", 3)  # noqa: B010 - it is Final
    socket.gethostname = lambda: "host"
    repository = Repository.create(
        str(folder / "repository"), password=b"fixture" if encrypt else None
    )
    if repository.vault is not None:
        ring = repository.vault.ring
        (folder / "recovery.key").write_bytes(ring.encode())
        (folder / "writer.key").write_bytes(ring.for_writers().encode())
    contents = {"vda": bytearray(VDA), "vdb": bytearray(VDB)}
    last: dict[str, Manifest] = {}
    expected: dict[str, dict[str, tuple[int, str]]] = {}
    for number, (level, disks) in enumerate(STATES):
        backup = BackupId(f"{number + 1:016x}")
        sessions = {
            name: repository.begin(vm="vm ü", disk=name, parent=last.get(name)) for name in disks
        }
        siblings = tuple((session.disk_id, session.id) for session in sessions.values())
        for name, changes in disks.items():
            session = sessions[name]
            before = repository.reader(last[name]) if name in last else None
            store(session, before, len(contents[name]), changes)
            apply(contents[name], changes)
            session.seal()
            last[name] = session.commit(
                Summary(
                    backup=backup,
                    vm="vm ü",
                    chain="default",
                    level=level,
                    parent=BackupId(f"{number:016x}") if number else None,
                    time=1000.0 + number,
                    duration_s=0.5,
                    disk=name,
                    disk_id=session.disk_id,
                    session=session.id,
                    size=len(contents[name]),
                    disk_level=level,
                    reason="fixture",
                    checkpoint=None if level is Level.COPY else f"checkpoint-{number}",
                    full_checkpoint=None if level is Level.COPY else "checkpoint-0",
                    changed_bytes=len(contents[name]),
                    read_bytes=1,
                    stored_bytes=session.stored_bytes,
                    siblings=siblings,
                    tool="nbdpull 0.1.0",
                )
            )
        expected[backup] = {
            name: (len(content), digest(content)) for name, content in contents.items()
        }
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    if life:
        live(folder, repository, last["vda"])


def live(folder: Path, repository: Repository, parent: Manifest) -> None:
    """What lies beside backups."""
    store = open_store(str(folder / "repository"))
    forgotten, doomed = (repository.find(f"{number:016x}") for number in (2, 3))
    repository.forget(forgotten.pins, "asked for")
    repository.forget(doomed.pins, "policy")
    for pin in doomed.pins:
        store.create(f"t/{pin}", b"")
    repository.protect(repository.find(f"{1:016x}"))
    dead = repository.begin(vm="vm ü", disk="vda", parent=parent)
    dead.put(text(77))
    dead.seal()
    dead.abandon()
    adopter = repository.begin(vm="vm ü", disk="vda", parent=parent)
    adopter.put(text(78))
    adopter.seal()
    adopter.abandon()
    gone = repository.begin(vm="vm ü", disk="vdb", parent=None)
    gone.abandon()
    store.create(f"m/{gone.disk_id}/{gone.id}", REVOKED)
    reader = repository.reader(parent)
    row = next(iter(reader.segment(0)))
    header = reader.written(row.session, row.seq, row.offset)
    repository.damage.add_damage(
        [
            DamagedFrame(
                place=Place(parent.sessions[row.session].sid, row.seq, row.offset),
                clen=row.clen,
                rlen=header.rlen,
                digest=header.digest,
                kind=FrameKind.DATA,
                disk=parent.summary.disk_id,
                start=row.start * GRAIN,
            )
        ]
    )
    nbdpull.copy(folder / "repository", folder / "replica")


if __name__ == "__main__":
    main(Path(sys.argv[1]), encrypt="--encrypt" in sys.argv[2:], life="--life" in sys.argv[2:])
