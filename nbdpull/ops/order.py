"""In which order a disk is read: upwards, and first what the guest is about to overwrite.

    read so far      |########|
    the guest writes |        |            |ccc>                   |    c: copied to the scratch before
    read next        |        |                 |----------------->|    then what was passed over
                     |        |----------->|

A guest that writes upwards (a log, a file that is copied, a table that is filled) shows in the scratch as a range
that grows. What lies behind its end is read at once, and trimmed: then the guest's writes there are not copied any
more. Writes at random tell nothing of the next one, and change nothing here.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, TypeVar

from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.ops.extents import Overwritten

__all__ = ["Foresight", "Order"]

_T = TypeVar("_T")
_LOOK_S: Final = 0.02
_SHARE: Final = 20
"""A look at a scratch of very many ranges takes long: at most a twentieth of the time goes into looking."""
_GROWN: Final = 4 * GRAIN
_OPEN: Final = 8
"""Segments that are begun and not finished, which takes memory: no jump into another one then."""


class Foresight:
    """Looks where a guest writes upwards."""

    def __init__(
        self,
        overwritten: Overwritten,
        size: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._overwritten = overwritten
        self._size = size
        self._clock = clock
        self._next = 0.0
        self._ends: list[int] = []

    def __call__(self) -> int | None:
        """The byte where the range ends that grew most since the last look; None when none grew much."""
        began = self._clock()
        if began < self._next:
            return None
        ranges = self._overwritten(0, self._size)
        took = self._clock() - began
        self._next = began + max(_LOOK_S, _SHARE * took)
        most, where = 0, None
        for start, end in ranges:
            # The last older end inside of it is where it grew from; one that did not grow has its own.
            older = bisect_right(self._ends, end) - 1
            grown = end - max(start, self._ends[older] if older >= 0 else 0)
            if grown > most:
                most, where = grown, end
        self._ends = [end for _, end in ranges]
        return where if most >= _GROWN else None


class Order(Generic[_T]):
    """Hands out the pieces of a disk, each once.

    Args:
        segments: how many there are.
        plan: makes the pieces of a segment, as (first byte, piece), rising; called once for each segment.
        look: tells a byte to go on from, or None to go on upwards; None goes upwards all along.
    """

    def __init__(
        self,
        segments: int,
        plan: Callable[[int], Sequence[tuple[int, _T]]],
        look: Callable[[], int | None] | None = None,
    ) -> None:
        self._left = list(range(segments))
        self._plan = plan
        self._look = look
        self._open: dict[int, list[tuple[int, _T]]] = {}
        self._at = 0

    def __iter__(self) -> Iterator[_T]:
        """All pieces."""
        while self._left:
            ahead = None if self._look is None else self._look()
            if ahead is not None and self._may_jump(ahead // SEGMENT):
                self._at = ahead
            piece = self._take()
            if piece is not None:
                yield piece

    def _may_jump(self, index: int) -> bool:
        if index in self._open:
            return True
        place = bisect_left(self._left, index)
        return self._left[place : place + 1] == [index] and len(self._open) < _OPEN

    def _take(self) -> _T | None:
        """The next piece from here upwards, in the next segment that has any; None where one has none."""
        place = bisect_left(self._left, self._at // SEGMENT)
        if place == len(self._left):
            place, self._at = 0, 0
        index = self._left[place]
        self._at = max(self._at, index * SEGMENT)
        pieces = self._open.get(index)
        if pieces is None:
            pieces = self._open[index] = list(self._plan(index))
        first = bisect_left(pieces, self._at, key=_start)
        piece = None
        if first < len(pieces):
            self._at, piece = pieces.pop(first)
            self._at += 1
        else:
            self._at = (index + 1) * SEGMENT
        if not pieces:
            del self._open[index]
            self._left.remove(index)
        return piece


def _start(piece: tuple[int, object]) -> int:
    return piece[0]
