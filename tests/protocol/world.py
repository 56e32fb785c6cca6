"""A repository that writers, collectors and others work on, and what must be true of it at any time."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import pytest

from nbdpull.errors import Error
from nbdpull.model.config import Config
from nbdpull.model.grain import GRAIN
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest
from nbdpull.model.outcomes import VerifyResult
from nbdpull.model.results import Level
from nbdpull.ops.copy import CopyOptions, _copy
from nbdpull.ops.forget import ForgetOptions, _forget
from nbdpull.ops.repack import RepackOptions, _Repack
from nbdpull.ops.undo import UndoOptions, _undo
from nbdpull.ops.verify import VerifyOptions, _Verify
from nbdpull.repo import repository as repository_module
from nbdpull.repo.location import new_store, open_store
from nbdpull.repo.repository import Backup, ParentGoneError, Repository
from nbdpull.repo.store import Store
from tests.repo.helpers import restore, store_changes, summary_for

__all__ = ["GRAINS", "World"]

GRAINS: Final = 6
SIZE: Final = GRAINS * GRAIN


def _content(disk: bytes, seed: int, rng: random.Random) -> tuple[bytes, dict[int, bytes | None]]:
    """A later state of a disk, and its changes."""
    out = bytearray(disk)
    changes: dict[int, bytes | None] = {}
    for at in rng.sample(range(GRAINS), 2):
        new = None if rng.random() < 0.2 else seed.to_bytes(4, "big") * (GRAIN // 4)
        changes[at] = new
        out[at * GRAIN : (at + 1) * GRAIN] = new or bytes(GRAIN)
    return bytes(out), changes


@dataclass
class World:
    """What was acknowledged to whom.

    Attributes:
        committed: what each acknowledged backup holds.
        possible: what a backup holds that was about to be committed, acknowledged or not.
        forgotten: backups that somebody at least began to forget.
    """

    config: Config = field(default_factory=lambda: Config(id=secrets.token_hex(16)))
    committed: dict[str, bytes] = field(default_factory=dict)
    possible: dict[str, bytes] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def repository(self, store: Store) -> Repository:
        """The repository, as one process sees it."""
        return Repository(store, "memory", self.config)

    # -- what processes do -----------------------------------------------------------------------

    def back_up(
        self,
        store: Store,
        rng: random.Random,
        *,
        level: Level = Level.INCREMENTAL,
        disks: int = 1,
    ) -> str:
        """One backup, on top of a new one or of the last full; returns its id when it is durable."""
        repository = self.repository(store)
        backups = [found for found in repository.backups() if found.complete]
        parent: Backup | None = None
        if level is Level.DIFFERENTIAL:
            fulls = [found for found in backups if found.disks[0].level is Level.FULL]
            parent = fulls[-1] if fulls else None
        elif level is Level.INCREMENTAL and backups:
            parent = rng.choice(backups[-3:])
        name = BackupId(f"{rng.getrandbits(64):016x}")
        try:
            content = self._write(repository, rng, name, parent, level, disks)
        except ParentGoneError:
            content = self._write(repository, rng, name, None, level, disks)
        with self.lock:
            self.committed[name] = content
        return name

    def die(self, store: Store, rng: random.Random) -> None:
        """A backup that ends when its packs are durable: the next one takes them over."""
        repository = self.repository(store)
        backups = [found for found in repository.backups() if found.complete]
        with suppress(ParentGoneError):
            parent = rng.choice(backups[-3:]) if backups else None
            self._write(repository, rng, None, parent, Level.INCREMENTAL, 1)

    def _write(
        self,
        repository: Repository,
        rng: random.Random,
        name: BackupId | None,
        parent: Backup | None,
        level: Level,
        disks: int,
    ) -> bytes:
        before = b"".join(bytes([at + 1]) * GRAIN for at in range(GRAINS))
        parents: list[Manifest | None] = [None] * disks
        if parent is not None:
            parents = [repository.manifest(summary) for summary in parent.disks]
            known = self.committed.get(parent.id) or self.possible.get(parent.id)
            before = known or restore(repository.reader(repository.manifest(parent.disks[0])))
        # Of few kinds: what a session that died had stored is then often what the next one needs.
        content, changes = _content(before, rng.randrange(1, 5), rng)
        if parent is None:
            grains = [content[at * GRAIN : (at + 1) * GRAIN] for at in range(GRAINS)]
            changes = {at: raw if any(raw) else None for at, raw in enumerate(grains)}
        sessions = [
            repository.begin(vm="vm", disk=f"vd{number}", parent=one)
            for number, one in enumerate(parents)
        ]
        siblings = tuple((session.disk_id, session.id) for session in sessions)
        try:
            for session, one in zip(sessions, parents, strict=True):
                reader = repository.reader(one) if one is not None else None
                store_changes(session, reader, SIZE, changes)
                session.seal()
            if name is None:
                return content
            with self.lock:
                self.possible[name] = content
            for number, session in enumerate(sessions):
                session.commit(
                    summary_for(
                        session,
                        size=SIZE,
                        backup=name,
                        disk=f"vd{number}",
                        level=Level.FULL if parent is None else level,
                        parent=None if parent is None else parent.id,
                        siblings=siblings,
                        time=time.time(),
                    )
                )
        finally:
            for session in sessions:
                session.abandon()
        return content

    def collect(self, store: Store, *, undo_window_s: float = 0) -> None:
        """One collection."""
        collector = self.repository(store).collector(undo_window_s=undo_window_s)
        collector._workers = 1
        collector.run()

    def forget(self, store: Store, backup: str) -> None:
        """Forget a backup."""
        with self.lock:
            self.forgotten.add(backup)
        with _opened(self.repository(store)):
            _forget(ForgetOptions(repository="memory", backups=(backup,)))

    def undo(self, store: Store, backup: str) -> bool:
        """Bring a backup back; False when it is too late, or was not forgotten."""
        with _opened(self.repository(store)):
            try:
                done = _undo(UndoOptions(repository="memory", backups=(backup,)))
            except Error:
                return False
            if not done.restored:
                return False
        with self.lock:
            self.forgotten.discard(backup)
        return True

    def repack(self, store: Store) -> None:
        """Repack as much as can be."""
        with _opened(self.repository(store)):
            _Repack(RepackOptions(repository="memory", ratio=1.0), None, threading.Event()).run()

    def verify(self, store: Store) -> VerifyResult:
        """Verify everything."""
        with _opened(self.repository(store)):
            return _Verify(VerifyOptions(repository="memory"), None, threading.Event()).run()

    def copy(self, store: Store, replica: Store) -> None:
        """Copy all backups; the replica is made where nothing is."""
        _current.replica = replica
        with _opened(self.repository(store)):
            options = CopyOptions(source="memory", target=_REPLICA)
            _copy(options, None, threading.Event())

    def garbage(self, store: Store) -> list[str]:
        """Packs that no manifest refers to."""
        repository = self.repository(store)
        needed = {
            f"d/{manifest.sessions[session].sid}/{seq:08x}"
            for summary in repository.summaries()
            for manifest in [repository.manifest(summary)]
            for session, seq in manifest.packs()
        }
        return [listed.key for listed in store.list("d") if listed.key not in needed]

    # -- what must be true -----------------------------------------------------------------------

    def check(self, store: Store, *, whole: bool = True) -> int:
        """See that nothing acknowledged is lost, and nothing half is shown; returns how many restored.

        Without `whole` backups may be missing, and those that are shown must restore.
        """
        repository = self.repository(store)
        assert repository.unreadable() == []
        shown = {backup.id: backup for backup in repository.backups()}
        wanted = self.committed.keys() - self.forgotten if whole else set()
        assert wanted <= shown.keys(), f"lost: {sorted(wanted - shown.keys())}"
        restored = 0
        for name, backup in shown.items():
            if not backup.complete:
                assert name not in wanted
                continue
            assert self.restore(repository, backup)
            restored += 1
        return restored

    def restore(self, repository: Repository, backup: Backup) -> bool:
        """Restore all disks of a backup and compare; False when packs of it are said to be missing."""
        for summary in backup.disks:
            reader = repository.reader(repository.manifest(summary))
            if reader.missing_packs():
                return False
            got = restore(reader)
            expected = self.committed.get(backup.id) or self.possible.get(backup.id, got)
            assert got == expected, f"{backup.id} restores to other bytes"
        return True


_current = threading.local()


def _open(*_args: object, **_kwargs: object) -> Repository:
    opened: Repository = _current.repository
    return opened


@contextmanager
def _opened(repository: Repository) -> Iterator[None]:
    """In this thread, verbs that open a repository get this one. Needs `memory_repositories`."""
    _current.repository = repository
    try:
        yield
    finally:
        del _current.repository


_REPLICA: Final = "replica"


def _open_replica(location: str) -> Store:
    """The store that a copy goes to."""
    if location != _REPLICA:
        return open_store(location)
    found: Store = _current.replica
    return found


def _new_replica(location: str) -> tuple[Store, int]:
    """The same when there is no repository in it."""
    return (_open_replica(location), 0) if location == _REPLICA else new_store(location)


@contextmanager
def memory_repositories() -> Iterator[None]:
    """Let verbs open what `World` hands them, instead of a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repository, "open", _open)
        patch.setattr(repository_module, "open_store", _open_replica)
        patch.setattr(repository_module, "new_store", _new_replica)
        yield


Work = Callable[[Store], object]
