"""A repository to be copied, and where its copy is to be."""

from __future__ import annotations

import random
from pathlib import Path

import nbdpull
from nbdpull.model.grain import GRAIN
from nbdpull.model.keysource import KeySource
from nbdpull.repo.location import open_store
from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup
from tests.repo.helpers import CHEAP

KEYS = KeySource(password="correct horse")


class World:
    """A repository with three backups of two disks, and where its replica is to be."""

    def __init__(
        self,
        folder: Path,
        *,
        password: bytes | None = None,
        source: str | None = None,
        target: str | None = None,
    ) -> None:
        self.source = source or str(folder / "one")
        self.target = target or str(folder / "two")
        self.keys = None if password is None else KEYS
        repository = Repository.create(self.source, password=password, kdf=CHEAP)
        rng = random.Random(4)
        size = 40 * GRAIN + 512
        disks = {
            name: Disk(size, {number: rng.randbytes(GRAIN) for number in range(0, 24, seed)})
            for seed, name in enumerate(("vda", "vdb"), 1)
        }
        self.states = [disks]
        manifests = add_backup(repository, disks, time=1.0)
        for step in (2, 3):
            before, disks = disks, {name: disk.changed(step) for name, disk in disks.items()}
            manifests = add_backup(
                repository, disks, before=before, parents=manifests, time=float(step)
            )
            self.states.append(disks)
        self.ids = [backup.id for backup in repository.backups()]

    def copy(self, *backups: str) -> nbdpull.CopyResult:
        return nbdpull.copy(self.source, self.target, backups, keys=self.keys)

    def check(self, backup: str, folder: Path) -> None:
        """The replica alone gives back the disks of a backup."""
        nbdpull.restore(self.target, backup, folder, keys=self.keys)
        for name, disk in self.states[[str(one) for one in self.ids].index(backup)].items():
            assert (folder / f"{name}.raw").read_bytes() == disk.content()

    def objects(self, location: str) -> dict[str, bytes]:
        """Packs, indexes and manifests."""
        store = open_store(location)
        return {
            entry.key: store.get(entry.key, limit=1 << 26)
            for entry in store.list("")
            if entry.key[0] in "dxm"
        }
