"""Audit: does the dirty bitmap tell the truth?

An incremental believes the bitmap: what it calls clean is taken from the parent. If ever a write went past
it (a bitmap that was switched off for a while, a tool that opened the image beside QEMU, a bug), every
later backup would be wrong, and nobody would see it. So a few places that the bitmap calls clean are read
again: frames must hash to what the manifest says, and what the manifest calls zero must be zero.

One place is not left to chance. When a disk is shrunk and grown again to its old size, QEMU calls the new
part clean, and its size tells nothing:

    parent      |XXXX.XXXX.XX..XXXX....|          X data, . zero
    shrunk to           ^
    now         |XXXX.XXX..............|

So the last clean data of the parent must still be there: what was cut off lay behind it, or it is gone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nbdpull.errors import DamagedError, WrongKeyError
from nbdpull.model.grain import GRAIN, SEGMENT, Kind, Kinds, segment_count
from nbdpull.model.segment import Interval, Segment
from nbdpull.repo.repository import DiskReader, Session

__all__ = ["Audit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What to look at of one disk, and with what.

    Attributes:
        count: frames, and as many grains that should be zero.
        size: of the disk in bytes.
        parent: what clean grains are taken from.
        session: knows the parent's digests.
        kinds_of: CLEAN and DATA grains of a segment, as the bitmap tells them.
        read: the source's bytes, by offset and length.
    """

    count: int
    size: int
    parent: DiskReader
    session: Session
    kinds_of: Callable[[int], Kinds]
    read: Callable[[int, int], bytes]

    def lie(self) -> str | None:
        """Where the bitmap calls clean what has changed, or None when none was found.

        Raises:
            NbdError: the source failed.
            DamagedError: the parent's maps can't be read.
        """
        if (found := self._tail()) is not None:
            return found
        rng = random.SystemRandom()
        segments = self.parent.manifest.segments
        mapped = [index for index, ref in enumerate(segments) if ref is not None]
        frames = Counter(rng.choices(mapped, k=self.count) if mapped else ())
        zeroes = Counter(rng.choices(range(segment_count(self.size)), k=self.count))
        # Segment by segment: what the bitmap says of one is asked once.
        for index in sorted(frames | zeroes):
            kinds = self.kinds_of(index)
            looks = [self._frame] * frames[index] + [self._zero] * zeroes[index]
            for look in looks:
                if (found := look(rng, index, kinds)) is not None:
                    return found
        return None

    def _tail(self) -> str | None:
        """Where data is gone although the bitmap calls it clean, looked for from the disk's end."""
        segments = self.parent.manifest.segments
        last = len(segments) - 1
        for index in range(last, -1, -1):
            if segments[index] is None and index != last:
                continue
            kinds = self.kinds_of(index)
            if index == last and (found := self._last_grain(index, kinds)) is not None:
                return found
            for interval in reversed(self._map(index) or Segment.empty()):
                clean = kinds[interval.start : interval.start + interval.n] == Kind.CLEAN
                seen = self._is_there(index, interval, np.flatnonzero(clean).tolist())
                if seen is not None:
                    return seen or None
        return None

    def _is_there(self, index: int, interval: Interval, clean: Sequence[int]) -> str | None:
        """Whether clean grains of an interval are as they were: empty, or what is wrong; None: can't be told."""
        if not clean:
            return None
        start = index * SEGMENT + interval.start * GRAIN
        first, end = clean[0] * GRAIN, (clean[-1] + 1) * GRAIN
        there = self.read(start + first, min(end - first, self.size - start - first))
        wrong = _cut(start + first, start + first + len(there))
        try:
            then = self.parent.read(interval)[first:end]
        except DamagedError:
            return None
        except WrongKeyError:
            # A writer's key opens no data. What was cut off and is back is all zero.
            return "" if any(there) else wrong
        parts = [slice(at * GRAIN - first, (at + 1) * GRAIN - first) for at in clean]
        if any(there[part] != then[part] for part in parts):
            return wrong
        return "" if any(any(then[part]) for part in parts) else None

    def _map(self, index: int) -> Segment | None:
        """The parent's map of a segment; None where it is damaged, which healing deals with."""
        try:
            return self.parent.segment(index)
        except DamagedError:
            return None

    def _last_grain(self, index: int, kinds: Kinds) -> str | None:
        """Whether the disk's very end, clean and zero then, is zero now: some storage grows with old data."""
        last = len(kinds) - 1
        then = self._map(index)
        if then is None or kinds[last] != Kind.CLEAN or then.covers(last):
            return None
        offset = index * SEGMENT + last * GRAIN
        if not any(self.read(offset, self.size - offset)):
            return None
        return _cut(offset, self.size)

    def _frame(self, rng: random.Random, index: int, kinds: Kinds) -> str | None:
        # It is asked for what is to be read, and here that is what is clean.
        asked = np.where(kinds == Kind.CLEAN, np.uint8(Kind.DATA), np.uint8(Kind.CLEAN))
        frame = self.session.any_known(index, asked, rng)
        if frame is None:
            return None
        offset = index * SEGMENT + frame.start * GRAIN
        if self.session.matches(frame, self.read(offset, frame.length)):
            return None
        return f"bytes {offset} to {offset + frame.length} changed, and the bitmap calls them clean"

    def _zero(self, rng: random.Random, index: int, kinds: Kinds) -> str | None:
        then = self._map(index)
        if then is None:
            return None
        grains = np.flatnonzero((kinds == Kind.CLEAN) & ~then.covered(len(kinds)))
        if not len(grains):
            return None
        offset = index * SEGMENT + int(rng.choice(grains)) * GRAIN
        length = min(GRAIN, self.size - offset)
        if not any(self.read(offset, length)):
            return None
        return (
            f"bytes {offset} to {offset + length} are zero no more, and the bitmap calls them clean"
        )


def _cut(start: int, end: int) -> str:
    return (
        f"bytes {start} to {end} are not what they were, and the bitmap calls them clean, as when the disk"
        " was shrunk and grown again"
    )
