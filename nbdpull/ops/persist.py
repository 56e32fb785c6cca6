"""Trying again after a lost connection: a few times in a row, with growing pauses."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from nbdpull.errors import NbdError
from nbdpull.nbdio.errors import Cancelled, ReplyError, TlsError

__all__ = ["persist"]

log = logging.getLogger(__name__)

_PAUSES_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
_WELL_S: Final = 60.0
"""After so long without a loss the pauses begin anew."""

_TICK_S: Final = 0.1

_T = TypeVar("_T")


def persist(once: Callable[[threading.Event], _T], stop: threading.Event) -> _T:
    """What `once` returns, run again when a connection is lost, up to five times in a row.

    Args:
        once: is given an event; ends with `Cancelled` soon after that is set.
        stop: set from outside, ends it all.

    Raises:
        Cancelled: `stop` was set.
        NbdError: the server refused something, neither side trusts the other, or the connection stays lost.
    """
    pauses = iter(_PAUSES_S)
    while True:
        cancel = _Follower(stop)
        began = time.monotonic()
        try:
            return once(cancel)
        except (ReplyError, TlsError):
            raise  # it would be the same the next time
        except NbdError as exc:
            if time.monotonic() - began > _WELL_S:
                pauses = iter(_PAUSES_S)
            pause_s = next(pauses, None)
            if pause_s is None or stop.is_set():
                raise
            log.warning("a connection is lost, and is made again in %g s: %s", pause_s, exc)
            if stop.wait(pause_s):
                raise Cancelled from exc


class _Follower(threading.Event):
    """An event that is set by itself, or as soon as another one is."""

    def __init__(self, leader: threading.Event) -> None:
        super().__init__()
        self._leader = leader

    def is_set(self) -> bool:
        """Whether either is set."""
        return super().is_set() or self._leader.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until either is set, or for so many seconds; whether one is."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            super().wait(min(left, _TICK_S))
        return self.is_set()
