"""`latest` and ids, where manifests can't be read: never another backup in the place of the one that was meant."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import BackupNotFoundError, DamagedError, WrongKeyError
from nbdpull.model.config import Config, Lock
from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup
from tests.ops.retained import Retained, retained
from tests.repo.helpers import PASSWORD


@pytest.fixture
def repo(tmp_path: Path) -> Retained:
    return retained(tmp_path / "repo")


def spoil(repo: Retained, pin: str) -> str:
    """Flip a bit in a manifest; its key."""
    key = f"m/{pin}"
    path = repo.store.path(key)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    return key


def test_latest_is_not_the_one_before_a_damaged_one(repo: Retained, tmp_path: Path) -> None:
    key = spoil(repo, min(repo.pins(2)))
    for verb in (
        lambda: nbdpull.restore(repo.path, "latest", tmp_path / "out"),
        lambda: nbdpull.restore(repo.path, "latest", tmp_path / "out", vm="vm1"),
        lambda: nbdpull.show(repo.path, "latest"),
        lambda: nbdpull.copy(repo.path, tmp_path / "replica", ["latest"]),
    ):
        with pytest.raises(
            DamagedError, match=f"is the latest can't be told: manifest {key}.*if {repo.ids[1]} is"
        ):
            verb()
    assert not (tmp_path / "replica").exists()
    # The way out that the message names, and the one that `list` and `gc` name.
    repo.check(1, tmp_path / "one")
    nbdpull.forget(repo.path, [key])
    assert nbdpull.show(repo.path, "latest").backup.backup == repo.ids[1]


def test_a_damaged_one_that_is_older_does_not_matter(repo: Retained) -> None:
    spoil(repo, min(repo.pins(0)))
    assert nbdpull.show(repo.path, "latest").backup.backup == repo.ids[2]


def test_a_damaged_one_of_another_vm_does_not_matter_when_the_vm_is_named(repo: Retained) -> None:
    disks = {"vda": Disk(1 << 20).changed(1)}
    add_backup(repo.repository, disks, vm="other")
    made = add_backup(repo.repository, disks, vm="other")
    summary = made["vda"].summary
    path = repo.store.path(f"m/{summary.disk_id}/{summary.session}")
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    vm = repo.manifests[0]["vda"].summary.vm
    assert nbdpull.show(repo.path, "latest", vm=vm).backup.backup == repo.ids[2]
    with pytest.raises(DamagedError, match="of VM 'other' is the latest"):
        nbdpull.show(repo.path, "latest", vm="other")


def test_an_id_that_may_be_the_damaged_ones_is_not_told_to_be_missing(repo: Retained) -> None:
    for pin in repo.pins(2):
        spoil(repo, pin)
    with pytest.raises(
        DamagedError, match=f"whether there is a backup '{repo.ids[2]}'.* and 1 more"
    ):
        nbdpull.show(repo.path, repo.ids[2])


def test_a_newer_incomplete_one_is_told(repo: Retained, caplog: pytest.LogCaptureFixture) -> None:
    repo.store.path(f"m/{min(repo.pins(2))}").unlink()
    with caplog.at_level(logging.WARNING):
        assert nbdpull.show(repo.path, "latest").backup.backup == repo.ids[1]
    assert f"backup {repo.ids[2]} is newer and not complete" in caplog.text


def test_a_copy_of_all_copies_what_can_be_read_and_says_what_can_not(
    repo: Retained, tmp_path: Path
) -> None:
    key = spoil(repo, min(repo.pins(1)))
    replica = tmp_path / "replica"
    for _ in range(2):
        with pytest.raises(DamagedError, match=f"what can't be read was not: manifest {key}"):
            nbdpull.copy(repo.path, replica)
    assert [one.backup for one in nbdpull.list_backups(replica)] == [repo.ids[0], repo.ids[2]]
    assert nbdpull.verify(replica).ok


def test_a_key_of_an_older_generation_opens_no_newer_backup_and_passes_none_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD", PASSWORD.decode())
    repo = retained(tmp_path / "repo", count=1, encrypt=True)
    old = tmp_path / "old"
    nbdpull.key_export(repo.path, old)
    nbdpull.key_rotate(repo.path)
    repo.repository = Repository.open(str(repo.path), write=True)
    repo.add(full=True)
    repo.check(1, tmp_path / "new")
    monkeypatch.delenv("NBDPULL_PASSWORD")
    monkeypatch.setenv("NBDPULL_KEY_FILE", str(old))
    for verb in (
        lambda: nbdpull.restore(repo.path, "latest", tmp_path / "out"),
        lambda: nbdpull.restore(repo.path, repo.ids[1], tmp_path / "out"),
        lambda: nbdpull.verify(repo.path),
        lambda: nbdpull.copy(repo.path, tmp_path / "replica"),
    ):
        with pytest.raises(WrongKeyError, match="another key"):
            verb()
    repo.check(0, tmp_path / "older")


def test_what_is_not_there_is_told_to_be_missing(repo: Retained) -> None:
    with pytest.raises(BackupNotFoundError, match="has no backup 'ffff'"):
        nbdpull.show(repo.path, "ffff")


def test_a_vm_whose_backups_can_not_be_read_is_not_told_to_be_called_otherwise(
    repo: Retained,
) -> None:
    made = add_backup(repo.repository, {"vda": Disk(1 << 20).changed(1)}, vm="web")
    key = spoil(repo, f"{made['vda'].summary.disk_id}/{made['vda'].summary.session}")
    seen = nbdpull.verify(repo.path, vm="web")
    assert [one.key for one in seen.damaged] == [key]


def test_a_locked_repository_that_was_copied_into_a_folder_verifies(tmp_path: Path) -> None:
    repo = retained(tmp_path / "repo", count=1)
    path = repo.path / "nbdpull.json"
    config = Config.decode(path.read_bytes())
    lock = Lock(mode="compliance", duration_s=86400)
    locked = Config.new(config.id, config.capabilities, encrypted=False, lock=lock)
    path.write_bytes(locked.encode())
    assert nbdpull.verify(repo.path).ok
