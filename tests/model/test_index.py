from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.frame import FormatError
from nbdpull.model.ids import SessionId
from nbdpull.model.index import TABLE_MAX, Directory, IndexTable, encode_index
from tests.model.samples import SID, damaged, directory

lengths = st.tuples(st.integers(1, 1 << 20), st.integers(0, 100)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], 1 << 20))
)


def read(raw: bytes, digest: bytes, seq: int) -> Directory:
    """A pack's directory, as a reader gets it."""
    table = IndexTable.decode(raw[:TABLE_MAX], sid=SID, number=1, digest=digest)
    place = table.place(seq)
    found = Directory.decode(raw[place.offset : place.offset + place.length], place)
    assert found.pack_size == place.size
    return found


@given(
    st.dictionaries(st.integers(64, 127), st.lists(lengths, min_size=1, max_size=20), min_size=1)
)
def test_every_frame_is_found_again(packs: dict[int, list[tuple[int, int]]]) -> None:
    written = {seq: directory(frames) for seq, frames in packs.items()}
    raw, digest = encode_index(SID, 1, written)
    for seq, expected in written.items():
        found = read(raw, digest, seq)
        assert found.encode() == expected.encode()
        for number, entry in enumerate(expected.entries):
            header = found.find(int(entry["offset"]))
            assert (header.clen, header.rlen) == packs[seq][number]
            assert header.number == number
            assert header.digest == entry["digest"].tobytes()
            with pytest.raises(FormatError):
                found.find(int(entry["offset"]) + 1)


def test_every_damaged_byte_is_found_before_a_frame_is() -> None:
    packs = {65: directory([(10, 20), (30, 30), (5, 9)]), 70: directory([(1, 2)] * 9)}
    raw, digest = encode_index(SID, 1, packs)
    found = 0
    for bad in damaged(raw):
        for seq, expected in packs.items():
            try:
                assert read(bad, digest, seq).encode() == expected.encode()
            except FormatError:
                found += 1
    assert found > 2 * len(raw)


def test_an_index_of_another_session_or_number_is_refused() -> None:
    raw, digest = encode_index(SID, 1, {64: directory([(1, 1)])})
    for sid, number in ((SessionId("ff" * 16), 1), (SID, 0)):
        with pytest.raises(FormatError, match="no index"):
            IndexTable.decode(raw, sid=sid, number=number, digest=digest)
    with pytest.raises(FormatError, match="no pack 65"):
        read(raw, digest, 65)


@pytest.mark.parametrize("seqs", [[63], [128], list(range(64, 129))])
def test_packs_that_do_not_belong_into_an_index_are_refused(seqs: list[int]) -> None:
    raw, digest = encode_index(SID, 1, {seq: directory([(1, 1)]) for seq in seqs})
    with pytest.raises(FormatError):
        IndexTable.decode(raw, sid=SID, number=1, digest=digest)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", 127),
        ("clen", 0),
        ("clen", 11),
        ("codec", 2),
        ("kind", 2),
        ("zero", 1),
        ("rlen", 1 << 21),
    ],
)
def test_frames_that_cannot_be_are_refused_although_the_digest_fits(field: str, value: int) -> None:
    wrong = directory([(10, 20), (30, 40)])
    wrong.entries[0][field] = value
    raw, digest = encode_index(SID, 1, {64: wrong})
    with pytest.raises(FormatError, match="can't be"):
        read(raw, digest, 64)
