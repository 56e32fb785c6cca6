"""Repacking: less space, the same bytes, the same backups."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nbdpull
from nbdpull.model.manifest import Manifest
from nbdpull.ops import repack as repack_module
from nbdpull.ops.recommit import Recommit
from tests.ops.retained import DAY, Retained, retained
from tests.repo.helpers import PASSWORD


@pytest.fixture
def repo(tmp_path: Path) -> Retained:
    """Eight backups, of which the first, a full, is forgotten: later ones need a part of its packs."""
    return with_a_sparse_past(tmp_path, encrypt=False)


def with_a_sparse_past(tmp_path: Path, *, encrypt: bool) -> Retained:
    made = retained(tmp_path / "repo", 8, encrypt=encrypt)
    nbdpull.forget(made.path, [made.ids[0]])
    nbdpull.gc(made.path, undo_window_s=0)
    return made


def stored(repo: Retained) -> int:
    return sum(listed.size for listed in repo.store.list("d"))


def repack(repo: Retained) -> nbdpull.RepackResult:
    done = nbdpull.repack(repo.path, ratio=1.05)
    nbdpull.gc(repo.path, undo_window_s=0)
    return done


def test_space_comes_back_and_every_backup_stays_as_it_was(repo: Retained, tmp_path: Path) -> None:
    before, listed = stored(repo), nbdpull.list_backups(repo.path)
    packs = set(repo.objects("d"))
    told = nbdpull.repack(repo.path, ratio=1.05, dry_run=True)
    done = repack(repo)
    assert done.sparse_packs > 0
    assert (told.sparse_packs, told.sparse_bytes, told.backups) == (
        done.sparse_packs,
        done.sparse_bytes,
        done.backups,
    )
    assert stored(repo) <= before - done.sparse_bytes + done.stored_bytes
    assert stored(repo) < before
    assert len(packs - set(repo.objects("d"))) == done.sparse_packs
    assert nbdpull.list_backups(repo.path) == listed
    for number in range(1, 8):
        repo.check(number, tmp_path / "out")
    assert nbdpull.verify(repo.path).ok
    assert nbdpull.repack(repo.path, ratio=1.05).backups == ()


def test_windows_and_rounds_of_any_size_come_to_the_same(
    repo: Retained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = nbdpull.repack(repo.path, ratio=1.05, dry_run=True)
    monkeypatch.setattr(repack_module, "_WINDOW", 1)
    monkeypatch.setattr(repack_module, "_ROUND_FRAMES", 1)
    assert nbdpull.repack(repo.path, ratio=1.05, dry_run=True).sparse_packs == told.sparse_packs
    done = repack(repo)
    assert (done.sparse_packs, done.sparse_bytes) == (told.sparse_packs, told.sparse_bytes)
    assert set(done.backups) == set(told.backups)
    for number in range(1, 8):
        repo.check(number, tmp_path / "out")
    assert nbdpull.verify(repo.path).ok
    assert nbdpull.repack(repo.path, ratio=1.05).backups == ()


def test_an_encrypted_repository_is_collected_undone_and_repacked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD", PASSWORD.decode())
    repo = with_a_sparse_past(tmp_path, encrypt=True)
    before = stored(repo)
    nbdpull.forget(repo.path, [repo.ids[2]])
    nbdpull.undo(repo.path, [repo.ids[2]])
    assert repack(repo).sparse_packs > 0
    assert stored(repo) < before
    for number in range(1, 8):
        repo.check(number, tmp_path / "out")
    assert nbdpull.verify(repo.path).ok
    monkeypatch.setenv("NBDPULL_PASSWORD", "another")
    with pytest.raises(nbdpull.WrongKeyError):
        nbdpull.gc(repo.path)


def test_what_is_dense_is_left_alone(tmp_path: Path) -> None:
    repo = retained(tmp_path / "repo", 2)
    before = repo.objects()
    assert nbdpull.repack(repo.path).backups == ()
    assert repo.objects() == before


def test_old_manifests_can_be_undone_to_until_their_window_ends(
    repo: Retained, tmp_path: Path
) -> None:
    before = repo.objects("d")
    nbdpull.repack(repo.path, ratio=1.05)
    nbdpull.gc(repo.path)
    assert set(before) <= set(repo.objects("d"))
    repo.age("f", 8 * DAY)
    nbdpull.gc(repo.path)
    assert not set(before) <= set(repo.objects("d"))
    repo.check(7, tmp_path / "out")


def test_a_protected_backup_is_repacked_too(repo: Retained, tmp_path: Path) -> None:
    nbdpull.protect(repo.path, [repo.ids[1]])
    before = stored(repo)
    repack(repo)
    assert stored(repo) < before
    assert nbdpull.show(repo.path, repo.ids[1]).backup.protected
    repo.check(1, tmp_path / "out")


def test_incrementals_go_on_from_a_repacked_backup(repo: Retained, tmp_path: Path) -> None:
    repack(repo)
    found = repo.repository.find(repo.ids[-1])
    repo.manifests[-1] = {one.disk: repo.repository.manifest(one) for one in found.disks}
    repo.add()
    repack(repo)
    repo.check(8, tmp_path / "out")
    assert nbdpull.verify(repo.path).ok


def test_one_that_is_forgotten_at_the_same_moment_is_passed_over(
    repo: Retained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Recommit.__init__

    def late(self: Recommit, repository: object, backup: object, **options: object) -> None:
        if backup.id == repo.ids[2]:  # type: ignore[attr-defined]
            nbdpull.forget(repo.path, [repo.ids[2]])
            nbdpull.gc(repo.path, undo_window_s=0)
        real(self, repository, backup, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Recommit, "__init__", late)
    assert repo.ids[2] not in nbdpull.repack(repo.path, ratio=1.05).backups
    monkeypatch.undo()
    repack(repo)
    assert repo.ids[2] not in [info.backup for info in nbdpull.list_backups(repo.path)]
    for number in (1, 3, 4, 5, 6, 7):
        repo.check(number, tmp_path / "out")


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_killed_between_commits_leaves_each_backup_whole(
    repo: Retained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    listed = nbdpull.list_backups(repo.path)
    real = type(repo.store).create
    count = 0

    def create(self: object, key: str, data: bytes) -> None:
        nonlocal count
        if key.startswith(("m/", "f/")):
            count += 1
            if count > after:
                raise nbdpull.StoreError("the power went")
        real(self, key, data)  # type: ignore[arg-type]

    monkeypatch.setattr(type(repo.store), "create", create)
    with pytest.raises(nbdpull.StoreError, match="power"):
        nbdpull.repack(repo.path, ratio=1.05)
    monkeypatch.undo()
    assert nbdpull.list_backups(repo.path, incomplete=True) == listed
    repack(repo)
    assert nbdpull.list_backups(repo.path, incomplete=True) == listed
    for number in range(1, 8):
        repo.check(number, tmp_path / "out")


@given(
    drop=st.lists(st.sets(st.integers(0, 6), max_size=3), min_size=1, max_size=3),
    ratio=st.sampled_from([1.0, 1.1, 1.4]),
)
@settings(max_examples=8, deadline=None)
def test_any_course_of_forgetting_and_repacking_keeps_the_rest(
    tmp_path_factory: pytest.TempPathFactory, drop: list[set[int]], ratio: float
) -> None:
    folder = tmp_path_factory.mktemp("repack")
    repo = retained(folder / "repo", 4)
    alive = set(range(4))
    for numbers in drop:
        gone = numbers & alive - {len(repo.ids) - 1}
        if gone:
            nbdpull.forget(repo.path, [repo.ids[number] for number in gone])
        alive -= gone
        nbdpull.gc(repo.path, undo_window_s=0)
        nbdpull.repack(repo.path, ratio=ratio)
        nbdpull.gc(repo.path, undo_window_s=0)
        found = repo.repository.find(repo.ids[-1])
        repo.manifests[-1] = _manifests(repo, found.id)
        repo.add()
        alive.add(len(repo.ids) - 1)
        for number in alive:
            repo.check(number, folder / "out")


def _manifests(repo: Retained, backup: str) -> dict[str, Manifest]:
    found = repo.repository.find(backup)
    return {one.disk: repo.repository.manifest(one) for one in found.disks}
