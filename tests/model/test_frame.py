from __future__ import annotations

import random
import zlib
from dataclasses import replace

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.frame import (
    HEADER_SIZE,
    Codec,
    FormatError,
    FrameHeader,
    FrameKind,
    PackHeader,
    decode_footer,
    encode_footer,
    open_frame,
    open_frame_into,
)
from tests.model.samples import damaged

TEXT = b"all work and no play " * 20
NOISE = random.Random(1).randbytes(300)
UNPACKER = zstandard.ZstdDecompressor()


def frame(raw: bytes, *, number: int = 0) -> tuple[FrameHeader, bytes]:
    packed = zstandard.compress(raw, 1)
    codec = Codec.ZSTD if len(packed) < len(raw) else Codec.RAW
    payload = packed if codec is Codec.ZSTD else raw
    digest = blake3(raw).digest()
    header = FrameHeader(len(payload), len(raw), codec, FrameKind.DATA, number, digest)
    return header, header.encode() + payload


@pytest.mark.parametrize("raw", [TEXT, NOISE, b"x"])
def test_a_frame_comes_back(raw: bytes) -> None:
    header, stored = frame(raw)
    assert open_frame(stored, header, UNPACKER) == raw
    assert FrameHeader.decode(stored[:HEADER_SIZE]) == header


@pytest.mark.parametrize("raw", [TEXT, NOISE])
def test_no_damaged_frame_gives_wrong_bytes(raw: bytes) -> None:
    header, stored = frame(raw)
    cases = 0
    for bad in damaged(stored):
        try:
            got = open_frame(bad, header, UNPACKER)
        except FormatError:
            cases += 1
        else:
            # A bit of zstd's frame header that changes nothing may flip unseen: the bytes are right.
            assert got == raw
    assert cases > 2 * len(stored)


@pytest.mark.parametrize("raw", [TEXT, NOISE, b"x"])
def test_a_frame_comes_back_into_a_buffer(raw: bytes) -> None:
    header, stored = frame(raw)
    out = memoryview(bytearray(len(raw)))
    open_frame_into(memoryview(stored), header, UNPACKER, None, out)
    assert out == raw


@pytest.mark.parametrize("raw", [TEXT, NOISE])
def test_no_damaged_frame_leaves_wrong_bytes_in_a_buffer_and_says_it_is_sound(raw: bytes) -> None:
    header, stored = frame(raw)
    cases = 0
    for bad in damaged(stored):
        out = memoryview(bytearray(len(raw)))
        try:
            open_frame_into(bad, header, UNPACKER, None, out)
        except FormatError:
            cases += 1
        else:
            assert out == raw
    assert cases > 2 * len(stored)


def test_a_sound_frame_that_is_not_the_expected_one_is_refused() -> None:
    header, _ = frame(TEXT)
    _, other = frame(TEXT, number=1)
    with pytest.raises(FormatError, match="header"):
        open_frame(other, header, UNPACKER)
    with pytest.raises(FormatError, match="header"):
        open_frame_into(other, header, UNPACKER, None, memoryview(bytearray(len(TEXT))))


def test_a_forged_digest_is_found_although_the_header_fits() -> None:
    header, stored = frame(NOISE)
    forged = replace(header, digest=bytes(32))
    with pytest.raises(FormatError, match="hashes to"):
        open_frame(forged.encode() + stored[HEADER_SIZE:], forged, UNPACKER)


def test_a_payload_that_unpacks_to_more_than_its_header_says_is_not_unpacked() -> None:
    bomb = zstandard.compress(bytes(1 << 26), 1)
    header = FrameHeader(len(bomb), 1 << 20, Codec.ZSTD, FrameKind.DATA, 0, bytes(32))
    with pytest.raises(FormatError, match="claims to unpack to 67108864"):
        open_frame(header.encode() + bomb, header, UNPACKER)
    out = memoryview(bytearray(1 << 20))
    with pytest.raises(FormatError, match="claims to unpack to 67108864"):
        open_frame_into(header.encode() + bomb, header, UNPACKER, None, out)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
    header = replace(header, clen=len(unsized))
    with pytest.raises(FormatError, match="claims"):
        open_frame(header.encode() + unsized, header, UNPACKER)


@pytest.mark.parametrize(
    "changes",
    [
        {"clen": 0},
        {"rlen": 0},
        {"rlen": (1 << 20) + 1},
        {"clen": 401},
        {"clen": 400},
        {"codec": 2},
        {"kind": 2},
        {"codec": Codec.RAW},
    ],
)
def test_a_header_that_cannot_be_is_refused_although_its_crc_fits(changes: dict[str, int]) -> None:
    good = FrameHeader(200, 400, Codec.ZSTD, FrameKind.MAP, 3, b"d" * 32)
    assert FrameHeader.decode(good.encode()) == good
    bad = replace(good, **changes)  # type: ignore[arg-type]
    with pytest.raises(FormatError):
        FrameHeader.decode(bad.encode())


def test_every_damaged_byte_of_pack_header_and_footer_is_found() -> None:
    header = PackHeader(7, b"r" * 16, b"s" * 16)
    assert PackHeader.decode(header.encode()) == header
    for bad in damaged(header.encode()):
        with pytest.raises(FormatError):
            PackHeader.decode(bad)
    size = 1000 + 2 * 48 + 64
    footer = encode_footer(b"d" * 32, 1000, 2)
    assert decode_footer(footer, size) == (1000, 2, b"d" * 32)
    for bad in damaged(footer):
        with pytest.raises(FormatError):
            decode_footer(bad, size)
    for other in (size - 1, size + 48, 0):
        with pytest.raises(FormatError):
            decode_footer(footer, other)


def test_a_pack_of_an_unknown_cipher_is_refused() -> None:
    with pytest.raises(FormatError, match="suite 2"):
        PackHeader.decode(PackHeader(7, b"r" * 16, b"s" * 16, suite=2).encode())


@given(st.binary(min_size=HEADER_SIZE - 4, max_size=HEADER_SIZE - 4))
def test_no_bytes_crash_the_header_decoder(tail: bytes) -> None:
    body = b"FRM1" + tail[:48]
    for raw in (
        tail,
        b"FRM1" + tail,
        (body + zlib.crc32(body).to_bytes(4, "little")).ljust(64, b"\0"),
    ):
        try:
            FrameHeader.decode(raw)
        except FormatError:
            continue
