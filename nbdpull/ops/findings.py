"""What `verify` keeps while it runs: eight bytes a frame seen, and what is damaged."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import DamagedError
from nbdpull.model.damage import Place
from nbdpull.model.manifest import Summary
from nbdpull.model.outcomes import Damage

__all__ = ["Damages", "Findings", "Keys", "Seen", "joined"]

Keys = NDArray[np.uint64]
"""Places in the packs of one session: seq << 32 | offset; or packs of one session: seq."""


class Seen:
    """A growing set of keys of one session."""

    def __init__(self) -> None:
        self._keys: Keys = np.empty(1024, dtype=np.uint64)
        self._count = 0

    def add(self, keys: Keys) -> NDArray[np.bool_]:
        """Add sorted, distinct `keys`; True for each that was not there."""
        known = self._keys[: self._count]
        place = np.searchsorted(known, keys)
        fresh = np.ones(len(keys), dtype=np.bool_)
        inside = place < self._count
        fresh[inside] = known[place[inside]] != keys[inside]
        new = keys[fresh]
        if len(new):
            self._insert(new)
        return fresh

    def _insert(self, new: Keys) -> None:
        count = self._count + len(new)
        if count > len(self._keys):
            # Doubling would leave half of it unused in a large repository.
            self._keys = np.resize(self._keys, max(count, len(self._keys) * 5 // 4))
        ordered = not self._count or new[0] > self._keys[self._count - 1]
        self._keys[self._count : count] = new
        self._count = count
        if not ordered:
            self._keys[:count].sort(kind="stable")


@dataclass(slots=True)
class Findings:
    """What was found, from any thread.

    Attributes:
        bad: frames that could not be read: key of the object, and what is wrong.
        packs: what is wrong with a pack around its frames, by its key.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    frames: int = 0
    read_bytes: int = 0
    bad: dict[Place, tuple[str, str]] = field(default_factory=dict)
    packs: dict[str, str] = field(default_factory=dict)

    def count(self, frames: int, read_bytes: int) -> None:
        """Count what was read."""
        with self.lock:
            self.frames += frames
            self.read_bytes += read_bytes

    def add(self, place: Place, exc: DamagedError) -> None:
        """A frame can't be read."""
        with self.lock:
            self.bad[place] = (exc.key, str(exc))

    def add_pack(self, exc: DamagedError) -> None:
        """Something around the frames of a pack is not what was written."""
        with self.lock:
            self.packs[exc.key] = str(exc)


class Damages:
    """Collects damage by object and disk, so that a lost pack is one entry with all its ranges."""

    def __init__(self) -> None:
        self._problems: dict[tuple[str, str | None, str | None], list[str]] = {}
        self._ranges: dict[tuple[str, str | None, str | None], list[tuple[int, int]]] = {}

    def add(
        self,
        key: str,
        problem: str,
        summary: Summary | None = None,
        ranges: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Something is wrong with an object, and because of it these ranges of a disk are lost."""
        where = (key, summary.backup if summary else None, summary.disk if summary else None)
        problems = self._problems.setdefault(where, [])
        if problem not in problems:
            problems.append(problem)
        self._ranges.setdefault(where, []).extend(ranges)

    def keys(self) -> set[str]:
        """The objects that something is wrong with."""
        return {key for key, _, _ in self._problems}

    def result(self) -> tuple[Damage, ...]:
        """All of it."""
        return tuple(
            Damage(
                key=where[0],
                problem=_first_and_count(problems),
                backup=where[1],
                disk=where[2],
                ranges=tuple(joined(self._ranges[where])),
            )
            for where, problems in self._problems.items()
        )


def _first_and_count(problems: Sequence[str]) -> str:
    more = len(problems) - 1
    return f"{problems[0]} (and {more} more like it)" if more else problems[0]


def joined(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same bytes in as few ranges as can be, sorted."""
    begin = end = -1
    for first, last in sorted(ranges):
        if first > end:
            if end > begin:
                yield begin, end
            begin, end = first, last
        else:
            end = max(end, last)
    if end > begin:
        yield begin, end
