"""Forgetting, undoing and protecting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import nbdpull
from nbdpull.ops.undo import _bring_back
from tests.ops.retained import DAY, Retained, retained


@pytest.fixture
def repo(tmp_path: Path) -> Retained:
    return retained(tmp_path / "repo")


def listed(repo: Retained, *, incomplete: bool = False, forgotten: bool = False) -> list[str]:
    found = nbdpull.list_backups(repo.path, incomplete=incomplete, forgotten=forgotten)
    return [info.backup for info in found]


def spread(repo: Retained, days: float) -> None:
    """As if a backup had been made every `days` days, the newest one just now."""
    for number, manifests in enumerate(repo.manifests):
        for made in manifests.values():
            key = f"m/{made.summary.disk_id}"
            for entry in repo.store.list(key):
                if entry.key.endswith(made.summary.session):
                    age_s = (len(repo.ids) - 1 - number) * days * DAY
                    when = repo.store.stat(entry.key).modified - age_s
                    os.utime(repo.store.path(entry.key), (when, when))


def test_a_forgotten_backup_is_hidden_and_the_others_restore(
    repo: Retained, tmp_path: Path
) -> None:
    before = repo.objects("d")
    done = nbdpull.forget(repo.path, [repo.ids[0]])
    assert [one.backup for one in done.dropped] == [repo.ids[0]]
    assert listed(repo) == repo.ids[1:]
    assert listed(repo, forgotten=True) == repo.ids
    assert repo.objects("d") == before
    repo.check(2, tmp_path / "out")
    with pytest.raises(nbdpull.BackupNotFoundError, match="is forgotten; 'nbdpull undo"):
        nbdpull.restore(repo.path, repo.ids[0], tmp_path / "out")
    assert nbdpull.verify(repo.path).ok


def test_latest_is_never_a_forgotten_one(repo: Retained) -> None:
    nbdpull.forget(repo.path, [repo.ids[2]])
    assert nbdpull.show(repo.path, "latest").backup.backup == repo.ids[1]


def test_a_dry_run_tells_and_writes_nothing(repo: Retained) -> None:
    before = repo.objects()
    done = nbdpull.forget(repo.path, policy="keep-last=1 min-keep=1", dry_run=True)
    assert [one.backup for one in done.dropped] == repo.ids[:2]
    assert [one.reasons for one in done.dropped] == [("no rule keeps it",)] * 2
    assert done.kept[0].reasons[0] == "keep-last=1"
    assert repo.objects() == before


def test_a_policy_forgets_what_no_rule_keeps(repo: Retained, tmp_path: Path) -> None:
    for _ in range(3):
        repo.add()
    done = nbdpull.forget(repo.path, policy="keep-last=1")
    assert [one.backup for one in done.kept] == repo.ids[3:]
    assert listed(repo) == repo.ids[3:]
    assert nbdpull.forget(repo.path, policy="keep-last=1").dropped == ()
    repo.check(5, tmp_path / "out")


def test_the_stores_time_decides_not_the_clocks_of_the_writers(repo: Retained) -> None:
    # The writers' times are all within seconds; by the store's they are ten days apart.
    spread(repo, 10)
    done = nbdpull.forget(repo.path, policy="keep-within=5d min-keep=1", dry_run=True)
    assert [one.backup for one in done.kept] == repo.ids[2:]
    assert done.warnings == ()


def test_backups_that_were_copied_here_are_left_alone_and_told_of(tmp_path: Path) -> None:
    repo = retained(tmp_path / "repo", 0)
    for number in range(5):
        repo.add(taken=1000.0 + number * DAY)
    done = nbdpull.forget(repo.path, policy="keep-last=1 min-keep=1")
    assert done.dropped == ()
    assert "--trust-store-time" in done.warnings[0]
    done = nbdpull.forget(repo.path, policy="keep-last=1 min-keep=1", trust_store_time=True)
    assert [one.backup for one in done.kept] == repo.ids[4:]


def test_a_named_one_that_is_protected_stops_all(repo: Retained) -> None:
    nbdpull.protect(repo.path, [repo.ids[1]])
    with pytest.raises(nbdpull.RepositoryError, match="is protected"):
        nbdpull.forget(repo.path, repo.ids[:2])
    assert listed(repo) == repo.ids
    info = nbdpull.show(repo.path, repo.ids[1]).backup
    assert info.protected
    assert nbdpull.unprotect(repo.path, [repo.ids[1]]).backups == (repo.ids[1],)
    nbdpull.forget(repo.path, repo.ids[:2])
    assert listed(repo) == repo.ids[2:]


def test_a_policy_passes_protected_ones_over(repo: Retained) -> None:
    nbdpull.protect(repo.path, [repo.ids[0], repo.ids[0]])
    nbdpull.forget(repo.path, policy="keep-last=1 min-keep=1")
    assert listed(repo) == [repo.ids[0], repo.ids[2]]


def test_a_forgotten_one_can_not_be_protected(repo: Retained) -> None:
    nbdpull.forget(repo.path, [repo.ids[0]])
    with pytest.raises(nbdpull.BackupNotFoundError, match="is forgotten"):
        nbdpull.protect(repo.path, [repo.ids[0]])
    found = repo.repository.find(repo.ids[0], forgotten=True)
    with pytest.raises(nbdpull.RepositoryError, match="forgotten meanwhile"):
        repo.repository.protect(found)
    assert repo.objects("p") == []


def test_undo_brings_back_every_byte_under_the_same_id(repo: Retained, tmp_path: Path) -> None:
    before = {info.backup: info for info in nbdpull.list_backups(repo.path)}
    nbdpull.forget(repo.path, [repo.ids[1]])
    done = nbdpull.undo(repo.path, [repo.ids[1][:6], repo.ids[0]])
    assert (done.restored, done.unchanged) == ((repo.ids[1],), (repo.ids[0],))
    assert {info.backup: info for info in nbdpull.list_backups(repo.path)} == before
    for number in range(3):
        repo.check(number, tmp_path / "out")
    # Once more: what was forgotten before does not matter.
    nbdpull.forget(repo.path, [repo.ids[1]])
    assert listed(repo) == [repo.ids[0], repo.ids[2]]
    nbdpull.undo(repo.path, [repo.ids[1]])
    repo.check(1, tmp_path / "out")


def test_undo_keeps_the_time_at_which_the_backup_was_stored(repo: Retained) -> None:
    repo.age("m", 20 * DAY)
    stored = repo.repository.find(repo.ids[0]).stored
    nbdpull.forget(repo.path, [repo.ids[0]])
    nbdpull.undo(repo.path, [repo.ids[0]])
    assert repo.repository.find(repo.ids[0]).stored == stored


def test_undo_of_what_a_collector_is_deleting_is_refused(repo: Retained) -> None:
    nbdpull.forget(repo.path, [repo.ids[0]])
    backup = repo.repository.find(repo.ids[0], forgotten=True)
    # The collector comes between the look at the backup and the session.
    for pin in backup.pins:
        repo.store.create(f"t/{pin}", b"")
    with pytest.raises(nbdpull.RepositoryError, match="undo window has ended"):
        _bring_back(repo.repository, backup)
    with pytest.raises(nbdpull.BackupNotFoundError):
        nbdpull.undo(repo.path, [repo.ids[0]])


def test_undo_killed_between_two_disks_leaves_the_backup_forgotten(
    repo: Retained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbdpull.forget(repo.path, [repo.ids[1]])
    real = repo.store.create
    made = []

    def create(key: str, data: bytes) -> None:
        made.append(key)
        if sum(name.startswith("m/") for name in made) == 2:
            raise nbdpull.StoreError("the power went")
        real(key, data)

    monkeypatch.setattr(repo.store, "create", create)
    with pytest.raises(nbdpull.StoreError, match="power"):
        _bring_back(repo.repository, repo.repository.find(repo.ids[1], forgotten=True))
    monkeypatch.undo()
    assert listed(repo, incomplete=True) == [repo.ids[0], repo.ids[2]]
    nbdpull.undo(repo.path, [repo.ids[1]])
    repo.check(1, tmp_path / "out")


def test_neither_or_both_of_names_and_policy_are_refused(repo: Retained) -> None:
    for backups, policy in (((), None), ((repo.ids[0],), "keep-last=1")):
        with pytest.raises(nbdpull.UsageError, match="name either"):
            nbdpull.forget(repo.path, backups, policy=policy)
    with pytest.raises(nbdpull.UsageError, match="no rule"):
        nbdpull.forget(repo.path, policy="keep-few=1")


def test_a_damaged_manifest_is_forgotten_by_its_key(repo: Retained) -> None:
    pin = min(repo.pins(0))
    path = repo.store.path(f"m/{pin}")
    raw = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(raw[:100] + b"!" + raw[101:])
    with pytest.raises(nbdpull.UsageError, match="not the key of a damaged"):
        nbdpull.forget(repo.path, [f"m/{min(repo.pins(1))}"])
    assert len(repo.repository.unreadable()) == 1
    done = nbdpull.forget(repo.path, [f"m/{pin}"])
    assert done.damaged == (f"m/{pin}",)
    assert repo.repository.unreadable() == []
