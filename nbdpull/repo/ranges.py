"""Frames that lie side by side, read from the store together.

    pack      |hdr| A | B | C |  D  | E | F | ...
    wanted          A   B   C          F
    requests       |-----------|      |--|      D is not worth a request saved, it is too large

A frame that could not be had this way (its pack is gone, or cut) is simply not among what was fetched: who
reads it by itself is then told what is wrong with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Final

from nbdpull.model.frame import HEADER_SIZE
from nbdpull.model.segment import Interval
from nbdpull.repo.store import KeyMissingError, Store

__all__ = ["RANGE_MAX", "Fetched", "fetch", "joined"]

RANGE_MAX: Final = (4 << 20) + (64 << 10)
"""Bytes of one request: 4 MiB of a disk that does not compress, with the frames' headers. Above that, what a
request costs by itself is small beside them."""
_GAP_MAX: Final = 64 << 10
"""Bytes between two frames that are read although nobody wants them: a store sends so much in the time that
one more request takes."""

Range = tuple[int, int]


class Fetched:
    """Stored bytes held in memory, by pack and offset."""

    def __init__(self, held: Mapping[tuple[int, int], list[tuple[int, memoryview]]]) -> None:
        self._held = held

    def find(self, session: int, seq: int, offset: int, length: int) -> memoryview | None:
        """These bytes of a pack; None when they are not all held."""
        held = self._held.get((session, seq), [])
        at = bisect_right(held, offset, key=_start) - 1
        if at < 0:
            return None
        start, raw = held[at]
        found = raw[offset - start : offset - start + length]
        return found if len(found) == length else None


def _start(held: tuple[int, memoryview]) -> int:
    return held[0]


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


def fetch(
    store: Store, intervals: Iterable[Interval], keys: Mapping[tuple[int, int], str]
) -> Fetched:
    """Read the frames of `intervals` with few requests.

    Args:
        store: where they are.
        intervals: any; memory holds all of their frames at once.
        keys: of their packs, by session and seq.

    Raises:
        StoreError: the store failed.
    """
    frames: dict[tuple[int, int], list[Range]] = {}
    for one in intervals:
        end = one.offset + HEADER_SIZE + one.clen
        frames.setdefault((one.session, one.seq), []).append((one.offset, end))
    held: dict[tuple[int, int], list[tuple[int, memoryview]]] = {}
    for pack, wanted in frames.items():
        pieces = held.setdefault(pack, [])
        for start, end in joined(wanted):
            try:
                raw = store.get_range(keys[pack], start, end - start)
            except KeyMissingError:
                break
            pieces.append((start, memoryview(raw)))
    return Fetched(held)
