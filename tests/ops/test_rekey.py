"""copy --rekey: the same backups under other keys, stored once, again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import (
    DamagedError,
    RepositoryNotFoundError,
    StoreError,
    UsageError,
    WrongKeyError,
)
from nbdpull.model.frame import FrameKind
from nbdpull.model.grain import GRAIN
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import Summary
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup
from tests.ops.copying import KEYS, World
from tests.repo.helpers import CHEAP

NEW = KeySource(password="new horse", environment=False)


class Rekeyed(World):
    """A `World` whose target is a repository with keys of its own, or with none."""

    def __init__(self, folder: Path, *, before: bytes | None, after: bytes | None) -> None:
        super().__init__(folder, password=before)
        Repository.create(self.target, password=after, kdf=CHEAP)
        self.target_keys = None if after is None else NEW

    def rekey(self, *backups: str) -> nbdpull.CopyResult:
        return nbdpull.copy(
            self.source,
            self.target,
            backups,
            rekey=True,
            keys=self.keys,
            target_keys=self.target_keys,
        )

    def opened(self) -> Repository:
        return Repository.open(self.target, keys=self.target_keys)

    def check(self, backup: str, folder: Path) -> None:
        self.keys, kept = self.target_keys, self.keys
        try:
            super().check(backup, folder)
        finally:
            self.keys = kept


KINDS = {
    "other keys": (b"correct horse", b"new horse"),
    "encrypted": (None, b"new horse"),
    "plain": (b"correct horse", None),
    "other id": (None, None),
}


@pytest.fixture(params=KINDS)
def any_world(request: pytest.FixtureRequest, tmp_path: Path) -> Rekeyed:
    before, after = KINDS[request.param]
    return Rekeyed(tmp_path, before=before, after=after)


@pytest.fixture
def world(tmp_path: Path) -> Rekeyed:
    return Rekeyed(tmp_path, before=b"correct horse", after=b"new horse")


def told(summary: Summary) -> Mapping[str, object]:
    """What a backup says of itself, but for what depends on where it is stored."""
    own = {"disk_id", "session", "siblings", "stored_bytes", "stored", "tool"}
    return {name: getattr(summary, name) for name in Summary.__slots__ if name not in own}


def frames(repository: Repository) -> int:
    """How many frames of disk data are stored, needed or not."""
    packs = {}
    for summary in repository.summaries():
        reader = repository.reader(repository.manifest(summary))
        for session, seq in reader.packs():
            entries = reader.directory(session, seq).entries
            packs[reader.key(session, seq)] = int((entries["kind"] == FrameKind.DATA).sum())
    return sum(packs.values())


def test_every_backup_is_there_under_its_own_name_and_restores_without_the_source(
    any_world: Rekeyed, tmp_path: Path
) -> None:
    world = any_world
    source = Repository.open(world.source, keys=world.keys)
    before = source.backups()
    wanted = frames(source)
    result = world.rekey()
    assert (list(result.copied), result.present) == (world.ids, ())
    after = world.opened().backups()
    assert world.opened().id != source.id
    assert [one.stored for one in after] == [one.stored for one in before]
    assert [told(disk) for one in after for disk in one.disks] == [
        told(disk) for one in before for disk in one.disks
    ]
    # What backups shared they share still.
    assert frames(world.opened()) == wanted
    Path(world.source).rename(tmp_path / "gone")
    for backup in world.ids:
        world.check(backup, tmp_path / backup)
    assert nbdpull.verify(world.target, keys=world.target_keys).ok
    assert not world.opened().collector(undo_window_s=0).run().packs


def test_a_second_run_copies_nothing(world: Rekeyed) -> None:
    world.rekey()
    before = world.objects(world.target)
    again = world.rekey()
    assert (again.copied, again.objects, again.written_bytes) == ((), 0, 0)
    assert list(again.present) == world.ids
    assert world.objects(world.target) == before


def test_what_comes_later_is_built_on_what_is_there(world: Rekeyed, tmp_path: Path) -> None:
    """Each run knows only the two repositories: the first one's memory is gone."""
    for number, backup in enumerate(world.ids):
        assert list(world.rekey(*world.ids[: number + 1]).copied) == [backup]
    assert frames(world.opened()) == frames(Repository.open(world.source, keys=KEYS))
    for backup in world.ids:
        world.check(backup, tmp_path / backup)


def test_one_backup_alone_brings_all_that_it_needs(world: Rekeyed, tmp_path: Path) -> None:
    assert list(world.rekey(world.ids[2]).copied) == [world.ids[2]]
    world.check(world.ids[2], tmp_path / "r")
    # An older one finds what is the same in the newer one.
    world.rekey()
    assert frames(world.opened()) == frames(Repository.open(world.source, keys=KEYS))
    for backup in world.ids:
        world.check(backup, tmp_path / backup)


def test_frames_that_vms_share_are_stored_once(tmp_path: Path) -> None:
    """Also by a later run, and although the disks have nothing else in common."""
    world = Rekeyed(tmp_path, before=None, after=b"new horse")
    disk = {"vda": Disk(40 * 65536, {at: bytes([at]) * 65536 for at in range(1, 40, 2)})}
    source = Repository.open(world.source)
    add_backup(source, disk, time=10.0)
    add_backup(source, {"other": Disk(80 * 65536, disk["vda"].grains)}, time=11.0)
    world.rekey(*[one.id for one in source.backups()][:4])
    before = frames(world.opened())
    world.rekey()
    assert frames(world.opened()) == before


@pytest.mark.parametrize("fails_at", [0, 1, 3, 4, 5, 8, 11, 17])
def test_a_run_that_was_interrupted_goes_on(
    world: Rekeyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Whatever is listed is whole; a backup of which one disk was committed is committed again.

    Each backup makes two intents, two indexes and two manifests.
    """
    create = LocalStore.create
    count = 0

    def failing(self: LocalStore, key: str, data: bytes) -> None:
        nonlocal count
        if str(self.root) == world.target:
            count += 1
            if count > fails_at:
                raise StoreError("no room")
        create(self, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "create", failing)
        with pytest.raises(StoreError):
            world.rekey()
    there = [one.id for one in world.opened().backups() if one.complete]
    assert there == world.ids[: len(there)]
    result = world.rekey()
    assert (list(result.present), list(result.copied)) == (there, world.ids[len(there) :])
    shown = world.opened().backups()
    assert [(one.id, one.complete) for one in shown] == [(name, True) for name in world.ids]
    # What the first run had of it is forgotten.
    left = [entry for one in shown for entry in one.superseded]
    assert len(left) == (fails_at % 6 == 5)
    assert all(entry.forgotten for entry in left)
    for backup in world.ids:
        world.check(backup, tmp_path / backup)


def test_a_disk_that_grew_is_copied_too(tmp_path: Path) -> None:
    world = Rekeyed(tmp_path, before=None, after=b"new horse")
    source = Repository.open(world.source)
    grown = {
        name: Disk(65536 * 20_000, {at: raw for at, raw in disk.grains.items() if at < 40})
        for name, disk in world.states[-1].items()
    }
    add_backup(source, grown, time=10.0)
    world.states.append(grown)
    world.ids.append(source.backups()[-1].id)
    world.rekey()
    world.check(world.ids[3], tmp_path / "r")


def test_what_was_forgotten_in_the_target_is_left_out(world: Rekeyed) -> None:
    world.rekey()
    nbdpull.forget(world.target, [world.ids[0]], keys=NEW)
    assert world.rekey().forgotten == (world.ids[0],)


def test_damage_is_told_and_its_backup_not_listed(world: Rekeyed) -> None:
    store = LocalStore(Path(world.source))
    key = max(store.list("d"), key=lambda one: one.key).key
    raw = bytearray(store.path(key).read_bytes())
    raw[len(raw) // 2] ^= 1
    store.path(key).write_bytes(raw)
    with pytest.raises(DamagedError):
        world.rekey()
    assert world.ids[2] not in {one.id for one in world.opened().backups()}


def test_a_part_of_the_target_that_was_lost_is_not_built_on(world: Rekeyed, tmp_path: Path) -> None:
    world.rekey(*world.ids[:2])
    store = LocalStore(Path(world.target))
    for listed in list(store.list("d")):
        store.delete(listed.key)
    world.rekey(world.ids[2])
    world.check(world.ids[2], tmp_path / "r")


def rot(world: Rekeyed, backup: str) -> None:
    """Flip a bit of a frame of a backup in the target, and put that on record."""
    opened = world.opened()
    manifest = opened.manifest(opened.find(backup).disks[0])
    row = list(opened.reader(manifest).segment(0))[1]
    path = LocalStore(Path(world.target)).path(
        f"d/{manifest.sessions[row.session].sid}/{row.seq:08x}"
    )
    raw = bytearray(path.read_bytes())
    raw[row.offset + 64 + 5] ^= 1
    path.write_bytes(raw)
    assert nbdpull.verify(world.target, keys=world.target_keys).recorded == 1


def test_what_the_target_has_on_record_as_lost_is_not_built_on(
    world: Rekeyed, tmp_path: Path
) -> None:
    world.rekey(world.ids[0])
    rot(world, world.ids[0])
    assert list(world.rekey(*world.ids[1:]).copied) == world.ids[1:]
    for backup in world.ids[1:]:
        world.check(backup, tmp_path / backup)


def test_nor_is_a_lost_frame_found_by_its_digest(world: Rekeyed, tmp_path: Path) -> None:
    world.rekey(world.ids[0])
    rot(world, world.ids[0])
    source = Repository.open(world.source, write=True, keys=world.keys)
    disk = Disk(80 * GRAIN, dict(world.states[0]["vda"].grains))
    other = add_backup(source, {"vda": disk}, vm="other", time=9.0)["vda"].summary.backup
    assert list(world.rekey(other).copied) == [other]
    nbdpull.restore(world.target, other, tmp_path / "out", keys=world.target_keys)
    assert (tmp_path / "out" / "vda.raw").read_bytes() == disk.content()


def test_a_map_that_the_target_lost_is_done_without(world: Rekeyed, tmp_path: Path) -> None:
    world.rekey(world.ids[0])
    opened = world.opened()
    manifest = opened.manifest(opened.find(world.ids[0]).disks[0])
    ref = manifest.segments[0]
    assert ref is not None
    path = LocalStore(Path(world.target)).path(
        f"d/{manifest.sessions[ref.session].sid}/{ref.seq:08x}"
    )
    raw = bytearray(path.read_bytes())
    raw[ref.offset + 64 + 5] ^= 1
    path.write_bytes(raw)
    assert list(world.rekey(*world.ids[1:]).copied) == world.ids[1:]
    for backup in world.ids[1:]:
        world.check(backup, tmp_path / backup)


@pytest.mark.parametrize("which", ["source", "target"])
def test_what_was_repacked_meanwhile_is_no_other_backup(
    world: Rekeyed, tmp_path: Path, which: str
) -> None:
    """Its frames lie elsewhere, and are others; what is in the disks is the same."""
    world.rekey(*world.ids[:2])
    location, keys = (
        (world.source, world.keys) if which == "source" else (world.target, world.target_keys)
    )
    nbdpull.forget(location, [world.ids[0]], keys=keys)
    assert nbdpull.repack(location, ratio=1.0, keys=keys).backups
    world.rekey(*world.ids[1:])
    for backup in world.ids[1:]:
        world.check(backup, tmp_path / backup)


def test_two_at_once_both_succeed_and_leave_each_backup_once(
    world: Rekeyed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    create = LocalStore.create
    done = False

    def creating(self: LocalStore, key: str, data: bytes) -> None:
        nonlocal done
        if not done and str(self.root) == world.target and key.startswith("m/"):
            done = True
            world.rekey()
        create(self, key, data)

    monkeypatch.setattr(LocalStore, "create", creating)
    world.rekey()
    assert [one.id for one in world.opened().backups()] == world.ids
    for backup in world.ids:
        world.check(backup, tmp_path / backup)


def _replica(world: Rekeyed) -> str:
    nbdpull.copy(world.source, f"{world.target}-replica", keys=world.keys)
    return f"{world.target}-replica"


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (_replica, UsageError, "leave --rekey out"),
        (lambda world: world.source, UsageError, "the same repository"),
        (lambda world: f"{world.target}-none", RepositoryNotFoundError, "make one with"),
    ],
)
def test_where_nothing_can_be_rekeyed_to(
    world: Rekeyed, target: Callable[[Rekeyed], str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        nbdpull.copy(
            world.source, target(world), rekey=True, keys=world.keys, target_keys=world.keys
        )


def test_a_writers_key_adds_to_the_target_and_copies_nothing_out_of_the_source(
    world: Rekeyed, tmp_path: Path
) -> None:
    for which, keys, name in ((world.source, KEYS, "source"), (world.target, NEW, "target")):
        nbdpull.key_export(which, tmp_path / name, writer=True, keys=keys)
    writer = KeySource(key_file=str(tmp_path / "source"))
    with pytest.raises(WrongKeyError, match="a writer's"):
        nbdpull.copy(world.source, world.target, rekey=True, keys=writer, target_keys=NEW)
    world.target_keys = KeySource(key_file=str(tmp_path / "target"))
    for backup in world.ids:
        world.rekey(backup)
    world.target_keys = NEW
    world.check(world.ids[2], tmp_path / "r")


def test_the_targets_key_is_told_apart_in_the_environment(
    world: Rekeyed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD", "correct horse")
    with pytest.raises(WrongKeyError, match="set NBDPULL_NEW_PASSWORD_FILE"):
        nbdpull.copy(world.source, world.target, rekey=True)
    nbdpull.key_export(world.target, tmp_path / "key", keys=NEW)
    monkeypatch.setenv("NBDPULL_NEW_KEY_FILE", str(tmp_path / "key"))
    assert len(nbdpull.copy(world.source, world.target, rekey=True).copied) == 3
