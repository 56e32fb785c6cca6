"""A manifest's table of sessions while the manifest is being made.

    place  0 ... n-1                n          n+1 ...
           those of the parent      own        sessions whose frames turned out to be here already

Maps name a session by its place, and are written before the table is complete: so places are given out
once and kept. The parent's come first, because its maps are taken over as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from nbdpull.model.ids import SessionId
from nbdpull.model.index import PACKS_PER_INDEX
from nbdpull.model.manifest import UNUSED, SessionRef
from nbdpull.model.segment import Packs

__all__ = ["SessionTable"]


class SessionTable:
    """May be used by many threads.

    Attributes:
        own: the place of the session that is being written.
    """

    def __init__(self, parent: Sequence[SessionRef], own: SessionId) -> None:
        self._lock = threading.Lock()
        self._sids = [ref.sid for ref in parent] + [own]
        self._indexes = [dict(ref.index) for ref in parent] + [{}]
        self._places = {sid: place for place, sid in enumerate(self._sids) if sid}
        self.own = len(parent)

    def place(self, sid: SessionId, number: int, digest: bytes) -> int | None:
        """The place of another session, whose index `number` has a table of that digest.

        None when the table vouches for another digest already: then one of the two is not what was
        written, and nothing new may be built on it.
        """
        with self._lock:
            place = self._places.get(sid)
            if place == self.own:
                return None
            if place is None:
                place = self._places[sid] = len(self._sids)
                self._sids.append(sid)
                self._indexes.append({})
            return place if self._indexes[place].setdefault(number, digest) == digest else None

    def finished(self, own: Mapping[int, bytes], packs: Packs) -> tuple[SessionRef, ...]:
        """The table for a manifest that refers to `packs`; `own` are this session's indexes."""
        needed: dict[int, set[int]] = {}
        for place, seq in packs:
            needed.setdefault(place, set()).add(seq // PACKS_PER_INDEX)
        with self._lock:
            indexes = [*self._indexes]
            sids = [*self._sids]
        indexes[self.own] = dict(own)
        last = max([self.own, *needed])
        return tuple(
            SessionRef(
                sids[place],
                tuple(item for item in sorted(indexes[place].items()) if item[0] in needed[place]),
            )
            if place in needed
            else UNUSED
            for place in range(last + 1)
        )
