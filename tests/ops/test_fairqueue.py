"""The queue between planners and pullers."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.nbdio.connection import Cancelled
from nbdpull.ops.fairqueue import FairQueue
from nbdpull.ops.threads import run_all


def filled(*lanes: str) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue(len(lanes), 100, threading.Event())
    for lane, items in enumerate(lanes):
        for item in items:
            queue.give(lane, item)
        queue.close(lane)
    return queue


def lane_of(taken: tuple[int, str] | None) -> int:
    assert taken is not None
    return taken[0]


def test_takers_spread_over_the_lanes_though_one_has_more() -> None:
    queue = filled("a" * 90, "b" * 3, "c" * 3)
    at = Counter(lane_of(queue.take()) for _ in range(6))
    assert at == {0: 2, 1: 2, 2: 2}


def test_a_taker_that_is_done_goes_where_fewest_are() -> None:
    queue = filled("a" * 10, "b" * 10)
    held = [lane_of(queue.take()) for _ in range(4)]
    assert sorted(held) == [0, 0, 1, 1]
    # Lane 1 gives both of its takers back at once (a fast disk): both go there again.
    assert lane_of(queue.take(1)) == 1
    assert lane_of(queue.take(1)) == 1


def test_a_taker_stays_where_its_connection_is_when_that_is_as_fair() -> None:
    queue = filled("aaa", "bbb")
    first = lane_of(queue.take())
    assert [lane_of(queue.take(lane)) for lane in (first, first)] == [first, first]


def test_a_lane_that_is_used_up_lends_its_takers() -> None:
    queue = filled("a", "b" * 5)
    assert lane_of(queue.take()) == 0
    assert [lane_of(queue.take(before)) for before in (0, 1, 1, 1, 1)] == [1] * 5
    assert queue.take(1) is None
    assert queue.take() is None


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 6))
def test_every_item_is_taken_once_and_in_its_lanes_order(
    sizes: list[int], takers: int, depth: int
) -> None:
    cancel = threading.Event()
    queue: FairQueue[int] = FairQueue(len(sizes), depth, cancel)
    taken: list[list[tuple[int, int]]] = [[] for _ in range(takers)]

    def give(lane: int) -> None:
        for item in range(sizes[lane]):
            queue.give(lane, item)
        queue.close(lane)

    def take(number: int) -> None:
        lane = None
        while (found := queue.take(lane)) is not None:
            lane = found[0]
            taken[number].append(found)

    run_all(
        [
            *((lambda lane=lane: give(lane)) for lane in range(len(sizes))),
            *((lambda number=number: take(number)) for number in range(takers)),
        ],
        cancel,
    )
    every = sorted(found for one in taken for found in one)
    assert every == [(lane, item) for lane, size in enumerate(sizes) for item in range(size)]
    for one in taken:
        for lane in range(len(sizes)):
            items = [item for at, item in one if at == lane]
            assert items == sorted(items)


def test_cancelling_ends_whoever_waits() -> None:
    cancel = threading.Event()
    queue: FairQueue[int] = FairQueue(1, 1, cancel)
    cancel.set()
    with pytest.raises(Cancelled):
        queue.take()
    queue.give(0, 1)
    with pytest.raises(Cancelled):
        queue.give(0, 2)
