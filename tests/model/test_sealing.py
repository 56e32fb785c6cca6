"""Sealed forms: what is opened is what was sealed there, whatever bytes are given."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.errors import WrongKeyError
from nbdpull.model.crypto import Aead, public_of
from nbdpull.model.frame import (
    HEADER_SIZE,
    Codec,
    FormatError,
    FrameHeader,
    FrameKind,
    open_frame,
)
from nbdpull.model.ids import SessionId
from nbdpull.model.index import TABLE_MAX, Directory, IndexTable, encode_index
from nbdpull.model.manifest import Manifest, decode_summary, summary_end
from nbdpull.model.sealing import (
    ENVELOPE_MAX,
    Recipient,
    SessionKeys,
    open_envelope,
    seal_envelope,
)
from tests.model.samples import REPOSITORY, SID, damaged, directory, manifest

DIGEST_KEY = bytes(range(32))
RECIPIENTS = [
    Recipient(public_of(bytes([n] * 32)), bytes([n] * 32), bytes([n + 100] * 32)) for n in (1, 2)
]
WRITERS = [Recipient(one.public, None, one.writer) for one in RECIPIENTS]
ENVELOPE = seal_envelope(
    repository=REPOSITORY,
    sid=SID,
    meta=b"m" * 32,
    data=b"d" * 32,
    recipients=RECIPIENTS,
    salt=b"s" * 16,
)


def opened(
    envelope: bytes,
    recipients: list[Recipient] = RECIPIENTS,
    *,
    repository: str = REPOSITORY,
    sid: SessionId = SID,
) -> SessionKeys:
    return open_envelope(
        envelope, repository=repository, sid=sid, recipients=recipients, digest_key=DIGEST_KEY
    )


KEYS = opened(ENVELOPE)


# -- envelope --------------------------------------------------------------------------------------


def test_each_recipient_opens_both_keys_and_each_writer_one() -> None:
    assert len(ENVELOPE) <= ENVELOPE_MAX
    sealed = KEYS.seal(b"p", b"text", b"aad")
    for one in RECIPIENTS:
        keys = opened(ENVELOPE, [one])
        assert keys.opens_data
        assert keys.open(b"p", sealed, b"aad") == b"text"
        assert keys.pack(1, bytes(16)).commitment() == KEYS.pack(1, bytes(16)).commitment()
    for one in WRITERS:
        keys = opened(ENVELOPE, [one])
        assert not keys.opens_data
        assert keys.open(b"p", sealed, b"aad") == b"text"
        with pytest.raises(WrongKeyError, match="writer's key"):
            keys.pack(1, bytes(16)).commitment()


def test_who_is_no_recipient_is_told_so() -> None:
    stranger = Recipient(public_of(b"\7" * 32), b"\7" * 32, b"\7" * 32)
    with pytest.raises(WrongKeyError, match="another key"):
        opened(ENVELOPE, [stranger])


def test_an_envelope_of_another_session_or_repository_is_refused() -> None:
    for recipients in (RECIPIENTS, WRITERS):
        with pytest.raises(FormatError):
            opened(ENVELOPE, recipients, sid=SessionId("0" * 32))
        with pytest.raises(FormatError):
            opened(ENVELOPE, recipients, repository="0" * 32)


@pytest.mark.parametrize("recipients", [RECIPIENTS[:1], WRITERS[:1]], ids=["both", "writer"])
def test_a_damaged_envelope_opens_nothing_or_the_same(recipients: list[Recipient]) -> None:
    """What is for others may be damaged; that is found where the envelope is authenticated."""
    sealed = KEYS.seal(b"p", b"text", b"aad")
    for bad in damaged(ENVELOPE):
        try:
            keys = opened(bad, recipients)
        except (FormatError, WrongKeyError):
            continue
        assert keys.open(b"p", sealed, b"aad") == b"text"


@given(st.binary(max_size=500))
def test_no_bytes_make_an_envelope_crash(raw: bytes) -> None:
    with pytest.raises((FormatError, WrongKeyError)):
        opened(raw)


# -- frames ----------------------------------------------------------------------------------------


def frame(raw: bytes, number: int, kind: FrameKind = FrameKind.DATA) -> tuple[FrameHeader, bytes]:
    """A frame of pack 5 as the index has it, and as it is stored."""
    packed = zstandard.ZstdCompressor(write_checksum=False).compress(raw)
    codec, payload = (Codec.ZSTD, packed) if len(packed) < len(raw) else (Codec.RAW, raw)
    header = FrameHeader(len(payload), len(raw), codec, kind, number, KEYS.digest(raw))
    buffer = memoryview(bytearray(len(payload) + 16))
    return header, b"".join(KEYS.pack(5, bytes(16)).seal_frame(header, payload, buffer))


def test_a_frame_opens_as_what_it_is_and_nothing_else_does() -> None:
    unpacker = zstandard.ZstdDecompressor()
    keys = KEYS.pack(5, bytes(16))
    header, stored = frame(b"abcd" * 20, 3)
    assert len(stored) == HEADER_SIZE + header.clen
    assert open_frame(stored, header, unpacker, keys) == b"abcd" * 20
    for bad in damaged(stored):
        with pytest.raises(FormatError):
            open_frame(bad, header, unpacker, keys)
    for other in (
        KEYS.pack(6, bytes(16)),
        KEYS.pack(5, b"\1" + bytes(15)),
        opened(
            seal_envelope(
                repository=REPOSITORY,
                sid=SessionId("0" * 32),
                meta=b"m" * 32,
                data=b"d" * 32,
                recipients=RECIPIENTS,
                salt=bytes(16),
            ),
            sid=SessionId("0" * 32),
        ).pack(5, bytes(16)),
    ):
        with pytest.raises(FormatError, match="bad tag"):
            open_frame(stored, header, unpacker, other)


def test_a_frame_in_the_place_of_another_of_the_same_length_is_refused() -> None:
    unpacker = zstandard.ZstdDecompressor()
    keys = KEYS.pack(5, bytes(16))
    frames = [frame(bytes([n]) * 64, n) for n in range(3)]
    for (expected, _), (_, stored) in itertools.permutations(frames, 2):
        with pytest.raises(FormatError):
            open_frame(stored, expected, unpacker, keys)


def test_data_and_maps_have_keys_of_their_own() -> None:
    keys = KEYS.pack(5, bytes(16))
    _, data = frame(b"x" * 64, 0)
    _, a_map = frame(b"x" * 64, 0, FrameKind.MAP)
    assert data[HEADER_SIZE:] != a_map[HEADER_SIZE:]
    assert keys.commitment()[:16] != keys.commitment()[16:]


def test_no_header_tells_a_digest() -> None:
    header, stored = frame(b"x" * 1000, 0)
    _, again = frame(b"x" * 1000, 1)
    assert header.digest not in stored
    assert stored[20:52] != again[20:52]


# -- index and manifest ----------------------------------------------------------------------------


def sealed_packs(lengths: dict[int, list[tuple[int, int]]]) -> dict[int, Directory]:
    return {
        seq: Directory(directory(frames).entries, KEYS.pack(seq, bytes([seq]) * 16))
        for seq, frames in lengths.items()
    }


def read_index(raw: bytes, digest: bytes, seq: int) -> Directory:
    table = IndexTable.decode(raw[:TABLE_MAX], sid=SID, number=1, digest=digest, open_keys=opened)
    place = table.place(seq)
    return Directory.decode(raw[place.offset : place.offset + place.length], place)


def test_a_sealed_index_gives_each_directory_and_finds_every_damage() -> None:
    packs = sealed_packs({64: [(10, 20), (5, 5)], 65: [(7, 9)], 127: [(1, 1)]})
    raw, digest = encode_index(SID, 1, packs, KEYS)
    for seq, expected in packs.items():
        found = read_index(raw, digest, seq)
        assert np.array_equal(found.entries, expected.entries)
        assert found.pack_size == expected.pack_size
        assert found.keys is not None
        assert found.keys.salt == bytes([seq]) * 16
    for bad in damaged(raw, every=3):
        if bad[: len(raw)] == raw:
            continue  # what follows the last directory is never read
        wrong = 0
        for seq, expected in packs.items():
            try:
                assert np.array_equal(read_index(bad, digest, seq).entries, expected.entries)
            except (FormatError, WrongKeyError):
                wrong += 1
        assert wrong


def test_no_digest_stands_in_a_sealed_index() -> None:
    packs = sealed_packs({64: [(10, 20)]})
    raw, _ = encode_index(SID, 1, packs, KEYS)
    assert bytes(packs[64].entries[0]["digest"]) not in raw


def test_a_plain_index_is_refused_where_keys_are_expected_and_the_other_way_round() -> None:
    plain, plain_digest = encode_index(SID, 1, {64: directory([(1, 1)])})
    with pytest.raises(FormatError, match="NBDPIDX1"):
        IndexTable.decode(plain, sid=SID, number=1, digest=plain_digest, open_keys=opened)
    sealed, digest = encode_index(SID, 1, sealed_packs({64: [(1, 1)]}), KEYS)
    with pytest.raises(FormatError, match="NBDPIDX2"):
        IndexTable.decode(sealed, sid=SID, number=1, digest=digest)


def test_a_sealed_manifest_is_read_back_and_every_damage_is_found() -> None:
    raw = manifest().encode(KEYS)
    assert Manifest.decode(raw, opened) == manifest()
    assert decode_summary(raw[: summary_end(raw[:80])], opened) == (
        manifest().summary,
        REPOSITORY,
    )
    assert "größe".encode() not in raw
    for bad in damaged(raw, every=2):
        with pytest.raises((FormatError, WrongKeyError)):
            Manifest.decode(bad, opened)


@given(st.binary(min_size=80, max_size=400))
def test_no_bytes_make_a_sealed_manifest_or_index_crash(tail: bytes) -> None:
    start = manifest().encode(KEYS)[:80]
    for raw in (tail, start + tail, start[:40] + tail):
        with pytest.raises((FormatError, WrongKeyError)):
            Manifest.decode(raw, opened)
    top, digest = encode_index(SID, 1, sealed_packs({64: [(1, 1)]}), KEYS)
    for raw in (tail, top[:36] + tail):
        with pytest.raises((FormatError, WrongKeyError)):
            IndexTable.decode(raw, sid=SID, number=1, digest=digest, open_keys=opened)


def test_a_key_of_another_length_is_a_bug() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Aead(b"short")
