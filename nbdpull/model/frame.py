"""Frames and packs: how bytes lie in `d/<session>/<seq>`.

    pack  | header 128 | frame | frame | ... | directory | footer 64 |
    frame | header 64  | payload (clen bytes) |

Everything is little-endian. docs/internals/format.md has the tables and the reasons.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, Protocol

import numpy as np
import zstandard
from blake3 import blake3

from nbdpull.model.grain import FRAME_MAX

__all__ = [
    "ENCRYPTED",
    "ENTRY",
    "FOOTER_SIZE",
    "HEADER_SIZE",
    "PACK_HEADER_SIZE",
    "TAG_SIZE",
    "Buffer",
    "Codec",
    "FormatError",
    "FrameCipher",
    "FrameHeader",
    "FrameKind",
    "PackHeader",
    "decode_footer",
    "encode_footer",
    "open_frame",
    "open_frame_into",
]


Buffer = bytes | bytearray | memoryview


class FormatError(ValueError):
    """Bytes that are not what they should be. The message says what was expected and what was got."""


class Codec(IntEnum):
    """How a frame's payload is stored."""

    RAW = 0
    ZSTD = 1


class FrameKind(IntEnum):
    """What a frame holds."""

    DATA = 0
    MAP = 1


_FRAME: Final = struct.Struct("<4sIIBBHI32sI")
_FRAME_MAGIC: Final = b"FRM1"
HEADER_SIZE: Final = 64
_PACK: Final = struct.Struct("<8sHBBI16s16s16s32sI")
_PACK_MAGIC: Final = b"NBDPPK01"
_PACK_VERSION: Final = 1
PACK_HEADER_SIZE: Final = 128
_FOOTER: Final = struct.Struct("<QI32sI8s")
_FOOTER_MAGIC: Final = b"NBDPEND1"
FOOTER_SIZE: Final = 64
_CRC: Final = 4

ENCRYPTED: Final = 1
"""The suite of cipher, key derivation and digest of encrypted packs: see `sealing`."""
TAG_SIZE: Final = 16

ENTRY: Final = np.dtype(
    [
        ("offset", "<u4"),
        ("clen", "<u4"),
        ("rlen", "<u4"),
        ("codec", "u1"),
        ("kind", "u1"),
        ("zero", "<u2"),
        ("digest", "V32"),
    ]
)
"""One frame in a directory: 48 bytes."""


def _sealed(packed: bytes, size: int) -> bytes:
    """`packed`, whose last four bytes are free, with its CRC there and zeroes up to `size`."""
    body = packed[:-_CRC]
    return (body + zlib.crc32(body).to_bytes(_CRC, "little")).ljust(size, b"\0")


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What stands before a frame's payload.

    Attributes:
        clen: bytes of the payload.
        rlen: bytes it unpacks to, at most 1 MiB.
        number: of the frame in its pack; the nonce where packs are encrypted.
        digest: BLAKE3-256 of the unpacked bytes; in an encrypted pack, whose header must not tell it,
            the cipher's tag stands in its place.
    """

    clen: int
    rlen: int
    codec: Codec
    kind: FrameKind
    number: int
    digest: bytes

    def encode(self) -> bytes:
        """64 bytes."""
        packed = _FRAME.pack(
            _FRAME_MAGIC,
            self.clen,
            self.rlen,
            self.codec,
            self.kind,
            0,
            self.number,
            self.digest,
            0,
        )
        return _sealed(packed, HEADER_SIZE)

    def with_digest(self, digest: bytes) -> FrameHeader:
        """The same with 32 other bytes there."""
        return replace(self, digest=digest)

    @classmethod
    def decode(cls, raw: bytes) -> FrameHeader:
        """The opposite of `encode`.

        Raises:
            FormatError: any bit is not as it was written.
        """
        if len(raw) != HEADER_SIZE:
            raise FormatError(f"frame header has {len(raw)} bytes, expected {HEADER_SIZE}")
        magic, clen, rlen, codec, kind, zero, number, digest, _ = _FRAME.unpack_from(raw)
        if magic != _FRAME_MAGIC:
            raise FormatError(f"frame begins with {magic!r}, expected {_FRAME_MAGIC!r}")
        if _sealed(raw[: _FRAME.size], HEADER_SIZE) != raw or zero:
            raise FormatError("frame header does not match its CRC")
        try:
            header = cls(clen, rlen, Codec(codec), FrameKind(kind), number, digest)
        except ValueError as exc:
            raise FormatError(f"frame header: {exc}") from exc
        stored_whole = header.codec is Codec.RAW
        if not 0 < rlen <= FRAME_MAX or not 0 < clen <= rlen or stored_whole != (clen == rlen):
            raise FormatError(f"frame of {clen} bytes for {rlen} can't be")
        return header


class FrameCipher(Protocol):
    """The keys of an encrypted pack."""

    def open_frame(self, stored: Buffer, header: FrameHeader) -> bytes:
        """The payload of a stored frame whose header, as stored, is `header`."""

    def digest(self, raw: Buffer) -> bytes:
        """The keyed digest of a frame's unpacked bytes."""


def open_frame(
    stored: Buffer,
    expected: FrameHeader,
    unpacker: zstandard.ZstdDecompressor,
    keys: FrameCipher | None = None,
) -> bytes:
    """The bytes that a stored frame (header and payload) holds, hashed and compared.

    Args:
        stored: what the store gave.
        expected: the frame as the session index, which the manifest vouches for, describes it.
        unpacker: of the calling thread.
        keys: of the pack; None where nothing is encrypted.

    Raises:
        FormatError: these are not the bytes that were written.
    """
    payload = _payload(stored, expected, keys)
    raw = bytes(payload) if expected.codec is Codec.RAW else _unpack(payload, expected, unpacker)
    _compare(raw, expected, keys)
    return raw


def open_frame_into(
    stored: Buffer,
    expected: FrameHeader,
    unpacker: zstandard.ZstdDecompressor,
    keys: FrameCipher | None,
    out: memoryview,
) -> None:
    """The same into `out`, which has `expected.rlen` bytes; undefined when it raises.

    Only what comes out is compared: bytes behind the end of what was compressed are not looked at.
    """
    payload = _payload(stored, expected, keys)
    if expected.codec is Codec.RAW:
        out[:] = payload
    else:
        try:
            _check_claim(payload, expected)
            # With room for all of it, zstd unpacks straight into `out`.
            with unpacker.stream_reader(payload) as reader:
                done = reader.readinto(out)
        except zstandard.ZstdError as exc:
            raise FormatError(f"it does not unpack: {exc}") from exc
        if done != expected.rlen:
            raise FormatError(f"it unpacks to {done} bytes, expected {expected.rlen}")
    _compare(out, expected, keys)


def _payload(stored: Buffer, expected: FrameHeader, keys: FrameCipher | None) -> Buffer:
    size = HEADER_SIZE + expected.clen
    if len(stored) != size:
        raise FormatError(f"it has {len(stored)} bytes, expected {size}: its pack is cut")
    header = FrameHeader.decode(bytes(stored[:HEADER_SIZE]))
    if (header if keys is None else header.with_digest(expected.digest)) != expected:
        raise FormatError("its header does not fit the session's index")
    return memoryview(stored)[HEADER_SIZE:] if keys is None else keys.open_frame(stored, header)


def _compare(raw: Buffer, expected: FrameHeader, keys: FrameCipher | None) -> None:
    digest = blake3(raw).digest() if keys is None else keys.digest(raw)
    if len(raw) != expected.rlen or digest != expected.digest:
        raise FormatError(f"it hashes to {digest.hex()}, the index says {expected.digest.hex()}")


def _check_claim(payload: Buffer, expected: FrameHeader) -> None:
    # zstandard allocates what the frame claims: look at the claim first.
    claimed = zstandard.frame_content_size(payload)
    if claimed != expected.rlen:
        raise FormatError(f"it claims to unpack to {claimed} bytes, expected {expected.rlen}")


def _unpack(payload: Buffer, expected: FrameHeader, unpacker: zstandard.ZstdDecompressor) -> bytes:
    try:
        _check_claim(payload, expected)
        return unpacker.decompress(payload, max_output_size=expected.rlen, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise FormatError(f"it does not unpack: {exc}") from exc


@dataclass(frozen=True, slots=True)
class PackHeader:
    """The first bytes of a pack: which pack of which repository it is.

    Attributes:
        suite: cipher; 0 is none, and then `salt` and `commitment` are zero.
        salt: random; the pack's keys are made with it.
        commitment: what only the pack's keys have.
    """

    seq: int
    repository: bytes
    session: bytes
    suite: int = 0
    salt: bytes = bytes(16)
    commitment: bytes = bytes(32)

    def encode(self) -> bytes:
        """128 bytes."""
        packed = _PACK.pack(
            _PACK_MAGIC,
            _PACK_VERSION,
            self.suite,
            0,
            self.seq,
            self.repository,
            self.session,
            self.salt,
            self.commitment,
            0,
        )
        return _sealed(packed, PACK_HEADER_SIZE)

    @classmethod
    def decode(cls, raw: bytes) -> PackHeader:
        """The opposite of `encode`.

        Raises:
            FormatError: any bit is not as it was written.
        """
        if len(raw) != PACK_HEADER_SIZE:
            raise FormatError(f"pack header has {len(raw)} bytes, expected {PACK_HEADER_SIZE}")
        magic, version, suite, zero, seq, repository, session, salt, commitment, _ = (
            _PACK.unpack_from(raw)
        )
        if magic != _PACK_MAGIC:
            raise FormatError(f"pack begins with {magic!r}, expected {_PACK_MAGIC!r}")
        if _sealed(raw[: _PACK.size], PACK_HEADER_SIZE) != raw or zero:
            raise FormatError("pack header does not match its CRC")
        if version != _PACK_VERSION or suite not in {0, ENCRYPTED}:
            raise FormatError(
                f"pack has version {version} and suite {suite}, expected 1 and 0 or {ENCRYPTED}"
            )
        return cls(seq, repository, session, suite, salt, commitment)


def encode_footer(digest: bytes, offset: int, count: int) -> bytes:
    """64 bytes that end a pack whose directory, with that BLAKE3, is at `offset`."""
    body = (
        bytes(FOOTER_SIZE - _FOOTER.size) + _FOOTER.pack(offset, count, digest, 0, b"")[: -_CRC - 8]
    )
    return body + zlib.crc32(body).to_bytes(_CRC, "little") + _FOOTER_MAGIC


def decode_footer(raw: bytes, size: int, suite: int = 0) -> tuple[int, int, bytes]:
    """Offset, count and BLAKE3 of the directory, as stored, of a pack of `size` bytes.

    Raises:
        FormatError: the pack is cut or damaged.
    """
    if len(raw) != FOOTER_SIZE:
        raise FormatError(f"pack footer has {len(raw)} bytes, expected {FOOTER_SIZE}")
    offset, count, digest, _, _ = _FOOTER.unpack(raw[-_FOOTER.size :])
    if raw != encode_footer(digest, offset, count):
        raise FormatError("pack has no footer, or its CRC is wrong")
    tag = TAG_SIZE if suite else 0
    if offset + count * ENTRY.itemsize + tag + FOOTER_SIZE != size:
        raise FormatError(f"pack of {size} bytes has a directory of {count} entries at {offset}")
    return offset, count, digest
