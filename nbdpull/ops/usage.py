"""What of which packs is still needed, in memory that grows with packs, not with frames.

`Frames` holds 15 bytes for each distinct frame it was told of, and is only ever told of a part: of a window
of some segments of a disk, or of packs that were chosen. `PackCounts` keeps what comes of it for all packs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbdpull.model.ids import SessionId
from nbdpull.model.manifest import SegmentRef

__all__ = ["HELD", "Frames", "Pack", "PackCounts", "Piece", "Pieces"]

Pack = tuple[SessionId, int]
"""(session, seq), the same in every manifest."""
Rows = NDArray[np.int64]
"""Intervals of a map."""

HELD: Final = -2
"""The user of a pack that stays where it is: several disks', or a backup's that can't be committed again."""
_UNUSED: Final = -1
_FRAME: Final = np.dtype([("key", "<u8"), ("clen", "<u4"), ("grains", "<u2"), ("flen", "u1")])
_LOOSE_MAX: Final = 1 << 19
_BITS: Final = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


class Frames:
    """Distinct frames, and which of their grains are needed."""

    def __init__(self, packs: Iterable[Pack] | None = None) -> None:
        """Begin with none; with `packs`, frames of others are passed over."""
        self._numbers: dict[Pack, int] = {pack: at for at, pack in enumerate(packs or ())}
        self._closed = packs is not None
        self._parts = [np.empty(0, dtype=_FRAME)]
        self._loose = 0

    def add(self, sids: Sequence[SessionId], rows: Rows) -> None:
        """The frames of a map; `sids` are its manifest's sessions."""
        keys, there = self._keys(sids, rows)
        part = np.empty(int(there.sum()), dtype=_FRAME)
        _start, n, _session, _seq, _offset, clen, skip, flen = rows[there].T
        part["key"], part["clen"], part["flen"] = keys[there], clen, flen
        part["grains"] = ((1 << n) - 1) << skip
        self._append(part)

    def add_map(self, sids: Sequence[SessionId], ref: SegmentRef) -> None:
        """The frame that a map itself is in."""
        row = (0, 1, ref.session, ref.seq, ref.offset, ref.clen, 0, 1)
        self.add(sids, np.array([row], dtype=np.int64))

    def _keys(
        self, sids: Sequence[SessionId], rows: Rows
    ) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """The frames' keys: number of the pack, offset; and for which there are such."""
        packs, which = np.unique((rows[:, 2] << 32) | rows[:, 3], return_inverse=True)
        numbers = np.array(
            [self._number((sids[pack >> 32], pack & 0xFFFFFFFF)) for pack in packs.tolist()],
            dtype=np.int64,
        )[which]
        keys = (numbers.astype(np.uint64) << np.uint64(32)) | rows[:, 4].astype(np.uint64)
        return keys, numbers >= 0

    def _number(self, pack: Pack) -> int:
        if self._closed:
            return self._numbers.get(pack, -1)
        return self._numbers.setdefault(pack, len(self._numbers))

    def _append(self, part: NDArray[np.void]) -> None:
        self._parts.append(part)
        self._loose += len(part)
        if self._loose > _LOOSE_MAX:
            self._join()

    def _join(self) -> NDArray[np.void]:
        """All of them, sorted by key, each once."""
        if len(self._parts) > 1:
            whole = np.concatenate(self._parts)
            whole = whole[np.argsort(whole["key"], kind="stable")]
            begins = np.ones(len(whole), dtype=np.bool_)
            begins[1:] = whole["key"][1:] != whole["key"][:-1]
            first = np.flatnonzero(begins)
            joined = whole[first]
            if len(first):
                joined["grains"] = np.bitwise_or.reduceat(whole["grains"], first)
            self._parts, self._loose = [joined], 0
        return self._parts[0]

    def __len__(self) -> int:
        return len(self._join())

    def grains(self, at: int) -> int:
        """The needed grains of frame `at`, a bit each."""
        return int(self._join()[at]["grains"])

    def find(self, sids: Sequence[SessionId], rows: Rows) -> list[int]:
        """For each interval the place of its frame, -1 where it is none of these."""
        if not len(rows):
            return []
        keys, there = self._keys(sids, rows)
        known = self._join()["key"]
        at = np.searchsorted(known, keys)
        there &= at < len(known)
        there[there] = known[at[there]] == keys[there]
        places: list[int] = np.where(there, at, -1).tolist()
        return places

    def by_pack(self) -> Iterator[tuple[Pack, float, int]]:
        """Each pack: how many of its bytes are needed, of how many frames."""
        joined = self._join()
        numbers = (joined["key"] >> np.uint64(32)).astype(np.int64)
        needed = joined["clen"] * _BITS[joined["grains"]].astype(np.float64) / joined["flen"]
        count = len(self._numbers)
        bytes_of = np.bincount(numbers, needed, minlength=count).tolist()
        frames_of = np.bincount(numbers, minlength=count).tolist()
        yield from zip(self._numbers, bytes_of, frames_of, strict=True)


class _Counts:
    """The packs of one session."""

    def __init__(self) -> None:
        self.seqs = np.empty(0, dtype=np.uint32)
        self.users = np.empty(0, dtype=np.int32)

    def use(self, seqs: NDArray[np.uint32], user: int) -> None:
        every = np.union1d(self.seqs, seqs)
        users = np.full(len(every), _UNUSED, dtype=np.int32)
        users[np.searchsorted(every, self.seqs)] = self.users
        at = np.searchsorted(every, seqs)
        before = users[at]
        users[at] = np.where((before == _UNUSED) | (before == user), user, HELD)
        self.seqs, self.users = every, users


class PackCounts:
    """Who uses which packs: a disk's number, or `HELD`."""

    def __init__(self) -> None:
        self._sessions: dict[SessionId, _Counts] = {}

    def use(self, sids: Sequence[SessionId], packs: NDArray[np.uint32], user: int) -> None:
        """Somebody uses these packs, as rows of (session, seq)."""
        for session in np.unique(packs[:, 0]).tolist():
            counts = self._sessions.setdefault(sids[session], _Counts())
            counts.use(packs[packs[:, 0] == session, 1], user)

    def user(self, pack: Pack) -> int:
        """Who uses a pack."""
        counts = self._sessions[pack[0]]
        return int(counts.users[np.searchsorted(counts.seqs, pack[1])])


class Piece(NamedTuple):
    """Grains [first, first + n) of a rewritten frame, where they are now."""

    first: int
    n: int
    sid: SessionId
    seq: int
    offset: int
    clen: int


class Pieces:
    """What became of frames that were rewritten, by their places in `Frames`: some 30 bytes each."""

    def __init__(self, frames: int) -> None:
        self._begin = np.full(frames, -1, dtype=np.int64)
        self._count = np.zeros(frames, dtype=np.uint8)
        self._columns = tuple(array(kind) for kind in "BBIIII")
        self._sids: list[SessionId] = []

    def get(self, at: int) -> list[Piece]:
        """The pieces of a frame; none while it is not rewritten."""
        begin = int(self._begin[at])
        return [self._piece(begin + number) for number in range(int(self._count[at]))]

    def _piece(self, at: int) -> Piece:
        first, n, sid, seq, offset, clen = (column[at] for column in self._columns)
        return Piece(first, n, self._sids[sid], seq, offset, clen)

    def put(self, at: int, pieces: Sequence[Piece]) -> None:
        """A frame was rewritten."""
        self._begin[at] = len(self._columns[0])
        self._count[at] = len(pieces)
        for piece in pieces:
            if not self._sids or self._sids[-1] != piece.sid:
                self._sids.append(piece.sid)
            row = (piece.first, piece.n, len(self._sids) - 1, piece.seq, piece.offset, piece.clen)
            for column, number in zip(self._columns, row, strict=True):
                column.append(number)
