"""The map of one segment: which frame each grain is in.

    grains    0   1   2   3   4   5   6   7   8   ...
    interval      |--- start 1, n 3 --|   |- start 5, n 2 -|
    reads as  zero|  frame A, from    |zero| frame B, from |zero
                  |  its grain `skip` |    | its grain 0   |

What no interval covers reads as zero. A frame whose middle was overwritten is referred to by two
intervals, so a map stays right without the frame being read or written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from nbdpull.model.columns import pack_columns, unpack_columns
from nbdpull.model.frame import PACK_HEADER_SIZE, FormatError
from nbdpull.model.grain import FRAME_GRAINS, FRAME_MAX, SEGMENT_GRAINS, Kind, Kinds

__all__ = ["Interval", "Packs", "Segment"]

_MAGIC: Final = b"NPSG"
_VERSION: Final = 1
_COLUMNS: Final = 8
_PREFIX: Final = 12  # magic, version u32, count u32


class Interval(NamedTuple):
    """A run of grains that one frame holds.

    Attributes:
        start: first grain in the segment.
        n: grains.
        session: index into the manifest's sessions.
        seq: number of the pack in that session.
        offset: of the frame in the pack, in bytes.
        clen: stored bytes of the frame without its header.
        skip: grains of the frame before the first one used here.
        flen: grains of the whole frame; its last one may be short at the disk's end.
    """

    start: int
    n: int
    session: int
    seq: int
    offset: int
    clen: int
    skip: int
    flen: int


class Packs(Sequence[tuple[int, int]]):
    """Distinct packs as (session, seq), sorted; eight bytes each, for there may be millions."""

    __slots__ = ("rows",)

    def __init__(self, rows: NDArray[np.uint32]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Packs:
        """From any pairs."""
        rows = np.array(sorted(set(pairs)), dtype=np.uint32).reshape(-1, 2)
        return cls(rows)

    @classmethod
    def distinct(cls, rows: NDArray[np.integer]) -> Packs:
        """From rows of (session, seq) in any order."""
        keys = np.sort(
            (rows[:, 0].astype(np.uint64) << np.uint64(32)) | rows[:, 1].astype(np.uint64)
        )
        # np.unique would load numpy.ma, a tenth of what a small incremental takes besides its data.
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        keys = keys[first]
        sessions = (keys >> np.uint64(32)).astype(np.uint32)
        return cls(np.column_stack((sessions, keys.astype(np.uint32))))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(tuple, self.rows.tolist())

    @overload
    def __getitem__(self, at: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, at: slice) -> Packs: ...
    def __getitem__(self, at: int | slice) -> tuple[int, int] | Packs:
        if isinstance(at, slice):
            return Packs(self.rows[at])
        return int(self.rows[at, 0]), int(self.rows[at, 1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Packs):
            return NotImplemented
        return bool(np.array_equal(self.rows, other.rows))

    def __hash__(self) -> int:
        return hash(self.rows.tobytes())

    def __repr__(self) -> str:
        return f"Packs.of({list(self)})"


class Segment:
    """An immutable, sorted set of intervals that don't overlap."""

    __slots__ = ("_rows",)

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self._rows = rows

    @classmethod
    def empty(cls) -> Segment:
        """A segment that reads as zeroes."""
        return cls(np.empty((0, _COLUMNS), dtype=np.int64))

    @classmethod
    def of(cls, intervals: Sequence[Interval]) -> Segment:
        """A segment of these intervals, which must be sorted by `start`."""
        return cls(_rows(intervals))

    @property
    def rows(self) -> NDArray[np.int64]:
        """The intervals as rows of numbers, which nobody may change."""
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Interval]:
        for row in self._rows.tolist():
            yield Interval(*row)

    def __getitem__(self, at: int) -> Interval:
        return Interval(*self._rows[at].tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        return bool(np.array_equal(self._rows, other._rows))

    __hash__ = None  # type: ignore[assignment] # holds an array

    def packs(self) -> Packs:
        """Every pack referred to."""
        return Packs.distinct(self._rows[:, 2:4])

    def covered(self, grains: int) -> NDArray[np.bool_]:
        """For each of so many grains, whether an interval covers it."""
        owner = np.full(grains, -1, dtype=np.int64)
        _fill(owner, self._rows, 0)
        return owner >= 0

    def runs(self) -> list[tuple[int, int]]:
        """The longest runs of grains [start, end) that intervals cover without a gap."""
        if not len(self):
            return []
        start = self._rows[:, 0]
        end = start + self._rows[:, 1]
        gap = start[1:] != end[:-1]
        starts = start[np.concatenate(([True], gap))]
        ends = end[np.concatenate((gap, [True]))]
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def covers(self, grain: int) -> bool:
        """Whether an interval covers this grain."""
        at = int(np.searchsorted(self._rows[:, 0], grain, side="right")) - 1
        return at >= 0 and grain < int(self._rows[at, 0] + self._rows[at, 1])

    def whole_frames(self, kinds: Kinds) -> Segment:
        """Intervals that show a frame from its first to its last grain, all of them DATA in `kinds`."""
        start, n, skip, flen = (
            self._rows[:, 0],
            self._rows[:, 1],
            self._rows[:, 6],
            self._rows[:, 7],
        )
        data = np.concatenate(([0], np.cumsum(kinds == Kind.DATA)))
        end = start + n
        inside = end <= len(kinds)
        ends = np.minimum(end, len(kinds))
        wanted = inside & (skip == 0) & (n == flen)
        wanted &= data[ends] - data[np.minimum(start, len(kinds))] == n
        return Segment(self._rows[wanted])

    def overlay(self, kinds: Kinds, new: Sequence[Interval]) -> Segment:
        """This segment with the changes of a later point in time.

        Args:
            kinds: what became of each grain: CLEAN ones keep their frame, the others lose it.
            new: frames for DATA grains, sorted; a DATA grain that none covers reads as zero.
        """
        rows = np.concatenate([self._rows, _rows(new)])
        owner = np.full(len(kinds), -1, dtype=np.int64)
        old = len(self._rows)
        _fill(owner, self._rows, 0)
        owner[kinds != Kind.CLEAN] = -1
        _fill(owner, rows[old:], old)
        used = np.flatnonzero(owner >= 0)
        if not len(used):
            return Segment.empty()
        by = owner[used]
        begins = np.ones(len(used), dtype=bool)
        begins[1:] = (np.diff(used) != 1) | (np.diff(by) != 0)
        first = np.flatnonzero(begins)
        result = rows[by[first]]
        start = used[first]
        result[:, 6] += start - result[:, 0]
        result[:, 0] = start
        result[:, 1] = np.diff(np.append(first, len(used)))
        return Segment(result)

    def encode(self) -> bytes:
        """The stored form, before it is compressed as a frame."""
        head = _MAGIC + _VERSION.to_bytes(4, "little") + len(self).to_bytes(4, "little")
        return head + pack_columns(self._rows)

    @classmethod
    def decode(cls, raw: bytes, *, grains: int, sessions: int) -> Segment:
        """The opposite of `encode`, for a segment of `grains` grains of a manifest with so many sessions.

        Raises:
            FormatError: any byte that `encode` would not have written for such a segment.
        """
        if len(raw) < _PREFIX or raw[:4] != _MAGIC:
            raise FormatError("segment map has no magic")
        version = int.from_bytes(raw[4:8], "little")
        count = int.from_bytes(raw[8:12], "little")
        if version != _VERSION:
            raise FormatError(f"segment map has version {version}, expected {_VERSION}")
        if count > min(grains, SEGMENT_GRAINS) or len(raw) != _PREFIX + count * _COLUMNS * 4:
            raise FormatError(f"segment map of {len(raw)} bytes claims {count} intervals")
        rows = unpack_columns(memoryview(raw)[_PREFIX:], _COLUMNS).astype(np.int64)
        start, n, session, _seq, offset, clen, skip, flen = rows.T
        sound = (
            (n >= 1)
            & (start + n <= grains)
            & (session < sessions)
            & (offset >= PACK_HEADER_SIZE)
            & (clen >= 1)
            & (clen <= FRAME_MAX)
            & (flen <= FRAME_GRAINS)
            & (skip + n <= flen)
        )
        if not sound.all() or (start[1:] < (start + n)[:-1]).any():
            raise FormatError("segment map has an interval that can't be")
        return cls(rows)


def _rows(intervals: Sequence[Interval]) -> NDArray[np.int64]:
    return np.array(intervals, dtype=np.int64).reshape(-1, _COLUMNS)


def _fill(owner: NDArray[np.int64], rows: NDArray[np.int64], base: int) -> None:
    """Write each row's number into the grains it covers."""
    if not len(rows):
        return
    counts = rows[:, 1]
    number = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts, counts)
    grains = rows[number, 0] + within
    inside = grains < len(owner)
    owner[grains[inside]] = base + number[inside]
