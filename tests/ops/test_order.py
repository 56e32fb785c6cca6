"""The order of reading: every piece once, upwards, and first behind where the guest writes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.ops.order import Foresight, Order

Piece = tuple[int, int]
STEP = SEGMENT // 4


def pieces_of(layout: list[list[int]]) -> dict[int, list[Piece]]:
    return {
        index: [(index * SEGMENT + at * STEP, index * SEGMENT + at * STEP) for at in sorted(places)]
        for index, places in enumerate(layout)
    }


LAYOUTS = st.lists(st.lists(st.integers(0, 3), unique=True), max_size=12)
LOOKS = st.lists(st.none() | st.integers(0, 14 * 4 - 1))


@given(LAYOUTS, LOOKS)
def test_whatever_the_guest_does_every_piece_comes_once_and_every_segment_is_planned_once(
    layout: list[list[int]], looks: list[int | None]
) -> None:
    planned = []
    told = iter(looks)

    def plan(index: int) -> list[Piece]:
        planned.append(index)
        return pieces_of(layout)[index]

    def look() -> int | None:
        at = next(told, None)
        return None if at is None else at * STEP

    given_out = list(Order(len(layout), plan, look))
    assert sorted(given_out) == [one for pieces in pieces_of(layout).values() for _, one in pieces]
    assert sorted(planned) == list(range(len(layout)))


@given(LAYOUTS)
def test_without_a_guest_it_goes_upwards(layout: list[list[int]]) -> None:
    given_out = list(Order(len(layout), pieces_of(layout).__getitem__))
    assert given_out == sorted(given_out)


def test_it_goes_on_where_the_guest_writes_then_returns_to_what_it_passed_over() -> None:
    full = pieces_of([[0, 1, 2, 3]] * 3)
    looks = iter([None, SEGMENT + 2 * STEP - 5])
    order = Order(3, full.__getitem__, lambda: next(looks, None))
    places = [at // STEP for at in order]
    assert places == [0, 6, 7, 8, 9, 10, 11, 1, 2, 3, 4, 5]


def test_a_guest_that_writes_everywhere_does_not_open_every_segment() -> None:
    planned: set[int] = set()
    most = 0
    left = dict.fromkeys(range(64), 4)

    def plan(index: int) -> list[Piece]:
        planned.add(index)
        return pieces_of([[0, 1, 2, 3]] * 64)[index]

    places = itertools.cycle(range(63, -1, -1))
    for at in Order(64, plan, lambda: next(places) * SEGMENT):
        left[at // SEGMENT] -= 1
        most = max(most, sum(left[index] > 0 for index in planned))
    assert most <= 8
    assert not any(left.values())


class Scratch:
    """What lies in it, and a clock that the test moves."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.now = 0.0
        self.looks = 0

    def overwritten(self, start: int, end: int) -> list[tuple[int, int]]:
        assert (start, end) == (0, SEGMENT)
        self.looks += 1
        return self.ranges

    def seen_by(self, foresight: Foresight, *ranges: tuple[int, int]) -> int | None:
        self.ranges = [(a * GRAIN, b * GRAIN) for a, b in ranges]
        self.now += 1.0
        end = foresight()
        return None if end is None else end // GRAIN


def foresight_of(scratch: Scratch) -> Foresight:
    return Foresight(scratch.overwritten, SEGMENT, clock=lambda: scratch.now)


def test_a_range_that_grows_is_where_the_guest_writes() -> None:
    scratch = Scratch()
    foresight = foresight_of(scratch)
    assert scratch.seen_by(foresight) is None
    assert scratch.seen_by(foresight, (100, 105), (500, 501)) == 105
    assert scratch.seen_by(foresight, (100, 105), (500, 501)) is None
    assert scratch.seen_by(foresight, (100, 107), (500, 520)) == 520
    assert scratch.seen_by(foresight, (100, 130), (500, 521)) == 130
    # What lay below it was read and trimmed meanwhile.
    assert scratch.seen_by(foresight, (126, 140), (500, 521)) == 140


def test_single_blocks_at_random_places_are_no_reason_to_go_anywhere() -> None:
    scratch = Scratch()
    foresight = foresight_of(scratch)
    for at in range(1, 40):
        assert scratch.seen_by(foresight, *((n * 16, n * 16 + 2) for n in range(at))) is None


def test_looking_takes_no_more_than_a_small_share_of_the_time() -> None:
    scratch = Scratch()
    foresight = foresight_of(scratch)
    for _ in range(1000):
        foresight()
        scratch.now += 0.001
    assert scratch.looks <= 51
