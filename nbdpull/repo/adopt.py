"""Going on with what dead sessions of the same disk had stored.

A session whose process died left packs that no manifest refers to. The next one of the disk takes it over:

    1. find    sessions of the disk without a register, whose process has died, or that idled for a day
    2.         they are named in the intent of the session that begins, with their sealed keys
    3. take    create m/<disk>/<old> = "adopted by <new>": one winner against the old one's commit, a
               collector that revokes it, and others that want it too. If there is a tombstone, it had
               committed once, and what it stored may be half deleted: let go
    4. open    its pack directories are read, and its missing indexes made: its frames are found by digest

From (3) on a collector spares its packs as long as the new session lives, and afterwards what that one's
manifest refers to: the register alone says whose they are (docs/internals/collection.md). What the old
session had itself taken over comes along in the same way.

No frame is read. Where the repository is encrypted the directories are opened with k_meta, which a writer's
key gives, and authenticated by it. A frame's digest is believed as its writer wrote it, as those of every
committed backup are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from nbdpull.errors import DamagedError, StoreError, WrongKeyError
from nbdpull.model.frame import (
    FOOTER_SIZE,
    PACK_HEADER_SIZE,
    FormatError,
    PackHeader,
    decode_footer,
)
from nbdpull.model.ids import BackupId, DiskId, SessionId, is_hex, may_be_of
from nbdpull.model.index import (
    PACKS_PER_INDEX,
    TABLE_MAX,
    Directory,
    IndexTable,
    PackPlace,
    encode_index,
    index_digest,
)
from nbdpull.model.intent import ADOPTS_MAX, Adopts, Intent
from nbdpull.model.manifest import Manifest, SessionRef, Summary, adopted_by, adopter, register_kind
from nbdpull.model.results import Level
from nbdpull.model.sealing import PackKeys, SessionKeys
from nbdpull.model.segment import Packs
from nbdpull.repo import alive
from nbdpull.repo.digestindex import DigestIndex, IndexFinder
from nbdpull.repo.intents import read_intent
from nbdpull.repo.marks import there
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.reuse import FrameFinder, PackListing, ReuseSource
from nbdpull.repo.sessiontable import SessionTable
from nbdpull.repo.store import KeyExistsError, KeyMissingError, Store
from nbdpull.repo.vault import Vault

__all__ = ["Adopted", "Adoption"]

_log = logging.getLogger(__name__)

_WORKERS: Final = 8
_TAIL: Final = 32 << 10
"""Read at a pack's end at once: the directory of some 680 frames, which most packs don't have."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """What was taken over.

    Attributes:
        sessions: those that had stored something.
        packs, nbytes: of theirs, that can be referred to.
    """

    sessions: int = 0
    packs: int = 0
    nbytes: int = 0


class Adoption:
    """The dead sessions of one disk: `find`, then their `names` go into the intent, `take`, `open`."""

    def __init__(
        self,
        store: Store,
        *,
        repository: str,
        disk: DiskId,
        own: SessionId,
        vault: Vault | None = None,
    ) -> None:
        """Prepare.

        Args:
            store: of the repository.
            repository: its id.
            disk: whose sessions are looked for.
            own: the session that begins.
            vault: the keys, where it is encrypted.
        """
        self._store = store
        self._own = own
        self._now: float | None = None
        self._repository = repository
        self._disk = disk
        self._vault = vault
        self._wanted: dict[SessionId, bytes | None] = {}
        self._ours: list[SessionId] = []
        self.adopted = Adopted()

    @property
    def names(self) -> tuple[Adopts, ...]:
        """What the intent says."""
        return tuple(Adopts(sid, keys) for sid, keys in self._wanted.items())

    # -- finding them ------------------------------------------------------------------------------

    def find(self) -> None:
        """Look for dead sessions of the disk that have stored a pack; the newest ones are kept."""
        listed = {
            sid: one.modified
            for one in self._store.list("s")
            if is_hex(sid := one.key.partition("/")[2], 32) and may_be_of(sid, self._disk)
        }
        if not listed:
            return
        ended = {one.key.rpartition("/")[2] for one in self._store.list(f"m/{self._disk}")}
        for sid in sorted(listed.keys() - ended, reverse=True):
            intent = self._dead(SessionId(sid), listed[sid])
            if intent is None:
                continue
            # What it had taken over is to be had through it alone, whether or not it stored anything itself.
            group = {SessionId(sid): intent.keys}
            for one in intent.adopts:
                group.setdefault(one.session, one.keys)
            room = ADOPTS_MAX - len(self._wanted)
            if any(map(self._has_packs, group)):
                self._wanted |= dict(list(group.items())[:room])

    def _has_packs(self, sid: SessionId) -> bool:
        return any(True for _ in self._store.list(f"d/{sid}"))

    def _dead(self, sid: SessionId, made: float) -> Intent | None:
        """The intent of a session of this disk that is known to have died."""
        try:
            intent = read_intent(self._store, sid)
        except (KeyMissingError, FormatError):
            return None
        if intent.role != "backup" or intent.disk != self._disk:
            return None
        return intent if alive.has_died(intent.process, sid) or self._idles(sid, made) else None

    def _idles(self, sid: SessionId, made: float) -> bool:
        """Whether it made no object for so long that a collector would revoke it, by the store's clock."""
        objects = [one for prefix in "dxa" for one in self._store.list(f"{prefix}/{sid}")]
        last = max([made, *(one.modified for one in objects)])
        return self._clock() - last > alive.IDLE_S

    def _clock(self) -> float:
        """The store's clock, when it is first asked for."""
        if self._now is None:
            key = f"a/{self._own}/0"
            self._store.create(key, b"")
            try:
                self._now = self._store.stat(key).modified
            except KeyMissingError:
                return (
                    0.0  # a collector took it away, as there is no intent yet: nothing is idle then
                )
        return self._now

    # -- taking them -------------------------------------------------------------------------------

    def take(self) -> None:
        """Create their registers, once the session's intent names them."""
        own = self._own
        owners = {sid: self._claim(sid) for sid in self._wanted}
        for sid in self._wanted:
            seen: set[SessionId | None] = set()
            owner: SessionId | None = sid
            while owner is not None and owner != own and owner not in seen:
                seen.add(owner)
                owner = owners.get(owner)
            if owner == own:
                self._ours.append(sid)

    def _claim(self, sid: SessionId) -> SessionId | None:
        """Who has the session now: ours, another one that took it over, or None where it is no more."""
        key = f"m/{self._disk}/{sid}"
        own = self._own
        try:
            self._store.create(key, adopted_by(own))
        except KeyExistsError:
            with suppress(FormatError, KeyMissingError):
                raw = self._store.get_range(key, 0, len(adopted_by(own)) + 1)
                if register_kind(raw) == "adopted":
                    return adopter(raw)
            return None
        if there(self._store, f"t/{self._disk}/{sid}"):
            return None  # it had committed, and a collector that deleted its manifest died then
        _log.debug("session %s is taken over by %s", sid, own)
        return own

    # -- what they have ----------------------------------------------------------------------------

    def open(self, table: SessionTable, listing: PackListing) -> list[FrameFinder]:
        """A way to find their frames by digest; none where there are none."""
        sessions: list[SessionRef] = []
        packs: list[tuple[int, int]] = []
        nbytes = 0
        for sid in self._ours:
            sizes = listing.sizes(sid)
            try:
                indexes, seqs = self._indexes(sid, sizes)
            except (DamagedError, FormatError, WrongKeyError, StoreError) as exc:
                _log.debug("nothing of session %s is reused: %s", sid, exc)
                continue
            if not seqs:
                continue
            # Who died between making one and syncing its folder left what a power cut may take away.
            for prefix in "dx":
                self._store.sync(f"{prefix}/{sid}")
            packs += [(len(sessions), seq) for seq in seqs]
            nbytes += sum(sizes[seq] for seq in seqs)
            sessions.append(SessionRef(sid, indexes))
        self.adopted = Adopted(len(sessions), len(packs), nbytes)
        if not packs:
            return []
        reader = _Reader(self._store, self._manifest(sessions), self._vault, packs=packs)
        index = DigestIndex([reader])
        return [IndexFinder(index, [ReuseSource(reader, table, listing)])]

    def _indexes(
        self, sid: SessionId, sizes: Mapping[int, int]
    ) -> tuple[tuple[tuple[int, bytes], ...], list[int]]:
        """Number and digest of each of a session's indexes, and the packs that these have."""
        keys = None
        if self._vault is not None:
            envelope = self._wanted[sid]
            if envelope is None:
                raise FormatError("its intent has no keys")
            keys = self._vault.opener(sid)(envelope)
        numbers = []
        seqs: list[int] = []
        for number in sorted({seq // PACKS_PER_INDEX for seq in sizes}):
            mine = [seq for seq in sorted(sizes) if seq // PACKS_PER_INDEX == number]
            table = self._index(sid, number, keys) or self._make(sid, number, mine, sizes, keys)
            if table is None:
                continue
            digest, there = table
            numbers.append((number, digest))
            seqs += [seq for seq in mine if seq in there]
        return tuple(numbers), seqs

    def _index(
        self, sid: SessionId, number: int, keys: SessionKeys | None
    ) -> tuple[bytes, frozenset[int]] | None:
        """Digest and packs of an index that is there."""
        try:
            raw = self._store.get_range(f"x/{sid}/{number}", 0, TABLE_MAX)
        except KeyMissingError:
            return None
        digest = index_digest(raw, sealed=keys is not None)
        opener = None if self._vault is None else self._vault.opener(sid)
        found = IndexTable.decode(raw, sid=sid, number=number, digest=digest, open_keys=opener)
        return digest, frozenset(found.seqs)

    def _make(
        self,
        sid: SessionId,
        number: int,
        seqs: Sequence[int],
        sizes: Mapping[int, int],
        keys: SessionKeys | None,
    ) -> tuple[bytes, frozenset[int]] | None:
        """Make the index that the session did not live to make, from what its packs say themselves."""
        read = partial(self._directory, sid, keys=keys)
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="nbdpull-adopt") as threads:
            found = zip(seqs, threads.map(read, seqs, [sizes[seq] for seq in seqs]), strict=True)
            directories = {seq: one for seq, one in found if one is not None}
        if not directories:
            return None
        raw, digest = encode_index(sid, number, directories, keys)
        try:
            self._store.create(f"x/{sid}/{number}", raw)
        except KeyExistsError:  # the old session was only stopped, and made it just now
            return self._index(sid, number, keys)
        return digest, frozenset(directories)

    def _directory(
        self, sid: SessionId, seq: int, size: int, *, keys: SessionKeys | None
    ) -> Directory | None:
        """The directory at a pack's end; None where the pack is not what its name says."""
        key = f"d/{sid}/{seq:08x}"
        try:
            header = PackHeader.decode(self._store.get_range(key, 0, PACK_HEADER_SIZE))
            pack_keys = self._check(header, sid, seq, keys)
            tail = self._store.get_range(key, max(0, size - _TAIL), min(size, _TAIL))
            at, _, digest = decode_footer(tail[-FOOTER_SIZE:], size, header.suite)
            length = size - FOOTER_SIZE - at
            raw = tail[-FOOTER_SIZE - length : -FOOTER_SIZE]
            if len(raw) < length:
                raw = self._store.get_range(key, at, length)
            return Directory.decode(raw, PackPlace(size, at, length, digest, pack_keys))
        except (FormatError, WrongKeyError, KeyMissingError) as exc:
            _log.debug("nothing of pack %s is reused: %s", key, exc)
            return None

    def _check(
        self, header: PackHeader, sid: SessionId, seq: int, keys: SessionKeys | None
    ) -> PackKeys | None:
        """The keys of the pack that has this header."""
        own = (header.repository.hex(), header.session.hex(), header.seq, header.suite != 0)
        if own != (self._repository, sid, seq, keys is not None):
            raise FormatError("it is of another pack")
        if keys is None:
            return None
        found = keys.pack(seq, header.salt)
        if not found.fits(header.commitment):
            raise FormatError("it has the commitment of another pack's keys")
        return found

    def _manifest(self, sessions: Sequence[SessionRef]) -> Manifest:
        """What a manifest of these sessions would say, as far as finding frames needs it."""
        summary = Summary(
            backup=BackupId(""),
            vm="",
            chain="",
            level=Level.FULL,
            parent=None,
            time=0.0,
            duration_s=0.0,
            disk="",
            disk_id=self._disk,
            session=sessions[0].sid,
            size=0,
            disk_level=Level.FULL,
            reason="",
            checkpoint=None,
            full_checkpoint=None,
            changed_bytes=0,
            read_bytes=0,
            stored_bytes=0,
            siblings=(),
            tool="",
        )
        return Manifest(summary, self._repository, tuple(sessions), ())


class _Reader(DiskReader):
    """A reader of sessions that no manifest refers to yet: their packs are told."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        vault: Vault | None,
        *,
        packs: Iterable[tuple[int, int]],
    ) -> None:
        super().__init__(store, manifest, vault)
        self._told = Packs.of(packs)

    def packs(self) -> Packs:
        """See `DiskReader.packs`."""
        return self._told
