"""A repository: its settings, the backups in it, and the ways to write and to read one.

Keys, every object immutable (docs/internals/format.md):

    nbdpull.json     settings              d/<sid>/<seq>    packs
    s/<sid>          a session's intent    x/<sid>/<n>      session index
    m/<disk>/<sid>   manifest: the commit  t/<disk>/<sid>   tombstone
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from nbdpull.errors import (
    BackupNotFoundError,
    DamagedError,
    RepositoryError,
    RepositoryNotFoundError,
    UnsupportedFormatError,
    UsageError,
    WrongKeyError,
)
from nbdpull.model.config import CONFIG_MAX, Config
from nbdpull.model.crypto import KEY_SIZE, Kdf, new_secret
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import BackupId, DiskId, SessionId, disk_id, is_hex, make_session_id
from nbdpull.model.keyring import DEFAULT_KDF, Ring
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
from nbdpull.model.results import Level
from nbdpull.model.sealing import KeyOpener
from nbdpull.repo.local import LocalStore, sync_folder, told
from nbdpull.repo.password import wants_key
from nbdpull.repo.probe import PROBE, probe
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.reuse import Found, KnownFrame, PackListing, Reuse, ReuseSource
from nbdpull.repo.session import Session
from nbdpull.repo.sessiontable import SessionTable
from nbdpull.repo.slots import add_slot, unlock
from nbdpull.repo.store import KeyExistsError, KeyMissingError, Store
from nbdpull.repo.vault import Vault

__all__ = [
    "Backup",
    "DiskReader",
    "Found",
    "KnownFrame",
    "ParentGoneError",
    "Repository",
    "Session",
]

_CONFIG: Final = "nbdpull.json"
_HEAD_READ: Final = 16 << 10
# In an otherwise empty folder: what mkfs makes, and what an `init` that was killed leaves.
_NOTHING: Final = re.compile(rf"lost\+found|key|{PROBE}[0-9a-f]{{16}}(first|race)|\.tmp-.*")


class ParentGoneError(RepositoryError):
    """The backup that was to be built on is being forgotten."""


@dataclass(frozen=True, slots=True)
class Backup:
    """The manifests of one backup.

    Attributes:
        disks: the summary of each disk that is there, by disk name.
        missing: disk ids whose manifest is not there; a backup with any is not complete.
    """

    id: BackupId
    disks: tuple[Summary, ...]
    missing: tuple[DiskId, ...]

    @property
    def complete(self) -> bool:
        """Whether every disk of the backup is there."""
        return not self.missing

    @property
    def vm(self) -> str:
        """The VM's name."""
        return self.disks[0].vm

    @property
    def chain(self) -> str:
        """The chain's name."""
        return self.disks[0].chain

    @property
    def level(self) -> Level:
        """The backup's level."""
        return self.disks[0].level

    @property
    def parent(self) -> BackupId | None:
        """The backup that changes were counted from."""
        return self.disks[0].parent

    @property
    def time(self) -> float:
        """Start of the point in time."""
        return self.disks[0].time

    @property
    def duration_s(self) -> float:
        """From the freeze to the commit."""
        return self.disks[0].duration_s


class Repository:
    """An open repository.

    Attributes:
        location: as the user gave it.
        id: 32 hex digits.
    """

    def __init__(
        self, store: Store, location: str, config: Config, vault: Vault | None = None
    ) -> None:
        self._store = store
        self._vault = vault
        self.location = location
        self.config = config
        self.id = config.id

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, location: str, *, password: bytes | None = None, kdf: Kdf = DEFAULT_KDF
    ) -> Repository:
        """Make a new repository.

        Args:
            location: a folder that is not there yet, or is empty.
            password: None is without encryption.
            kdf: what the password goes through.

        Raises:
            UsageError: there is one already, or a folder that holds something else.
            StoreError: the storage can't be written, or does not do what a repository needs.
        """
        root = _folder(location)
        with told("use", root):
            if root.exists() and not root.is_dir():
                raise UsageError(f"{root} is a file, expected a folder or nothing")
            if (root / _CONFIG).exists():
                raise UsageError(
                    f"{root} is a repository already; use it, or choose another folder"
                )
            if root.exists() and not all(_NOTHING.fullmatch(path.name) for path in root.iterdir()):
                raise UsageError(f"{root} is not empty; choose an empty or a new folder")
        _make_root(root)
        store = LocalStore(root)
        capabilities = probe(store)
        own = secrets.token_hex(16)
        config = Config.new(own, capabilities, encrypted=password is not None)
        vault = None
        if password is not None:
            # Before the settings: no repository is ever there without its key.
            vault = Vault(Ring(own, os.urandom(KEY_SIZE), ()).rotated(*_new_keys()))
            add_slot(store, vault.ring, password, kdf=kdf)
        try:
            store.create(_CONFIG, config.encode())
        except KeyExistsError as exc:
            raise UsageError(f"{root} was just made a repository by somebody else") from exc
        return cls(store, location, config, vault)

    @classmethod
    def open(
        cls, location: str, *, write: bool = False, keys: KeySource | None = None
    ) -> Repository:
        """Open a repository.

        Args:
            location: where it is.
            write: whether backups will be added.
            keys: what opens an encrypted one; None looks in the environment.

        Raises:
            RepositoryNotFoundError: there is none at `location`.
            WrongKeyError: it is encrypted and the key is another one, or it is not encrypted and a
                key is given.
            UnsupportedFormatError: it needs a feature that this version does not know.
            DamagedError: its settings can't be read.
        """
        store = LocalStore(_folder(location))
        try:
            raw = store.get(_CONFIG, limit=CONFIG_MAX)
        except KeyMissingError as exc:
            raise RepositoryNotFoundError(
                f"no repository at {location}; make one with 'nbdpull init -r {location}'"
            ) from exc
        try:
            config = Config.decode(raw)
        except FormatError as exc:
            raise DamagedError(f"{location}/{_CONFIG} is damaged: {exc}", key=_CONFIG) from exc
        unknown = config.unknown("write" if write else "read")
        if unknown is not None:
            raise UnsupportedFormatError(
                f"repository {location} needs {unknown}, which this nbdpull does not know; use a"
                " newer nbdpull"
            )
        keys = keys or KeySource()
        vault = None
        if config.encrypted:
            vault = Vault(unlock(store, config.id, location, keys))
        elif wants_key(keys):
            # Settings are not authenticated: a store that says "not encrypted" would be given plain data.
            raise WrongKeyError(
                f"a key is given, and repository {location} is not encrypted; if it is not meant to be,"
                " unset NBDPULL_PASSWORD, _FILE, _COMMAND and NBDPULL_KEY_FILE"
            )
        if write:
            store.remove_leftovers()
        return cls(store, location, config, vault)

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

    def scan(self) -> tuple[list[Summary], list[DamagedError]]:
        """The summaries of all manifests, and what is wrong with those that can't be read."""
        summaries: list[Summary] = []
        damaged: list[DamagedError] = []
        for listed in self._store.list("m"):
            try:
                summary = self._summary(listed.key)
            except DamagedError as exc:
                damaged.append(exc)
                continue
            except WrongKeyError as exc:
                # It may be whole: but what needs it must not take it for absent.
                problem = f"manifest {listed.key} can't be read: {exc}"
                damaged.append(DamagedError(problem, key=listed.key))
                continue
            if summary is not None:
                summaries.append(summary)
        return summaries, damaged

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

    def unreadable(self) -> list[DamagedError]:
        """What is wrong with the manifests that can't be read."""
        return self.scan()[1]

    def backups(self) -> list[Backup]:
        """All backups, oldest first, those with disks missing too."""
        grouped: dict[BackupId, list[Summary]] = {}
        for summary in self.summaries():
            grouped.setdefault(summary.backup, []).append(summary)
        found = [_group(backup, summaries) for backup, summaries in grouped.items()]
        return sorted(found, key=lambda backup: (backup.time, backup.id))

    def find(self, name: str, *, vm: str | None = None) -> Backup:
        """The backup with an id, a unique prefix of one, or the newest complete one for ``latest``.

        Raises:
            BackupNotFoundError: none, or more than one, fits.
        """
        backups = [found for found in self.backups() if vm is None or found.vm == vm]
        of_vm = f" of VM '{vm}'" if vm is not None else ""
        if not backups:
            raise BackupNotFoundError(
                f"repository {self.location} has no backup{of_vm}; see 'nbdpull list'"
            )
        if name == "latest":
            complete = [found for found in backups if found.complete]
            names = sorted({found.vm for found in complete})
            if len(names) > 1:
                raise BackupNotFoundError(
                    f"'latest' could be of any of the VMs {', '.join(names)}; choose one with --vm"
                )
            if not complete:
                raise BackupNotFoundError(
                    f"repository {self.location} has no complete backup{of_vm}; see 'nbdpull list'"
                )
            return complete[-1]
        fitting = [found for found in backups if name and found.id.startswith(name)]
        if len(fitting) > 1:
            ids = ", ".join(found.id for found in fitting[:8])
            raise BackupNotFoundError(f"backup '{name}' is not unique: {ids}; give more digits")
        if not fitting:
            raise BackupNotFoundError(
                f"repository {self.location} has no backup '{name}'{of_vm}; see 'nbdpull list'"
            )
        return fitting[0]

    def manifest(self, summary: Summary) -> Manifest:
        """The whole manifest of one disk of a backup.

        Raises:
            DamagedError: it is not what was written.
        """
        key = f"m/{summary.disk_id}/{summary.session}"
        try:
            raw = self._store.get(key, limit=MANIFEST_MAX)
            manifest = Manifest.decode(raw, self._opener(summary.session))
            self._check_place(manifest.summary, manifest.repository, key)
        except KeyMissingError as exc:
            raise DamagedError(f"manifest {key} is missing", key=key) from exc
        except FormatError as exc:
            raise DamagedError(f"manifest {key} is damaged: {exc}", key=key) from exc
        return manifest

    # -- reading and writing one -------------------------------------------------------------------

    def reader(self, manifest: Manifest) -> DiskReader:
        """A reader of one disk of a backup."""
        return DiskReader(self._store, manifest, self._vault)

    def begin(
        self,
        *,
        vm: str,
        disk: str,
        parent: Manifest | None,
        like: Manifest | None = None,
        compression_level: int = 1,
    ) -> Session:
        """Begin to write one disk of a backup.

        The intent is on record before an earlier backup is looked at: from then on a collector spares
        what that one needs.

        Args:
            vm: whose disk it is.
            disk: its name.
            parent: what unchanged ranges are taken from.
            like: an earlier backup of the disk, which a full is compared with: what it has at the same
                place is not stored again. By default the parent. Passed over when it is being
                forgotten.
            compression_level: of zstd.

        Raises:
            ParentGoneError: the parent is being forgotten; begin again without it.
            StoreError: the repository can't be written.
        """
        sid = make_session_id(time.time_ns() // 1_000_000, os.urandom(10))
        vault = self._vault
        keys = None if vault is None else vault.new_session(sid)
        own = disk_id(vm, disk, None if vault is None else vault.ring.digest_key)
        like = (like or parent) if self.reuses else None
        pins = list(dict.fromkeys(_pin(one) for one in (parent, like) if one is not None))
        intent: dict[str, object] = {"role": "backup", "disk": own, "pins": pins}
        if keys is None:
            intent["host"] = socket.gethostname()
        else:
            # All else in it are names of objects, which whoever sees the store sees anyway.
            intent["keys"] = keys.envelope.hex()
        intent["time"] = time.time()
        self._store.create(f"s/{sid}", json.dumps(intent).encode())
        alive = {pin for pin in pins if self._there(f"m/{pin}") and not self._there(f"t/{pin}")}
        if parent is not None and _pin(parent) not in alive:
            raise ParentGoneError(
                f"the backup that was to be built on, m/{_pin(parent)}, is being forgotten"
            )
        table = SessionTable(parent.sessions if parent is not None else (), sid)
        source = None
        if like is not None and _pin(like) in alive:
            source = ReuseSource(self.reader(like), table, PackListing(self._store))
        return Session(
            self._store,
            repository=self.id,
            sid=sid,
            disk_id=own,
            parent=parent,
            compression_level=compression_level,
            table=table,
            reuse=Reuse(source),
            keys=keys,
        )

    @property
    def reuses(self) -> bool:
        """Whether a session may refer to what others stored, beyond what it is built on.

        Not where `create` can't be trusted: then nothing keeps a collector from what is pinned.
        """
        return "single_writer" not in self.config.features.get("write", ())

    def _there(self, key: str) -> bool:
        try:
            self._store.stat(key)
        except KeyMissingError:
            return False
        return True


def _pin(manifest: Manifest) -> str:
    """How an intent names a manifest."""
    return f"{manifest.summary.disk_id}/{manifest.summary.session}"


def _new_keys() -> tuple[bytes, bytes]:
    """A private key and a writer key."""
    return new_secret(), os.urandom(KEY_SIZE)


def _group(backup: BackupId, summaries: Iterable[Summary]) -> Backup:
    ordered = tuple(sorted(summaries, key=lambda summary: summary.disk))
    there = {(summary.disk_id, summary.session) for summary in ordered}
    wanted = {pair for summary in ordered for pair in summary.siblings}
    missing = tuple(sorted(disk for disk, _ in wanted - there))
    return Backup(backup, ordered, missing)


def _folder(location: str) -> Path:
    """The folder of a location.

    Raises:
        UsageError: a location of another kind.
    """
    if not location:
        raise UsageError("the repository's location is empty; give a folder with -r")
    parts = urlsplit(location)
    if "://" not in location:
        return Path(location).absolute()
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return Path(unquote(parts.path)).absolute()
    raise UsageError(
        f"repository {location} is of a kind that this version does not know; expected a folder"
    )


def _make_root(root: Path) -> None:
    """Make the folder, and its entry and those above it durable."""
    with told("make", root):
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
        for folder in missing or [root]:
            sync_folder(folder.parent)
