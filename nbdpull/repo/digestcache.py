"""A local memory of where frames are, over all VMs of a repository: `--digest-cache`.

    frames   first 16 bytes of a digest -> pack, offset        of what was stored from this host
    packs    pack -> the last manifest that referred to it     who can be asked, and must be pinned

An SQLite file for each repository. All that is in it are hints: a hit counts after the manifest was
pinned and seen to be alive, refers to that pack, and the pack's directory, which it vouches for, has the
whole digest at that place (`reuse.py`). So a file that is lost, old, from another host or damaged costs
storing again, and nothing else. It is written after a commit, never before.
"""

from __future__ import annotations

import functools
import logging
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdpull.model.frame import FrameKind
from nbdpull.model.index import Directory
from nbdpull.model.manifest import Manifest
from nbdpull.repo.digestindex import directories
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.reuse import Found, ReuseSource

__all__ = ["CacheFinder", "DigestCache", "Hint"]

_log = logging.getLogger(__name__)

_PREFIX: Final = 16
_PINS_MAX: Final = 1000
"""An intent names them all, in 70 bytes each."""
_SOURCES_KEPT: Final = 4
_BUSY_S: Final = 5.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS manifests (id INTEGER PRIMARY KEY, pin TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS packs (
    id INTEGER PRIMARY KEY, sid TEXT NOT NULL, seq INTEGER NOT NULL, manifest INTEGER NOT NULL,
    UNIQUE (sid, seq));
CREATE TABLE IF NOT EXISTS frames (
    digest BLOB PRIMARY KEY, pack INTEGER NOT NULL, offset INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Hint:
    """Where a frame may be, and the manifest (``<disk>/<sid>``) that may vouch for it."""

    pin: str
    sid: str
    seq: int
    offset: int


class DigestCache:
    """One repository's file. May be used by many threads, and by many processes at once.

    Nothing here raises because of the file: what is wrong with it is logged, and it is not used any more.
    """

    def __init__(self, folder: Path, repository: str) -> None:
        self.path = folder / f"{repository}.sqlite"
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        with self._harmless():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
            self._db = sqlite3.connect(
                self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            # It may be lost at any time, so it needs no fsync.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Do `work` in a transaction, or nothing when the file is not used."""
        with self._harmless(), self._lock:
            if (db := self._db) is None:
                return
            db.execute("BEGIN IMMEDIATE")
            try:
                work(db)
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            _log.warning("digest cache %s is not used: %s", self.path, exc)
            self.close()
            # An operational error is a full disk or a lock; any other one says that it is damaged.
            if isinstance(exc, sqlite3.DatabaseError) and not isinstance(
                exc, sqlite3.OperationalError
            ):
                for suffix in ("", "-wal", "-shm"):  # the next run begins with a new one
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def pins(self, alive: Collection[str]) -> tuple[str, ...]:
        """Manifests worth pinning, of those that are `alive`; what it knows of others is dropped."""
        known: list[str] = []

        def work(db: sqlite3.Connection) -> None:
            rows = db.execute("SELECT pin, id FROM manifests ORDER BY id DESC").fetchall()
            known.extend(str(pin) for pin, _ in rows if pin in alive)
            dead = [(number,) for pin, number in rows if pin not in alive]
            if dead:
                db.executemany("DELETE FROM packs WHERE manifest = ?", dead)
                db.executemany("DELETE FROM manifests WHERE id = ?", dead)
                db.execute("DELETE FROM frames WHERE pack NOT IN (SELECT id FROM packs)")

        self._write(work)
        return tuple(known[:_PINS_MAX])

    def lookup(self, digest: bytes) -> Hint | None:
        """Where a frame with that digest was last seen."""
        row = None
        with self._harmless(), self._lock:
            if self._db is not None:
                row = self._db.execute(
                    "SELECT pin, sid, seq, offset FROM frames JOIN packs ON packs.id = pack"
                    " JOIN manifests ON manifests.id = manifest WHERE digest = ?",
                    (digest[:_PREFIX],),
                ).fetchone()
        if row is None or not all(
            isinstance(value, kind) for value, kind in zip(row, (str, str, int, int), strict=True)
        ):
            return None  # SQLite keeps any type in any column, and the file may be anybody's
        return Hint(*row)

    def learn(self, reader: DiskReader, pin: str) -> None:
        """Remember a manifest that was just committed, and the frames that its session stored."""
        own = reader.manifest.summary.session
        sids = [session.sid for session in reader.manifest.sessions]
        packs = list(reader.packs())
        self._write(lambda db: _learn_packs(db, pin, [(sids[at], seq) for at, seq in packs]))
        mine = [(at, seq) for at, seq in packs if sids[at] == own]
        # One transaction a pack: the next one may have to be fetched, and others write too.
        for _, seq, directory in directories(reader, mine):
            self._write(functools.partial(_learn_frames, sid=own, seq=seq, directory=directory))


def _learn_packs(db: sqlite3.Connection, pin: str, packs: Sequence[tuple[str, int]]) -> None:
    db.execute("INSERT OR IGNORE INTO manifests (pin) VALUES (?)", (pin,))
    number = db.execute("SELECT id FROM manifests WHERE pin = ?", (pin,)).fetchone()[0]
    db.executemany(
        "INSERT INTO packs (sid, seq, manifest) VALUES (?, ?, ?)"
        " ON CONFLICT (sid, seq) DO UPDATE SET manifest = excluded.manifest",
        ((sid, seq, number) for sid, seq in packs),
    )
    db.execute("DELETE FROM manifests WHERE id NOT IN (SELECT manifest FROM packs)")


def _learn_frames(db: sqlite3.Connection, *, sid: str, seq: int, directory: Directory) -> None:
    found = db.execute("SELECT id FROM packs WHERE sid = ? AND seq = ?", (sid, seq)).fetchone()
    if found is None:
        return  # another process saw that it is gone already
    data = directory.entries[directory.entries["kind"] == FrameKind.DATA]
    frames = zip(data["digest"], data["offset"].tolist(), strict=True)
    db.executemany(
        "INSERT OR REPLACE INTO frames VALUES (?, ?, ?)",
        ((bytes(digest)[:_PREFIX], found[0], offset) for digest, offset in frames),
    )


class CacheFinder:
    """Finds frames through a cache for one session.

    Args:
        cache: what is asked.
        pinned: manifests that the session pinned and then saw to be alive.
        load: a manifest of these; raises nothing, None when it can't be read.
        source: makes it a witness for the session.
    """

    def __init__(
        self,
        cache: DigestCache,
        pinned: Collection[str],
        load: Callable[[str], Manifest | None],
        source: Callable[[Manifest], ReuseSource],
    ) -> None:
        self._cache = cache
        self._pinned = set(pinned)
        self._load = load
        self._source = source
        self._lock = threading.Lock()
        self._sources: OrderedDict[str, ReuseSource] = OrderedDict()

    def find(self, digest: bytes, length: int) -> Found | None:
        """See `FrameFinder`."""
        hint = self._cache.lookup(digest)
        source = None if hint is None else self._witness(hint.pin)
        if hint is None or source is None:
            return None
        place = source.place_of(hint.sid, hint.seq)
        return None if place is None else source.check(place, hint.seq, hint.offset, digest, length)

    def _witness(self, pin: str) -> ReuseSource | None:
        with self._lock:
            if pin not in self._pinned:
                return None
            source = self._sources.pop(pin, None)
            if source is None:
                manifest = self._load(pin)
                if manifest is None:
                    self._pinned.discard(pin)
                    return None
                source = self._source(manifest)
            self._sources[pin] = source
            while len(self._sources) > _SOURCES_KEPT:
                self._sources.popitem(last=False)
            return source
