"""Audit: does the dirty bitmap tell the truth?

An incremental believes the bitmap: what it calls clean is taken from the parent. If ever a write went past
it (a bitmap that was switched off for a while, a tool that opened the image beside QEMU, a bug), every
later backup would be wrong, and nobody would see it. So a few places that the bitmap calls clean are read
again: frames must hash to what the manifest says, and what the manifest calls zero must be zero.
"""

from __future__ import annotations

import random
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
        several = range(segment_count(self.size))
        for index in rng.choices(mapped, k=self.count) if mapped else ():
            if (found := self._frame(rng, index)) is not None:
                return found
        for index in rng.choices(several, k=self.count):
            if (found := self._zero(rng, index)) is not None:
                return found
        return None

    def _frame(self, rng: random.Random, index: int) -> str | None:
        kinds = self.kinds_of(index)
        # `known` is asked for what is to be read, and here that is what is clean.
        asked = np.where(kinds == Kind.CLEAN, np.uint8(Kind.DATA), np.uint8(Kind.CLEAN))
        frames = self.session.known(index, asked)
        if not frames:
            return None
        frame = rng.choice(frames)
        offset = index * SEGMENT + frame.start * GRAIN
        if self.session.matches(frame, self.read(offset, frame.length)):
            return None
        return f"bytes {offset} to {offset + frame.length} changed, and the bitmap calls them clean"

    def _zero(self, rng: random.Random, index: int) -> str | None:
        blank = self.kinds_of(index) == Kind.CLEAN
        for interval in self.parent.segment(index):
            blank[interval.start : interval.start + interval.n] = False
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
