"""Healing: a backup reads again what the repository lost, and stores it anew where it still is the same.

    parent's map      |-- frame A --|-- frame B (lost) --|-- frame C --|       segment
    source now        |   clean     |  clean             |   dirty     |

    B read again hashes as B was     -> stored anew: the new map refers to the new frame, and a record
                                        makes every older backup that refers to B read that one
    B read again is something else   -> what of it the bitmap calls clean is read as if it had changed:
                                        the new backup is whole, the older ones stay as they are

A disk that is read in full has no parent here: what is lost is then looked for where the records of
damage say that it was. A parent's map that is itself lost makes its segment be read in full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import DamagedError
from nbdpull.model.damage import DamagedFrame, HealedFrame, Place
from nbdpull.model.frame import FrameKind
from nbdpull.model.grain import FRAME_MAX, GRAIN, SEGMENT, Kind, Kinds
from nbdpull.model.manifest import Manifest
from nbdpull.model.segment import Interval, Segment
from nbdpull.repo.repository import DiskReader, Repository, Session

__all__ = ["Healer", "lost_segments"]

_log = logging.getLogger(__name__)

Read = Callable[[int, int], bytes]
"""The source's bytes: offset, length."""


@dataclass(frozen=True, slots=True)
class _Stored:
    lost: DamagedFrame
    seq: int
    offset: int
    clen: int


def lost_segments(lost: Mapping[Place, object], manifest: Manifest) -> set[int]:
    """Segments of a backup whose map is lost, or that refer to a pack with a lost frame."""
    wanted = {(place.session, place.seq) for place in lost}
    places = {ref.sid: number for number, ref in enumerate(manifest.sessions)}
    packs = [(places[sid], seq) for sid, seq in wanted if sid in places]
    keys = _keys(np.array(packs, dtype=np.uint64).reshape(-1, 2))
    found = set()
    for index, ref in enumerate(manifest.segments):
        if ref is None or not packs:
            continue
        own = Place(manifest.sessions[ref.session].sid, ref.seq, ref.offset)
        if own in lost or np.isin(_keys(ref.packs.rows.astype(np.uint64)), keys).any():
            found.add(index)
    return found


def _keys(packs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return (packs[:, 0] << np.uint64(32)) | packs[:, 1]


class Healer:
    """What of one disk is lost in the repository, and what became of it in this backup.

    `plan` is called by one thread, for each segment that `concerns` names.
    """

    def __init__(
        self, repository: Repository, session: Session, parent: DiskReader | None, *, size: int
    ) -> None:
        self._records = repository.damage
        self._lost = repository.damage.lost()
        self._session = session
        self._parent = parent
        self._size = size
        self._stored: list[_Stored] = []
        self._segments = (
            lost_segments(self._lost, parent.manifest) if parent is not None else self._of_records()
        )
        session.lost = frozenset(
            row.digest for rows in self._lost.values() for row in rows if row.rlen
        )

    def _of_records(self) -> set[int]:
        return {
            row.start // SEGMENT
            for rows in self._lost.values()
            for row in rows
            if row.disk == self._session.disk_id and row.start + row.rlen <= self._size
        }

    def concerns(self, index: int, *, changed: bool) -> bool:
        """Whether that segment must be planned: something of it is lost, or its old map is needed."""
        return index in self._segments or (changed and self._parent is not None)

    def lacks(self, index: int) -> bool:
        """Whether something of that segment is known to be lost, so that `plan` reads what is clean."""
        return index in self._segments

    def plan(self, index: int, kinds: Kinds, read: Read) -> Segment:
        """Store anew what of a segment still is as it was, and mark the rest to be read.

        Args:
            index: of the segment.
            kinds: what is to become of its grains; is changed.
            read: reads the source.

        Returns:
            What the grains that `kinds` calls clean are to be taken from.
        """
        if self._parent is None:
            return self._plan_full(index, kinds, read)
        try:
            before = self._parent.segment(index)
        except DamagedError as exc:
            _log.info("segment %d is read in full: %s", index, exc)
            kinds[kinds == Kind.CLEAN] = Kind.DATA
            return Segment.empty()
        if index not in self._segments:
            return before
        sids = [session.sid for session in self._parent.manifest.sessions]
        result: list[Interval] = []
        healed: dict[tuple[int, int, int], _Stored | None] = {}
        for interval in before:
            place = Place(sids[interval.session], interval.seq, interval.offset)
            rows = self._lost.get(place)
            if rows is None:
                result.append(interval)
                continue
            first = interval.start - interval.skip
            key = (interval.session, interval.seq, interval.offset)
            if key not in healed:
                row = self._vouched(rows[0], interval, index * SEGMENT + first * GRAIN)
                healed[key] = None if row is None else self._heal(row, read)
            stored = healed[key]
            if stored is None:
                mine = kinds[interval.start : interval.start + interval.n]
                mine[mine == Kind.CLEAN] = Kind.DATA
            else:
                result.append(self._moved(interval, stored))
        return Segment.of(result)

    def _vouched(self, row: DamagedFrame, interval: Interval, start: int) -> DamagedFrame | None:
        """The lost frame as the parent's index has it: a record is not to be believed."""
        parent = self._parent
        if parent is None:
            return None
        try:
            header = parent.written(interval.session, interval.seq, interval.offset)
        except DamagedError:
            return None
        whole = min(interval.flen * GRAIN, self._size - start)
        if interval.skip > interval.start or header.rlen != whole:
            return None
        return replace(row, start=start, rlen=header.rlen, digest=header.digest, kind=header.kind)

    def _plan_full(self, index: int, kinds: Kinds, read: Read) -> Segment:
        """A full: what is healed is used for the new map too, so that it is stored once."""
        used: list[Interval] = []
        for rows in self._lost.values():
            for row in rows:
                first = (row.start - index * SEGMENT) // GRAIN
                n = -(-row.rlen // GRAIN)
                if row.disk != self._session.disk_id or row.start // SEGMENT != index:
                    continue
                if not self._could_be(row) or first + n > len(kinds):
                    continue
                stored = self._heal(row, read)
                if stored is None:
                    continue
                mine = kinds[first : first + n]
                if (mine == Kind.DATA).all():
                    mine[:] = Kind.CLEAN
                    used.append(Interval(first, n, self._session.index, *_at(stored), 0, n))
                break
        return Segment.of(sorted(used))

    def _could_be(self, row: DamagedFrame) -> bool:
        """Whether a frame of this disk can lie there: a record is not to be believed."""
        end = row.start + row.rlen
        return (
            row.start % GRAIN == 0
            and 0 < row.rlen <= FRAME_MAX - row.start % FRAME_MAX
            and end <= self._size
            and (end % GRAIN == 0 or end == self._size)
        )

    def _heal(self, row: DamagedFrame, read: Read) -> _Stored | None:
        """Store the frame anew if the source has its bytes there."""
        if row.kind is not FrameKind.DATA:
            return None
        raw = read(row.start, row.rlen)
        if self._session.digest(raw) != row.digest:
            return None
        # Its own session is where it has to go: what the repository has of it is what was lost.
        self._session.lost |= {row.digest}
        ref = self._session.put(raw)
        stored = _Stored(row, ref.seq, ref.offset, ref.clen)
        self._stored.append(stored)
        return stored

    def _moved(self, interval: Interval, stored: _Stored) -> Interval:
        return interval._replace(
            session=self._session.index, seq=stored.seq, offset=stored.offset, clen=stored.clen
        )

    def record(self) -> int:
        """Let older backups know, after the session was sealed and before it is committed.

        Returns:
            How many frames were healed.

        Raises:
            StoreError: the repository can't be written.
        """
        rows = [
            HealedFrame(
                damaged=stored.lost.place,
                copy=Place(self._session.id, stored.seq, stored.offset),
                clen=stored.clen,
                rlen=stored.lost.rlen,
                digest=stored.lost.digest,
                index=self._session.index_digest(stored.seq),
            )
            # One copy of each: a segment is planned again when a connection was lost.
            for stored in {stored.lost.place: stored for stored in self._stored}.values()
        ]
        if rows:
            self._records.add_healed(self._session.id, rows)
        return len(rows)


def _at(stored: _Stored) -> tuple[int, int, int]:
    return stored.seq, stored.offset, stored.clen
