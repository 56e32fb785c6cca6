"""Records of damage and of healing, `b/<sid>/<n>`: which frames are lost, and where they were stored anew.

    | head 64 | rows: 128 bytes each | BLAKE3 of all before, 32 |

A record of damage is a note for the next backup and is never believed beyond that. A record of healing
is a hint for readers: the bytes that it leads to must have the digest that the reader's own manifest
vouches for, so a wrong one, or a forged one, can do no harm.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from blake3 import blake3

from nbdpull.model.frame import PACK_HEADER_SIZE, FormatError, FrameKind
from nbdpull.model.grain import FRAME_MAX
from nbdpull.model.ids import DiskId, SessionId

__all__ = [
    "RECORD_MAX",
    "ROWS_MAX",
    "DamagedFrame",
    "HealedFrame",
    "Place",
    "Record",
    "decode_record",
    "encode_record",
]

ROWS_MAX: Final = 4096
_HEAD: Final = struct.Struct("<8sHHI16s16sI12s")
_DAMAGE: Final = struct.Struct("<16sIIII32sB7sQ16s32s")
_HEAL: Final = struct.Struct("<16sIIII32s16sII8s32s")
_ROW: Final = 128
_DAMAGE_MAGIC: Final = b"NBDPDMG1"
_HEAL_MAGIC: Final = b"NBDPHEA1"
_VERSION: Final = 1
_TRAILER: Final = 32
RECORD_MAX: Final = _HEAD.size + ROWS_MAX * _ROW + _TRAILER


class Place(NamedTuple):
    """Where a frame lies, the same in every manifest: session, pack, offset in the pack."""

    session: SessionId
    seq: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedFrame:
    """A frame that could not be read, at one place of one disk.

    Attributes:
        clen: stored bytes.
        rlen: bytes that it unpacked to; 0 where the index, too, is lost: then the digest means nothing.
        digest: of the unpacked bytes.
        disk: a disk that has, or had, these bytes.
        start: where on that disk the frame begins, in bytes; of a map, where its segment begins.
    """

    place: Place
    clen: int
    rlen: int
    digest: bytes
    kind: FrameKind
    disk: DiskId
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HealedFrame:
    """Where a later session stored a damaged frame anew.

    Attributes:
        damaged: the frame that could not be read.
        copy: the new one.
        clen: stored bytes of the new one.
        rlen, digest: what both unpack to.
        index: BLAKE3 of the head and table of the new session's index that has the new frame.
    """

    damaged: Place
    copy: Place
    clen: int
    rlen: int
    digest: bytes
    index: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """A decoded record; one of the two is empty."""

    damaged: Sequence[DamagedFrame] = ()
    healed: Sequence[HealedFrame] = ()


def encode_record(
    repository: str, sid: SessionId, number: int, rows: Sequence[DamagedFrame | HealedFrame]
) -> bytes:
    """The object `b/<sid>/<number>` with these rows, 1 to `ROWS_MAX`, all of one kind."""
    damage = isinstance(rows[0], DamagedFrame)
    head = _HEAD.pack(
        _DAMAGE_MAGIC if damage else _HEAL_MAGIC,
        _VERSION,
        0,
        len(rows),
        bytes.fromhex(repository),
        bytes.fromhex(sid),
        number,
        b"",
    )
    raw = head + b"".join(map(_encode, rows))
    return raw + blake3(raw).digest()


def _encode(row: DamagedFrame | HealedFrame) -> bytes:
    if isinstance(row, DamagedFrame):
        return _DAMAGE.pack(
            bytes.fromhex(row.place.session),
            row.place.seq,
            row.place.offset,
            row.clen,
            row.rlen,
            row.digest,
            row.kind,
            b"",
            row.start,
            bytes.fromhex(row.disk),
            b"",
        )
    return _HEAL.pack(
        bytes.fromhex(row.damaged.session),
        row.damaged.seq,
        row.damaged.offset,
        row.clen,
        row.rlen,
        row.digest,
        bytes.fromhex(row.copy.session),
        row.copy.seq,
        row.copy.offset,
        b"",
        row.index,
    )


def decode_record(raw: bytes, *, repository: str, sid: str, number: int) -> Record:
    """The opposite of `encode_record`.

    Raises:
        FormatError: cut, changed, of another place, or never written by `encode_record`.
    """
    if len(raw) < _HEAD.size + _TRAILER:
        raise FormatError(f"record has {len(raw)} bytes, expected {_HEAD.size + _TRAILER} or more")
    magic, version, zero, count, owner, own_sid, own_number, rest = _HEAD.unpack_from(raw)
    if magic not in {_DAMAGE_MAGIC, _HEAL_MAGIC} or version != _VERSION or zero or any(rest):
        raise FormatError(f"record begins with {magic!r}, version {version}")
    if (owner.hex(), own_sid.hex(), own_number) != (repository, sid, number):
        raise FormatError("record belongs elsewhere")
    end = _HEAD.size + count * _ROW
    if not 0 < count <= ROWS_MAX or len(raw) != end + _TRAILER:
        raise FormatError(f"record of {len(raw)} bytes claims {count} rows")
    if blake3(memoryview(raw)[:end]).digest() != raw[end:]:
        raise FormatError("record does not match its BLAKE3 trailer")
    if magic == _DAMAGE_MAGIC:
        return Record(damaged=tuple(map(_damaged, _DAMAGE.iter_unpack(raw[_HEAD.size : end]))))
    return Record(healed=tuple(map(_healed, _HEAL.iter_unpack(raw[_HEAD.size : end]))))


def _damaged(row: tuple[Any, ...]) -> DamagedFrame:
    sid, seq, offset, clen, rlen, digest, kind, zero, start, disk, rest = row
    _check_lengths(offset, clen, rlen, least=0)
    if any(zero) or any(rest) or kind > max(FrameKind) or start >= 1 << 63:
        raise FormatError("record has a damaged frame that can't be")
    return DamagedFrame(
        place=Place(SessionId(sid.hex()), seq, offset),
        clen=clen,
        rlen=rlen,
        digest=digest,
        kind=FrameKind(kind),
        disk=DiskId(disk.hex()),
        start=start,
    )


def _healed(row: tuple[Any, ...]) -> HealedFrame:
    sid, seq, offset, clen, rlen, digest, new, new_seq, new_offset, zero, index = row
    _check_lengths(offset, clen, rlen, least=1)
    if any(zero) or new_offset < PACK_HEADER_SIZE:
        raise FormatError("record has a healed frame that can't be")
    return HealedFrame(
        damaged=Place(SessionId(sid.hex()), seq, offset),
        copy=Place(SessionId(new.hex()), new_seq, new_offset),
        clen=clen,
        rlen=rlen,
        digest=digest,
        index=index,
    )


def _check_lengths(offset: int, clen: int, rlen: int, *, least: int) -> None:
    if offset < PACK_HEADER_SIZE or not 0 < clen <= FRAME_MAX or not least <= rlen <= FRAME_MAX:
        raise FormatError(f"record has a frame of {clen} bytes for {rlen} at {offset}")
