"""Values for the tests of formats, and a way to damage bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from blake3 import blake3

from nbdpull.model.frame import ENTRY, HEADER_SIZE, PACK_HEADER_SIZE, Codec, FrameKind
from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.model.ids import BackupId, DiskId, SessionId
from nbdpull.model.index import Directory
from nbdpull.model.manifest import Manifest, SegmentRef, SessionRef, Summary
from nbdpull.model.results import Level
from nbdpull.model.segment import Packs

SID = SessionId("0123456789abcdef0123456789abcdef")
REPOSITORY = "ab" * 16


def summary(**changes: object) -> Summary:
    fields: dict[str, object] = {
        "backup": BackupId("0011223344556677"),
        "vm": "größe",
        "chain": "default",
        "level": Level.INCREMENTAL,
        "parent": BackupId("8899aabbccddeeff"),
        "time": 1_700_000_000.25,
        "duration_s": 3.5,
        "disk": "vda",
        "disk_id": DiskId("cd" * 16),
        "session": SID,
        "size": 3 * SEGMENT - GRAIN - 512,
        "disk_level": Level.FULL,
        "reason": "its bitmap is missing",
        "checkpoint": "bitmap",
        "full_checkpoint": None,
        "changed_bytes": 1 << 40,
        "read_bytes": 12,
        "stored_bytes": 3,
        "siblings": ((DiskId("cd" * 16), SID), (DiskId("ef" * 16), SessionId("12" * 16))),
        "tool": "nbdpull 1",
    }
    return Summary(**(fields | changes))  # type: ignore[arg-type]


def manifest() -> Manifest:
    """Three segments, of which one reads as zeroes, and a session that nothing refers to any more."""
    return Manifest(
        summary(),
        REPOSITORY,
        (
            SessionRef(SessionId("34" * 16), ((0, bytes(range(32))), (7, bytes(32)))),
            SessionRef(SessionId(""), ()),
            SessionRef(SID, ((0, b"\xff" * 32),)),
        ),
        (
            SegmentRef(2, 0, PACK_HEADER_SIZE, 99, Packs.of([(0, 1), (0, 450), (2, 0)])),
            None,
            SegmentRef(0, 3, 1 << 20, 5, Packs.of([(0, 1)])),
        ),
    )


def directory(lengths: list[tuple[int, int]]) -> Directory:
    """Frames with these (stored, unpacked) lengths."""
    entries = np.zeros(len(lengths), dtype=ENTRY)
    at = PACK_HEADER_SIZE
    for number, (clen, rlen) in enumerate(lengths):
        entries[number]["offset"] = at
        entries[number]["clen"] = clen
        entries[number]["rlen"] = rlen
        entries[number]["codec"] = Codec.RAW if clen == rlen else Codec.ZSTD
        entries[number]["kind"] = FrameKind.MAP if number % 7 == 3 else FrameKind.DATA
        entries[number]["digest"] = np.frombuffer(blake3(b"%d" % number).digest(), dtype="V32")[0]
        at += HEADER_SIZE + clen
    return Directory(entries)


def damaged(raw: bytes, *, every: int = 1) -> Iterator[bytes]:
    """`raw` with each byte changed (one bit, all bits), cut at each place, and longer."""
    for at in range(0, len(raw), every):
        for mask in (1 << at % 8, 0xFF):
            changed = bytearray(raw)
            changed[at] ^= mask
            yield bytes(changed)
        yield raw[:at]
    yield raw + b"\0"
    yield raw + raw
