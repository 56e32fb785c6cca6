"""What a session that begins may refer to: pinned first, looked at then, opened last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from nbdpull.errors import DamagedError, WrongKeyError
from nbdpull.model.manifest import Manifest
from nbdpull.repo.adopt import Adoption
from nbdpull.repo.digestindex import DigestIndex, IndexFinder
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.reuse import FrameFinder, PackListing, Reuse, ReuseSource
from nbdpull.repo.sessiontable import SessionTable
from nbdpull.repo.store import KeyMissingError, Store

if TYPE_CHECKING:
    from nbdpull.repo.digestcache import DigestCache  # loads SQLite

__all__ = ["ReusePlan", "pin_of"]

_log = logging.getLogger(__name__)

_ASKED_ONE_BY_ONE: Final = 8
"""More manifests than these are looked up by listing."""


def pin_of(manifest: Manifest) -> str:
    """How an intent names a manifest: what follows ``m/`` in its key."""
    return f"{manifest.summary.disk_id}/{manifest.summary.session}"


class ReusePlan:
    """`pins` go into the intent, then `look`, then `open`: in this order, which is what makes it safe.

    Args:
        store: of the repository.
        load: reads the manifest of a pin; raises `DamagedError`.
        reader: of a manifest.
        needed: pins that the session can't do without.
        like: compared with place by place.
        base: found by digest.
        cache: found by digest.
        adoption: of dead sessions, which the caller takes before `open`; found by digest.
    """

    def __init__(
        self,
        store: Store,
        load: Callable[[str], Manifest],
        reader: Callable[[Manifest], DiskReader],
        *,
        needed: Sequence[str],
        like: Manifest | None = None,
        base: DigestIndex | None = None,
        cache: DigestCache | None = None,
        adoption: Adoption | None = None,
    ) -> None:
        self._store = store
        self._adoption = adoption
        self._load = load
        self._reader = reader
        self._like = like
        self._base = base
        self._cache = cache
        self._alive: set[str] = set()
        bases = base.manifests if base is not None else []
        self._needed = needed
        pins = [*needed, *(pin_of(one) for one in (like, *bases) if one is not None)]
        if cache is not None:
            pins += cache.pins(self._all())
        self.pins = tuple(dict.fromkeys(pins))

    def look(self) -> Sequence[str]:
        """Which of the `needed` ones are gone or being forgotten, now that the intent is on record.

        The others that are gone are only not used.
        """
        if len(self.pins) > _ASKED_ONE_BY_ONE:
            self._alive = self._all() & set(self.pins)
        else:
            # Tombstones first: a collector removes a manifest before its tombstone.
            left = [pin for pin in self.pins if not self._there(f"t/{pin}")]
            self._alive = {pin for pin in left if self._there(f"m/{pin}")}
        return [pin for pin in self._needed if pin not in self._alive]

    def open(self, table: SessionTable) -> Reuse:
        """What is left of the plan, for a session with that table."""
        listing = PackListing(self._store)

        def source(manifest: Manifest) -> ReuseSource:
            return ReuseSource(self._reader(manifest), table, listing)

        def pinned(manifest: Manifest) -> ReuseSource | None:
            return source(manifest) if pin_of(manifest) in self._alive else None

        adopted = self._adoption.open(table, listing) if self._adoption is not None else []
        finders: list[FrameFinder] = [*adopted]
        if self._base is not None:
            finders.append(IndexFinder(self._base, [pinned(one) for one in self._base.manifests]))
        if self._cache is not None:
            from nbdpull.repo.digestcache import CacheFinder  # noqa: PLC0415

            finders.append(CacheFinder(self._cache, self._alive, self._read, source))
        like = pinned(self._like) if self._like is not None else None
        return Reuse(like, finders, adopted)

    def _read(self, pin: str) -> Manifest | None:
        try:
            return self._load(pin)
        except (DamagedError, WrongKeyError) as exc:
            _log.debug("nothing is reused through m/%s: %s", pin, exc)
            return None

    def _all(self) -> set[str]:
        dead = {listed.key.partition("/")[2] for listed in self._store.list("t")}
        there = {listed.key.partition("/")[2] for listed in self._store.list("m")}
        return there - dead

    def _there(self, key: str) -> bool:
        try:
            self._store.stat(key)
        except KeyMissingError:
            return False
        return True
