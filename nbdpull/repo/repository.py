"""A repository: its settings, the backups in it, and the ways to write and to read one.

Keys, every object immutable (docs/internals/format.md):

    nbdpull.json     settings              d/<sid>/<seq>    packs
    s/<sid>          a session's intent    x/<sid>/<n>      session index
    m/<disk>/<sid>   manifest: the commit  f/<disk>/<sid>   forgotten
    t/<disk>/<sid>   tombstone             p/<backup>       protected
    b/<sid>/<n>      records of damage and of healing
"""
# What a backup into a repository without a key never uses is loaded where it is used.
# ruff: noqa: PLC0415

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from nbdpull.errors import (
    DamagedError,
    RepositoryError,
    RepositoryNotFoundError,
    UnsupportedFormatError,
    UsageError,
    WrongKeyError,
)
from nbdpull.model.config import CONFIG_MAX, Config, Lock
from nbdpull.model.crypto import KEY_SIZE, Kdf
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import DiskId, SessionId, disk_id, is_hex, session_id_of
from nbdpull.model.intent import Intent
from nbdpull.model.keyring import Ring
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import (
    HEAD_SIZE,
    MANIFEST_MAX,
    Manifest,
    Summary,
    decode_summary,
    register_kind,
    summary_end,
)
from nbdpull.model.sealing import KeyOpener
from nbdpull.repo import marks as marking
from nbdpull.repo.adopt import Adoption
from nbdpull.repo.alive import KeepAlive, process_token
from nbdpull.repo.catalog import Backup, Entry, Unreadable, Vanished, group
from nbdpull.repo.damage import DamageRecords
from nbdpull.repo.digestindex import DigestIndex
from nbdpull.repo.finding import Finder
from nbdpull.repo.location import (
    CONFIG,
    REPLICA,
    check_lockable,
    is_far,
    lock_store,
    new_store,
    open_store,
    tidy,
)
from nbdpull.repo.locks import first_unlock, hold_locks
from nbdpull.repo.password import wants_key
from nbdpull.repo.probe import PROBE, probe
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.reuse import Found, KnownFrame
from nbdpull.repo.reuseplan import ReusePlan, pin_of
from nbdpull.repo.session import Session
from nbdpull.repo.sessiontable import SessionTable
from nbdpull.repo.store import KeyExistsError, KeyMissingError, LostBytesError, Store
from nbdpull.repo.vault import Vault

if TYPE_CHECKING:
    from nbdpull.repo.collect import Collector
    from nbdpull.repo.copier import Copier
    from nbdpull.repo.digestcache import DigestCache
    from nbdpull.repo.slots import Slots

__all__ = [
    "Backup",
    "DigestIndex",
    "DiskReader",
    "Entry",
    "Found",
    "KnownFrame",
    "ParentGoneError",
    "Repository",
    "Session",
    "Unreadable",
    "Vanished",
]

_HEAD_READ: Final = 16 << 10


class ParentGoneError(RepositoryError):
    """The backup that was to be built on is being forgotten."""


class Repository:
    """An open repository.

    Attributes:
        location: as the user gave it.
        id: 32 hex digits.
        damage: what is known to be damaged, and where it was stored anew.
        warnings: what `create` found that the user should know.
    """

    def __init__(
        self, store: Store, location: str, config: Config, vault: Vault | None = None
    ) -> None:
        self._store = store
        self._vault = vault
        self.location = location
        self.config = config
        self.id = config.id
        self.damage = DamageRecords(store, config.id)
        self.warnings: tuple[str, ...] = ()
        self._times: Mapping[str, float] | None = None

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        location: str,
        *,
        password: bytes | None = None,
        kdf: Kdf | None = None,
        lock: Lock | None = None,
    ) -> Repository:
        """Make a new repository.

        Args:
            location: a folder that is not there yet, or is empty.
            password: None is without encryption.
            kdf: what the password goes through; None is Argon2id with 256 MiB.
            lock: of what backups consist of, where the store has such.

        Raises:
            UsageError: there is one already, or a place that holds something else.
            StoreError: the storage can't be written, or does not do what a repository needs.
        """
        if lock is not None:
            check_lockable(location)
        store, keys = new_store(location)
        probed = probe(store, keys=keys)
        own = os.urandom(16).hex()
        config = Config.new(own, probed.capabilities, encrypted=password is not None, lock=lock)
        if lock is not None:
            lock_store(store, lock, trial=f"{PROBE}{own[:16]}lock")
        vault = None
        if password is not None:
            from nbdpull.repo.slots import Slots, new_keys

            # Before the settings: no repository is ever there without its key.
            vault = Vault(Ring(own, os.urandom(KEY_SIZE), ()).rotated(*new_keys()))
            Slots(store, own, location).add(vault.ring, password, kdf=kdf)
        raw = config.encode()
        with suppress(KeyExistsError):
            store.create(CONFIG, raw)
        # Also where it was created: without create-only another one may have overwritten it.
        if store.get(CONFIG, limit=CONFIG_MAX) != raw:
            raise UsageError(f"{location} was just made a repository by somebody else")
        made = cls(store, location, config, vault)
        made.warnings = probed.warnings
        return made

    @classmethod
    def open(
        cls,
        location: str,
        *,
        write: bool = False,
        mend: bool = False,
        keys: KeySource | None = None,
    ) -> Repository:
        """Open a repository.

        Args:
            location: where it is.
            write: whether backups will be added.
            mend: whether what is lost may be put back (`mend`), locked where all is.
            keys: what opens an encrypted one; None looks in the environment.

        Raises:
            RepositoryNotFoundError: there is none at `location`.
            WrongKeyError: it is encrypted and the key is another one, or it is not encrypted and a
                key is given.
            UnsupportedFormatError: it needs a feature that this version does not know.
            DamagedError: its settings can't be read.
        """
        store, config = cls._settings(location, write=write, locks=mend)
        keys = keys or KeySource()
        vault = None
        if config.encrypted:
            from nbdpull.repo.slots import Slots

            vault = Vault(Slots(store, config.id, location).unlock(keys))
        elif wants_key(keys):
            # Settings are not authenticated: a store that says "not encrypted" would be given plain data.
            raise WrongKeyError(
                f"a key is given, and repository {location} is not encrypted; if it is not meant to be,"
                f" unset {keys.variables}_PASSWORD, _FILE, _COMMAND and {keys.variables}_KEY_FILE"
            )
        if write:
            tidy(store)
        return cls(store, location, config, vault)

    def copier(
        self,
        location: str,
        *,
        lock: Lock | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[Copier, Repository]:
        """What copies backups of this repository into its replica at `location`, made if need be; and the replica.

        Args:
            location: of the replica.
            lock: of what backups there consist of, when it is made.
            check: called often; what it raises ends the copy.

        Raises:
            UsageError: something else is there, or a replica with other locks.
            RepositoryError: another repository is there.
            StoreError: the storage can't be used.
        """
        from nbdpull.repo.copier import Copier

        made = False
        warnings: tuple[str, ...] = ()
        try:
            store, config = self._settings(location, write=True)
        except RepositoryNotFoundError:
            warnings = self._make_replica(location, lock)
            store, config = self._settings(location, write=True)
            made = True
        if config.id == self.id and not made and not marking.there(store, REPLICA):
            raise UsageError(
                f"{location} is no replica: it is {self.location} itself, or another original with its id;"
                " copy into an empty place"
            )
        if config.id != self.id:
            raise RepositoryError(
                f"{location} is repository {config.id}, expected a replica of {self.id}; copy into an"
                " empty place"
            )
        if lock is not None and config.lock != lock:
            raise UsageError(
                f"{location} is a replica already, with {'other' if config.lock else 'no'} locks; these are"
                " decided when it is made: leave --lock out, or copy into an empty place"
            )
        if self.config.lock is not None and config.lock is None:
            more = "a replica that does is made in an empty place with --lock"
            warnings += (f"{self.location} locks its backups and {location} does not; {more}",)
        held = config.lock
        copier = Copier(
            self._store,
            store,
            warnings=warnings,
            hold=None if held is None else partial(hold_locks, store, lock=held),
            repository=self.id,
            reader=lambda below, manifest: DiskReader(
                below, manifest, self._vault, DamageRecords(below, self.id)
            ),
            frames=self._vault is None or self._vault.ring.opens_data,
            check=check,
        )
        # It is opened with the same keys, which nobody is asked for again.
        return copier, Repository(store, location, config, self._vault)

    def _make_replica(self, location: str, lock: Lock | None) -> tuple[str, ...]:
        """Make it; what the user should know of its store."""
        from nbdpull.repo.copier import replica_mark

        if lock is not None:
            check_lockable(location)
        try:
            store, keys = new_store(location)
        except UsageError:
            with suppress(RepositoryNotFoundError):
                self._settings(location, write=True)
                return ()  # another copy was faster
            raise
        probed = probe(store, keys=keys)
        config = Config.new(
            self.id, probed.capabilities, encrypted=self.config.encrypted, lock=lock
        )
        if lock is not None:
            lock_store(store, lock, trial=f"{PROBE}{os.urandom(8).hex()}lock")
        # The mark first: no replica is ever there that looks like an original.
        with suppress(KeyExistsError):
            store.create(REPLICA, replica_mark())
        with suppress(KeyExistsError):
            store.create(CONFIG, config.encode())
        return probed.warnings

    def check_original(self) -> None:
        """See that backups may be added.

        Raises:
            UsageError: it is a replica. Two of one id would take each other's checkpoints for leftovers.
        """
        if marking.there(self._store, REPLICA):
            raise UsageError(
                f"{self.location} is a replica, which backups are only copied to; if its original is"
                f" gone for good, delete {REPLICA} in it to go on with it"
            )

    @classmethod
    def slots(cls, location: str) -> Slots:
        """The key slots of an encrypted repository, which no key is needed to list.

        Raises:
            RepositoryNotFoundError: there is none at `location`.
            UsageError: it is not encrypted.
        """
        from nbdpull.repo.slots import Slots

        store, config = cls._settings(location, write=True)
        if not config.encrypted:
            raise UsageError(
                f"repository {location} is not encrypted: it has no keys; that is decided by 'nbdpull"
                " init --encrypt'"
            )
        return Slots(store, config.id, location)

    @staticmethod
    def _settings(location: str, *, write: bool, locks: bool = False) -> tuple[Store, Config]:
        store = open_store(location)
        try:
            raw = store.get(CONFIG, limit=CONFIG_MAX)
        except KeyMissingError as exc:
            raise RepositoryNotFoundError(
                f"no repository at {location}; make one with 'nbdpull init -r {location}'"
            ) from exc
        try:
            config = Config.decode(raw)
        except FormatError as exc:
            raise DamagedError(f"{location}/{CONFIG} is damaged: {exc}", key=CONFIG) from exc
        unknown = config.unknown("write" if write else "read")
        if unknown is not None:
            raise UnsupportedFormatError(
                f"repository {location} needs {unknown}, which this nbdpull does not know; use a"
                " newer nbdpull"
            )
        # Of a copy in a folder, made with other tools, only reading can be gone on with.
        if config.lock is not None and (write or (locks and is_far(location))):
            lock_store(store, config.lock)
        return store, config

    @property
    def vault(self) -> Vault | None:
        """The keys; None where nothing is encrypted."""
        return self._vault

    def check_restorable(self) -> None:
        """See that the key opens disk data, before anything is begun that needs it.

        Raises:
            WrongKeyError: it is a writer's key.
        """
        if self._vault is not None and not self._vault.ring.opens_data:
            raise WrongKeyError(
                f"the key given for repository {self.location} is a writer's: it adds backups and can't"
                " read the data of any; give the password or the recovery key"
            )

    # -- what is there -----------------------------------------------------------------------------

    def entries(self) -> tuple[list[Entry], list[Unreadable]]:
        """All manifests without a tombstone, and those that can't be read and are not forgotten."""
        # Marks first: between the two listings a backup may be committed again and its first manifests
        # be forgotten; so it is seen at least once.
        return self._entries(marking.read_marks(self._store))

    def _entries(self, marks: marking.Marks) -> tuple[list[Entry], list[Unreadable]]:
        entries: list[Entry] = []
        unreadable: list[Unreadable] = []
        for listed in self._store.list("m"):
            pin = listed.key.partition("/")[2]
            if pin in marks.tombstones:
                continue
            forgotten = marks.forgotten.get(pin)
            try:
                summary = self._summary(listed.key)
            except (DamagedError, WrongKeyError) as exc:
                # What needs it must not take it for absent.
                if forgotten is None:
                    unreadable.append(Unreadable(listed.key, exc))
                continue
            if summary is not None:
                entries.append(Entry(summary=summary, stored=listed.modified, forgotten=forgotten))
        return entries, unreadable

    def scan(self) -> tuple[list[Summary], list[Unreadable]]:
        """The summaries of all manifests, and those that can't be read."""
        entries, unreadable = self.entries()
        return [entry.summary for entry in entries], unreadable

    def _summary(self, key: str) -> Summary | None:
        parts = key.split("/")
        if len(parts) != 3 or not is_hex(parts[1], 32) or not is_hex(parts[2], 32):
            return None
        try:
            head = self._store.get_range(key, 0, _HEAD_READ)
            if register_kind(head) in {"revoked", "adopted"}:
                return None
            end = summary_end(head[:HEAD_SIZE])
            if end > len(head):
                head = self._store.get_range(key, 0, end)
            summary, repository = decode_summary(head[:end], self._opener(SessionId(parts[2])))
            self._check_place(summary, repository, key)
        except KeyMissingError:
            return None  # forgotten between the listing and now
        except FormatError as exc:
            raise DamagedError(f"manifest {key} is damaged: {exc}", key=key) from exc
        except WrongKeyError as exc:
            raise WrongKeyError(f"manifest {key} can't be read: {exc}") from exc
        return summary

    def _opener(self, sid: SessionId) -> KeyOpener | None:
        return None if self._vault is None else self._vault.opener(sid)

    def _check_place(self, summary: Summary, repository: str, key: str) -> None:
        if repository != self.id:
            raise FormatError(f"it is of repository {repository}, this one is {self.id}")
        if f"m/{summary.disk_id}/{summary.session}" != key:
            raise FormatError("it belongs under another key")

    def summaries(self) -> list[Summary]:
        """The summaries of all manifests that can be read."""
        return self.scan()[0]

    def unreadable(self) -> list[Unreadable]:
        """The manifests that can't be read."""
        return self.scan()[1]

    def everything(self) -> tuple[list[Backup], list[Unreadable]]:
        """All backups, oldest first, forgotten ones and those with disks missing too; and what can't be read.

        Each manifest is looked at once.
        """
        marks = marking.read_marks(self._store)
        entries, unreadable = self._entries(marks)
        return group(entries, protected=marks.protected), unreadable

    def backups(self, *, forgotten: bool = False) -> list[Backup]:
        """All backups, oldest first, those with disks missing too; on request also forgotten ones."""
        found, _ = self.everything()
        return [backup for backup in found if forgotten or backup.forgotten is None]

    def vanished(self, vm: str, disk: str) -> list[Vanished]:
        """What once were backups of a disk, or may have been: their manifests can't be read any more."""
        own = disk_id(vm, disk, None if self._vault is None else self._vault.ring.digest_key)
        marks = marking.read_marks(self._store)
        entries, unreadable = self._entries(marks)
        damaged = {one.key for one in unreadable}
        # One that is forgotten and damaged is not told of there.
        damaged |= {f"m/{pin}" for pin in marks.forgotten} - {f"m/{one.pin}" for one in entries}
        gone = {f"m/{pin}" for pin in marks.tombstones}
        found = [Vanished(key, damaged=key not in gone) for key in sorted(damaged | gone)]
        return [one for one in found if one.key.startswith(f"m/{own}/")]

    def find(self, name: str, *, vm: str | None = None, forgotten: bool = False) -> Backup:
        """The backup with an id, a unique prefix of one, or the newest complete one for ``latest``.

        `forgotten` ones are only found on request, and never as ``latest``.

        Raises:
            BackupNotFoundError: none, or more than one, fits.
            DamagedError: a manifest that can't be read may be of a newer one than the latest.
            WrongKeyError: the same, or none fits; and the key does not open a manifest that may.
        """
        found = Finder(self.location, *self.everything(), vm=vm)
        return found.latest() if name == "latest" else found.named(name, forgotten=forgotten)

    def manifest(self, summary: Summary) -> Manifest:
        """The whole manifest of one disk of a backup.

        Raises:
            DamagedError: it is not what was written.
        """
        return self._read(f"{summary.disk_id}/{summary.session}")

    def _read(self, pin: str) -> Manifest:
        key = f"m/{pin}"
        try:
            raw = self._store.get(key, limit=MANIFEST_MAX)
        except KeyMissingError as exc:
            raise DamagedError(f"manifest {key} is missing", key=key) from exc
        except LostBytesError as exc:
            raise DamagedError(f"manifest {key} is damaged: {exc}", key=key) from exc
        return self._decode(key, raw)

    def _decode(self, key: str, raw: bytes) -> Manifest:
        try:
            manifest = Manifest.decode(raw, self._opener(SessionId(key.rpartition("/")[2])))
            self._check_place(manifest.summary, manifest.repository, key)
        except FormatError as exc:
            raise DamagedError(f"manifest {key} is damaged: {exc}", key=key) from exc
        except WrongKeyError as exc:
            raise WrongKeyError(f"manifest {key} can't be read: {exc}") from exc
        return manifest

    # -- reading and writing one -------------------------------------------------------------------

    def reader(self, manifest: Manifest) -> DiskReader:
        """A reader of one disk of a backup."""
        return DiskReader(self._store, manifest, self._vault, self.damage)

    def missing(self, manifest: Manifest) -> list[str]:
        """Keys of what a backup refers to that is not there as written, after mending what can be.

        Copies of damaged frames don't count: what is built on it would need them for ever.
        """
        reader = self.reader(manifest)
        missing = reader.missing_packs(copies=False, indexes=True)
        if reader.rebuilt and self.mend(reader):
            missing = self.reader(manifest).missing_packs(copies=False, indexes=True)
        return missing

    def mend(self, reader: DiskReader) -> set[str]:
        """Put session indexes back that are gone and that the reader could do without; their keys.

        One that is there and damaged stays: nothing but a collector deletes.

        Raises:
            StoreError: the repository can't be written.
        """
        mended = set()
        for session, number in reader.rebuilt:
            key = f"x/{reader.manifest.sessions[session].sid}/{number}"
            with suppress(KeyExistsError, DamagedError):
                self._store.create(key, reader.index_object(session, number))
                mended.add(key)
        return mended

    def begin(  # noqa: PLR0913 - keywords, most of them with a default
        self,
        *,
        vm: str,
        disk: str,
        parent: Manifest | None,
        like: Manifest | None = None,
        base: DigestIndex | None = None,
        cache: DigestCache | None = None,
        compression_level: int = 1,
        pins: Sequence[str] = (),
        role: str = "backup",
    ) -> Session:
        """Begin to write one disk of a backup.

        The intent is on record before an earlier backup is looked at: from then on a collector spares
        what that one needs. What dead sessions of the disk had stored is taken over (`repo.adopt`).

        Args:
            vm: whose disk it is.
            disk: its name.
            parent: what unchanged ranges are taken from.
            like: an earlier backup of the disk, which a full is compared with: what it has at the same
                place is not stored again. By default the parent. Passed over when it is being
                forgotten.
            base: frames of other backups, found by digest.
            cache: what is known of all backups, found by digest.
            compression_level: of zstd.
            pins: more manifests (``<disk>/<sid>``) whose packs the caller will refer to.
            role: what the intent calls the session.

        Raises:
            ParentGoneError: one of them is being forgotten; begin again without it.
            StoreError: the repository can't be written.
        """
        vault = self._vault
        own = disk_id(vm, disk, None if vault is None else vault.ring.digest_key)
        sid = session_id_of(own, time.time_ns() // 1_000_000, os.urandom(8))
        # Repacking stores again what is here already: that is its purpose.
        shares = self.reuses and role in {"backup", "rekey"}
        adoption = Adoption(self._store, repository=self.id, disk=own, own=sid, vault=vault)
        if shares and role == "backup":
            adoption.find()
        plan = ReusePlan(
            self._store,
            self._read,
            # What a new backup is to rest on must be there, not only be possible to make again.
            lambda manifest: DiskReader(self._store, manifest, vault, self.damage, rebuild=False),
            needed=[*([pin_of(parent)] if parent is not None else []), *pins],
            like=(like or parent) if shares and role == "backup" else None,
            base=base if shares else None,
            cache=cache if shares else None,
            adoption=adoption,
        )
        # Before the intent, by which others find it: they must not take it for dead.
        alive = KeepAlive(self._store, sid)
        try:
            return self._begin(sid, own, parent, plan, adoption, alive, compression_level, role)
        except BaseException:
            alive.stop()
            raise

    def _begin(
        self,
        sid: SessionId,
        disk: DiskId,
        parent: Manifest | None,
        plan: ReusePlan,
        adoption: Adoption,
        alive: KeepAlive,
        compression_level: int,
        role: str,
    ) -> Session:
        keys = None if self._vault is None else self._vault.new_session(sid)
        intent = Intent(
            role=role,
            disk=disk,
            pins=plan.pins,
            # Where it is encrypted only names of objects, which whoever sees the store sees anyway.
            host=socket.gethostname() if keys is None else "",
            keys=None if keys is None else keys.envelope,
            time=time.time(),
            adopts=adoption.names,
            process=process_token(),
        )
        self._store.create(f"s/{sid}", intent.encode(sid))
        gone = plan.look()
        if gone:
            raise ParentGoneError(
                f"the backup that was to be built on, m/{gone[0]}, is being forgotten"
            )
        adoption.take()
        table = SessionTable(parent.sessions if parent is not None else (), sid)
        return Session(
            self._store,
            repository=self.id,
            sid=sid,
            disk_id=disk,
            parent=parent,
            compression_level=compression_level,
            table=table,
            reuse=plan.open(table),
            keys=keys,
            hold=self._hold if self.config.lock is not None else None,
            alive=alive,
            adopted=adoption.adopted,
        )

    def _hold(self, manifest: Manifest) -> None:
        if self.config.lock is not None:
            hold_locks(self._store, manifest, self.config.lock)

    def locked_until(self, backup: Backup) -> float | None:
        """When the first object can be deleted that a backup needs; None without locks. See `first_unlock`.

        Raises:
            DamagedError: what it needs can't be told.
            StoreError: the store failed.
        """
        if self.config.lock is None:
            return None
        manifests = [self.manifest(summary) for summary in backup.disks]
        return first_unlock(self._store, manifests, self.config.lock)

    @property
    def reuses(self) -> bool:
        """Whether a session may refer to what others stored, beyond what it is built on.

        Not where `create` can't be trusted: then nothing keeps a collector from what is pinned.
        """
        return "single_writer" not in self.config.features.get("write", ())

    def is_alive(self, pin: str) -> bool:
        """Whether a manifest is there, and no collector is about to delete it."""
        return marking.there(self._store, f"m/{pin}") and not marking.there(self._store, f"t/{pin}")

    def pack_sizes(self, sids: Iterable[str]) -> dict[tuple[str, int], int]:
        """Bytes of all packs of these sessions, by session and seq."""
        return {
            (sid, int(listed.key.rpartition("/")[2], 16)): listed.size
            for sid in sids
            for listed in self._store.list(f"d/{sid}")
            if is_hex(listed.key.rpartition("/")[2], 8)
        }

    def stored(self, backup: Backup) -> float:
        """When the store took a backup in; in a replica, when its original's store did.

        By this time rules judge. An original does without such notes: whoever may add a backup could make them.
        """
        if self._times is None:
            replica = marking.there(self._store, REPLICA)
            self._times = marking.original_times(self._store) if replica else {}
        times = [self._times.get(pin) for pin in backup.pins]
        known = [time for time in times if time is not None]
        return max(known) if len(known) == len(times) else backup.stored

    # -- forgetting --------------------------------------------------------------------------------

    def forget(self, pins: Sequence[str], reason: str) -> None:
        """Hide manifests; a collector deletes them when the undo window is over."""
        marking.forget(self._store, pins, reason)

    def forget_replaced(self, pins: Iterable[str]) -> None:
        """Hide manifests whose backup was committed again, protected or not."""
        marking.forget(self._store, pins, marking.REPLACED)

    def protect(self, backup: Backup) -> None:
        """Keep a backup from being forgotten.

        Raises:
            RepositoryError: it was forgotten just now.
        """
        marking.protect(self._store, backup.id, backup.pins)

    def unprotect(self, backup: Backup) -> None:
        """Let a backup be forgotten again."""
        marking.unprotect(self._store, backup.id)

    def collector(
        self,
        *,
        undo_window_s: float,
        exclusive: bool = False,
        dry_run: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> Collector:
        """A run of the garbage collection.

        Raises:
            UnsupportedFormatError: it needs a feature that this version does not know.
            UsageError: the store lets only one process at a time write, and `exclusive` does not say
                that there is no other one.
        """
        from nbdpull.repo.collect import Collector

        unknown = self.config.unknown("gc")
        if unknown is not None:
            raise UnsupportedFormatError(
                f"repository {self.location} needs {unknown}, which this nbdpull does not know; use a"
                " newer nbdpull"
            )
        if "single_writer" in self.config.features.get("gc", ()) and not exclusive:
            raise UsageError(
                f"the store of {self.location} can't tell two writers apart; make sure that nothing else"
                " uses the repository, and give --exclusive"
            )
        return Collector(
            self._store,
            decode=self._decode,
            repository=self.id,
            undo_window_s=undo_window_s,
            dry_run=dry_run,
            check=check,
            host=socket.gethostname() if self._vault is None else "",
        )

    def digest_index(self, backup: Backup) -> DigestIndex:
        """An index of all frames of a backup, for `begin`.

        Raises:
            DamagedError: a manifest is not what was written.
        """
        return DigestIndex([self.reader(self.manifest(summary)) for summary in backup.disks])

    def learn(self, cache: DigestCache, manifest: Manifest) -> None:
        """Have the cache remember what was just committed."""
        cache.learn(self.reader(manifest), pin_of(manifest))
