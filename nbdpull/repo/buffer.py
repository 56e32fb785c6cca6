"""Packs in memory on their way to an object store, and the bound on how much they take.

one open pack for each disk (at most 32 MiB)  +  packs being sent  <=  128 MiB, or else nobody begins
                                                                      one before some are sent
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from nbdpull.errors import StoreError

__all__ = ["BUDGET", "Budget", "MemoryUpload", "Put"]

BUDGET: Final = 128 << 20
"""Bytes of packs in memory above which a new one waits for others to be sent.

Disks whose packs are open each hold up to one pack beyond that: waiting for those could last for ever.
"""
_FIRST_ROOM: Final = 33 << 20  # a pack of 32 MiB with its directory; only touched pages take memory

Put = Callable[[str, memoryview, threading.Event], None]
"""Creates an object under a key; gives up, sooner or later, when the event is set."""


@dataclass(slots=True)
class Budget:
    """Counts the bytes of open and sent packs, and lets nobody begin another one above `limit`."""

    limit: int = BUDGET
    held: int = 0
    sending: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_room(self) -> None:
        """Wait while too much is held and some of it is being sent.

        Sending needs no room, so it ends by itself; packs that are only open might wait for the caller.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.held < self.limit or self.sending == 0)

    def add(self, size: int) -> None:
        """Hold `size` bytes more, or fewer when negative."""
        with self._changed:
            self.held += size
            self._changed.notify_all()

    def send(self, count: int) -> None:
        """Note that a pack begins (1) or ends (-1) to be sent."""
        with self._changed:
            self.sending += count
            self._changed.notify_all()


class MemoryUpload:
    """An object in memory until `commit`; see `Upload`."""

    def __init__(self, key: str, budget: Budget, put: Put) -> None:
        """Waits for room; `put` is what `commit` makes the object with."""
        self._key = key
        self._put = put
        self._budget = budget
        self._lock = threading.Lock()
        self._end = 0
        self._stopped = threading.Event()
        budget.wait_for_room()
        self._room: mmap.mmap | None = mmap.mmap(-1, _FIRST_ROOM)

    def write(self, offset: int, *parts: bytes | bytearray | memoryview) -> None:
        """See `Upload.write`."""
        with self._lock:
            room = self._room
            if room is None:
                raise StoreError(f"the upload of {self._key} was given up")
            end = offset + sum(map(len, parts))
            if end > len(room):
                larger = mmap.mmap(-1, max(end, 2 * len(room)))
                larger[: self._end] = room[: self._end]
                room = self._room = larger
            for part in parts:
                room[offset : offset + len(part)] = part
                offset += len(part)
            if end > self._end:
                self._budget.add(end - self._end)
                self._end = end

    def commit(self) -> None:
        """See `Upload.commit`."""
        with self._lock:
            room = self._room
        if room is None:
            raise StoreError(f"the upload of {self._key} was given up")
        self._budget.send(1)
        try:
            self._put(self._key, memoryview(room)[: self._end], self._stopped)
        finally:
            self._budget.send(-1)
            self.abort()

    def abort(self) -> None:
        """See `Upload.abort`."""
        self._stopped.set()
        with self._lock:
            # Not closed: a request that timed out may still look at it. The last reference frees it.
            room, self._room = self._room, None
        if room is not None:
            self._budget.add(-self._end)
