"""The session index `x/<session>/<n>`: the directories of 64 packs, and a table of them.

    | head 32 | table: 48 bytes a pack | directory of a pack | directory of the next | ...
    `--- BLAKE3 in the manifest ------'                  ^
                         `--- BLAKE3 of each directory --'

So a reader proves one directory by reading that and the table, at most 200 KiB, wherever in the index it
is. A disk that many sessions wrote to is read in an order that has one pack of each session in use at a
time: all these directories fit in memory where all their indexes would not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nbdpull.model.frame import (
    ENTRY,
    FOOTER_SIZE,
    HEADER_SIZE,
    PACK_HEADER_SIZE,
    Codec,
    FormatError,
    FrameHeader,
    FrameKind,
)
from nbdpull.model.grain import FRAME_MAX
from nbdpull.model.ids import SessionId

__all__ = [
    "FRAMES_PER_PACK",
    "PACKS_PER_INDEX",
    "TABLE_MAX",
    "Directory",
    "IndexTable",
    "PackPlace",
    "encode_index",
]

PACKS_PER_INDEX: Final = 64
FRAMES_PER_PACK: Final = 4096
_HEAD: Final = struct.Struct("<8s16sII")
_MAGIC: Final = b"NBDPIDX1"
_ROW: Final = np.dtype([("seq", "<u4"), ("frames", "<u4"), ("size", "<u8"), ("digest", "V32")])
TABLE_MAX: Final = _HEAD.size + PACKS_PER_INDEX * _ROW.itemsize
_PACK_SIZE_MAX: Final = 1 << 32  # frames are found by a 32-bit offset


class Directory:
    """The frames of one pack, in the order in which they lie there without gaps.

    Attributes:
        entries: an array of `ENTRY`.
        end: where the last frame ends, and the directory begins in the pack.
    """

    __slots__ = ("_offsets", "end", "entries")

    def __init__(self, entries: NDArray[np.void]) -> None:
        self.entries = entries
        self._offsets = np.ascontiguousarray(entries["offset"])
        last = entries[-1] if len(entries) else None
        self.end = PACK_HEADER_SIZE
        if last is not None:
            self.end = int(last["offset"]) + HEADER_SIZE + int(last["clen"])

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.entries.nbytes + self._offsets.nbytes

    @property
    def pack_size(self) -> int:
        """Bytes of the whole pack."""
        return self.end + self.entries.nbytes + FOOTER_SIZE

    def find(self, offset: int) -> FrameHeader:
        """The frame at `offset`, as the session wrote it.

        Raises:
            FormatError: there is none.
        """
        at = int(np.searchsorted(self._offsets, offset))
        if at >= len(self._offsets) or int(self._offsets[at]) != offset:
            raise FormatError(f"no frame at {offset}")
        entry = self.entries[at]
        return FrameHeader(
            clen=int(entry["clen"]),
            rlen=int(entry["rlen"]),
            codec=Codec(int(entry["codec"])),
            kind=FrameKind(int(entry["kind"])),
            number=at,
            digest=bytes(entry["digest"]),
        )

    def encode(self) -> bytes:
        """48 bytes a frame."""
        return self.entries.tobytes()

    @classmethod
    def decode(cls, raw: bytes, place: PackPlace) -> Directory:
        """The opposite of `encode`, for the pack at `place`.

        Raises:
            FormatError: these are not the bytes that the index's table vouches for.
        """
        if len(raw) != place.length:
            raise FormatError(f"directory has {len(raw)} bytes, expected {place.length}")
        if blake3(raw).digest() != place.digest:
            raise FormatError("directory does not hash to what the index's table says")
        entries = np.frombuffer(raw, dtype=ENTRY)
        offset = entries["offset"].astype(np.int64)
        clen = entries["clen"].astype(np.int64)
        rlen = entries["rlen"]
        begins = np.concatenate(([PACK_HEADER_SIZE], offset + HEADER_SIZE + clen))
        sound = (
            (offset == begins[:-1])
            & (clen > 0)
            & (clen <= rlen)
            & (rlen <= FRAME_MAX)
            & (entries["codec"] <= max(Codec))
            & (entries["kind"] <= max(FrameKind))
            & (entries["zero"] == 0)
        )
        directory = cls(entries)
        if not sound.all() or directory.pack_size != place.size:
            raise FormatError("directory has frames that can't be")
        return directory


class PackPlace(NamedTuple):
    """Where a pack's directory is, and what the table says of the pack.

    Attributes:
        size: of the pack in bytes.
        offset, length: of its directory in the index object.
        digest: BLAKE3 of the directory.
    """

    size: int
    offset: int
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True, eq=False)
class IndexTable:
    """The packs of one index object."""

    _rows: NDArray[np.void]

    def place(self, seq: int) -> PackPlace:
        """Where the directory of pack `seq` is.

        Raises:
            FormatError: the index does not have it.
        """
        at = int(np.searchsorted(self._rows["seq"], seq))
        if at >= len(self._rows) or int(self._rows[at]["seq"]) != seq:
            raise FormatError(f"no pack {seq}")
        row: Any = self._rows[at]
        before = int(self._rows["frames"][:at].sum(dtype=np.int64))
        return PackPlace(
            size=int(row["size"]),
            offset=_HEAD.size + self._rows.nbytes + before * ENTRY.itemsize,
            length=int(row["frames"]) * ENTRY.itemsize,
            digest=bytes(row["digest"]),
        )

    @classmethod
    def decode(cls, raw: bytes, *, sid: SessionId, number: int, digest: bytes) -> IndexTable:
        """The table that an index object begins with.

        Args:
            raw: the object's first `TABLE_MAX` bytes, or all where it has fewer.
            sid: the session it is of.
            number: of the index in the session.
            digest: BLAKE3 of head and table, from the manifest.

        Raises:
            FormatError: these are not the bytes that the manifest vouches for.
        """
        if len(raw) < _HEAD.size:
            raise FormatError(f"session index has {len(raw)} bytes, expected {_HEAD.size} or more")
        magic, owner, own_number, count = _HEAD.unpack_from(raw)
        end = _HEAD.size + count * _ROW.itemsize
        if magic != _MAGIC or owner.hex() != sid or own_number != number:
            raise FormatError(f"it is no index {number} of session {sid}")
        if not 0 < count <= PACKS_PER_INDEX or end > len(raw):
            raise FormatError(f"session index of {len(raw)} bytes or more claims {count} packs")
        if blake3(raw[:end]).digest() != digest:
            raise FormatError(
                f"its table hashes to {blake3(raw[:end]).hexdigest()}, the manifest says {digest.hex()}"
            )
        rows = np.frombuffer(raw, dtype=_ROW, count=count, offset=_HEAD.size)
        seq = rows["seq"].astype(np.int64)
        sound = (
            (seq // PACKS_PER_INDEX == number)
            & (rows["frames"] > 0)
            & (rows["frames"] <= FRAMES_PER_PACK)
            & (rows["size"] <= _PACK_SIZE_MAX)
        )
        if not sound.all() or (np.diff(seq) <= 0).any():
            raise FormatError("session index has packs that can't be")
        return cls(rows)


def encode_index(
    sid: SessionId, number: int, packs: Mapping[int, Directory]
) -> tuple[bytes, bytes]:
    """An index object, and the BLAKE3 of its head and table for the manifest."""
    rows = np.zeros(len(packs), dtype=_ROW)
    directories = []
    for at, (seq, directory) in enumerate(sorted(packs.items())):
        raw = directory.encode()
        digest = np.frombuffer(blake3(raw).digest(), dtype="V32")[0]
        rows[at] = (seq, len(directory.entries), directory.pack_size, digest)
        directories.append(raw)
    top = _HEAD.pack(_MAGIC, bytes.fromhex(sid), number, len(packs)) + rows.tobytes()
    return top + b"".join(directories), blake3(top).digest()
