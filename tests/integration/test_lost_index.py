"""A session index that is lost after a collection deleted one of its packs, so that it can't be made again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import nbdpull
from nbdpull import Level
from nbdpull.errors import DamagedError
from nbdpull.repo import session as session_module
from nbdpull.repo.local import LocalStore
from tests.integration.conftest import Keeper
from tests.support.disk import MIB, Disk, compare, create_disk
from tests.support.process import run


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return create_disk(tmp_path, "vda", size=8 * MIB)


@pytest.fixture
def step(
    keeper: Keeper, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], tuple[nbdpull.BackupResult, Path]]:
    """Writes noise into some MiB of the disk and backs it up; the result, and a copy of the disk."""
    monkeypatch.setattr(session_module, "PACK_SIZE", MIB // 2)  # a pack for each frame

    def take(first: int, count: int) -> tuple[nbdpull.BackupResult, Path]:
        noise = tmp_path / "noise"
        noise.write_bytes(random.Random(first + 10 * count).randbytes(count * MIB))
        command = f"write -q -s {noise} {first}M {count}M"
        run(["qemu-io", "-f", "qcow2", "-c", command, disk.path])
        done = keeper.backup(f"disk:vda={disk.path}")
        return done, Path(shutil.copy(disk.path, tmp_path / f"{done.backup}.qcow2"))

    return take


def stored(keeper: Keeper) -> list[str]:
    """What backups consist of."""
    store = LocalStore(Path(keeper.repository))
    return [one.key for prefix in ("d", "x", "m") for one in store.list(prefix)]


def check(keeper: Keeper, backup: str, image: Path) -> None:
    compare(keeper.restore(backup)["vda"], image, other_format="qcow2")


def collect_and_lose_the_index(keeper: Keeper, old: str) -> str:
    """Forget a backup for good, with a pack that only it needs; the key of the index that has it."""
    store = LocalStore(Path(keeper.repository))
    (index,) = {one.key for one in store.list("x")} - indexes_of_others(keeper, old)
    nbdpull.forget(keeper.repository, [old])
    done = nbdpull.gc(keeper.repository, undo_window_s=0)
    assert (done.packs > 0, done.indexes) == (True, 0)
    store.delete(index)
    return index


def indexes_of_others(keeper: Keeper, own: str) -> set[str]:
    found = nbdpull.list_backups(keeper.repository)
    assert own in {one.backup for one in found}
    store = LocalStore(Path(keeper.repository))
    newest = max(one.key for one in store.list("m"))
    return {one.key for one in store.list(f"x/{newest.rpartition('/')[2]}")}


def test_what_its_other_packs_hold_is_restored_and_the_next_backup_needs_none_of_them(
    keeper: Keeper,
    step: Callable[[int, int], tuple[nbdpull.BackupResult, Path]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, _ = step(0, 4)
    second, then = step(0, 1)
    assert second.level == Level.INCREMENTAL
    index = collect_and_lose_the_index(keeper, first.backup)
    objects = stored(keeper)

    assert [one.backup for one in nbdpull.list_backups(keeper.repository)] == [second.backup]
    for level in ("list", "sample", "full"):
        told = nbdpull.verify(keeper.repository, level=level)
        assert [(one.key, one.ranges) for one in told.damaged] == [(index, ())]
        assert "can't be made again" in told.damaged[0].problem
    check(keeper, second.backup, then)
    assert f"{index} is missing; it can't be made again" in caplog.text
    collected = nbdpull.gc(keeper.repository, undo_window_s=0)
    assert (collected.packs, collected.indexes) == (0, 0)
    with pytest.raises(DamagedError, match="can't be made again"):
        nbdpull.copy(keeper.repository, tmp_path / "replica")
    assert stored(keeper) == objects

    third, last = step(6, 1)
    assert third.level == Level.FULL
    assert index in third.disks[0].reason
    # Of the second's own pack, whose index is there, nothing is stored again.
    assert (third.disks[0].reused_bytes, third.disks[0].stored_bytes // MIB) == (MIB, 4)
    assert nbdpull.verify(keeper.repository, [third.backup], level="full").ok
    check(keeper, third.backup, last)
    fourth, _ = step(7, 1)
    assert (fourth.level, fourth.parent) == (Level.INCREMENTAL, third.backup)
    nbdpull.forget(keeper.repository, [second.backup])
    assert nbdpull.gc(keeper.repository, undo_window_s=0).packs == 4
    assert nbdpull.verify(keeper.repository, level="full").ok


def test_what_a_needed_pack_held_is_told_range_by_range(
    keeper: Keeper, step: Callable[[int, int], tuple[nbdpull.BackupResult, Path]]
) -> None:
    first, _ = step(0, 4)
    second, _ = step(0, 1)
    index = collect_and_lose_the_index(keeper, first.backup)
    store = LocalStore(Path(keeper.repository))
    lost = min(one.key for one in store.list(index.replace("x/", "d/").rpartition("/")[0]))
    store.delete(lost)
    told = {one.key: one.ranges for one in nbdpull.verify(keeper.repository, level="full").damaged}
    assert told.keys() == {index, lost}
    assert told[index] == ()
    ((start, end),) = told[lost]
    assert end - start == MIB
    with pytest.raises(DamagedError, match=lost):
        keeper.restore(second.backup)
    third, last = step(6, 1)
    assert third.level == Level.FULL
    check(keeper, third.backup, last)


def test_what_is_rewritten_is_whole_again(
    keeper: Keeper,
    step: Callable[[int, int], tuple[nbdpull.BackupResult, Path]],
    tmp_path: Path,
) -> None:
    first, _ = step(0, 4)
    second, then = step(0, 1)
    index = collect_and_lose_the_index(keeper, first.backup)
    other = Keeper(str(tmp_path / "other"), keeper.scratch, tmp_path / "from-other")
    nbdpull.init(other.repository)
    nbdpull.copy(keeper.repository, other.repository, rekey=True)
    nbdpull.repack(keeper.repository, ratio=1.0)
    nbdpull.gc(keeper.repository, undo_window_s=0)
    for one in (keeper, other):
        assert nbdpull.verify(one.repository, level="full").ok
        assert [found.backup for found in nbdpull.list_backups(one.repository)] == [second.backup]
        check(one, second.backup, then)
        assert index not in stored(one)
