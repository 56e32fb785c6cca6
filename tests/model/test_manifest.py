from __future__ import annotations

import os
import random
import resource
import time
from dataclasses import replace

import cbor2
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.errors import RepositoryError
from nbdpull.model import manifest as manifest_module
from nbdpull.model.frame import FormatError
from nbdpull.model.grain import DISK_MAX, GRAIN, SEGMENT
from nbdpull.model.ids import SessionId
from nbdpull.model.manifest import (
    HEAD_SIZE,
    Manifest,
    SegmentRef,
    SessionRef,
    adopted_by,
    adopter,
    decode_summary,
    register_kind,
    summary_end,
)
from nbdpull.model.results import Level
from nbdpull.model.segment import Packs
from tests.model.samples import REPOSITORY, SID, damaged, manifest, summary


def forged(body: object, head: bytes | None = None) -> bytes:
    """A manifest with all digests right around a body that nobody would write."""
    top = cbor2.dumps(cbor2.loads(_summary_bytes()))
    inner = body if isinstance(body, bytes) else cbor2.dumps(body)
    packed = zstandard.compress(inner)
    lengths = b"".join(n.to_bytes(4, "little") for n in (len(top), len(packed), len(inner)))
    raw = head or b"NBDPMAN1" + b"\1\0\0\0" + lengths + bytes.fromhex(REPOSITORY)
    raw += blake3(top).digest() + bytes(8) + top + packed
    return raw + blake3(raw).digest()


def _with_summary(top: object, body: object) -> bytes:
    """The same, also around a summary that nobody would write."""
    outer, inner = cbor2.dumps(top), cbor2.dumps(body)
    packed = zstandard.compress(inner)
    lengths = b"".join(n.to_bytes(4, "little") for n in (len(outer), len(packed), len(inner)))
    raw = b"NBDPMAN1\1\0\0\0" + lengths + bytes.fromhex(REPOSITORY)
    raw += blake3(outer).digest() + bytes(8) + outer + packed
    return raw + blake3(raw).digest()


def _summary_bytes() -> bytes:
    raw = manifest().encode()
    return raw[HEAD_SIZE : summary_end(raw[:HEAD_SIZE])]


def _body() -> dict[str, bytes]:
    raw = manifest().encode()
    loaded: dict[str, bytes] = cbor2.loads(
        zstandard.decompress(raw[summary_end(raw[:HEAD_SIZE]) : -32])
    )
    return loaded


def test_a_manifest_comes_back() -> None:
    assert Manifest.decode(manifest().encode()) == manifest()
    assert Manifest.decode(forged(_body())) == manifest()


@pytest.mark.parametrize("size", [1, GRAIN, SEGMENT])
def test_a_disk_of_zeroes_comes_back(size: int) -> None:
    empty = Manifest(summary(size=size), REPOSITORY, (), (None,))
    assert Manifest.decode(empty.encode()) == empty


@given(
    st.lists(
        st.none() | st.sets(st.tuples(st.integers(0, 2), st.integers(0, (1 << 32) - 1))), min_size=1
    )
)
def test_any_packs_of_any_segments_come_back(listed: list[set[tuple[int, int]] | None]) -> None:
    sessions = tuple(SessionRef(SessionId(f"{n + 1:032x}"), ((n, bytes(32)),)) for n in range(3))
    segments = tuple(
        None if pairs is None else SegmentRef(n % 3, n, 128 + n, n + 1, Packs.of(pairs))
        for n, pairs in enumerate(listed)
    )
    one = Manifest(summary(size=len(listed) * SEGMENT), REPOSITORY, sessions, segments)
    assert Manifest.decode(one.encode()) == one
    maps = {(ref.session, ref.seq) for ref in segments if ref is not None}
    assert set(one.packs()) == maps.union(*(pairs or set() for pairs in listed))


def test_tags_and_the_first_stored_time_come_back_and_older_manifests_have_none() -> None:
    tagged = replace(manifest(), summary=summary(tags=("gold", "größe"), stored=1_700_000_009.5))
    assert Manifest.decode(tagged.encode()) == tagged
    fields = cbor2.loads(_summary_bytes())
    del fields["tags"], fields["stored"]
    top = cbor2.dumps(fields)
    raw = b"NBDPMAN1" + b"\1\0\0\0" + len(top).to_bytes(4, "little") + bytes(8)
    raw += bytes.fromhex(REPOSITORY) + blake3(top).digest() + bytes(8) + top
    assert decode_summary(raw) == (summary(), REPOSITORY)


def test_every_damaged_byte_is_found() -> None:
    for bad in damaged(manifest().encode()):
        with pytest.raises(FormatError):
            Manifest.decode(bad)


def test_a_damaged_summary_is_found_without_the_rest() -> None:
    raw = manifest().encode()
    end = summary_end(raw[:HEAD_SIZE])
    assert decode_summary(raw[:end]) == (summary(), REPOSITORY)
    for at in range(HEAD_SIZE, end):
        with pytest.raises(FormatError):
            decode_summary(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 : end])
        with pytest.raises(FormatError):
            decode_summary(raw[:at])


@pytest.mark.parametrize(
    "changes",
    [
        {"level": "sometimes"},
        {"size": -1},
        {"size": True},
        {"size": 1 << 63},
        {"time": float("nan")},
        {"time": "now"},
        {"backup": "../../x"},
        {"disk_id": "AB" * 16},
        {"siblings": [["cd" * 16]]},
        {"siblings": [3]},
        {"vm": b"bytes"},
        {"disk": None},
        {"tags": "gold"},
        {"tags": [3]},
        {"stored": "now"},
    ],
)
def test_a_summary_with_a_value_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    fields = cbor2.loads(_summary_bytes()) | changes
    top = cbor2.dumps(fields)
    raw = b"NBDPMAN1" + b"\1\0\0\0" + len(top).to_bytes(4, "little") + bytes(8 + 16)
    raw += blake3(top).digest() + bytes(8) + top
    with pytest.raises(FormatError):
        decode_summary(raw)


@pytest.mark.parametrize(
    "changes",
    [
        {"sids": b"x"},
        {"sids": b""},
        {"sids": 5},
        {"index_counts": b"\xff" * 12},
        {"index_digests": b""},
        {"present": b""},
        {"present": b"\xa1"},
        {"present": b"\x00"},
        {"present": b"\xff"},
        {"maps": b"abc"},
        {"maps": b"\xff" * 40},
        {"packs": b""},
        {"packs": b"\xff" * 32},
        {"packs": None},
    ],
)
def test_a_body_that_cannot_be_is_refused_although_its_digests_fit(
    changes: dict[str, object],
) -> None:
    with pytest.raises(FormatError):
        Manifest.decode(forged(_body() | changes))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"\x81" * 100_000,
        b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\xc2\x5a\x00\xff\xff\xff",
        b"\xc4\x82\x1b\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\xd8\x23\x61(",
        b"\xa1\x80\x01",
        b"\xa1\xa0\x01",
        cbor2.dumps([1, 2]),
        cbor2.dumps({}),
    ],
)
def test_hostile_cbor_is_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        Manifest.decode(forged(body))


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_decoders(raw: bytes) -> None:
    for data in (raw, b"NBDPMAN1\1\0\0\0" + raw, forged(raw)):
        with pytest.raises(FormatError):
            Manifest.decode(data)


def test_a_body_that_claims_too_much_is_not_unpacked() -> None:
    top = _summary_bytes()
    packed = zstandard.compress(bytes(1 << 29))
    for claim in (1 << 29, 100):
        lengths = b"".join(n.to_bytes(4, "little") for n in (len(top), len(packed), claim))
        raw = b"NBDPMAN1\1\0\0\0" + lengths + bytes.fromhex(REPOSITORY)
        raw += blake3(top).digest() + bytes(8) + top + packed
        with pytest.raises(FormatError, match=r"length"):
            Manifest.decode(raw + blake3(raw).digest())


def test_other_registers_are_told_apart() -> None:
    assert register_kind(manifest().encode()) == "manifest"
    assert register_kind(b"NBDPREV1") == "revoked"
    assert register_kind(b"NBDPADO1" + b"x") == "adopted"
    assert register_kind(b"") == "unknown"


def _large(segments: int, increments: int) -> Manifest:
    """A disk of so many GiB, its full at ratio 2.65, and increments that touch every segment."""
    rng = random.Random(1)
    refs = []
    for index in range(segments):
        full = [(0, index * 12 + n) for n in range(13)]
        later = [(n, index * 2500 // segments) for n in range(1, increments + 1)]
        refs.append(
            SegmentRef(
                increments,
                index // 60,
                rng.randrange(1 << 25),
                4000 + index % 99,
                Packs.of(full + later),
            )
        )
    tables = segments * 12 // 64 + 1
    full_index = tuple((n, os.urandom(32)) for n in range(tables))
    sessions = [SessionRef(SID, full_index)] + [
        SessionRef(SessionId(os.urandom(16).hex()), tuple((n, os.urandom(32)) for n in range(40)))
        for _ in range(increments)
    ]
    size = segments * SEGMENT
    return Manifest(summary(size=size, level=Level.FULL), REPOSITORY, tuple(sessions), tuple(refs))


@pytest.mark.parametrize(
    ("segments", "increments", "limit"), [(16384, 0, 1 << 20), (1024, 365, 2 << 20)]
)
def test_a_large_disk_has_a_small_manifest(
    segments: int, increments: int, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    one = _large(segments, increments)
    began = time.perf_counter()
    raw = one.encode()
    encoded = time.perf_counter()
    assert Manifest.decode(raw) == one
    decoded = time.perf_counter()
    one.packs()
    with capsys.disabled():
        print(  # noqa: T201 - figures for the reader
            f"\n{segments} GiB, {increments} increments: {len(raw)} bytes, encode"
            f" {encoded - began:.3f} s, decode and compare {decoded - encoded:.3f} s, packs"
            f" {time.perf_counter() - decoded:.3f} s, max RSS"
            f" {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
        )
    assert len(raw) < limit


def test_a_session_nobody_refers_to_costs_next_to_nothing() -> None:
    one = manifest()
    gone = (*one.sessions, *[SessionRef(SessionId(""), ())] * 10_000)
    many = replace(one, sessions=gone)
    assert Manifest.decode(many.encode()) == many
    assert len(many.encode()) < len(one.encode()) + 200


def test_a_mark_names_who_took_a_session_over_and_no_digit_of_it_can_flip() -> None:
    mark = adopted_by(SessionId("ab" * 16))
    assert register_kind(mark) == "adopted"
    assert adopter(mark) == "ab" * 16
    for at in range(len(mark)):
        with pytest.raises(FormatError):
            adopter(mark[:at] + bytes([mark[at] ^ 1]) + mark[at + 1 :])
        with pytest.raises(FormatError):
            adopter(mark[:at])
    with pytest.raises(FormatError):
        adopter(mark + b"x")


def test_what_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = manifest().encode()
    body = int.from_bytes(raw[20:24], "little")
    monkeypatch.setattr(manifest_module, "_BODY_MAX", body)
    assert Manifest.decode(manifest().encode()) == manifest()
    monkeypatch.setattr(manifest_module, "_BODY_MAX", body - 1)
    with pytest.raises(RepositoryError, match=f"takes {body} bytes, at most {body - 1}.*repack"):
        manifest().encode()
    monkeypatch.undo()
    with pytest.raises(RepositoryError, match="can be read again"):
        replace(manifest(), summary=replace(summary(), tags=("x" * (1 << 20),))).encode()


def test_a_disk_of_no_size_that_can_be_takes_no_memory() -> None:
    size = DISK_MAX + 1
    count = -(-size // SEGMENT)
    body = _body() | {"present": bytes(-(-count // 8))}
    top = cbor2.loads(_summary_bytes()) | {"size": size}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=f"'size' is {size}, at most"):
        Manifest.decode(_with_summary(top, body))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    with pytest.raises(RepositoryError, match="can be read again"):
        replace(manifest(), summary=replace(summary(), size=size)).encode()
