"""A storage that answers EIO for some of its bytes, as disks, btrfs and ZFS do: damage like any other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import DamagedError, StoreError
from nbdpull.repo.repository import Repository
from nbdpull.repo.store import LostBytesError
from tests.ops.retained import Retained, retained

SECTOR = 4096


@pytest.fixture
def repo(tmp_path: Path) -> Retained:
    return retained(tmp_path / "repo")


def lose(monkeypatch: pytest.MonkeyPatch, path: Path, at: int) -> None:
    """From now on the sector at `at` of a file can't be read."""
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").readlink() == path and offset <= at < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)


def test_a_frame_that_can_not_be_read_is_named_recorded_and_healed(
    repo: Retained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = repo.manifests[2]["vda"]
    row = next(row for row in repo.repository.reader(manifest).segment(0) if row.session == 0)
    pack = repo.store.path(f"d/{manifest.sessions[0].sid}/{row.seq:08x}")
    with monkeypatch.context() as patch:
        lose(patch, pack, row.offset + 200)
        seen = nbdpull.verify(repo.path)
        assert not seen.ok
        assert seen.recorded == 1
        assert [len(one.ranges) for one in seen.damaged if one.disk == "vda"] == [1, 1, 1]
        with pytest.raises(DamagedError, match=r"are lost: .*Input/output error"):
            nbdpull.restore(repo.path, repo.ids[2], tmp_path / "out")
        # Only its own frame is lost with it.
        assert len(Repository.open(str(repo.path)).damage.lost()) == 1


@pytest.mark.parametrize("at", [0, 100])
def test_a_manifest_that_can_not_be_read_hinders_only_its_own_backup(
    repo: Retained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    key = f"m/{min(repo.pins(0))}"
    with monkeypatch.context() as patch:
        lose(patch, repo.store.path(key), at)
        assert len(nbdpull.list_backups(repo.path)) == 2
        assert nbdpull.show(repo.path, "latest").backup.backup == repo.ids[2]
        repo.check(2, tmp_path / "out")
        seen = nbdpull.verify(repo.path)
        assert key in {one.key for one in seen.damaged}
        with pytest.raises(DamagedError, match=f"{key} is damaged: .*nothing was collected"):
            nbdpull.gc(repo.path)
        repo.add()
        nbdpull.forget(repo.path, [key])
        nbdpull.gc(repo.path, undo_window_s=0)
    assert key not in repo.objects("m")
    repo.check(3, tmp_path / "out")


def test_a_copy_tells_which_pack_can_not_be_read(
    repo: Retained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = repo.store.path(repo.objects("d")[0])
    with monkeypatch.context() as patch:
        lose(patch, pack, 300)
        with pytest.raises(DamagedError, match=f"pack d/{pack.parent.name}/.* is damaged"):
            nbdpull.copy(repo.path, tmp_path / "replica")
    assert len(nbdpull.copy(repo.path, tmp_path / "replica").copied) == 3


def test_a_disk_that_is_gone_is_no_damage(repo: Retained, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_args: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", gone)
    monkeypatch.setattr(Path, "read_bytes", gone)
    with pytest.raises(StoreError, match="look at the kernel's log") as caught:
        repo.store.get(repo.objects("d")[0], limit=1 << 20)
    assert not isinstance(caught.value, LostBytesError)
