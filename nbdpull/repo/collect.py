"""Garbage collection: any number at once, beside any number of writers, with no lock.

The order of the steps is the proof; `tests/protocol/` searches every interleaving of a model of them.

    1. end undo windows: t/ for what was forgotten long enough ago; read all t/: the set T
    2. list d/ and x/               only what is listed here is ever deleted below
    3. list s/; revoke the idle     create m/... = "revoked": one winner against the writer's commit
    4. list m/, read the manifests; then b/: which packs hold copies of damaged frames that these need.
       A register "adopted by X" hands the session's packs to X, which may be live or have ended
    5. list t/ again: any that is not in T, and it begins again at 1
    6. delete what of (2) is referred to by no manifest outside T, no live session, and no pin of one
    7. delete the manifests of T that no live session pins, then marks and intents nobody needs

A writer creates s/<sid> before anything else, and looks for t/<pin> after it. So a collector that had
the tombstone in T also sees the session in (3), if the session got past its look: it spares the pins.
A session that (3) does not list because it has ended is seen in (4), which comes later; one that began
later wrote no pack that (2) listed.

Step 5 is there because a listing is no instant: without it a manifest could be committed behind the
reader's back, and the older one that it was built on be deleted by another collector before the reader
got to it. Tombstones outlive their manifests by a year, so (5) sees whatever happened meanwhile.

The clock (the store's, never this machine's) says only when an undo window is over and when a session
is idle; if it is wrong, a backup fails loudly or an undo comes too late, and nothing else is lost.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

from nbdpull.errors import DamagedError, RepositoryError, StoreError
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import SessionId, is_hex, make_session_id
from nbdpull.model.index import PACKS_PER_INDEX
from nbdpull.model.intent import Intent, is_pin
from nbdpull.model.manifest import MANIFEST_MAX, REVOKED, Manifest, adopter, register_kind
from nbdpull.repo import alive
from nbdpull.repo.damage import Pack, kept_packs, stale_records
from nbdpull.repo.intents import read_intent
from nbdpull.repo.marks import REPLACED, read_marks, reason_of, there, tombstones
from nbdpull.repo.store import (
    AccessDeniedError,
    KeyExistsError,
    KeyMissingError,
    Listed,
    LostBytesError,
    Store,
)

__all__ = ["Collected", "Collector"]

_log = logging.getLogger(__name__)

_HOPELESS_S: Final = 31 * 86400.0
"""Writers commit within 30 days of their beginning, or not at all."""
_STALE_S: Final = 30 * 86400.0
"""A collector deletes nothing any more so long after it began: a day later others take it for dead."""
_STUB_S: Final = 366 * 86400.0
_ROUNDS: Final = 20
_WORKERS: Final = 8


@dataclass(slots=True)
class Collected:
    """What a run deleted, or would delete.

    Attributes:
        packs, indexes, manifests, intents, marks: objects of each kind.
        freed_bytes: of all of them together.
        revoked: sessions that were idle and can't commit any more.
        live: sessions that were spared because they may still commit.
        refused: keys that the store did not let us delete.
        unlock: when the first lock of these ends, by the store, or None.
    """

    packs: int = 0
    indexes: int = 0
    manifests: int = 0
    intents: int = 0
    marks: int = 0
    freed_bytes: int = 0
    revoked: list[SessionId] = field(default_factory=list)
    live: list[SessionId] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unlock: float | None = None


class _Vanished(Exception):
    """A manifest that was listed is gone, so another collector is ahead: look again from the beginning."""


@dataclass(frozen=True, slots=True)
class _Session:
    """A session that has an intent."""

    id: SessionId
    intent: Intent
    listed: Listed
    idle_s: float

    @property
    def pin(self) -> str:
        """What names its register."""
        return f"{self.intent.disk}/{self.id}"


class _References:
    """Which packs and indexes the manifests read so far refer to; it only grows."""

    def __init__(self) -> None:
        self._packs: dict[str, set[int]] = defaultdict(set)
        self._indexes: dict[str, set[int]] = defaultdict(set)
        self.manifests: set[str] = set()
        self.marked: set[str] = set()  # registers that are no manifest
        self.adopters: dict[str, str] = {}  # of these, by whom a session was taken over: pins

    def add(self, pin: str, manifest: Manifest) -> None:
        sids = [session.sid for session in manifest.sessions]
        for session, seq in manifest.packs():
            self._packs[sids[session]].add(seq)
        for ref in manifest.sessions:
            self._indexes[ref.sid].update(number for number, _ in ref.index)
        self.manifests.add(pin)

    def __contains__(self, pack: object) -> bool:
        """Whether a pack, as (session, number), is referred to."""
        return isinstance(pack, tuple) and pack[1] in self._packs.get(pack[0], ())

    def add_packs(self, packs: Iterable[Pack]) -> None:
        for sid, seq in packs:
            self._packs[sid].add(seq)
            self._indexes[sid].add(seq // PACKS_PER_INDEX)

    def spares(self, key: str) -> bool:
        kind, sid, name = key.split("/")
        if kind == "d":
            return int(name, 16) in self._packs.get(sid, ())
        return int(name) in self._indexes.get(sid, ())


@dataclass(frozen=True, slots=True)
class _Spared:
    """All packs that are spared, as a container."""

    references: _References
    sessions: frozenset[str]

    def __contains__(self, pack: object) -> bool:
        return pack in self.references or (isinstance(pack, tuple) and pack[0] in self.sessions)


@dataclass(frozen=True, slots=True)
class _View:
    """What one round saw."""

    doomed: frozenset[str]
    objects: Mapping[str, Sequence[Listed]]
    sessions: Sequence[_Session]
    registers: Mapping[str, Listed]
    live: frozenset[str]
    pinned: frozenset[str]
    adopted: frozenset[str]  # sessions whose packs a live one took over
    copies: frozenset[str]  # sessions of which any pack may hold copies of damaged frames
    marks: Sequence[Listed]  # f/, b/ and o/, as they were before the manifests were listed

    @property
    def spared(self) -> frozenset[str]:
        """Sessions whose packs stay, whoever refers to them."""
        return self.live | self.adopted | self.copies


class Collector:
    """One run of the collection; `run` blocks."""

    def __init__(
        self,
        store: Store,
        *,
        decode: Callable[[str, bytes], Manifest],
        repository: str = "",
        undo_window_s: float,
        dry_run: bool = False,
        check: Callable[[], None] = lambda: None,
        workers: int = _WORKERS,
        host: str = "",
    ) -> None:
        """Prepare.

        Args:
            store: where.
            decode: the manifest in a register, from its key and bytes; raises `DamagedError`.
            repository: its id; empty where there are no records of damage.
            undo_window_s: how long what was forgotten can be brought back.
            dry_run: change nothing, tell what would be.
            check: called often; what it raises ends the run, which does no harm at any point.
            workers: threads that delete.
            host: for people, in the intent.
        """
        self._store = store
        self._decode = decode
        self._repository = repository
        self._undo_window_s = undo_window_s
        self._dry_run = dry_run
        self._check = check
        self._workers = workers
        self._host = host
        self._references = _References()
        self._ended: set[str] = set()  # tombstones that this run made, or a dry run would
        self._hopeless: list[Listed] = []
        self._unread: list[tuple[Listed, DamagedError]] = []  # intents, of this round
        self._alive: dict[str, list[Listed]] = {}
        self._own: str | None = None
        self._here = ExitStack()
        self._began = alive.clocks()
        self._now = 0.0
        self.collected = Collected()

    def run(self) -> Collected:
        """Collect.

        Raises:
            DamagedError: a manifest or an intent can't be read, so what it needs can't be told; nothing
                was deleted.
            WrongKeyError: the same, because a manifest is sealed to another key.
            RepositoryError: other collectors were ahead again and again, or the store's listings lag.
        """
        try:
            self._begin()
            view = self._look()
            self._delete_objects(view)
            self._delete_manifests(view)
            self._delete_marks(view)
        finally:
            self._here.close()
            if self._own is not None:
                with suppress(StoreError):  # another collector takes it away some day
                    self._store.delete(self._own)
        return self.collected

    def _begin(self) -> None:
        """Ask the store for its time, with an intent that says that a collector is here."""
        if self._dry_run:
            self._now = time.time()
            return
        sid = make_session_id(time.time_ns() // 1_000_000, os.urandom(10))
        intent = Intent(
            role="gc", disk="", host=self._host, time=time.time(), process=alive.process_token()
        )
        self._here.enter_context(alive.here(sid))
        self._own = f"s/{sid}"
        self._store.create(self._own, intent.encode(sid))
        self._now = self._store.stat(self._own).modified

    # -- looking -----------------------------------------------------------------------------------

    def _look(self) -> _View:
        for _ in range(_ROUNDS):
            self._end_undo()
            made = tombstones(self._store)
            # Of what is made later nothing here can tell what it is for.
            marks = [listed for prefix in "fbo" for listed in self._store.list(prefix)]
            doomed = self._doomed(made, marks)
            objects = self._list_objects()
            sessions = self._list_sessions(objects)
            self._revoke(sessions)
            registers = self._list_registers()
            self._pass_over_ended(registers)
            with suppress(_Vanished):
                live, pinned = self._read_manifests(doomed, sessions, registers)
                adopted = self._adopted(objects, registers, live)
                copies: Collection[str] = ()
                if self._repository:
                    spared = _Spared(self._references, live | adopted)
                    needed, copies = kept_packs(self._store, self._repository, spared)
                    self._references.add_packs(needed)
                if self._is_current(made):
                    self.collected.live = sorted(one.id for one in sessions if one.id in live)
                    return _View(
                        doomed,
                        objects,
                        sessions,
                        registers,
                        live,
                        pinned,
                        adopted,
                        frozenset(copies),
                        marks,
                    )
            _log.debug("another collector was ahead; looking again")
        raise RepositoryError(
            f"other collectors were ahead {_ROUNDS} times; nothing was deleted; run it again later"
        )

    def _doomed(self, made: Mapping[str, float], marks: Iterable[Listed]) -> frozenset[str]:
        """What is to be deleted: tombstones that this run made, or whose undo window is over.

        A host that may only add objects can make marks, too. What it marks is hidden, and still there for as
        long as it takes somebody to see that.
        """
        forgotten = {one.key.partition("/")[2]: one.modified for one in marks if one.key[0] == "f"}
        due = {
            pin
            for pin, when in made.items()
            if self._undo_window_s <= 0
            or self._now - forgotten.get(pin, when) >= self._undo_window_s
        }
        return frozenset(due | self._ended)

    def _is_current(self, made: Collection[str]) -> bool:
        """Whether no tombstone was made since `made` was read, so that no manifest can have gone either."""
        return set(tombstones(self._store)) <= set(made)

    def _end_undo(self) -> None:
        """Make what was forgotten long enough ago final: all manifests of a backup together."""
        marks = read_marks(self._store)
        for pin in marks.forgotten:
            young = self._now - marks.forgotten[pin] < self._undo_window_s
            if young or pin in marks.tombstones or pin in self._ended:
                continue
            members = [pin]
            try:
                manifest = self._manifest(pin)
            except DamagedError:
                manifest = None  # it stands for itself alone
            except KeyMissingError:
                continue
            if manifest is not None:
                if (
                    manifest.summary.backup in marks.protected
                    and reason_of(self._store, pin) != REPLACED
                ):
                    continue
                members = [f"{disk}/{sid}" for disk, sid in manifest.summary.siblings]
            # Forgetting may have been killed between two disks, and been done again later.
            last = max(marks.forgotten[one] for one in members if one in marks.forgotten)
            if self._now - last < self._undo_window_s:
                continue
            for one in members:
                self._end(one)

    def _end(self, pin: str) -> None:
        try:
            if register_kind(self._store.get_range(f"m/{pin}", 0, 8)) in {"revoked", "adopted"}:
                return
        except KeyMissingError:
            return
        except LostBytesError as exc:
            _log.debug("%s: it is deleted with its backup", exc)
        self._ended.add(pin)
        if not self._dry_run:
            with suppress(KeyExistsError):
                self._store.create(f"t/{pin}", b"")

    def _list_objects(self) -> Mapping[str, Sequence[Listed]]:
        """Packs and indexes, by session."""
        found: dict[str, list[Listed]] = defaultdict(list)
        for prefix in ("d", "x"):
            for listed in self._store.list(prefix):
                parts = listed.key.split("/")
                if len(parts) == 3 and is_hex(parts[1], 32) and _is_number(prefix, parts[2]):
                    found[parts[1]].append(listed)
            self._check()
        return found

    def _list_sessions(self, objects: Mapping[str, Sequence[Listed]]) -> list[_Session]:
        sessions = []
        self._unread = []
        self._alive = defaultdict(list)
        for listed in self._store.list("a"):
            self._alive[listed.key.split("/")[1]].append(listed)
        intents = list(self._store.list("s"))
        if self._own is not None and all(listed.key != self._own for listed in intents):
            raise RepositoryError(
                f"the store does not list {self._own}, which was made just now: its listings lag, and what"
                " is needed can't be told by them; nothing was deleted; run it again later"
            )
        for listed in intents:
            sid = listed.key.partition("/")[2]
            if not is_hex(sid, 32):
                continue
            self._check()
            made = (*objects.get(sid, ()), *self._alive.get(sid, ()))
            last = max([listed.modified, *(one.modified for one in made)])
            intent = self._intent(listed)
            if intent is not None:
                sessions.append(_Session(SessionId(sid), intent, listed, self._now - last))
        return sessions

    def _intent(self, listed: Listed) -> Intent | None:
        try:
            return read_intent(self._store, listed.key.partition("/")[2])
        except KeyMissingError:
            return None  # ended: its register is there, and is listed after this
        except FormatError as exc:
            if self._now - listed.modified > _HOPELESS_S:
                self._hopeless.append(listed)
                return None  # it can't commit any more, whatever it says
            damage = DamagedError(
                f"intent {listed.key} is damaged: {exc}; what its session needs can't be told, so"
                " nothing was collected; it is passed over 31 days after it was made",
                key=listed.key,
            )
            self._unread.append((listed, damage))
            return None

    def _revoke(self, sessions: Iterable[_Session]) -> None:
        for session in sessions:
            if session.intent.role == "gc" or session.idle_s <= alive.IDLE_S:
                continue
            if self._dry_run:
                continue
            # Looked for first: where only one may write at a time, creating may replace what is there.
            if there(self._store, f"m/{session.pin}"):
                continue
            # Taken: it was committed, or another collector was first.
            with suppress(KeyExistsError, AccessDeniedError):
                self._store.create(f"m/{session.pin}", REVOKED)
                self.collected.revoked.append(session.id)

    def _list_registers(self) -> Mapping[str, Listed]:
        found = {}
        for listed in self._store.list("m"):
            pin = listed.key.partition("/")[2]
            if is_pin(pin):
                found[pin] = listed
        return found

    def _pass_over_ended(self, registers: Iterable[str]) -> None:
        """Do without the intents that can't be read of sessions that have a register, on whatever disk.

        A session has one register, so this is the rule by which every other one is told to have ended.

        Raises:
            DamagedError: a session may still commit, and what it pins can't be told.
        """
        ended = {pin.partition("/")[2] for pin in registers}
        for listed, damage in self._unread:
            if listed.key.partition("/")[2] not in ended:
                raise damage
            self._hopeless.append(listed)

    def _read_manifests(
        self,
        doomed: Collection[str],
        sessions: Iterable[_Session],
        registers: Mapping[str, Listed],
    ) -> tuple[frozenset[str], frozenset[str]]:
        """Note what is referred to; returns the live sessions and their pins.

        Raises:
            _Vanished: a manifest is gone that was there, or a pinned one.
        """
        live: set[str] = set()
        pinned: set[str] = set()
        for session in sessions:
            if session.intent.role == "gc" or session.pin in registers:
                continue
            if self._dry_run and session.idle_s > alive.IDLE_S:
                if session.id not in self.collected.revoked:
                    self.collected.revoked.append(session.id)
                continue
            live.add(session.id)
            live.update(session.intent.brings)
            pinned.update(session.intent.pins)
            # A pin that is not there was looked for in vain, and its session does without. But if it
            # committed while the listing was under way, its pins were free to go from then on.
            if not registers.keys() >= set(session.intent.pins) and there(
                self._store, f"m/{session.pin}"
            ):
                raise _Vanished
        wanted = [pin for pin in registers if pin not in doomed]
        wanted += [pin for pin in pinned if pin in registers and pin in doomed]
        for pin in wanted:
            self._check()
            if pin in self._references.manifests or pin in self._references.marked:
                continue
            try:
                manifest = self._manifest(pin)
            except KeyMissingError as exc:
                raise _Vanished from exc
            if manifest is None:
                self._references.marked.add(pin)
            else:
                self._references.add(pin, manifest)
        return frozenset(live), frozenset(pinned)

    def _adopted(
        self,
        objects: Mapping[str, Sequence[Listed]],
        registers: Mapping[str, Listed],
        live: Collection[str],
    ) -> frozenset[str]:
        """Sessions that were taken over by one that lives, by itself or through others.

        Raises:
            _Vanished: one that took over has committed, or been taken over itself, since the listings.
        """
        found = set()
        for pin in self._references.adopters:
            sid = pin.partition("/")[2]
            if sid not in objects:
                continue
            owner = self._owner(pin)
            if owner is None or owner.partition("/")[2] in live or self._lives(owner, registers):
                found.add(sid)
        return frozenset(found)

    def _owner(self, pin: str) -> str | None:
        """Who a session that was taken over belongs to in the end; None when they go in a circle.

        No writer makes such a thing: nothing is deleted for it.
        """
        seen = set()
        while pin in self._references.adopters:
            if pin in seen:
                return None
            seen.add(pin)
            pin = self._references.adopters[pin]
        return pin

    def _lives(self, pin: str, registers: Mapping[str, Listed]) -> bool:
        """Whether a session that was not listed as live is so now.

        The intent is looked for first: it is older than the mark that named the session, and goes only when
        the session's register is there, which goes only after its tombstone.
        """
        if pin in registers:
            return False
        sid = SessionId(pin.partition("/")[2])
        if self._dry_run and sid in self.collected.revoked:
            return False
        begun = there(self._store, f"s/{sid}")
        if there(self._store, f"m/{pin}"):
            raise _Vanished
        return begun

    def _manifest(self, pin: str) -> Manifest | None:
        """The manifest of a register, None when it holds a mark instead."""
        key = f"m/{pin}"
        try:
            raw = self._get_register(key)
            kind = register_kind(raw)
            if kind == "revoked":
                return None
            if kind == "adopted":
                disk = pin.partition("/")[0]
                self._references.adopters[pin] = f"{disk}/{_adopter(key, raw)}"
                return None
            return self._decode(key, raw)
        except DamagedError as exc:
            way = f"if it can't be repaired, forget it with 'nbdpull forget {key}'"
            if there(self._store, f"f/{pin}"):
                way = "it is forgotten, so wait until its undo window is over, or give --undo-window 0s"
            raise DamagedError(
                f"{exc}; what it refers to can't be told, so nothing was collected; {way}", key=key
            ) from exc

    def _get_register(self, key: str) -> bytes:
        try:
            return self._store.get(key, limit=MANIFEST_MAX)
        except LostBytesError as exc:
            raise DamagedError(f"manifest {key} is damaged: {exc}", key=key) from exc

    # -- deleting ----------------------------------------------------------------------------------

    def _delete_objects(self, view: _View) -> None:
        def garbage() -> Iterator[Listed]:
            for sid, listed in view.objects.items():
                if sid not in view.spared:
                    yield from (one for one in listed if not self._references.spares(one.key))

        for one in self._delete(garbage()):
            if one.key.startswith("d/"):
                self.collected.packs += 1
            else:
                self.collected.indexes += 1

    def _delete_manifests(self, view: _View) -> None:
        gone = [
            listed
            for pin, listed in view.registers.items()
            if pin in view.doomed and pin not in view.pinned
        ]
        self.collected.manifests += sum(1 for _ in self._delete(gone))

    def _delete_marks(self, view: _View) -> None:
        """Delete intents of ended sessions, and what a year has made useless."""
        ended = [
            session.listed
            for session in view.sessions
            if (_is_over(session) if session.intent.role == "gc" else session.pin in view.registers)
        ]
        hopeless = {listed.key: listed for listed in self._hopeless}
        ended += hopeless.values()
        self.collected.intents += sum(1 for _ in self._delete(ended))
        marks = [
            listed
            for listed in view.marks
            if listed.key[0] in "fo" and _is_over_with(listed.key, view)
        ]
        marks += [
            listed
            for listed in self._store.list("t")
            if self._is_old(listed) and listed.key.partition("/")[2] not in view.registers
        ]
        for sid, listed_alive in self._alive.items():
            if sid not in view.live:
                marks += listed_alive
        busy = {session.id for session in view.sessions} | view.objects.keys()
        marks += [
            listed
            for pin, listed in view.registers.items()
            if pin in self._references.marked
            and self._is_old(listed)
            and pin.partition("/")[2] not in busy
        ]
        if self._repository:
            kept = _Spared(self._references, view.spared)
            stale = {one.key: one for one in stale_records(self._store, self._repository, kept)}
            marks += [stale[one.key] for one in view.marks if one.key in stale]
        self.collected.marks += sum(1 for _ in self._delete(marks))

    def _check_fresh(self) -> None:
        """See that this run began lately.

        Raises:
            RepositoryError: others may have taken its intent away, and a copy been made that relies on what is to go.
        """
        age_s = max(now - then for now, then in zip(alive.clocks(), self._began, strict=True))
        if age_s > _STALE_S:
            raise RepositoryError(
                f"this collection began {age_s / 86400:.0f} days ago, at most"
                f" {_STALE_S / 86400:.0f} may pass; what is deleted stays so; run it again"
            )

    def _is_old(self, listed: Listed) -> bool:
        return self._now - listed.modified > _STUB_S

    def _delete(self, objects: Iterable[Listed]) -> Iterator[Listed]:
        """Delete objects, and yield those that are gone."""

        def one(listed: Listed) -> bool:
            self._check()
            self._check_fresh()
            if self._dry_run:
                return True
            try:
                self._store.delete(listed.key)
            except AccessDeniedError as exc:
                _log.debug("%s", exc)
                if exc.until is not None:
                    unlocks.append(exc.until)
                return False
            return True

        unlocks: list[float] = []
        with ThreadPoolExecutor(self._workers, thread_name_prefix="nbdpull-gc") as threads:
            listed = list(objects)
            for done, gone in zip(listed, threads.map(one, listed), strict=True):
                if gone:
                    self.collected.freed_bytes += done.size
                    yield done
                else:
                    self.collected.refused.append(done.key)
        if unlocks:
            self.collected.unlock = min([*unlocks, self.collected.unlock or unlocks[0]])


def _is_over_with(mark: str, view: _View) -> bool:
    """Whether the manifest is gone that a mark is about; of what is no mark of ours, too."""
    parts = mark.split("/")
    pin = "/".join(parts[1:3])
    # A copy that is under way makes the manifest after the note of its time.
    return not is_pin(pin) or (pin not in view.registers and parts[2] not in view.live)


def _is_over(collector: _Session) -> bool:
    """Whether another collector has died, and does not only stand still.

    As long as its intent is there no copy is made that could bring back a key which it is about to delete.
    """
    if alive.has_died(collector.intent.process, collector.id):
        return True
    return collector.idle_s > _HOPELESS_S


def _adopter(key: str, raw: bytes) -> SessionId:
    try:
        return adopter(raw)
    except FormatError as exc:
        raise DamagedError(f"register {key} is damaged: {exc}", key=key) from exc


def _is_number(prefix: str, text: str) -> bool:
    return is_hex(text, 8) if prefix == "d" else text.isascii() and text.isdigit()
