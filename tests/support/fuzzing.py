"""Every decoder of stored bytes, with samples to change and a way to make their checks fit again.

A changed byte mostly ends at a CRC or a hash. An attacker makes these fit, so each target can be given
bytes that are `sealed` again: then what is behind the check is reached.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cbor2
import numpy as np
import zstandard
from blake3 import blake3

from nbdpull.errors import WrongKeyError
from nbdpull.model.archive import pack_files, unpack_files
from nbdpull.model.cbor import decode_map
from nbdpull.model.columns import unpack_columns
from nbdpull.model.config import Config
from nbdpull.model.crypto import Kdf, KdfName, public_of
from nbdpull.model.damage import DamagedFrame, HealedFrame, Place, decode_record, encode_record
from nbdpull.model.frame import (
    ENTRY,
    FOOTER_SIZE,
    HEADER_SIZE,
    PACK_HEADER_SIZE,
    Codec,
    FormatError,
    FrameHeader,
    FrameKind,
    PackHeader,
    decode_footer,
    encode_footer,
    open_frame,
)
from nbdpull.model.grain import GRAIN, SEGMENT_GRAINS
from nbdpull.model.index import Directory, IndexTable, PackPlace, encode_index
from nbdpull.model.intent import Intent, checked_intent
from nbdpull.model.keyring import Ring, Slot
from nbdpull.model.manifest import (
    HEAD_SIZE,
    Manifest,
    adopted_by,
    adopter,
    decode_summary,
    summary_end,
)
from nbdpull.model.sealing import Recipient, SessionKeys, open_envelope, seal_envelope
from nbdpull.model.segment import Interval, Segment
from tests.model.samples import REPOSITORY, SID, directory, manifest

__all__ = ["TARGETS", "Target", "change", "run"]


@dataclass(frozen=True)
class Target:
    """One decoder.

    Attributes:
        samples: what it takes.
        decode: calls it.
        seal: makes lengths, CRCs and hashes fit what was changed; returns its argument where it can't.
    """

    samples: Sequence[bytes]
    decode: Callable[[bytes], object]
    seal: Callable[[bytes], bytes] = lambda raw: raw


def _with_crc(raw: bytes, at: int, size: int) -> bytes:
    if len(raw) < at + 4:
        return raw
    return (raw[:at] + zlib.crc32(raw[:at]).to_bytes(4, "little")).ljust(size, b"\0")[:size]


def _frame(raw: bytes) -> bytes:
    expected = FrameHeader.decode(raw[:HEADER_SIZE])
    return open_frame(raw, expected, zstandard.ZstdDecompressor())


def _frame_samples() -> list[bytes]:
    samples = []
    for data in (b"a" * GRAIN, random.Random(1).randbytes(3000)):
        packed = zstandard.ZstdCompressor(level=1, write_checksum=False).compress(data)
        codec, payload = (Codec.ZSTD, packed) if len(packed) < len(data) else (Codec.RAW, data)
        digest = blake3(data).digest()
        header = FrameHeader(len(payload), len(data), codec, FrameKind.DATA, 0, digest)
        samples.append(header.encode() + payload)
    return samples


def _sealed_frame(raw: bytes) -> bytes:
    """With a clen, and where it can be unpacked also a digest, that fit."""
    if len(raw) <= HEADER_SIZE:
        return raw
    raw = raw[:4] + (len(raw) - HEADER_SIZE).to_bytes(4, "little") + raw[8:]
    return _with_crc(raw, 52, HEADER_SIZE) + raw[HEADER_SIZE:]


def _directory(raw: bytes) -> Directory:
    last = (
        np.frombuffer(raw[-ENTRY.itemsize :], dtype=ENTRY) if len(raw) % 48 == 0 and raw else None
    )
    end = PACK_HEADER_SIZE
    if last is not None:
        end = int(last[0]["offset"]) + HEADER_SIZE + int(last[0]["clen"])
    place = PackPlace(end + len(raw) + FOOTER_SIZE, 0, len(raw), blake3(raw).digest())
    found = Directory.decode(raw, place)
    for entry in found.entries:
        found.find(int(entry["offset"]))
    return found


def _table(raw: bytes) -> IndexTable:
    count = int.from_bytes(raw[28:32], "little")
    digest = blake3(raw[: 32 + 48 * min(count, 64)]).digest()
    table = IndexTable.decode(raw, sid=SID, number=0, digest=digest)
    for seq in range(0, 64, 7):
        try:
            table.place(seq)
        except FormatError:
            continue
    return table


def _segment() -> bytes:
    rows = [Interval(n * 7, 5, n % 3, n, 128 + n, 1000, 1, 8) for n in range(40)]
    return Segment.of(rows).encode()


def _split(raw: bytes) -> tuple[bytes, bytes]:
    """The summary and the unpacked body of a sample, led by the summary's length."""
    length = int.from_bytes(raw[:4], "little")
    return raw[4 : 4 + length], raw[4 + length :]


def _manifest(raw: bytes) -> Manifest:
    """Any summary and body, in a manifest whose lengths and hashes fit."""
    summary, body = _split(raw)
    packed = zstandard.compress(body)
    lengths = b"".join(n.to_bytes(4, "little") for n in (len(summary), len(packed), len(body)))
    head = b"NBDPMAN1\1\0\0\0" + lengths + bytes.fromhex(REPOSITORY) + blake3(summary).digest()
    raw = head + bytes(8) + summary + packed
    return Manifest.decode(raw + blake3(raw).digest())


def _manifest_samples() -> list[bytes]:
    raw = manifest().encode()
    end = summary_end(raw[:HEAD_SIZE])
    summary, body = raw[HEAD_SIZE:end], zstandard.decompress(raw[end:-32])
    return [len(summary).to_bytes(4, "little") + summary + body]


def _records() -> list[bytes]:
    place = Place(SID, 1, 128)
    damage = DamagedFrame(
        place=place,
        clen=5,
        rlen=9,
        digest=bytes(range(32)),
        kind=FrameKind.DATA,
        disk=manifest().summary.disk_id,
        start=1 << 40,
    )
    heal = HealedFrame(damaged=place, copy=place, clen=5, rlen=9, digest=bytes(32), index=bytes(32))
    return [encode_record(REPOSITORY, SID, 3, [row] * 3) for row in (damage, heal)]


def _columns(raw: bytes) -> None:
    for width in (1, 2, 5, 8):
        try:
            unpack_columns(raw, width)
        except FormatError:
            continue


_RECIPIENT = Recipient(public_of(bytes(32)), bytes(32), bytes(range(32)))


def _envelope(raw: bytes) -> SessionKeys:
    try:
        return open_envelope(
            raw, repository=REPOSITORY, sid=SID, recipients=[_RECIPIENT], digest_key=bytes(32)
        )
    except WrongKeyError as exc:  # one that names another key is nothing else
        raise FormatError(str(exc)) from exc


_ENVELOPE = seal_envelope(
    repository=REPOSITORY,
    sid=SID,
    meta=b"m" * 32,
    data=b"d" * 32,
    recipients=[_RECIPIENT],
    salt=b"s" * 16,
)
_INDEX = encode_index(SID, 0, {n * 7: directory([(50, 90), (9, 9)]) for n in range(5)})[0]
_CONFIG = Config(id=REPOSITORY, capabilities={"ranges": True}).encode()
_INTENT = Intent(role="backup", disk="cd" * 16, pins=(f"{'ab' * 16}/{SID}",), host="h").encode(SID)
_RAW = manifest().encode()
_RING = Ring(REPOSITORY, bytes(32), ()).rotated(b"\1" * 32, b"\2" * 32)
_SLOT = Slot.make(
    _RING,
    b"secret",
    kid="ab" * 16,
    created=1,
    label="x",
    salt=bytes(16),
    kdf=Kdf(KdfName.ARGON2ID, 8, 1, 1),
).encode()

TARGETS: dict[str, Target] = {
    "config": Target([_CONFIG], Config.decode),
    "intent": Target(
        [_INTENT],
        lambda raw: Intent.decode(raw, SID),
        lambda raw: checked_intent(raw.rpartition(b', "check"')[0] + b"}", SID),
    ),
    "key-slot": Target([_SLOT], lambda raw: Slot.decode(raw, "ab" * 16)),
    "key-ring": Target([_RING.encode()], Ring.decode),
    "pack-header": Target(
        [PackHeader(3, bytes(16), bytes(16)).encode()],
        PackHeader.decode,
        lambda raw: _with_crc(raw, 96, 128),
    ),
    "frame-header": Target(
        [raw[:HEADER_SIZE] for raw in _frame_samples()],
        FrameHeader.decode,
        lambda raw: _with_crc(raw, 52, 64),
    ),
    "frame": Target(_frame_samples(), _frame, _sealed_frame),
    "footer": Target(
        [encode_footer(bytes(32), 128, 1)],
        lambda raw: decode_footer(raw, 128 + 48 + 64),
        lambda raw: raw[:52] + zlib.crc32(raw[:52]).to_bytes(4, "little") + raw[56:],
    ),
    "directory": Target([directory([(50, 90), (9, 9), (7, 8)]).encode()], _directory),
    "index-table": Target([_INDEX], _table),
    "segment": Target(
        [_segment()], lambda raw: Segment.decode(raw, grains=SEGMENT_GRAINS, sessions=3)
    ),
    "manifest": Target([_RAW], Manifest.decode, lambda raw: raw[:-32] + blake3(raw[:-32]).digest()),
    "manifest-inside": Target(_manifest_samples(), _manifest),
    "summary": Target([_RAW[: summary_end(_RAW[:HEAD_SIZE])]], decode_summary),
    "cbor": Target([cbor2.dumps({"a": [1, b"x", None, 2.5], "b": {"c": "d"}})], decode_map),
    "columns": Target([_segment()[12:]], _columns),
    "archive": Target([pack_files([("machine.json", b"{}"), ("tpm/a", bytes(700))])], unpack_files),
    "envelope": Target([_ENVELOPE], _envelope),
    "adopted-register": Target([adopted_by(SID)], adopter),
    "record": Target(
        _records(),
        lambda raw: decode_record(raw, repository=REPOSITORY, sid=SID, number=3),
        lambda raw: raw[:-32] + blake3(raw[:-32]).digest(),
    ),
}


def change(raw: bytes, rng: random.Random) -> bytes:
    """`raw` with a few changes: bits, bytes, numbers of 1 to 8 bytes at their limits, cuts, repeats."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            width = rng.choice([2, 4, 8])
            limit = 1 << (8 * width)
            number = rng.choice([0, 1, limit - 1, limit // 2, rng.randrange(limit)])
            data[at : at + width] = number.to_bytes(width, rng.choice(["little", "big"]))
        elif kind == 3:
            del data[at : at + rng.choice([1, 4, 48, len(data)])]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 48]))
        elif kind == 5:
            begin = rng.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + rng.choice([1, 8, 48, 1000])]
        else:
            data[at : at + 4] = bytes(4)
    return bytes(data[: 1 << 20])


def run(name: str, raw: bytes, *, sealed: bool) -> bool:
    """Decode; False when it was refused, as `FormatError` says. Everything else is a bug."""
    target = TARGETS[name]
    try:
        target.decode(target.seal(raw) if sealed else raw)
    except FormatError:
        return False
    return True
