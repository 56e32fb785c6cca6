from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.columns import pack_columns, unpack_columns
from nbdpull.model.frame import FormatError
from nbdpull.model.grain import FRAME_GRAINS, SEGMENT_GRAINS, Kind, Kinds, frame_runs
from nbdpull.model.segment import Interval, Packs, Segment
from tests.model.samples import damaged

Content = dict[int, tuple[int, int, int, int]]
"""For each grain that is not zero its frame (session, seq, offset) and which grain of it it is."""


def content(segment: Segment) -> Content:
    """What a segment says, grain by grain."""
    grains: Content = {}
    for one in segment:
        for i in range(one.n):
            assert one.start + i not in grains
            grains[one.start + i] = (one.session, one.seq, one.offset, one.skip + i)
    return grains


kinds_lists = st.lists(st.sampled_from(list(Kind)), min_size=48, max_size=48)


def frames(kinds: Kinds, session: int, drop: Callable[[int], bool]) -> list[Interval]:
    """A frame for each run, as a pull makes them; some all-zero ones are not stored."""
    return [
        Interval(first, n, session, first % 3, 128 + first * 100, 64 + first, 0, n)
        for first, n in frame_runs(kinds)
        if not drop(first)
    ]


@given(st.lists(st.tuples(kinds_lists, st.integers(2, 5)), min_size=1, max_size=6))
def test_overlay_does_what_is_done_grain_by_grain(history: list[tuple[list[Kind], int]]) -> None:
    segment = Segment.empty()
    expected: Content = {}
    for session, (listed, nth) in enumerate(history):
        kinds = np.array(listed, dtype=np.uint8)
        new = frames(kinds, session, lambda first, nth=nth: first % nth == 1)  # type: ignore[misc]
        for grain, kind in enumerate(listed):
            if kind is not Kind.CLEAN:
                expected.pop(grain, None)
        expected |= content(Segment.of(new))
        segment = segment.overlay(kinds, new)
        assert content(segment) == expected
        assert np.flatnonzero(segment.covered(48)).tolist() == sorted(expected)
        assert [grain for grain in range(48) if segment.covers(grain)] == sorted(expected)
        runs = segment.runs()
        assert [grain for run in runs for grain in range(*run)] == sorted(expected)
        assert all(end < start for (_, end), (start, _) in pairwise(runs))
        assert segment.packs() == Packs.of((key[0], key[1]) for key in expected.values())
        # What a backup stores must be what the next one reads.
        again = Segment.decode(segment.encode(), grains=48, sessions=session + 1)
        assert again == segment


def test_a_zeroed_grain_in_the_middle_of_a_frame_splits_it() -> None:
    whole = Segment.of([Interval(0, 16, 0, 0, 128, 9, 0, 16)])
    kinds = np.full(SEGMENT_GRAINS, Kind.CLEAN, dtype=np.uint8)
    kinds[5] = Kind.ZERO
    assert list(whole.overlay(kinds, [])) == [
        Interval(0, 5, 0, 0, 128, 9, 0, 16),
        Interval(6, 10, 0, 0, 128, 9, 6, 16),
    ]


def test_a_changed_grain_without_a_frame_reads_as_zero() -> None:
    kinds = np.full(4, Kind.DATA, dtype=np.uint8)
    before = Segment.of([Interval(0, 4, 0, 0, 128, 9, 0, 4)])
    assert before.overlay(kinds, []) == Segment.empty()


GOOD = Interval(start=3, n=4, session=1, seq=9, offset=128, clen=70, skip=2, flen=8)


@pytest.mark.parametrize(
    "bad",
    [
        GOOD._replace(n=0),
        GOOD._replace(n=7, flen=8),
        GOOD._replace(flen=17),
        GOOD._replace(session=2),
        GOOD._replace(offset=127),
        GOOD._replace(clen=0),
        GOOD._replace(clen=(1 << 20) + 1),
        GOOD._replace(start=29),
        GOOD._replace(start=(1 << 32) - 1),
    ],
)
def test_an_interval_that_cannot_be_is_refused(bad: Interval) -> None:
    assert list(Segment.decode(Segment.of([GOOD]).encode(), grains=32, sessions=2)) == [GOOD]
    with pytest.raises(FormatError):
        Segment.decode(Segment.of([bad]).encode(), grains=32, sessions=2)


@pytest.mark.parametrize("second", [GOOD, GOOD._replace(start=6), GOOD._replace(start=0)])
def test_overlapping_or_unsorted_intervals_are_refused(second: Interval) -> None:
    with pytest.raises(FormatError):
        Segment.decode(Segment.of([GOOD, second]).encode(), grains=32, sessions=2)


def test_damage_never_decodes_to_an_impossible_segment() -> None:
    # A map has no digest of its own (its frame has), so here changed bytes may decode; whatever does
    # must obey every rule.
    rows = [Interval(i * 3, 2, i % 2, i, 128 + i, 50, 1, 4) for i in range(10)]
    for raw in damaged(Segment.of(rows).encode()):
        try:
            segment = Segment.decode(raw, grains=32, sessions=2)
        except FormatError:
            continue
        end = 0
        for one in segment:
            assert end <= one.start < one.start + one.n <= 32
            assert one.session < 2
            assert one.skip + one.n <= one.flen <= FRAME_GRAINS
            end = one.start + one.n


@given(st.binary(max_size=400))
def test_no_bytes_crash_the_decoder(raw: bytes) -> None:
    for data in (raw, b"NPSG\1\0\0\0" + raw):
        try:
            Segment.decode(data, grains=SEGMENT_GRAINS, sessions=3)
        except FormatError:
            continue


def test_a_claim_of_many_intervals_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(FormatError):
        Segment.decode(b"NPSG\1\0\0\0\xff\xff\xff\xff", grains=SEGMENT_GRAINS, sessions=1)


@given(st.lists(st.tuples(*[st.integers(0, (1 << 32) - 1)] * 3), max_size=20))
def test_columns_come_back(rows: list[tuple[int, int, int]]) -> None:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    packed = pack_columns(table)
    assert len(packed) == 12 * len(rows)
    assert np.array_equal(unpack_columns(packed, 3), table)
    with pytest.raises(FormatError):
        unpack_columns(packed + b"\0", 3)


def test_packs_are_a_sorted_set_of_pairs() -> None:
    packs = Packs.of([(1, 5), (0, 9), (1, 5), (0, (1 << 32) - 1)])
    assert list(packs) == [(0, 9), (0, (1 << 32) - 1), (1, 5)]
    assert packs[0] == (0, 9)
    assert packs[1:] == Packs.of([(1, 5), (0, (1 << 32) - 1)])
    assert (1, 5) in packs
    assert hash(packs) == hash(Packs.of([(0, 9), (1, 5), (0, (1 << 32) - 1)]))
    assert not Packs.of([])
