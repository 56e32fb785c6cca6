"""The arithmetic of a pull: extents of any place become grains, grains become batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nbdpull.model.grain import GRAIN, SEGMENT, Kind, Kinds, frame_runs
from nbdpull.nbdio.status import StatusReader
from nbdpull.ops.extents import mark, plan_changed, zero_where_known
from nbdpull.ops.puller import _is_zero
from nbdpull.ops.pullwork import DiskPull, SegmentWork, batches

GRAINS = 96
BASE = 3 * SEGMENT

Extent = tuple[int, int, int]
"""Start, end, flags; bytes from the segment's start."""


class Told:
    """Block status as a test says; notes what it was asked."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self.extents = extents
        self.asked: list[tuple[int, int]] = []

    def read(
        self, start: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        self.asked.append((start - BASE, end - BASE))
        rows = [
            (max(a + BASE, start), min(b + BASE, end), flags)
            for a, b, flags in self.extents
            if a + BASE < end and b + BASE > start
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]


def reader(extents: Sequence[Extent]) -> StatusReader:
    return cast(StatusReader, Told(extents))


@st.composite
def extents(draw: st.DrawFn, flags: Sequence[int], end: int = GRAINS * GRAIN) -> list[Extent]:
    """Gapless ones of any alignment, many or few."""
    unit = 512
    cuts = draw(st.lists(st.integers(1, end // unit - 1), max_size=80, unique=True))
    edges = [0, *sorted(cuts), end // unit]
    return [
        (a * unit, b * unit, draw(st.sampled_from(flags))) for a, b in itertools.pairwise(edges)
    ]


def touched(parts: Sequence[Extent], wanted: int) -> set[int]:
    """Grains that an extent of those flags touches, the slow and obvious way."""
    return {
        grain
        for start, end, flags in parts
        if flags == wanted
        for grain in range(start // GRAIN, (end - 1) // GRAIN + 1)
    }


def grains(kinds: Kinds, kind: Kind) -> set[int]:
    return set(np.flatnonzero(kinds == kind).tolist())


@given(extents([0, 1]))
def test_a_grain_is_marked_when_any_byte_of_it_is(parts: list[Extent]) -> None:
    kinds = np.full(GRAINS, Kind.CLEAN, dtype=np.uint8)
    marked = [part for part in parts if part[2]]
    starts = np.array([part[0] for part in marked], dtype=np.int64) + BASE
    ends = np.array([part[1] for part in marked], dtype=np.int64) + BASE
    mark(kinds, starts, ends, BASE, Kind.DATA)
    assert grains(kinds, Kind.DATA) == touched(parts, 1)
    assert grains(kinds, Kind.CLEAN) == set(range(GRAINS)) - touched(parts, 1)


@given(extents([0, 1, 2, 3]), st.integers(0, GRAINS - 1), st.integers(1, GRAINS))
def test_a_grain_is_zero_only_when_all_of_it_is(
    parts: list[Extent], first: int, count: int
) -> None:
    """HOLE alone says nothing of the content: only the flag ZERO (2) counts."""
    last = min(first + count, GRAINS)
    kinds = np.full(GRAINS, Kind.CLEAN, dtype=np.uint8)
    kinds[first:last] = Kind.DATA
    zero_where_known(kinds, reader(parts), BASE, BASE + first * GRAIN, BASE + last * GRAIN)
    data = touched(parts, 0) | touched(parts, 1)
    within = set(range(first, last))
    assert grains(kinds, Kind.ZERO) == within - data
    assert grains(kinds, Kind.DATA) == within & data
    assert grains(kinds, Kind.CLEAN) == set(range(GRAINS)) - within


def test_odd_end_of_a_disk_is_a_grain_of_its_own() -> None:
    end = 2 * GRAIN + 512
    kinds = np.full(3, Kind.DATA, dtype=np.uint8)
    told = reader([(0, 2 * GRAIN, 0), (2 * GRAIN, end, 3)])
    zero_where_known(kinds, told, BASE, BASE, BASE + end)
    assert kinds.tolist() == [Kind.DATA, Kind.DATA, Kind.ZERO]


@given(dirty=extents([0, 1]), allocation=extents([0, 3]))
def test_changed_grains_are_data_or_zero_and_never_clean(
    dirty: list[Extent], allocation: list[Extent]
) -> None:
    kinds = np.full(GRAINS, Kind.CLEAN, dtype=np.uint8)
    # A bitmap's extents are whole grains.
    whole = [(a // GRAIN * GRAIN, b // GRAIN * GRAIN, flags) for a, b, flags in dirty]
    whole = [extent for extent in whole if extent[0] < extent[1]]
    told = Told(allocation)
    changed = plan_changed(
        kinds, reader(whole), cast(StatusReader, told), BASE, BASE + GRAINS * GRAIN
    )
    wanted = touched(whole, 1)
    assert changed == len(wanted) * GRAIN
    assert grains(kinds, Kind.DATA) | grains(kinds, Kind.ZERO) == wanted
    assert grains(kinds, Kind.ZERO) <= set(range(GRAINS)) - touched(allocation, 0)
    # Mode C answers nothing else.
    for start, end in told.asked:
        assert set(range(start // GRAIN, end // GRAIN)) <= wanted


def work_of(kinds: Kinds) -> SegmentWork:
    return SegmentWork(cast(DiskPull, None), 0, kinds, [], 0)


@given(st.lists(st.sampled_from(list(Kind)), max_size=600))
def test_batches_hold_every_run_once_and_in_order(kinds: list[Kind]) -> None:
    work = work_of(np.array(kinds, dtype=np.uint8))
    made = batches(work, work.kinds)
    runs = [run for batch in made for run in batch.runs]
    assert runs == frame_runs(work.kinds)
    assert work.open_batches == len(made)
    assert all(batch.work is work and batch.runs for batch in made)


def test_a_batch_ends_once_it_has_as_much_as_a_frame() -> None:
    """More would lie between the frames of other batches in the pack, away from its neighbours on the disk."""
    work = work_of(np.full(SEGMENT // GRAIN, Kind.DATA, dtype=np.uint8))
    whole = batches(work, work.kinds)
    assert {sum(n for _, n in batch.runs) * GRAIN for batch in whole} == {1 << 20}
    kinds = np.full(SEGMENT // GRAIN, Kind.CLEAN, dtype=np.uint8)
    kinds[::2] = Kind.DATA
    assert {len(batch.runs) for batch in batches(work_of(kinds), kinds)} == {16}
    zero = np.full(8, Kind.ZERO, dtype=np.uint8)
    assert batches(work_of(zero), zero) == []


def test_zero_is_all_zero() -> None:
    raw = bytearray(GRAIN)
    assert _is_zero(memoryview(raw))
    assert _is_zero(memoryview(raw)[:1])
    for at in (0, 1, GRAIN // 2, GRAIN - 1):
        raw[at] = 1
        assert not _is_zero(memoryview(raw))
        raw[at] = 0
