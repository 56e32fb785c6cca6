"""Frames that the repository has already: found again, checked, and referred to.

A frame is referred to only when all of this holds:

    its manifest is pinned     on record in the session's intent before it was seen to be alive: no
                               collector takes its packs away meanwhile
    its pack is listed         with its size, in this run
    its digest is vouched for  manifest -> index table -> pack directory, read in this run

What was found where is only a hint until then; so a hint that is old or wrong costs a little time and
nothing else. No frame's payload is read for it: a writer that must not read old data can reuse it.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import DamagedError, WrongKeyError
from nbdpull.model.frame import FrameHeader, FrameKind
from nbdpull.model.grain import GRAIN, Kinds
from nbdpull.model.ids import SessionId, is_hex
from nbdpull.model.index import PACKS_PER_INDEX
from nbdpull.model.segment import Interval, Packs, Segment
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.sessiontable import SessionTable
from nbdpull.repo.store import Store

__all__ = ["Found", "FrameFinder", "KnownFrame", "PackListing", "Reuse", "ReuseSource"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A frame in the repository that may be referred to.

    Attributes:
        session: its place in the table of the manifest being made.
        grains: counts a short last one.
    """

    session: int
    seq: int
    offset: int
    clen: int
    grains: int


@dataclass(frozen=True, slots=True)
class KnownFrame:
    """A frame that an earlier backup has at this place of the disk.

    Attributes:
        start: first grain in the segment.
        length: bytes that it unpacks to.
    """

    start: int
    length: int
    digest: bytes
    found: Found


class PackListing:
    """Which packs the store lists: asked once in this run for each session that comes up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._sizes: dict[SessionId, dict[int, int]] = {}

    def has(self, sid: SessionId, seq: int, size: int) -> bool:
        """Whether the pack is there with that size."""
        return self.sizes(sid).get(seq) == size

    def sizes(self, sid: SessionId) -> Mapping[int, int]:
        """Bytes of each of a session's packs, by number."""
        with self._lock:
            sizes = self._sizes.get(sid)
            if sizes is None:
                sizes = self._sizes[sid] = {
                    int(name, 16): entry.size
                    for entry in self._store.list(f"d/{sid}")
                    if is_hex(name := entry.key.rpartition("/")[2], 8)
                }
        return sizes


class ReuseSource:
    """One pinned manifest, as a witness of frames. May be used by many threads."""

    def __init__(self, reader: DiskReader, table: SessionTable, listing: PackListing) -> None:
        manifest = reader.manifest
        self.reader = reader
        self._packs = _pack_keys(manifest.packs())
        self._places = {ref.sid: place for place, ref in enumerate(manifest.sessions) if ref.sid}
        self._sessions = manifest.sessions
        self._table = table
        self._listing = listing

    def refer(self, session: int, seq: int, offset: int) -> tuple[FrameHeader, Found] | None:
        """The data frame there, or None when it can't be referred to.

        `session` is a place in *this* manifest's table; the pack must be one that it refers to.
        """
        ref = self._sessions[session]
        number = seq // PACKS_PER_INDEX
        digest = dict(ref.index).get(number)
        try:
            size = self.reader.pack_place(session, seq).size
            header = self.reader.directory(session, seq).find(offset)
        except (DamagedError, WrongKeyError, ValueError) as exc:
            _log.debug("a frame of session %s is not reused: %s", ref.sid, exc)
            return None
        if digest is None or header.kind is not FrameKind.DATA:
            return None
        if not self._listing.has(ref.sid, seq, size):
            _log.debug("pack d/%s/%08x is not listed as it was written", ref.sid, seq)
            return None
        place = self._table.place(ref.sid, number, digest)
        if place is None:
            return None
        return header, Found(place, seq, offset, header.clen, -(-header.rlen // GRAIN))

    def place_of(self, sid: str, seq: int) -> int | None:
        """Where the session stands in the manifest's table, if the manifest refers to that pack.

        Packs that it does not refer to are not spared by pinning it.
        """
        place = self._places.get(SessionId(sid))
        if place is None or not 0 <= seq < 1 << 32:
            return None
        key = np.uint64(place << 32 | seq)
        at = int(np.searchsorted(self._packs, key))
        return place if at < len(self._packs) and self._packs[at] == key else None

    def check(
        self, session: int, seq: int, offset: int, digest: bytes, length: int
    ) -> Found | None:
        """What `refer` finds there, if it has that digest and length."""
        referred = self.refer(session, seq, offset)
        if referred is None or (referred[0].digest, referred[0].rlen) != (digest, length):
            return None
        return referred[1]


def _pack_keys(packs: Packs) -> NDArray[np.uint64]:
    rows = packs.rows.astype(np.uint64)
    keys: NDArray[np.uint64] = (rows[:, 0] << np.uint64(32)) | rows[:, 1]
    return keys


class FrameFinder(Protocol):
    """Finds frames by what they hold."""

    def find(self, digest: bytes, length: int) -> Found | None:
        """A frame with that digest that unpacks to `length` bytes, fit to be referred to."""


def _whole_frames(like: ReuseSource, index: int, kinds: Kinds) -> Segment:
    if index >= len(like.reader.manifest.segments):
        return Segment.empty()
    try:
        return like.reader.segment(index).whole_frames(kinds)
    except (DamagedError, WrongKeyError) as exc:
        _log.debug("nothing of segment %d is reused: %s", index, exc)
        return Segment.empty()


def _known(like: ReuseSource, one: Interval) -> KnownFrame | None:
    referred = like.refer(one.session, one.seq, one.offset)
    if referred is None or referred[1].grains != one.flen:
        return None
    header, found = referred
    return KnownFrame(one.start, header.rlen, header.digest, found)


class Reuse:
    """What one session may refer to instead of storing it again.

    Args:
        like: the backup whose frames are looked at first, place by place; None for none.
        finders: are asked by digest, in this order.
        adopted: those of them that find what dead sessions of the disk had stored.
    """

    def __init__(
        self,
        like: ReuseSource | None = None,
        finders: Sequence[FrameFinder] = (),
        adopted: Sequence[FrameFinder] = (),
    ) -> None:
        self._like = like
        self._finders = finders
        self._adopted = adopted

    def known(self, index: int, kinds: Kinds) -> list[KnownFrame]:
        """Whole frames of the earlier backup that lie inside the DATA grains of segment `index`.

        They are sorted and don't overlap. A frame that was partly overwritten is not among them: its
        digest says nothing about the part.
        """
        like = self._like
        if like is None:
            return []
        frames = (_known(like, one) for one in _whole_frames(like, index, kinds))
        return [frame for frame in frames if frame is not None]

    def any_known(self, index: int, kinds: Kinds, rng: random.Random) -> KnownFrame | None:
        """One of those that `known` would list, by chance, without looking the others up."""
        like = self._like
        if like is None:
            return None
        intervals = _whole_frames(like, index, kinds)
        return _known(like, intervals[rng.randrange(len(intervals))]) if intervals else None

    def find(self, digest: bytes, length: int) -> Found | None:
        """A frame with that digest and length from anywhere."""
        return _first(self._finders, digest, length)

    def find_adopted(self, digest: bytes, length: int) -> Found | None:
        """The same, of what dead sessions of the disk had stored."""
        return _first(self._adopted, digest, length)


def _first(finders: Sequence[FrameFinder], digest: bytes, length: int) -> Found | None:
    found = (finder.find(digest, length) for finder in finders)
    return next((one for one in found if one is not None), None)
