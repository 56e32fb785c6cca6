"""Holds a pull to a rate, all its threads together."""

from __future__ import annotations

import threading
import time

from nbdpull.nbdio.errors import Cancelled

__all__ = ["RateLimit"]

_BURST_S = 0.25


class RateLimit:
    """A budget of bytes that grows with time; a quarter of a second's worth may be saved up.

    A reader takes what it is about to read and then waits until the budget is no longer in debt, so that
    the rate holds whatever the size of a request is.
    """

    def __init__(self, bytes_per_s: int) -> None:
        """`bytes_per_s` is 1 or more."""
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def take(self, length: int, cancel: threading.Event) -> None:
        """Wait for the turn of `length` bytes.

        Raises:
            Cancelled: `cancel` was set meanwhile.
        """
        with self._lock:
            now = time.monotonic()
            start = max(self._free_at, now - _BURST_S)
            self._free_at = start + length / self._rate
        wait_s = start - now
        if wait_s > 0 and cancel.wait(wait_s):
            raise Cancelled
