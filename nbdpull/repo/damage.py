"""What a repository knows of its own damage: `b/<sid>/<n>`.

    verify, restore  find frames that can't be read   ->  records of damage
    next backup      reads these extents again; where the digest is the lost one's, it stores the frame
                     anew and says so                 ->  records of healing
    any reader       finds a frame damaged, looks for a copy of it with the digest that its own manifest
                     vouches for

Copies of copies count: a copy may be damaged, and healed, in turn.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Final

from nbdpull.errors import StoreError
from nbdpull.model.damage import (
    RECORD_MAX,
    ROWS_MAX,
    DamagedFrame,
    HealedFrame,
    Place,
    Record,
    decode_record,
    encode_record,
)
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import SessionId, is_hex, make_session_id
from nbdpull.repo.store import KeyMissingError, Listed, Store

__all__ = ["DamageRecords", "HealedCopies", "Pack", "kept_packs", "stale_records"]

_log = logging.getLogger(__name__)

KNOWN_MAX: Final = 1 << 16
"""Rows of each kind that are looked at: 64 GiB of lost disk. More is recorded when these are healed."""

Pack = tuple[SessionId, int]
"""A pack: session and number."""


class DamageRecords:
    """The records of one repository, read when they are first asked for. Any thread may call it."""

    def __init__(self, store: Store, repository: str) -> None:
        self._store = store
        self._repository = repository
        self._lock = threading.Lock()
        self._loaded = False
        self._damaged: dict[Place, list[DamagedFrame]] = {}
        self._copies: dict[Place, list[HealedFrame]] = {}
        self._packs: set[Pack] = set()

    # -- reading -----------------------------------------------------------------------------------

    def copies(self, place: Place) -> Sequence[HealedFrame]:
        """Where the frame there was stored anew, copies of copies too."""
        self._load()
        found: list[HealedFrame] = []
        seen = {place}
        ahead = [place]
        while ahead:
            for healed in self._copies.get(ahead.pop(), ()):
                if healed.copy not in seen:
                    seen.add(healed.copy)
                    ahead.append(healed.copy)
                    found.append(healed)
        return found

    def has_copies(self, pack: Pack) -> bool:
        """Whether any frame of that pack was stored anew."""
        self._load()
        return pack in self._packs

    def lost(self) -> Mapping[Place, Sequence[DamagedFrame]]:
        """The frames known to be damaged of which no copy is known to be sound."""
        self._load()
        return {place: rows for place, rows in self._damaged.items() if self._is_lost(place)}

    def _is_lost(self, place: Place) -> bool:
        return all(healed.copy in self._damaged for healed in self.copies(place))

    def _load(self) -> None:
        with self._lock:
            if self._loaded:
                return
            rows = 0
            for _, record in _records(self._store, self._repository):
                rows += len(record.damaged) + len(record.healed)
                if rows > 2 * KNOWN_MAX:
                    _log.warning("more than %d records of damage: the others are left out", rows)
                    break
                self._keep(record)
            self._loaded = True

    def _keep(self, record: Record) -> None:
        for row in record.damaged:
            self._damaged.setdefault(row.place, []).append(row)
        for healed in record.healed:
            self._copies.setdefault(healed.damaged, []).append(healed)
            self._packs.add((healed.damaged.session, healed.damaged.seq))

    # -- writing -----------------------------------------------------------------------------------

    def add_damage(self, rows: Iterable[DamagedFrame]) -> int:
        """Record what is damaged, but for what is on record already; how many rows were new.

        Raises:
            StoreError: the repository can't be written.
        """
        self._load()
        new = [row for row in dict.fromkeys(rows) if row not in self._damaged.get(row.place, ())]
        new = new[:KNOWN_MAX]
        if new:
            sid = make_session_id(time.time_ns() // 1_000_000, os.urandom(10))
            self._write(sid, new)
            with self._lock:
                self._keep(Record(damaged=new))
        return len(new)

    def add_healed(self, sid: SessionId, rows: Sequence[HealedFrame]) -> None:
        """Record what the session `sid` stored anew.

        Call it when its packs are durable and **before** its manifest is committed: a collector that
        finds neither a live session nor this record is free to take the packs away.

        Raises:
            StoreError: the repository can't be written.
        """
        self._load()
        self._write(sid, rows)
        with self._lock:
            self._keep(Record(healed=rows))

    def _write(self, sid: SessionId, rows: Sequence[DamagedFrame | HealedFrame]) -> None:
        for number, at in enumerate(range(0, len(rows), ROWS_MAX)):
            raw = encode_record(self._repository, sid, number, rows[at : at + ROWS_MAX])
            self._store.create(f"b/{sid}/{number}", raw)


def _records(store: Store, repository: str) -> Iterator[tuple[Listed, Record]]:
    """Every record; those that are damaged themselves are left out."""
    for listed, record in _read_records(store, repository):
        if isinstance(record, Record):
            yield listed, record
        else:
            _log.warning("%s is left out: %s", listed.key, record)


def _read_records(
    store: Store, repository: str
) -> Iterator[tuple[Listed, Record | FormatError | StoreError]]:
    """Every record, or why it can't be read."""
    for listed in store.list("b"):
        _, sid, number = (*listed.key.split("/"), "", "")[:3]
        if not is_hex(sid, 32) or not number.isdecimal() or len(number) > 9:
            continue
        try:
            raw = store.get_range(listed.key, 0, RECORD_MAX + 1)
            yield listed, decode_record(raw, repository=repository, sid=sid, number=int(number))
        except KeyMissingError:
            continue  # collected between the listing and now
        except (FormatError, StoreError) as exc:
            yield listed, exc


# -- for a copy to another store ---------------------------------------------------------------------


class HealedCopies:
    """The records of healing of one repository, as objects, read when they are first asked for."""

    def __init__(self, store: Store, repository: str) -> None:
        self._store = store
        self._repository = repository
        self._lock = threading.Lock()
        self._found: list[tuple[str, Record]] | None = None
        self._packs: set[Pack] = set()

    def _records(self) -> list[tuple[str, Record]]:
        with self._lock:
            if self._found is None:
                self._found = [
                    (listed.key, record)
                    for listed, record in _records(self._store, self._repository)
                    if record.healed
                ]
                for _, record in self._found:
                    self._packs |= {(row.damaged.session, row.damaged.seq) for row in record.healed}
            return self._found

    def has(self, pack: Pack) -> bool:
        """Whether any frame of that pack was stored anew."""
        self._records()
        return pack in self._packs

    def of(self, packs: Iterable[Pack]) -> tuple[Sequence[str], Mapping[Pack, bytes]]:
        """What carries the damaged frames of `packs`: keys of records, and packs that hold the copies.

        Copies of copies are among them. With each pack comes the digest of head and table of its index, as
        the record has it.
        """
        records = self._records()
        known = {pack for pack in packs if pack in self._packs}
        copies: dict[Pack, bytes] = {}
        keys: dict[str, None] = {}
        more = bool(known)
        while more:
            more = False
            for key, record in records:
                for row in record.healed:
                    if (row.damaged.session, row.damaged.seq) not in known:
                        continue
                    keys[key] = None
                    pack = (row.copy.session, row.copy.seq)
                    more = more or pack not in known
                    known.add(pack)
                    copies.setdefault(pack, row.index)
        return list(keys), copies


# -- for a collector ---------------------------------------------------------------------------------


def kept_packs(
    store: Store, repository: str, needed: Container[Pack]
) -> tuple[set[Pack], set[SessionId]]:
    """Packs beyond `needed` that hold copies of damaged frames of packs in `needed`, at any remove.

    A collector calls this with all packs that manifests, live sessions and pins refer to, **after** it
    has listed the manifests, and spares what it gets, and the indexes `x/<sid>/<seq // 64>` of these.

    Returns:
        These packs; and sessions of which all are spared: copies lie in packs of the session that the record
        is called by, and with a record that is damaged itself that is all that can be told.

    Raises:
        StoreError: a record can't be read now, so what it keeps can't be told.
    """
    by_pack: dict[Pack, set[Pack]] = {}
    whole: set[SessionId] = set()
    for listed, record in _read_records(store, repository):
        if isinstance(record, StoreError) and not isinstance(record, FormatError):
            raise record
        if not isinstance(record, Record):
            _log.warning(
                "%s is damaged (%s): no pack of its session is deleted", listed.key, record
            )
            whole.add(SessionId(listed.key.split("/")[1]))
            continue
        for healed in record.healed:
            old, new = healed.damaged, healed.copy
            by_pack.setdefault((old.session, old.seq), set()).add((new.session, new.seq))
    kept: set[Pack] = set()
    ahead = [pack for pack in by_pack if pack in needed or pack[0] in whole]
    while ahead:
        for pack in by_pack.get(ahead.pop(), ()):
            if pack not in needed and pack not in kept:
                kept.add(pack)
                ahead.append(pack)
    return kept, whole


def stale_records(store: Store, repository: str, kept: Container[Pack]) -> list[Listed]:
    """Records that speak only of packs outside `kept`: a collector may delete these.

    `kept` is all that was spared: what is needed, and what `kept_packs` added.
    """
    return [
        listed
        for listed, record in _records(store, repository)
        if not any((row.place.session, row.place.seq) in kept for row in record.damaged)
        and not any((row.damaged.session, row.damaged.seq) in kept for row in record.healed)
    ]
