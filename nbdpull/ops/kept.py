"""What of a disk is read and stored already, so that a connection which is lost costs only what was on its way.

segment finished    its map is put: nothing of it is looked at again
segment open        its frames, by place: only the rest is read
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from nbdpull.model.grain import Kind, Kinds
from nbdpull.model.segment import Interval

__all__ = ["Kept"]


class Kept:
    """Of one disk, during one pull. May be used by many threads.

    Attributes:
        audited: what is clean was looked at.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: set[int] = set()
        self._finished: set[int] = set()
        self._open: dict[int, list[tuple[int, int, Interval | None]]] = {}
        self.audited = False

    def note(self, index: int, first: int, grains: int, interval: Interval | None) -> None:
        """Note a run of grains of segment `index` that is read: stored as `interval`, or zero."""
        with self._lock:
            self._open.setdefault(index, []).append((first, grains, interval))

    def finish(self, index: int) -> None:
        """Note that the segment's map is put."""
        with self._lock:
            self._finished.add(index)
            self._open.pop(index, None)

    def is_finished(self, index: int) -> bool:
        """Whether nothing of that segment is left to do."""
        with self._lock:
            return index in self._finished

    def counts_first(self, index: int) -> bool:
        """Whether the segment is planned for the first time."""
        with self._lock:
            first = index not in self._counted
            self._counted.add(index)
            return first

    def take(self, index: int, left: Kinds, intervals: list[Interval]) -> Kinds:
        """What of the DATA grains in `left` is to be read still; `intervals` gets the rest of them."""
        with self._lock:
            pieces: Sequence[tuple[int, int, Interval | None]] = tuple(self._open.get(index, ()))
        if not pieces:
            return left
        left = left.copy()
        for first, grains, interval in pieces:
            if (left[first : first + grains] == Kind.DATA).all():
                left[first : first + grains] = Kind.CLEAN
                if interval is not None:
                    intervals.append(interval)
        return left
