"""Copying backups into a replica: the same objects, each proved; again and again; beside collectors."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import (
    DamagedError,
    InUseError,
    RepositoryError,
    StoreError,
    UsageError,
)
from nbdpull.model.grain import GRAIN
from nbdpull.model.intent import Intent
from nbdpull.model.keysource import KeySource
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup
from tests.repo.helpers import CHEAP

KEYS = KeySource(password="correct horse")


class World:
    """A repository with three backups of two disks, and where its replica is to be."""

    def __init__(self, folder: Path, *, password: bytes | None = None) -> None:
        self.source, self.target = folder / "one", folder / "two"
        self.keys = None if password is None else KEYS
        repository = Repository.create(str(self.source), password=password, kdf=CHEAP)
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

    def objects(self, which: Path) -> dict[str, bytes]:
        store = LocalStore(which)
        return {
            entry.key: store.path(entry.key).read_bytes()
            for entry in store.list("")
            if entry.key[0] in "dxm"
        }


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_everything_is_copied_as_it_is_and_restores_from_the_replica_alone(
    world: World, tmp_path: Path
) -> None:
    result = world.copy()
    assert list(result.copied) == world.ids
    assert world.objects(world.target) == world.objects(world.source)
    assert result.objects == len(world.objects(world.source))
    assert not list(LocalStore(world.target).list("s"))
    world.source.rename(tmp_path / "gone")
    for backup in world.ids:
        world.check(backup, tmp_path / backup)
    assert nbdpull.verify(world.target).ok


def test_a_second_copy_writes_nothing(world: World) -> None:
    world.copy()
    again = world.copy()
    assert (again.copied, again.objects, list(again.present)) == ((), 0, world.ids)


def test_one_backup_brings_what_it_needs_of_older_ones_and_no_more(
    world: World, tmp_path: Path
) -> None:
    world.copy(world.ids[2])
    assert [backup.backup for backup in nbdpull.list_backups(world.target)] == [world.ids[2]]
    world.check(world.ids[2], tmp_path / "r")
    world.copy(world.ids[0])
    world.check(world.ids[0], tmp_path / "s")


def test_an_encrypted_repository_is_copied_and_opens_with_the_same_password(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, password=b"correct horse")
    world.copy()
    assert world.objects(world.target) == world.objects(world.source)
    world.check(world.ids[1], tmp_path / "r")


@pytest.mark.parametrize("fails_at", range(0, 18, 3))
def test_a_copy_that_was_interrupted_goes_on_where_it_ended(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    create = LocalStore.create
    count = 0

    def failing(self: LocalStore, key: str, data: bytes) -> None:
        nonlocal count
        if self.root == world.target and key[0] in "dxm":
            count += 1
            if count > fails_at:
                raise StoreError("no room")
        create(self, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "create", failing)
        with pytest.raises(StoreError):
            world.copy()
    # What is listed is whole, and a collection takes nothing that is still to be used.
    for backup in nbdpull.list_backups(world.target):
        world.check(backup.backup, tmp_path / "r")
        break
    before = len(world.objects(world.target))
    nbdpull.gc(world.target, undo_window_s=0)
    assert len(world.objects(world.target)) == before
    result = world.copy()
    assert result.objects == len(world.objects(world.source)) - before
    assert world.objects(world.target) == world.objects(world.source)


@pytest.mark.parametrize("prefix", ["d", "x", "m"])
@pytest.mark.parametrize("where", [10, 200, -70, -1])
def test_a_changed_object_is_not_copied(world: World, prefix: str, where: int) -> None:
    store = LocalStore(world.source)
    for entry in list(store.list(prefix)):
        raw = bytearray(store.path(entry.key).read_bytes())
        raw[where] ^= 4
        store.path(entry.key).write_bytes(raw)
    with pytest.raises((DamagedError, nbdpull.BackupNotFoundError)):
        world.copy(*world.ids)
    there = world.objects(world.target) if world.target.exists() else {}
    assert not [key for key in there if key[0] in {prefix, "m"}]


@pytest.mark.parametrize("prefix", ["d", "x"])
def test_a_lost_object_is_told_and_its_backup_not_listed(world: World, prefix: str) -> None:
    store = LocalStore(world.source)
    for entry in list(store.list(prefix)):
        store.delete(entry.key)
    with pytest.raises(DamagedError):
        world.copy()
    assert nbdpull.list_backups(world.target) == ()


def cut(store: LocalStore, key: str) -> None:
    store.path(key).write_bytes(store.path(key).read_bytes()[:-1])


def test_a_pack_that_the_replica_lost_comes_again(world: World, tmp_path: Path) -> None:
    world.copy()
    store = LocalStore(world.target)
    key = next(iter(store.list("d"))).key
    store.delete(key)
    assert world.copy().objects == 1
    world.check(world.ids[2], tmp_path / "r")


def test_a_pack_of_another_size_in_the_replica_is_an_error_and_stays(world: World) -> None:
    world.copy()
    store = LocalStore(world.target)
    key = next(iter(store.list("d"))).key
    cut(store, key)
    with pytest.raises(StoreError, match="delete it there"):
        world.copy()


def test_another_repository_is_refused(world: World) -> None:
    nbdpull.init(world.target)
    with pytest.raises(RepositoryError, match="expected a replica"):
        world.copy()


def test_a_folder_with_something_else_in_it_is_refused(world: World) -> None:
    world.target.mkdir()
    (world.target / "file").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        world.copy()


def test_what_was_forgotten_in_the_replica_does_not_come_back(world: World) -> None:
    world.copy()
    nbdpull.forget(world.target, [world.ids[0]])
    assert world.copy().forgotten == (world.ids[0],)
    nbdpull.gc(world.target, undo_window_s=0)
    assert world.copy().forgotten == (world.ids[0],)
    assert [backup.backup for backup in nbdpull.list_backups(world.target)] == world.ids[1:]


def test_a_replica_takes_no_backups_until_it_is_made_an_original(world: World) -> None:
    world.copy()
    replica = Repository.open(str(world.target), write=True)
    with pytest.raises(UsageError, match="is a replica"):
        replica.check_original()
    LocalStore(world.target).delete("replica.json")
    replica.check_original()


def test_nothing_is_copied_beside_a_collection_that_began_before(world: World) -> None:
    world.copy(world.ids[0])
    LocalStore(world.target).create(f"s/{'ab' * 16}", Intent(role="gc", disk="").encode())
    with pytest.raises(InUseError, match="garbage collection"):
        world.copy()


def test_a_collection_that_begins_meanwhile_spares_what_has_no_manifest_yet(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    create = LocalStore.create
    collected: list[int] = []

    def collecting(self: LocalStore, key: str, data: bytes) -> None:
        if self.root == world.target and key.startswith("m/"):
            done = nbdpull.gc(world.target, undo_window_s=0)
            collected.append(done.packs + done.indexes)
        create(self, key, data)

    monkeypatch.setattr(LocalStore, "create", collecting)
    world.copy()
    assert set(collected) == {0}
    world.check(world.ids[2], tmp_path / "r")


def test_an_incomplete_backup_is_not_copied(world: World) -> None:
    repository = Repository.open(str(world.source), write=True)
    add_backup(repository, world.states[0], commit=frozenset({"vda"}), time=9.0)
    assert list(world.copy().copied) == world.ids
    partial = next(one.id for one in repository.backups() if not one.complete)
    with pytest.raises(RepositoryError, match="incomplete"):
        world.copy(partial)
