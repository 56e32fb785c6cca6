"""The manifest: what one backup says of one whole disk; creating it is the commit.

    | head 80 | summary (CBOR) | body (CBOR, zstd) | BLAKE3 of all before 32 |

Where the repository is encrypted:

    | head 80 | envelope | summary, sealed | body, sealed | BLAKE3 of all before 32 |

`list` needs the summaries only, so they stand first, with a digest of their own. The body holds a
reference for each 1 GiB segment, and for each session that these refer to the digests of its index
tables: so the trailer authenticates every byte below. Numbers stand in columns (`columns.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import cbor2
import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

from nbdpull.errors import RepositoryError
from nbdpull.model.archive import ARCHIVE_MAX, FILES_MAX, is_name
from nbdpull.model.cbor import decode_map
from nbdpull.model.columns import pack_columns, unpack_columns
from nbdpull.model.frame import ENCRYPTED, FormatError
from nbdpull.model.grain import DISK_MAX, segment_count
from nbdpull.model.ids import BackupId, DiskId, SessionId, is_hex
from nbdpull.model.results import Level
from nbdpull.model.sealing import ENVELOPE_MAX, SEAL_OVERHEAD, KeyOpener, SessionKeys
from nbdpull.model.segment import Packs

__all__ = [
    "HEAD_SIZE",
    "MANIFEST_MAX",
    "REVOKED",
    "UNUSED",
    "Manifest",
    "SegmentRef",
    "SessionRef",
    "Summary",
    "adopted_by",
    "adopter",
    "decode_summary",
    "manifest_envelope",
    "register_kind",
    "summary_end",
]

_PLACE: Final = struct.Struct("<8sHHIII16s")
_AFTER: Final = struct.Struct("<32sII")
HEAD_SIZE: Final = _PLACE.size + _AFTER.size
_MAGIC: Final = b"NBDPMAN1"
_VERSION: Final = 1
_TRAILER: Final = 32
_SUMMARY_MAX: Final = 1 << 20
_BODY_MAX: Final = 128 << 20  # 16 TiB after 365 incrementals that touch every segment: about 50 MB
MANIFEST_MAX: Final = HEAD_SIZE + ENVELOPE_MAX + _SUMMARY_MAX + _BODY_MAX + _TRAILER
_SUMMARY: Final = b"summary"
_BODY: Final = b"manifest"

# What a register holds when it is no manifest.
REVOKED: Final = b"NBDPREV1"
_ADOPTED: Final = b"NBDPADO1"
_SESSION_SIZE: Final = 16
_CHECK_SIZE: Final = 8


def adopted_by(sid: SessionId) -> bytes:
    """The mark of a register whose session was taken over by session `sid` of the same disk.

    Its last bytes tell that none of the others is another: by them a collector decides what to delete.
    """
    raw = _ADOPTED + bytes.fromhex(sid)
    return raw + blake3(raw).digest(_CHECK_SIZE)


def adopter(raw: bytes) -> SessionId:
    """The session that a register's mark names.

    Raises:
        FormatError: it was not made by `adopted_by`.
    """
    sid = SessionId(raw[len(_ADOPTED) :][:_SESSION_SIZE].hex())
    if len(sid) != 2 * _SESSION_SIZE or adopted_by(sid) != raw:
        raise FormatError(f"a mark of {len(raw)} bytes that names no session, or was damaged")
    return sid


def register_kind(raw: bytes) -> str:
    """``manifest``, ``revoked``, ``adopted`` or ``unknown``: what the first bytes of a register say."""
    kinds = {_MAGIC: "manifest", REVOKED: "revoked", _ADOPTED: "adopted"}
    return kinds.get(raw[:8], "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One disk of one backup, as `list` and `show` tell it.

    Attributes:
        parent: newest backup that a disk of this one was counted from, or None.
        time: start of the point in time, seconds since the Unix epoch.
        session: whose packs this backup added; also the manifest's name.
        size: of the disk in bytes.
        level: of the backup; `disk_level` is what was read of this disk.
        checkpoint: the bitmap that records from this backup on, None for a copy.
        full_checkpoint: the bitmap of the disk's last full, for differentials.
        reused_bytes: of the disk's data read, what the repository had already and was not stored again.
        siblings: (disk id, session) of each disk of the backup, this one included.
        tool: what wrote it.
        tags: words that `forget --keep-tag` looks for.
        stored: when the store took in the manifest that this one replaces, seconds since the Unix epoch;
            None when it replaces none.
        machine: (name, bytes) of the files of a machine's state, which this is instead of a disk; None of a disk.
    """

    backup: BackupId
    vm: str
    chain: str
    level: Level
    parent: BackupId | None
    time: float
    duration_s: float
    disk: str
    disk_id: DiskId
    session: SessionId
    size: int
    disk_level: Level
    reason: str
    checkpoint: str | None
    full_checkpoint: str | None
    changed_bytes: int
    read_bytes: int
    stored_bytes: int
    siblings: tuple[tuple[DiskId, SessionId], ...]
    tool: str
    reused_bytes: int = 0
    tags: tuple[str, ...] = ()
    stored: float | None = None
    machine: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Where a segment's map is stored, and every pack that it refers to.

    Attributes:
        session: index into the manifest's sessions.
        clen: stored bytes of the map's frame without its header.
        packs: the map's own pack is not among them unless it holds data of the segment too.
    """

    session: int
    seq: int
    offset: int
    clen: int
    packs: Packs


@dataclass(frozen=True, slots=True)
class SessionRef:
    """A session that the manifest refers to.

    Maps name a session by its place in the table, so a place is kept when nothing refers to its
    session any more; only its content is dropped.

    Attributes:
        sid: empty where nothing refers to the session any more.
        index: (number, BLAKE3) of the table of each of its index objects that is needed.
    """

    sid: SessionId
    index: tuple[tuple[int, bytes], ...]


UNUSED: Final = SessionRef(SessionId(""), ())
"""A place in the table of sessions whose session nothing refers to any more."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A decoded manifest.

    Attributes:
        repository: 32 hex digits, the repository that it belongs to.
        segments: one entry for each segment; None reads as zeroes.
    """

    summary: Summary
    repository: str
    sessions: tuple[SessionRef, ...]
    segments: tuple[SegmentRef | None, ...]

    def packs(self) -> Packs:
        """Every pack that a restore reads."""
        refs = [ref for ref in self.segments if ref is not None]
        maps = np.array([(ref.session, ref.seq) for ref in refs], dtype=np.uint32).reshape(-1, 2)
        return Packs.distinct(np.concatenate([maps, *(ref.packs.rows for ref in refs)]))

    def encode(self, keys: SessionKeys | None = None) -> bytes:
        """The bytes of the register; encrypted with the session's keys where there are any.

        Raises:
            RepositoryError: no reader would take it.
        """
        summary = cbor2.dumps(_summary_map(self.summary))
        body = cbor2.dumps(_sessions_map(self.sessions) | _segments_map(self.segments))
        packed = zstandard.ZstdCompressor(level=3).compress(body)
        envelope = b""
        sealed = 0
        if keys is not None:
            envelope, sealed = keys.envelope, SEAL_OVERHEAD
        if max(len(body), len(packed) + sealed) > _BODY_MAX:
            raise RepositoryError(
                f"what the backup of disk '{self.summary.disk}' refers to takes {len(body)} bytes, at most"
                f" {_BODY_MAX} can be read again; run 'nbdpull repack', or back up with '--level full'"
            )
        if len(summary) + sealed > _SUMMARY_MAX or self.summary.size > DISK_MAX:
            raise RepositoryError(
                f"what is told of disk '{self.summary.disk}', {self.summary.size} bytes, takes"
                f" {len(summary)} bytes; at most {DISK_MAX} and {_SUMMARY_MAX} can be read again"
            )
        place = _PLACE.pack(
            _MAGIC,
            _VERSION,
            0 if keys is None else ENCRYPTED,
            len(summary) + sealed,
            len(packed) + sealed,
            len(body),
            bytes.fromhex(self.repository),
        )
        if keys is not None:
            summary = keys.seal(_SUMMARY, summary, place + envelope)
        top = envelope + summary
        head = place + _AFTER.pack(blake3(top).digest(), len(envelope), 0)
        if keys is not None:
            packed = keys.seal(_BODY, packed, head)
        raw = head + top + packed
        return raw + blake3(raw).digest()

    @classmethod
    def decode(cls, raw: bytes, open_keys: KeyOpener | None = None) -> Manifest:
        """The opposite of `encode`.

        Args:
            raw: the whole register.
            open_keys: opens the session's keys; None where nothing is encrypted.

        Raises:
            FormatError: cut, changed, moved here, or never written by `encode`.
            WrongKeyError: it is encrypted with another key.
        """
        head = _read_head(raw)
        size = head.summary_end + head.packed + _TRAILER
        if len(raw) != size:
            raise FormatError(f"manifest has {len(raw)} bytes, expected {size}")
        if blake3(memoryview(raw)[:-_TRAILER]).digest() != raw[-_TRAILER:]:
            raise FormatError("manifest does not match its BLAKE3 trailer")
        summary, repository = decode_summary(raw, open_keys)
        packed = raw[head.summary_end : -_TRAILER]
        if open_keys is not None:
            keys = open_keys(raw[HEAD_SIZE : head.envelope_end])
            packed = keys.open(_BODY, packed, raw[:HEAD_SIZE])
        fields = _loads(_unpack(packed, head.body))
        sessions = _sessions(fields)
        segments = _segments(fields, sessions=len(sessions), count=segment_count(summary.size))
        return cls(summary, repository, sessions, segments)


class _Head(NamedTuple):
    """Lengths in bytes, as the head gives them."""

    suite: int
    envelope_end: int
    summary_end: int
    packed: int
    body: int
    repository: str
    digest: bytes


def _read_head(raw: bytes) -> _Head:
    if len(raw) < HEAD_SIZE:
        raise FormatError(f"manifest has {len(raw)} bytes, expected {HEAD_SIZE} or more")
    magic, version, suite, summary, packed, body, repository = _PLACE.unpack_from(raw)
    digest, envelope, zero = _AFTER.unpack_from(raw, _PLACE.size)
    if magic != _MAGIC:
        raise FormatError(f"manifest begins with {magic!r}, expected {_MAGIC!r}")
    if version != _VERSION or suite not in {0, ENCRYPTED} or zero:
        raise FormatError(
            f"manifest has version {version} and suite {suite}, expected {_VERSION} and 0 or {ENCRYPTED}"
        )
    if summary > _SUMMARY_MAX or packed > _BODY_MAX or body > _BODY_MAX:
        raise FormatError("manifest has lengths that can't be")
    if envelope > (ENVELOPE_MAX if suite else 0):
        raise FormatError(f"manifest claims {envelope} bytes of keys")
    envelope_end = HEAD_SIZE + envelope
    return _Head(
        suite, envelope_end, envelope_end + summary, packed, body, repository.hex(), digest
    )


def manifest_envelope(raw: bytes) -> bytes:
    """The sealed keys of the session; nothing of them is checked. `raw` may end anywhere behind them.

    Raises:
        FormatError: it is no manifest.
    """
    return raw[HEAD_SIZE : _read_head(raw).envelope_end]


def summary_end(head: bytes) -> int:
    """How many bytes of a register `decode_summary` needs, from its first `HEAD_SIZE` bytes.

    Raises:
        FormatError: it is no manifest.
    """
    return _read_head(head).summary_end


def decode_summary(raw: bytes, open_keys: KeyOpener | None = None) -> tuple[Summary, str]:
    """The summary and the repository's id, from the first `summary_end` bytes of a register.

    Args:
        raw: these bytes.
        open_keys: opens the session's keys; None where nothing is encrypted.

    Raises:
        FormatError: cut, changed, moved here, or never written by `Manifest.encode`.
        WrongKeyError: it is encrypted with another key.
    """
    head = _read_head(raw)
    if (head.suite != 0) != (open_keys is not None):
        # Not only an accident: else who can write to the store could put backups of his own there.
        what = "is not encrypted, and its repository is" if open_keys else "is encrypted"
        raise FormatError(f"manifest {what}")
    top = raw[HEAD_SIZE : head.summary_end]
    if len(raw) < head.summary_end or blake3(top).digest() != head.digest:
        raise FormatError("manifest's summary does not match its digest")
    summary = raw[head.envelope_end : head.summary_end]
    if open_keys is not None:
        envelope = raw[HEAD_SIZE : head.envelope_end]
        summary = open_keys(envelope).open(_SUMMARY, summary, raw[: _PLACE.size] + envelope)
    return _summary(_loads(summary)), head.repository


def _unpack(packed: bytes, length: int) -> bytes:
    try:
        # zstandard allocates what the frame claims: look at the claim first.
        if zstandard.frame_content_size(packed) != length:
            raise FormatError("manifest body has another length than its head says")
        return zstandard.ZstdDecompressor().decompress(
            packed, max_output_size=length, allow_extra_data=False
        )
    except zstandard.ZstdError as exc:
        raise FormatError(f"manifest body does not unpack: {exc}") from exc


# -- summary -------------------------------------------------------------------------------------------


def _summary_map(summary: Summary) -> dict[str, Any]:
    fields = {name: getattr(summary, name) for name in Summary.__slots__}
    fields["time"], fields["duration_s"] = float(summary.time), float(summary.duration_s)
    fields["level"] = str(summary.level)
    fields["disk_level"] = str(summary.disk_level)
    fields["tags"] = list(summary.tags)
    fields["siblings"] = [list(pair) for pair in summary.siblings]
    if summary.machine is None:
        del fields["machine"]
    else:
        fields["machine"] = [list(pair) for pair in summary.machine]
    return fields


def _summary(fields: Mapping[str, Any]) -> Summary:
    parent = _optional(fields, "parent")
    return Summary(
        backup=BackupId(_hex(fields.get("backup"), 16)),
        vm=_text(fields, "vm"),
        chain=_text(fields, "chain"),
        level=_level(fields, "level"),
        parent=None if parent is None else BackupId(_hex(parent, 16)),
        time=_float(fields, "time"),
        duration_s=_float(fields, "duration_s"),
        disk=_text(fields, "disk"),
        disk_id=DiskId(_hex(fields.get("disk_id"), 32)),
        session=SessionId(_hex(fields.get("session"), 32)),
        size=_size(fields, "size"),
        disk_level=_level(fields, "disk_level"),
        reason=_text(fields, "reason"),
        checkpoint=_optional(fields, "checkpoint"),
        full_checkpoint=_optional(fields, "full_checkpoint"),
        changed_bytes=_int(fields, "changed_bytes"),
        read_bytes=_int(fields, "read_bytes"),
        stored_bytes=_int(fields, "stored_bytes"),
        siblings=tuple(map(_sibling, _list(fields.get("siblings")))),
        tool=_text(fields, "tool"),
        # Written by nobody before it was counted.
        reused_bytes=_int(fields, "reused_bytes") if "reused_bytes" in fields else 0,
        tags=_tags(fields.get("tags", [])),
        stored=None if fields.get("stored") is None else _float(fields, "stored"),
        machine=_machine(fields["machine"]) if "machine" in fields else None,
    )


def _machine(value: object) -> tuple[tuple[str, int], ...]:
    pairs = [tuple(_list(entry)) for entry in _list(value)]
    for pair in pairs:
        if (
            len(pair) != 2
            or not isinstance(pair[0], str)
            or not is_name(pair[0])
            or type(pair[1]) is not int
            or not 0 <= pair[1] < ARCHIVE_MAX
        ):
            raise FormatError("manifest has a machine's state that can't be")
    if len(pairs) > FILES_MAX:
        raise FormatError(f"manifest has {len(pairs)} files of a machine's state")
    return tuple(pairs)


def _tags(value: object) -> tuple[str, ...]:
    tags = _list(value)
    if not all(isinstance(tag, str) for tag in tags):
        raise FormatError("manifest has a tag that is no text")
    return tuple(tags)


def _sibling(entry: object) -> tuple[DiskId, SessionId]:
    pair = _list(entry)
    if len(pair) != 2:
        raise FormatError("manifest has a sibling that can't be")
    return DiskId(_hex(pair[0], 32)), SessionId(_hex(pair[1], 32))


# -- body ----------------------------------------------------------------------------------------------

_DIGEST: Final = 32
_SID: Final = 16


def _sessions_map(sessions: Sequence[SessionRef]) -> dict[str, bytes]:
    numbers = [number for ref in sessions for number, _ in ref.index]
    return {
        "sids": b"".join(bytes.fromhex(ref.sid).rjust(_SID, b"\0") for ref in sessions),
        "index_counts": _column(len(ref.index) for ref in sessions),
        "index_numbers": _column(numbers),
        "index_digests": b"".join(digest for ref in sessions for _, digest in ref.index),
    }


def _sessions(fields: Mapping[str, Any]) -> tuple[SessionRef, ...]:
    sids, digests = _bytes(fields, "sids"), _bytes(fields, "index_digests")
    counts = unpack_columns(_bytes(fields, "index_counts"), 1)[:, 0].tolist()
    numbers = unpack_columns(_bytes(fields, "index_numbers"), 1)[:, 0].tolist()
    if (
        len(sids) != _SID * len(counts)
        or sum(counts) != len(numbers)
        or len(digests) != _DIGEST * len(numbers)
    ):
        raise FormatError("manifest has sessions that can't be")
    sessions = []
    at = 0
    for place, count in enumerate(counts):
        raw = sids[place * _SID : (place + 1) * _SID]
        index = tuple(
            (number, digests[_DIGEST * i : _DIGEST * (i + 1)])
            for i, number in enumerate(numbers[at : at + count], at)
        )
        at += count
        if any(raw):
            sessions.append(SessionRef(SessionId(raw.hex()), index))
        elif not index:
            sessions.append(UNUSED)
        else:
            raise FormatError("manifest has an index of no session")
    return tuple(sessions)


def _segments_map(segments: Sequence[SegmentRef | None]) -> dict[str, bytes]:
    there = [ref for ref in segments if ref is not None]
    places = [(ref.session, ref.seq, ref.offset, ref.clen, len(ref.packs)) for ref in there]
    present = np.array([ref is not None for ref in segments], dtype=np.bool_)
    packs = [ref.packs.rows for ref in there]
    return {
        "present": np.packbits(present).tobytes(),
        "maps": pack_columns(np.array(places, dtype=np.int64).reshape(-1, 5)),
        "packs": pack_columns(np.concatenate([np.empty((0, 2), dtype=np.uint32), *packs])),
    }


def _segments(
    fields: Mapping[str, Any], *, sessions: int, count: int
) -> tuple[SegmentRef | None, ...]:
    bits = _bytes(fields, "present")
    if len(bits) != -(-count // 8):
        raise FormatError(f"manifest has {8 * len(bits)} segments or less, expected {count}")
    present = np.unpackbits(np.frombuffer(bits, dtype=np.uint8)).astype(np.bool_)
    maps = unpack_columns(_bytes(fields, "maps"), 5).astype(np.int64)
    packs = unpack_columns(_bytes(fields, "packs"), 2)
    ends = np.cumsum(maps[:, 4])
    if (
        present[count:].any()
        or present.sum() != len(maps)
        or maps[:, 4].sum() != len(packs)
        or (maps[:, 0] >= sessions).any()
        or (packs[:, 0] >= sessions).any()
        or not _ascending(packs, ends)
    ):
        raise FormatError("manifest has segments that can't be")
    segments: list[SegmentRef | None] = [None] * count
    rows = zip(np.flatnonzero(present).tolist(), maps.tolist(), ends.tolist(), strict=True)
    for index, (session, seq, offset, clen, length), end in rows:
        segments[index] = SegmentRef(session, seq, offset, clen, Packs(packs[end - length : end]))
    return tuple(segments)


def _ascending(packs: NDArray[np.uint32], ends: NDArray[np.int64]) -> bool:
    """Whether the packs of each segment are sorted and distinct."""
    keys = (packs[:, 0].astype(np.uint64) << np.uint64(32)) | packs[:, 1]
    rising = keys[1:] > keys[:-1]
    inner = np.ones(len(rising), dtype=np.bool_)
    bounds = ends[(ends > 0) & (ends < len(packs))]
    inner[bounds - 1] = False
    return bool(rising[inner].all())


def _column(numbers: Iterable[int]) -> bytes:
    return pack_columns(np.array(list(numbers), dtype=np.int64).reshape(-1, 1))


# -- checked values ------------------------------------------------------------------------------------


def _loads(raw: bytes) -> Mapping[str, Any]:
    try:
        return decode_map(raw)
    except FormatError as exc:
        raise FormatError(f"manifest is no CBOR: {exc}") from exc


def _list(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise FormatError(f"manifest has {type(value).__name__}, expected a list")
    return value


def _bytes(fields: Mapping[str, Any], name: str) -> bytes:
    value = fields.get(name)
    if not isinstance(value, bytes):
        raise FormatError(f"manifest: '{name}' is no byte string")
    return value


def _int(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise FormatError(f"manifest: '{name}' is no size")
    return value


def _size(fields: Mapping[str, Any], name: str) -> int:
    value = _int(fields, name)
    if value > DISK_MAX:
        raise FormatError(f"manifest: '{name}' is {value}, at most {DISK_MAX} may be")
    return value


def _float(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if type(value) is not float or not -1e12 < value < 1e12:
        raise FormatError(f"manifest: '{name}' is no time")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise FormatError(f"manifest: '{name}' is no text")
    return value


def _optional(fields: Mapping[str, Any], name: str) -> str | None:
    return None if fields.get(name) is None else _text(fields, name)


def _level(fields: Mapping[str, Any], name: str) -> Level:
    text = _text(fields, name)
    if text not in list(Level):
        raise FormatError(f"manifest: '{name}' is '{text}', expected a level")
    return Level(text)


def _hex(value: object, digits: int) -> str:
    if not isinstance(value, str) or not is_hex(value, digits):
        raise FormatError(f"manifest has {value!r}, expected {digits} hex digits")
    return value
