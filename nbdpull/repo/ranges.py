"""Frames that lie side by side, read from the store together.

    pack      |hdr| A | B | C |  D  | E | F | ...
    wanted          A   B   C          F
    requests       |-----------|      |--|      D is not worth a request saved, it is too large

A frame that could not be had this way (its pack is gone, or cut) is simply not among what was fetched: who
reads it by itself is then told what is wrong with it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Final

from nbdpull.model.frame import HEADER_SIZE
from nbdpull.model.segment import Interval
from nbdpull.repo.store import KeyMissingError, LostBytesError, Store

__all__ = ["RANGE_MAX", "Fetched", "joined"]

RANGE_MAX: Final = (4 << 20) + (64 << 10)
"""Bytes of one request: 4 MiB of a disk that does not compress, with the frames' headers. Above that, what a
request costs by itself is small beside them."""
_GAP_MAX: Final = 64 << 10
"""Bytes between two frames that are read although nobody wants them: a store sends so much in the time that
one more request takes."""

Range = tuple[int, int]


class _Part:
    """One range of a pack; `raw` is None until it was read."""

    __slots__ = ("end", "key", "lock", "raw", "start")

    def __init__(self, key: str, start: int, end: int) -> None:
        self.key = key
        self.start = start
        self.end = end
        self.lock = threading.Lock()
        self.raw: memoryview | None = None

    def load(self, store: Store) -> None:
        if self.raw is None:
            try:
                self.raw = memoryview(store.get_range(self.key, self.start, self.end - self.start))
            except (KeyMissingError, LostBytesError):
                self.raw = memoryview(b"")


class Fetched:
    """Ranges of packs that hold some frames, each read once, by whoever needs it first.

    Any thread may call any method.
    """

    def __init__(
        self,
        store: Store,
        intervals: Iterable[Interval],
        keys: Mapping[tuple[int, int], str],
        *,
        limit: int = RANGE_MAX,
    ) -> None:
        """Plan the ranges; nothing is read yet.

        Args:
            store: where the frames are.
            intervals: any.
            keys: of their packs, by session and seq.
            limit: bytes of the longest range.
        """
        self._store = store
        frames: dict[tuple[int, int], list[Range]] = {}
        for one in intervals:
            end = one.offset + HEADER_SIZE + one.clen
            frames.setdefault((one.session, one.seq), []).append((one.offset, end))
        self._parts = {
            pack: [_Part(keys[pack], start, end) for start, end in joined(wanted, limit=limit)]
            for pack, wanted in frames.items()
        }

    def load(self, intervals: Iterable[Interval]) -> None:
        """Have the frames of these of its intervals in memory.

        Threads that need the same ranges read different ones of them at a time.

        Raises:
            StoreError: the store failed.
        """
        found = (self._part(one.session, one.seq, one.offset) for one in intervals)
        needed = {id(part): part for part in found if part is not None}.values()
        for part in needed:
            if part.raw is None and part.lock.acquire(blocking=False):
                try:
                    part.load(self._store)
                finally:
                    part.lock.release()
        for part in needed:
            with part.lock:
                part.load(self._store)

    def _part(self, session: int, seq: int, offset: int) -> _Part | None:
        parts = self._parts.get((session, seq), [])
        at = bisect_right(parts, offset, key=_start) - 1
        return parts[at] if at >= 0 else None

    def find(self, session: int, seq: int, offset: int, length: int) -> memoryview | None:
        """These bytes of a pack; None when they are not all in memory."""
        part = self._part(session, seq, offset)
        if part is None or part.raw is None:
            return None
        found = part.raw[offset - part.start : offset - part.start + length]
        return found if len(found) == length else None


def _start(part: _Part) -> int:
    return part.start


def joined(frames: Iterable[Range], *, limit: int = RANGE_MAX) -> list[Range]:
    """The ranges [start, end) to ask for, sorted, so that each of `frames` lies whole in one of them.

    Args:
        frames: [start, end) of each, at most `limit` bytes.
        limit: bytes of the longest range.
    """
    ranges: list[Range] = []
    for start, end in sorted(frames):
        if ranges and start - ranges[-1][1] <= _GAP_MAX and end - ranges[-1][0] <= limit:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((start, end))
    return ranges
