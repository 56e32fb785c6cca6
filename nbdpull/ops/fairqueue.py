"""A bounded queue with a lane for each producer, whose consumers spread evenly over the lanes.

    lane 0 (a fast disk)   |#|#|#|#|   consumers: o o
    lane 1 (a slow disk)   |#|#|       consumers: o o      the next free one goes where fewest are

With one queue for all, the pieces of a slow disk would in the end hold every consumer, and a fast disk
would wait behind them; its point in time would be kept, at the guest's cost, for longer than needed.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from nbdpull.nbdio.errors import Cancelled

__all__ = ["FairQueue"]

_T = TypeVar("_T")
_TICK_S = 0.25


class FairQueue(Generic[_T]):
    """The queue. Any thread may call any method.

    Args:
        lanes: how many; each is closed once.
        depth: items that a lane holds.
        cancel: once set, every waiting call raises `Cancelled` soon.
    """

    def __init__(self, lanes: int, depth: int, cancel: threading.Event) -> None:
        self._lanes: list[deque[_T]] = [deque() for _ in range(lanes)]
        self._at: list[int] = [0] * lanes
        self._open = lanes
        self._depth = depth
        self._cancel = cancel
        self._changed = threading.Condition()

    def give(self, lane: int, item: _T) -> None:
        """Put an item into a lane; one that is full is waited for until it is half empty."""
        with self._changed:
            while len(self._lanes[lane]) >= self._depth:
                self._wait()
            self._lanes[lane].append(item)
            self._changed.notify_all()

    def close(self, lane: int) -> None:
        """Say that `lane` gets no more items."""
        del lane  # which one it was makes no difference: its rest is taken like any other
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def take(self, before: int | None = None) -> tuple[int, _T] | None:
        """A lane and its next item; None once all lanes are closed and empty.

        Args:
            before: the lane of the item that the caller is done with. It stays there where that is
                as fair as any: it has a connection to that lane's disk.
        """
        with self._changed:
            if before is not None:
                self._at[before] -= 1
            while (lane := self._choose(before)) is None:
                if not self._open:
                    return None
                self._wait()
            self._at[lane] += 1
            items = self._lanes[lane]
            item = items.popleft()
            if len(items) == self._depth // 2:
                # Not sooner: the producer would be woken for each item, and takes the lock from the consumers.
                self._changed.notify_all()
            return lane, item

    def _choose(self, before: int | None) -> int | None:
        filled = [lane for lane, items in enumerate(self._lanes) if items]
        return min(filled, key=lambda lane: (self._at[lane], lane != before), default=None)

    def _wait(self) -> None:
        if self._cancel.is_set():
            raise Cancelled
        self._changed.wait(_TICK_S)
