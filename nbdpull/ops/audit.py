"""Audit: does the dirty bitmap tell the truth?

An incremental believes the bitmap: what it calls clean is taken from the parent. If ever a write went past
it (a bitmap that was switched off for a while, a tool that opened the image beside QEMU, a bug), every
later backup would be wrong, and nobody would see it. So a few places that the bitmap calls clean are read
again: frames must hash to what the manifest says, and what the manifest calls zero must be zero.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nbdpull.model.grain import GRAIN, SEGMENT, Kind, Kinds, segment_count
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
        blank = kinds == Kind.CLEAN
        blank &= ~self.parent.segment(index).covered(len(blank))
        grains = np.flatnonzero(blank)
        if not len(grains):
            return None
        offset = index * SEGMENT + int(rng.choice(grains)) * GRAIN
        length = min(GRAIN, self.size - offset)
        if not any(self.read(offset, length)):
            return None
        return (
            f"bytes {offset} to {offset + length} are zero no more, and the bitmap calls them clean"
        )
