"""What is read and not let go yet, with --trim-scratch: another process must find it again, should this one die.

    read -> noted in the journal -> its pack is durable -> the journal is written -> let go

What is let go can't be read again. In this order it need not be: whoever goes on at the point in time finds
each of these places in the journal, and its frame in a durable pack, or it was zero, or an earlier backup has it there.

While it waits the guest's writes to it are copied, which takes room. Where that gets scarce nobody shall go on
any more: then all is let go at once, and from there on when it is read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from nbdpull.model.grain import SEGMENT
from nbdpull.repo.repository import Found, Session
from nbdpull.source.journal import ZEROES, DiskJournal

__all__ = ["LITTLE_ROOM", "Waiting"]

LITTLE_ROOM: Final = 1 << 30
"""Bytes free beside the scratch. Three packs of each of four disks wait at a time, which unpack to more."""

_NOW: Final = -1
_NEVER: Final = -2


class Waiting:
    """Of one disk. May be used by many threads."""

    def __init__(self, journal: DiskJournal, session: Session) -> None:
        self._journal = journal
        self._session = session
        self._lock = threading.Lock()
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._look()

    def _look(self) -> None:
        if self._journal.room() < LITTLE_ROOM:
            self._journal.give_up("its scratch has little room, or what is read can't be noted")

    @property
    def ended(self) -> bool:
        """Whether nothing waits any more: nobody will go on with this run."""
        return not self._journal.kept

    def add(self, start: int, end: int, found: Found | None) -> None:
        """Let [start, end), in bytes of the disk, wait: it is noted in the journal.

        `found` is its frame; None where it is zero, or what an earlier backup has at this place.
        """
        if found is None:
            key = _NOW
        else:
            # A frame of others is not referred to on a journal's word.
            key = found.seq if found.session == self._session.index else _NEVER
        with self._lock:
            self._ranges.setdefault(key, []).append((start, end))

    def take(self) -> list[tuple[int, int]]:
        """What may be let go now: sorted, neighbours joined up to a segment's size. It waits no more."""
        self._look()
        taken = self._take_durable()
        if taken and not self.secure():
            taken += self._take_durable()
        return _joined(taken)

    def _take_durable(self) -> list[tuple[int, int]]:
        with self._lock:
            keys = [key for key in self._ranges if self.ended or self._is_durable(key)]
            return [one for key in keys for one in self._ranges.pop(key)]

    def _is_durable(self, key: int) -> bool:
        return key == _NOW or (key != _NEVER and self._session.is_durable(key))

    def note_zeroes(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Note ranges that read as zeroes, so that they may be let go; each lies in one segment."""
        for start, end in ranges:
            self._journal.note(start, end - start, ZEROES)
        self.secure()

    def note_audited(self) -> None:
        """Note that nothing of what is clean will be looked at any more, so that it may be let go."""
        self._journal.note_audited()
        self.secure()

    def secure(self) -> bool:
        """Write the journal; where that can't be nobody shall go on, and False is returned."""
        if self._journal.flush():
            return True
        self._journal.give_up("what is read can't be noted any more")
        return False


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1] and end - joined[-1][0] <= SEGMENT:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
