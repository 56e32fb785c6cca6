"""A repository with a few backups of one VM, their contents, and ways to age what is stored."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbdpull
from nbdpull.model.grain import GRAIN
from nbdpull.model.manifest import Manifest
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup
from tests.repo.helpers import encrypted

DAY = 86400.0
SIZE = 40 * GRAIN + 5000


@dataclass
class Retained:
    """Backups by number: ids, and what each disk held."""

    path: Path
    repository: Repository
    ids: list[str] = field(default_factory=list)
    states: list[dict[str, Disk]] = field(default_factory=list)
    manifests: list[dict[str, Manifest]] = field(default_factory=list)

    @property
    def store(self) -> LocalStore:
        store = self.repository._store
        assert isinstance(store, LocalStore)
        return store

    def add(self, *, full: bool = False, count: int = 6, taken: float | None = None) -> str:
        """One more backup, on top of the last one."""
        taken = time.time() if taken is None else taken
        number = len(self.ids)
        if number:
            states = {
                name: disk.changed(number * 10 + at, count=count)
                for at, (name, disk) in enumerate(self.states[-1].items())
            }
        else:
            empty = Disk(SIZE)
            states = {"vda": empty.changed(1, count=60), "vdb": empty.changed(2, count=60)}
        before = self.states[-1] if number and not full else None
        parents = self.manifests[-1] if number and not full else None
        made = add_backup(self.repository, states, before=before, parents=parents, time=taken)
        self.ids.append(made["vda"].summary.backup)
        self.states.append(states)
        self.manifests.append(made)
        return self.ids[-1]

    def check(self, number: int, into: Path) -> None:
        """Restore a backup by its id and compare each byte."""
        into.mkdir(exist_ok=True)
        nbdpull.restore(self.path, self.ids[number], into, force=True)
        for name, disk in self.states[number].items():
            assert (into / f"{name}.raw").read_bytes() == disk.content(), (number, name)

    def objects(self, prefix: str = "") -> list[str]:
        return [listed.key for listed in self.store.list(prefix)]

    def age(self, prefix: str, by_s: float) -> None:
        """Make objects older, by the store's clock."""
        for listed in list(self.store.list(prefix)):
            then = listed.modified - by_s
            os.utime(self.store.path(listed.key), (then, then))

    def pins(self, number: int) -> set[str]:
        return {
            f"{made.summary.disk_id}/{made.summary.session}"
            for made in self.manifests[number].values()
        }


def retained(path: Path, count: int = 3, *, encrypt: bool = False) -> Retained:
    """A repository with `count` backups: a full, and increments.

    For an encrypted one NBDPULL_PASSWORD must be that of `tests.repo.helpers`.
    """
    if encrypt:
        encrypted(path)
    else:
        Repository.create(str(path))
    made = Retained(path, Repository.open(str(path), write=True))
    for _ in range(count):
        made.add()
    return made
