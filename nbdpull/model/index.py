"""The session index `x/<session>/<n>`: the directories of 64 packs, and a table of them.

    | head 32 | table: 48 bytes a pack | directory of a pack | directory of the next | ...
    `--- BLAKE3 in the manifest ------'                  ^
                         `--- BLAKE3 of each directory --'

Where the repository is encrypted the session's keys, sealed, stand between head and table, the table and
each directory are ciphertext, and the digests are of that.

So a reader proves one directory by reading that and the table, at most 200 KiB, wherever in the index it
is. A disk that many sessions wrote to is read in an order that has one pack of each session in use at a
time: all these directories fit in memory where all their indexes would not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
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
    TAG_SIZE,
    Codec,
    FormatError,
    FrameHeader,
    FrameKind,
)
from nbdpull.model.grain import FRAME_MAX
from nbdpull.model.ids import SessionId
from nbdpull.model.sealing import (
    ENVELOPE_MAX,
    SALT_SIZE,
    SEAL_OVERHEAD,
    KeyOpener,
    PackKeys,
    SessionKeys,
)

__all__ = [
    "FRAMES_PER_PACK",
    "PACKS_PER_INDEX",
    "TABLE_MAX",
    "Directory",
    "IndexTable",
    "PackFacts",
    "PackPlace",
    "encode_index",
    "encode_table",
    "index_digest",
    "index_envelope",
]

PACKS_PER_INDEX: Final = 64
FRAMES_PER_PACK: Final = 4096
_HEAD: Final = struct.Struct("<8s16sII")
_MAGIC: Final = b"NBDPIDX1"
_SEALED_MAGIC: Final = b"NBDPIDX2"
_ENVELOPE_LENGTH: Final = 4
_FIELDS: Final = [("seq", "<u4"), ("frames", "<u4"), ("size", "<u8"), ("digest", "V32")]
_ROW: Final = np.dtype(_FIELDS)
_SEALED_ROW: Final = np.dtype([*_FIELDS, ("salt", f"V{SALT_SIZE}")])
_PURPOSE: Final = b"index"
TABLE_MAX: Final = (
    _HEAD.size
    + _ENVELOPE_LENGTH
    + ENVELOPE_MAX
    + SEAL_OVERHEAD
    + PACKS_PER_INDEX * _SEALED_ROW.itemsize
)
"""More than head and table ever take."""
_PACK_SIZE_MAX: Final = 1 << 32  # frames are found by a 32-bit offset


class Directory:
    """The frames of one pack, in the order in which they lie there without gaps.

    Attributes:
        entries: an array of `ENTRY`.
        end: where the last frame ends, and the directory begins in the pack.
        keys: of the pack; None where nothing is encrypted.
    """

    __slots__ = ("_offsets", "end", "entries", "keys")

    def __init__(self, entries: NDArray[np.void], keys: PackKeys | None = None) -> None:
        self.entries = entries
        self.keys = keys
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
        tag = 0 if self.keys is None else TAG_SIZE
        return self.end + self.entries.nbytes + tag + FOOTER_SIZE

    def find(self, offset: int) -> FrameHeader:
        """The frame at `offset`, as the session wrote it.

        Raises:
            FormatError: there is none.
        """
        at = len(self._offsets)
        if 0 <= offset < _PACK_SIZE_MAX:
            # Of the array's own type, or numpy would convert the whole array.
            at = int(self._offsets.searchsorted(np.uint32(offset)))
        if at >= len(self._offsets) or self._offsets[at] != offset:
            raise FormatError(f"no frame at {offset}")
        _, clen, rlen, codec, kind, _, digest = self.entries[at].item()
        return FrameHeader(clen, rlen, Codec(codec), FrameKind(kind), at, digest)

    def encode(self) -> bytes:
        """The stored form: 48 bytes a frame, and a tag where they are encrypted."""
        raw = self.entries.tobytes()
        return raw if self.keys is None else self.keys.seal_directory(raw)

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
        if place.keys is not None:
            raw = place.keys.open_directory(raw)
        if len(raw) % ENTRY.itemsize:
            raise FormatError(f"directory of {len(raw)} bytes is no whole number of entries")
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
        directory = cls(entries, place.keys)
        if not sound.all() or directory.pack_size != place.size:
            raise FormatError("directory has frames that can't be")
        return directory


class PackPlace(NamedTuple):
    """Where a pack's directory is, and what the table says of the pack.

    Attributes:
        size: of the pack in bytes.
        offset, length: of its directory in the index object.
        digest: BLAKE3 of the directory as stored.
        keys: of the pack; None where nothing is encrypted.
    """

    size: int
    offset: int
    length: int
    digest: bytes
    keys: PackKeys | None = None


@dataclass(frozen=True, slots=True, eq=False)
class IndexTable:
    """The packs of one index object.

    Attributes:
        keys: of the session; None where nothing is encrypted.
    """

    _rows: NDArray[np.void]
    _end: int
    keys: SessionKeys | None = None

    @property
    def seqs(self) -> list[int]:
        """The packs' numbers, rising."""
        seqs: list[int] = self._rows["seq"].tolist()
        return seqs

    def place(self, seq: int) -> PackPlace:
        """Where the directory of pack `seq` is.

        Raises:
            FormatError: the index does not have it.
        """
        at = int(np.searchsorted(self._rows["seq"], seq))
        if at >= len(self._rows) or int(self._rows[at]["seq"]) != seq:
            raise FormatError(f"no pack {seq}")
        row: Any = self._rows[at]
        before = int(self._rows["frames"][:at].sum(dtype=np.int64)) * ENTRY.itemsize
        tag = 0 if self.keys is None else TAG_SIZE
        return PackPlace(
            size=int(row["size"]),
            offset=self._end + before + at * tag,
            length=int(row["frames"]) * ENTRY.itemsize + tag,
            digest=bytes(row["digest"]),
            keys=None if self.keys is None else self.keys.pack(seq, bytes(row["salt"])),
        )

    @classmethod
    def decode(
        cls,
        raw: bytes,
        *,
        sid: SessionId,
        number: int,
        digest: bytes,
        open_keys: KeyOpener | None = None,
    ) -> IndexTable:
        """The table that an index object begins with.

        Args:
            raw: the object's first `TABLE_MAX` bytes, or all where it has fewer.
            sid: the session it is of.
            number: of the index in the session.
            digest: BLAKE3 of head and table, from the manifest.
            open_keys: opens the session's keys; None where nothing is encrypted.

        Raises:
            FormatError: these are not the bytes that the manifest vouches for.
            WrongKeyError: they are encrypted with another key.
        """
        if len(raw) < _HEAD.size:
            raise FormatError(f"session index has {len(raw)} bytes, expected {_HEAD.size} or more")
        magic, owner, own_number, count = _HEAD.unpack_from(raw)
        if magic != (_MAGIC if open_keys is None else _SEALED_MAGIC):
            raise FormatError(f"session index begins with {magic!r}")
        if owner.hex() != sid or own_number != number:
            raise FormatError(f"it is no index {number} of session {sid}")
        begin, end = _table_bounds(raw, count, sealed=open_keys is not None)
        if not 0 < count <= PACKS_PER_INDEX or end > len(raw):
            raise FormatError(f"session index of {len(raw)} bytes or more claims {count} packs")
        if blake3(raw[:end]).digest() != digest:
            raise FormatError(
                f"its table hashes to {blake3(raw[:end]).hexdigest()}, the manifest says {digest.hex()}"
            )
        keys = None
        if open_keys is None:
            rows = np.frombuffer(raw, dtype=_ROW, count=count, offset=begin)
        else:
            keys = open_keys(raw[_HEAD.size + _ENVELOPE_LENGTH : begin])
            table = keys.open(_PURPOSE, raw[begin:end], raw[:begin])
            rows = np.frombuffer(table, dtype=_SEALED_ROW)
        seq = rows["seq"].astype(np.int64)
        sound = (
            (seq // PACKS_PER_INDEX == number)
            & (rows["frames"] > 0)
            & (rows["frames"] <= FRAMES_PER_PACK)
            & (rows["size"] <= _PACK_SIZE_MAX)
        )
        if not sound.all() or (np.diff(seq) <= 0).any():
            raise FormatError("session index has packs that can't be")
        return cls(rows, end, keys)


def index_digest(raw: bytes, *, sealed: bool) -> bytes:
    """BLAKE3 of the head and table that stored bytes begin with: what a manifest would vouch for.

    For an index that no manifest vouches for yet, of a session that another one takes over.

    Raises:
        FormatError: they are too short for that.
    """
    if len(raw) < _HEAD.size:
        raise FormatError(f"session index has {len(raw)} bytes, expected {_HEAD.size} or more")
    count = _HEAD.unpack_from(raw)[3]
    end = _table_bounds(raw, count, sealed=sealed)[1]
    if not 0 < count <= PACKS_PER_INDEX or end > len(raw):
        raise FormatError(f"session index of {len(raw)} bytes or more claims {count} packs")
    return blake3(raw[:end]).digest()


def _table_bounds(raw: bytes, count: int, *, sealed: bool) -> tuple[int, int]:
    """Where the stored table of so many packs begins and ends."""
    begin = _HEAD.size
    if not sealed:
        return begin, begin + count * _ROW.itemsize
    envelope = int.from_bytes(raw[begin : begin + _ENVELOPE_LENGTH], "little")
    if envelope > ENVELOPE_MAX:
        raise FormatError(f"session index claims {envelope} bytes of keys")
    begin += _ENVELOPE_LENGTH + envelope
    return begin, begin + count * _SEALED_ROW.itemsize + SEAL_OVERHEAD


class PackFacts(NamedTuple):
    """What the table of an index says of one pack; the pack's own ends say the same.

    Attributes:
        seq: its number in the session.
        frames: in its directory.
        size: of the whole pack in bytes.
        digest: BLAKE3 of its directory as stored.
        salt: of its keys; empty where nothing is encrypted.
    """

    seq: int
    frames: int
    size: int
    digest: bytes
    salt: bytes = b""


def encode_table(
    sid: SessionId, number: int, packs: Sequence[PackFacts], keys: SessionKeys | None = None
) -> bytes:
    """Head and table as stored: what the manifest has the BLAKE3 of.

    Args:
        sid: the session.
        number: of the index in the session.
        packs: in order.
        keys: of the session; None where nothing is encrypted.
    """
    rows = np.zeros(len(packs), dtype=_ROW if keys is None else _SEALED_ROW)
    for at, facts in enumerate(packs):
        row: Any = rows[at]
        row["seq"], row["frames"], row["size"] = facts.seq, facts.frames, facts.size
        row["digest"] = np.frombuffer(facts.digest, dtype="V32")[0]
        if keys is not None:
            row["salt"] = np.frombuffer(facts.salt, dtype=f"V{SALT_SIZE}")[0]
    magic = _MAGIC if keys is None else _SEALED_MAGIC
    top = _HEAD.pack(magic, bytes.fromhex(sid), number, len(packs))
    if keys is None:
        return top + rows.tobytes()
    top += len(keys.envelope).to_bytes(_ENVELOPE_LENGTH, "little") + keys.envelope
    return top + keys.seal(_PURPOSE, rows.tobytes(), top)


def index_envelope(raw: bytes) -> bytes:
    """The sealed keys that an index of an encrypted session seems to have; nothing of it is checked."""
    begin = _HEAD.size + _ENVELOPE_LENGTH
    return raw[begin : begin + int.from_bytes(raw[_HEAD.size : begin], "little")]


def encode_index(
    sid: SessionId,
    number: int,
    packs: Mapping[int, Directory],
    keys: SessionKeys | None = None,
) -> tuple[bytes, bytes]:
    """An index object, and the BLAKE3 of its head and table for the manifest.

    Args:
        sid: the session.
        number: of the index in the session.
        packs: their directories; with `keys` each has keys of its own.
        keys: of the session; None where nothing is encrypted.
    """
    facts = []
    directories = []
    for seq, directory in sorted(packs.items()):
        raw = directory.encode()
        salt = b"" if directory.keys is None else directory.keys.salt
        digest = blake3(raw).digest()
        facts.append(PackFacts(seq, len(directory.entries), directory.pack_size, digest, salt))
        directories.append(raw)
    top = encode_table(sid, number, facts, keys)
    return top + b"".join(directories), blake3(top).digest()
