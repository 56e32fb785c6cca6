"""What changes an encrypted repository, and which key is enough for it."""

from __future__ import annotations

from pathlib import Path

import pytest

import nbdpull
from nbdpull.repo import slots
from tests.ops.retained import Retained
from tests.repo.helpers import CHEAP, PASSWORD, encrypted


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Retained:
    """Five backups, the first one a full."""
    monkeypatch.setattr(slots, "DEFAULT_KDF", CHEAP)
    made = Retained(tmp_path / "repo", encrypted(tmp_path / "repo"))
    for _ in range(5):
        made.add()
    monkeypatch.setenv("NBDPULL_PASSWORD", PASSWORD.decode())
    return made


@pytest.fixture
def writer(repo: Retained, tmp_path: Path) -> nbdpull.KeySource:
    file = tmp_path / "writer"
    nbdpull.key_export(repo.path, file, writer=True)
    return nbdpull.KeySource(key_file=str(file))


def test_forgetting_collecting_and_repacking_leave_the_others_whole(
    repo: Retained, tmp_path: Path
) -> None:
    nbdpull.forget(repo.path, repo.ids[:2])
    nbdpull.undo(repo.path, [repo.ids[1]])
    assert [info.backup for info in nbdpull.list_backups(repo.path)] == repo.ids[1:]
    done = nbdpull.gc(repo.path, undo_window_s=0)
    assert done.manifests > 0
    nbdpull.forget(repo.path, [repo.ids[2]])
    repacked = nbdpull.repack(repo.path, ratio=1.01)
    assert repacked.stored_bytes > 0
    assert nbdpull.gc(repo.path, undo_window_s=0).packs > 0
    for number in (1, 3, 4):
        repo.check(number, tmp_path / f"restored-{number}")
    assert nbdpull.verify(repo.path).ok


def test_a_writers_key_is_enough_to_forget_and_collect_and_not_to_repack(
    repo: Retained, writer: nbdpull.KeySource, tmp_path: Path
) -> None:
    nbdpull.forget(repo.path, [repo.ids[0]], keys=writer)
    nbdpull.protect(repo.path, [repo.ids[1]], keys=writer)
    assert nbdpull.gc(repo.path, undo_window_s=0, keys=writer).manifests > 0
    with pytest.raises(nbdpull.WrongKeyError, match="writer's"):
        nbdpull.repack(repo.path, keys=writer)
    with pytest.raises(nbdpull.WrongKeyError, match="writer's"):
        nbdpull.verify(repo.path, keys=writer)
    assert len(nbdpull.list_backups(repo.path, keys=writer)) == 4
    repo.check(1, tmp_path / "restored")
    assert nbdpull.verify(repo.path).ok


def test_a_collector_that_can_not_read_a_manifest_deletes_nothing(
    repo: Retained, writer: nbdpull.KeySource
) -> None:
    nbdpull.key_rotate(repo.path)
    keys = nbdpull.KeySource(password=PASSWORD.decode())
    again = type(repo)(repo.path, type(repo.repository).open(str(repo.path), write=True, keys=keys))
    again.add()
    before = {path for path in repo.path.rglob("*") if path.is_file()}
    nbdpull.forget(repo.path, [repo.ids[0]], keys=writer)
    with pytest.raises(nbdpull.WrongKeyError, match="another key"):
        nbdpull.gc(repo.path, undo_window_s=0, keys=writer)
    assert before <= {path for path in repo.path.rglob("*") if path.is_file()}
