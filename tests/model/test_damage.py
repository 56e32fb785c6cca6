from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.damage import (
    RECORD_MAX,
    ROWS_MAX,
    DamagedFrame,
    HealedFrame,
    Place,
    Record,
    decode_record,
    encode_record,
)
from nbdpull.model.frame import PACK_HEADER_SIZE, FormatError, FrameKind
from nbdpull.model.grain import FRAME_MAX
from nbdpull.model.ids import DiskId, SessionId
from tests.model.samples import REPOSITORY, SID, damaged

sids = st.binary(min_size=16, max_size=16).map(lambda raw: SessionId(raw.hex()))
u32 = st.integers(0, (1 << 32) - 1)
places = st.builds(Place, sids, u32, st.integers(PACK_HEADER_SIZE, (1 << 32) - 1))
digests = st.binary(min_size=32, max_size=32)
lengths = st.integers(1, FRAME_MAX)
damages = st.builds(
    DamagedFrame,
    place=places,
    clen=lengths,
    rlen=st.integers(0, FRAME_MAX),
    digest=digests,
    kind=st.sampled_from(FrameKind),
    disk=sids.map(DiskId),
    start=st.integers(0, (1 << 63) - 1),
)
heals = st.builds(
    HealedFrame,
    damaged=places,
    copy=places,
    clen=lengths,
    rlen=lengths,
    digest=digests,
    index=digests,
)


def decoded(raw: bytes, *, repository: str = REPOSITORY, sid: str = SID, number: int = 3) -> Record:
    return decode_record(raw, repository=repository, sid=sid, number=number)


@given(st.lists(damages, min_size=1, max_size=5))
def test_records_of_damage_come_back(rows: list[DamagedFrame]) -> None:
    assert decoded(encode_record(REPOSITORY, SID, 3, rows)) == Record(damaged=tuple(rows))


@given(st.lists(heals, min_size=1, max_size=5))
def test_records_of_healing_come_back(rows: list[HealedFrame]) -> None:
    assert decoded(encode_record(REPOSITORY, SID, 3, rows)) == Record(healed=tuple(rows))


PLACE = Place(SID, 1, 128)
DAMAGE = DamagedFrame(
    place=PLACE,
    clen=5,
    rlen=9,
    digest=bytes(range(32)),
    kind=FrameKind.DATA,
    disk=DiskId("cd" * 16),
    start=1 << 40,
)
HEAL = HealedFrame(
    damaged=PLACE,
    copy=PLACE._replace(seq=2),
    clen=5,
    rlen=9,
    digest=bytes(range(32)),
    index=bytes(32),
)


@pytest.mark.parametrize("row", [DAMAGE, HEAL])
def test_every_damaged_byte_of_a_record_is_found(row: DamagedFrame | HealedFrame) -> None:
    for bad in damaged(encode_record(REPOSITORY, SID, 3, [row])):
        with pytest.raises(FormatError):
            decoded(bad)


def test_a_record_of_another_place_is_refused() -> None:
    raw = encode_record(REPOSITORY, SID, 3, [HEAL])
    with pytest.raises(FormatError, match="elsewhere"):
        decoded(raw, repository="ef" * 16)
    with pytest.raises(FormatError, match="elsewhere"):
        decoded(raw, sid="ef" * 16)
    with pytest.raises(FormatError, match="elsewhere"):
        decoded(raw, number=4)


@pytest.mark.parametrize(
    "row",
    [
        replace(DAMAGE, clen=0),
        replace(DAMAGE, clen=FRAME_MAX + 1),
        replace(DAMAGE, rlen=FRAME_MAX + 1),
        replace(DAMAGE, place=PLACE._replace(offset=127)),
        replace(DAMAGE, start=1 << 63),
        replace(HEAL, rlen=0),
        replace(HEAL, copy=PLACE._replace(offset=0)),
    ],
)
def test_a_row_that_cannot_be_is_refused_although_its_hash_fits(
    row: DamagedFrame | HealedFrame,
) -> None:
    with pytest.raises(FormatError):
        decoded(encode_record(REPOSITORY, SID, 3, [row]))


def test_the_largest_record_fits_its_limit() -> None:
    assert len(encode_record(REPOSITORY, SID, 3, [HEAL] * ROWS_MAX)) == RECORD_MAX
    with pytest.raises(FormatError, match="claims"):
        decoded(encode_record(REPOSITORY, SID, 3, [HEAL] * (ROWS_MAX + 1)))


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(raw: bytes) -> None:
    with pytest.raises(FormatError):
        decoded(raw)
