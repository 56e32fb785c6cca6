"""Copying backups into a replica: the same objects, each proved; again and again; beside collectors."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from nbdpull.model.ids import SessionId
from nbdpull.model.intent import Intent
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import REVOKED
from nbdpull.repo import alive, copyguard
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import Repository
from nbdpull.repo.store import AccessDeniedError
from tests.ops.builder import add_backup
from tests.ops.copying import World


def local(location: str) -> LocalStore:
    return LocalStore(Path(location))


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
    assert not list(local(world.target).list("s"))
    Path(world.source).rename(tmp_path / "gone")
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
        if str(self.root) == world.target and key[0] in "dxm":
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


@pytest.mark.parametrize("prefix", ["d", "m"])
@pytest.mark.parametrize("where", [10, 200, -70, -1])
def test_a_changed_object_is_not_copied(world: World, prefix: str, where: int) -> None:
    store = local(world.source)
    for entry in list(store.list(prefix)):
        raw = bytearray(store.path(entry.key).read_bytes())
        raw[where] ^= 4
        store.path(entry.key).write_bytes(raw)
    with pytest.raises((DamagedError, nbdpull.BackupNotFoundError)):
        world.copy(*world.ids)
    there = world.objects(world.target) if Path(world.target).exists() else {}
    assert not [key for key in there if key[0] in {prefix, "m"}]


@pytest.mark.parametrize("where", [None, 10, 200, -70, -1])
def test_an_index_that_is_lost_or_changed_is_copied_as_it_was_written(
    world: World, where: int | None
) -> None:
    before = world.objects(world.source)
    store = local(world.source)
    for entry in list(store.list("x")):
        raw = bytearray(store.path(entry.key).read_bytes())
        store.delete(entry.key)
        if where is not None:
            raw[where] ^= 4
            store.create(entry.key, bytes(raw))
    world.copy()
    assert world.objects(world.target) == before


def test_an_index_that_the_replica_lost_comes_again(world: World) -> None:
    world.copy()
    store = local(world.target)
    for entry in list(store.list("x")):
        store.delete(entry.key)
    assert world.copy().objects
    assert world.objects(world.target) == world.objects(world.source)


def test_a_lost_pack_is_told_and_its_backup_not_listed(world: World) -> None:
    store = local(world.source)
    for entry in list(store.list("d")):
        store.delete(entry.key)
    with pytest.raises(DamagedError):
        world.copy()
    assert nbdpull.list_backups(world.target) == ()


def cut(store: LocalStore, key: str) -> None:
    store.path(key).write_bytes(store.path(key).read_bytes()[:-1])


def test_a_pack_that_the_replica_lost_comes_again(world: World, tmp_path: Path) -> None:
    world.copy()
    store = local(world.target)
    key = next(iter(store.list("d"))).key
    store.delete(key)
    assert world.copy().objects == 1
    world.check(world.ids[2], tmp_path / "r")


def test_a_pack_of_another_size_in_the_replica_is_an_error_and_stays(world: World) -> None:
    world.copy()
    store = local(world.target)
    key = next(iter(store.list("d"))).key
    cut(store, key)
    with pytest.raises(StoreError, match="delete it there"):
        world.copy()


def test_another_repository_is_refused(world: World) -> None:
    nbdpull.init(world.target)
    with pytest.raises(RepositoryError, match="expected a replica"):
        world.copy()


def test_a_folder_with_something_else_in_it_is_refused(world: World) -> None:
    Path(world.target).mkdir()
    Path(world.target, "file").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        world.copy()


def test_what_was_forgotten_in_the_replica_does_not_come_back(world: World) -> None:
    world.copy()
    nbdpull.forget(world.target, [world.ids[0]])
    assert world.copy().forgotten == (world.ids[0],)
    nbdpull.gc(world.target, undo_window_s=0)
    assert world.copy().forgotten == (world.ids[0],)
    assert [backup.backup for backup in nbdpull.list_backups(world.target)] == world.ids[1:]


def test_what_was_forgotten_in_the_replica_does_not_come_back_when_the_source_repacks_it(
    world: World,
) -> None:
    world.copy()
    nbdpull.forget(world.target, [world.ids[1]])
    nbdpull.forget(world.source, [world.ids[0]])
    assert world.ids[1] in nbdpull.repack(world.source, ratio=1.0).backups
    assert world.copy().forgotten == (world.ids[1],)
    left = [backup.backup for backup in nbdpull.list_backups(world.target)]
    assert left == [world.ids[0], world.ids[2]]


def test_what_was_repacked_takes_the_place_of_what_it_was_in_the_replica_too(
    world: World, tmp_path: Path
) -> None:
    world.copy()
    nbdpull.forget(world.source, [world.ids[0]])
    nbdpull.gc(world.source, undo_window_s=0)
    assert nbdpull.repack(world.source, ratio=1.0).backups
    nbdpull.forget(world.target, [world.ids[0]])
    assert list(world.copy().copied) == world.ids[1:]
    done = nbdpull.gc(world.target, undo_window_s=0)
    nbdpull.gc(world.source, undo_window_s=0)
    assert done.manifests == 6
    assert world.objects(world.target) == world.objects(world.source)
    for backup in world.ids[1:]:
        world.check(backup, tmp_path / backup)


def test_more_sessions_than_one_intent_can_name(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    intents: list[int] = []
    begin = copyguard.CopyGuard._begin

    def counted(self: copyguard.CopyGuard, brings: tuple[SessionId, ...]) -> None:
        intents.append(len(brings))
        begin(self, brings)

    monkeypatch.setattr(copyguard.CopyGuard, "_begin", counted)
    monkeypatch.setattr(copyguard, "_BRINGS_MAX", 2)
    world.copy(world.ids[2])
    assert intents == [2, 2, 2]
    assert not list(local(world.target).list("s"))
    world.check(world.ids[2], tmp_path / "out")


def test_an_intent_that_is_longer_than_any_is_damage_and_no_end(world: World) -> None:
    world.copy(world.ids[0])
    store = local(world.target)
    store.create(f"s/{'ab' * 16}", b"{" * (2 << 20))
    world.copy()
    with pytest.raises(DamagedError, match="more than 1048576 bytes"):
        nbdpull.gc(world.target)
    path = store.path(f"s/{'ab' * 16}")
    then = path.stat().st_mtime - 32 * 86400
    os.utime(path, (then, then))
    nbdpull.gc(world.target)
    assert not path.exists()


def test_what_was_brought_back_in_the_replica_is_there(world: World) -> None:
    world.copy()
    nbdpull.forget(world.target, [world.ids[1]])
    nbdpull.undo(world.target, [world.ids[1]])
    again = world.copy(world.ids[1])
    assert (again.present, again.forgotten, again.warnings) == ((world.ids[1],), (), ())


def test_the_password_is_asked_for_once(tmp_path: Path) -> None:
    world = World(tmp_path, password=b"correct horse")
    asked: list[int] = []

    def password() -> str:
        asked.append(1)
        return "correct horse"

    for count in (1, 2):
        nbdpull.copy(world.source, world.target, keys=KeySource(password=password))
        assert len(asked) == count


def age(location: str, number: int, by_s: float) -> None:
    """Have a store have taken a backup in earlier."""
    repository = Repository.open(location)
    backup = sorted(repository.backups(), key=lambda one: (one.time, one.id))[number]
    for pin in backup.pins:
        path = local(location).path(f"m/{pin}")
        then = path.stat().st_mtime - by_s
        os.utime(path, (then, then))


@pytest.mark.parametrize("chained", [False, True])
def test_rules_judge_a_replica_by_when_the_original_took_its_backups_in(
    world: World, tmp_path: Path, *, chained: bool
) -> None:
    for number, hours in enumerate((5, 3, 1)):
        age(world.source, number, hours * 3600.0)
    policy = nbdpull.Policy(keep_hourly=2, min_keep=1)
    world.copy()
    replica = world.target
    if chained:
        replica = str(tmp_path / "three")
        nbdpull.copy(world.target, replica)
    there = nbdpull.forget(replica, policy=policy, trust_store_time=True, dry_run=True)
    here = nbdpull.forget(world.source, policy=policy, trust_store_time=True, dry_run=True)
    assert [one.backup for one in there.kept] == [one.backup for one in here.kept] == world.ids[1:]
    assert [one.stored_time for one in there.kept] == pytest.approx(
        [one.stored_time for one in here.kept], abs=0.002
    )
    # Once they are gone, so are the notes.
    nbdpull.forget(replica, world.ids)
    for _ in range(2):
        nbdpull.gc(replica, undo_window_s=0)
    assert not list(local(replica).list("o"))


def test_who_may_add_to_an_original_makes_no_backup_older_there(world: World) -> None:
    """Else a stolen host could crowd out good backups with times of its own."""
    before = nbdpull.forget(
        world.source, policy="keep-last=1", trust_store_time=True, dry_run=True
    ).kept
    store = local(world.source)
    for listed in list(store.list("m")):
        store.create(f"o/{listed.key.partition('/')[2]}/1000", b"")
    after = nbdpull.forget(
        world.source, policy="keep-last=1", trust_store_time=True, dry_run=True
    ).kept
    assert after == before


def test_a_replica_takes_no_backups_until_it_is_made_an_original(world: World) -> None:
    world.copy()
    replica = Repository.open(world.target, write=True)
    with pytest.raises(UsageError, match="is a replica"):
        replica.check_original()
    local(world.target).delete("replica.json")
    replica.check_original()


def test_nothing_is_copied_beside_a_collection_that_began_before(world: World) -> None:
    world.copy(world.ids[0])
    local(world.target).create(f"s/{'ab' * 16}", Intent(role="gc", disk="").encode("ab" * 16))
    with pytest.raises(InUseError, match="garbage collection"):
        world.copy()


def test_a_collection_that_begins_meanwhile_spares_what_has_no_manifest_yet(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    create = LocalStore.create
    collected: list[int] = []

    def collecting(self: LocalStore, key: str, data: bytes) -> None:
        if str(self.root) == world.target and key.startswith("m/"):
            done = nbdpull.gc(world.target, undo_window_s=0)
            collected.append(done.packs + done.indexes)
        create(self, key, data)

    monkeypatch.setattr(LocalStore, "create", collecting)
    world.copy()
    assert set(collected) == {0}
    world.check(world.ids[2], tmp_path / "r")


def test_an_incomplete_backup_is_not_copied(world: World) -> None:
    repository = Repository.open(world.source, write=True)
    add_backup(repository, world.states[0], commit=frozenset({"vda"}), time=9.0)
    assert list(world.copy().copied) == world.ids
    partial = next(one.id for one in repository.backups() if not one.complete)
    with pytest.raises(RepositoryError, match="incomplete"):
        world.copy(partial)


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, world: World, work: Callable[[], object], *, before: str
) -> None:
    """Do `work` once, just before the first object below `before` is made in the replica."""
    create = LocalStore.create
    done = False

    def creating(self: LocalStore, key: str, data: bytes) -> None:
        nonlocal done
        if not done and str(self.root) == world.target and key.startswith(before):
            done = True
            work()
        create(self, key, data)

    monkeypatch.setattr(LocalStore, "create", creating)


@pytest.mark.parametrize("before", ["nbdpull.json", "s/", "d/", "x/", "m/"])
@pytest.mark.parametrize("other", [slice(None), slice(1), slice(1, 3)], ids=["same", "one", "two"])
def test_another_copy_of_the_same_meanwhile_hinders_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, other: slice
) -> None:
    """And what a collection sees after the other one has ended is still spared for this one."""

    def work() -> None:
        world.copy(*world.ids[other])
        nbdpull.gc(world.target, undo_window_s=0)

    meanwhile(monkeypatch, world, work, before=before)
    result = world.copy()
    assert sorted([*result.copied, *result.present]) == sorted(world.ids)
    assert world.objects(world.target) == world.objects(world.source)
    assert not list(local(world.target).list("s"))
    world.check(world.ids[2], tmp_path / "r")


def test_copies_at_once_of_all_backups_all_succeed(world: World, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        started = [
            threads.submit(world.copy, *chosen)
            for chosen in (world.ids, world.ids[1:], world.ids[:2], world.ids[::-1])
        ]
        results = [one.result() for one in started]
    assert {one for result in results for one in result.copied} == set(world.ids)
    assert world.objects(world.target) == world.objects(world.source)
    assert not list(local(world.target).list("s"))
    world.check(world.ids[2], tmp_path / "r")


def test_a_copy_that_was_taken_for_dead_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def revoke() -> None:
        monkeypatch.setattr(alive, "IDLE_S", -1.0)
        nbdpull.gc(world.target, undo_window_s=0)
        monkeypatch.undo()

    meanwhile(monkeypatch, world, revoke, before="m/")
    with pytest.raises(StoreError, match="took it for dead"):
        world.copy()
    result = world.copy()
    assert len(result.copied) + len(result.present) == 3
    assert nbdpull.verify(world.target).ok


def test_what_a_revoked_copy_left_is_not_believed_while_a_collection_may_run(world: World) -> None:
    world.copy()
    store = local(world.target)
    store.create(f"m/{'0' * 32}/{'ab' * 16}", REVOKED)
    assert list(world.copy().present) == world.ids
    store.create(f"s/{'cd' * 16}", Intent(role="gc", disk="").encode("cd" * 16))
    with pytest.raises(InUseError, match="garbage collection"):
        world.copy()


def test_a_copy_takes_no_rights_to_delete(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LocalStore, key: str) -> None:
        raise AccessDeniedError(f"{key} stays")

    world.copy(world.ids[0])
    monkeypatch.setattr(LocalStore, "delete", refuse)
    assert list(world.copy().copied) == world.ids[1:]
