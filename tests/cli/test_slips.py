"""What is typed by mistake is told, and done nothing for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nbdpull.cli.bars import show_bars
from nbdpull.model.results import Progress, ProgressKind
from tests.cli.conftest import Cli
from tests.ops.retained import Retained, retained


@pytest.fixture
def repo(tmp_path: Path) -> Retained:
    return retained(tmp_path / "repo", 2)


@pytest.mark.parametrize("location", ["s3:/bucket/x", "s3//bucket", "gs:bucket", "az:/c"])
def test_a_location_with_half_a_scheme_is_no_folder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("init", "list"):
        done = cli(verb, "-r", location)
        assert done.exit_code == 2
        assert f"did you mean {location[:2]}://" in done.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s3:").mkdir()
    assert cli("init", "-r", "./s3:/x").exit_code == 0


@pytest.mark.parametrize("verb", [("verify",), ("forget", "--keep-last", "1"), ("repack",)])
def test_a_vm_that_is_called_otherwise_is_told(
    cli: Cli, repo: Retained, verb: tuple[str, ...]
) -> None:
    done = cli(*verb, "-r", repo.path, "--vm", "wbe")
    assert done.exit_code == 1
    assert "no backup is of a VM 'wbe'; there are backups of 'vm1'" in done.stderr
    assert done.stdout == ""


def test_a_chain_that_is_called_otherwise_is_told(cli: Cli, repo: Retained) -> None:
    done = cli("forget", "-r", repo.path, "--keep-last", "1", "--chain", "dialy")
    assert done.exit_code == 1
    assert "no backup is of a chain 'dialy'; there are backups of 'default'" in done.stderr


def test_a_lock_mode_without_a_lock(cli: Cli, tmp_path: Path) -> None:
    done = cli("init", "-r", tmp_path / "new", "--lock-mode", "compliance")
    assert done.exit_code == 2
    assert "give --lock 30d" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_tag_that_is_empty(cli: Cli, repo: Retained) -> None:
    done = cli("forget", "-r", repo.path, "--keep-tag", "")
    assert done.exit_code == 2
    assert "the tag to keep is empty" in done.stderr
    done = cli("backup", "qmp:/nothing", "-r", repo.path, "--tag", "")
    assert done.exit_code == 2
    assert "the tag's name is empty" in done.stderr


def test_a_repository_in_a_repository(cli: Cli, repo: Retained) -> None:
    for verb in (("init", "-r"), ("copy", repo.path)):
        done = cli(*verb, repo.path / "sub")
        assert done.exit_code == 2
        assert f"is inside of the repository {repo.path}" in done.stderr
    assert not (repo.path / "sub").exists()


def test_a_copy_into_itself(cli: Cli, repo: Retained, tmp_path: Path) -> None:
    done = cli("copy", repo.path, f"{repo.path}/")
    assert done.exit_code == 2
    assert "is no replica: it is" in done.stderr
    # One that was made with other tools, and so is an original.
    shutil.copytree(repo.path, tmp_path / "rsynced")
    assert cli("copy", repo.path, tmp_path / "rsynced").exit_code == 2


@pytest.mark.parametrize("how", ["flipped", "emptied"])
def test_a_manifest_that_the_replica_has_damaged_is_no_backup_that_is_there(
    cli: Cli, repo: Retained, tmp_path: Path, how: str
) -> None:
    replica = tmp_path / "replica"
    assert cli("copy", repo.path, replica).exit_code == 0
    key = f"m/{min(repo.pins(1))}"
    path = replica / key
    raw = path.read_bytes()
    path.write_bytes(b"" if how == "emptied" else raw[:90] + bytes([raw[90] ^ 1]) + raw[91:])
    done = cli("copy", repo.path, replica)
    assert done.exit_code == 1
    assert f"manifest {key} is damaged" in done.stderr
    assert "delete it there and copy again" in done.stderr
    path.unlink()
    assert cli("copy", repo.path, replica).exit_code == 0
    assert path.read_bytes() == raw


def test_bars_leave_a_question_for_a_password_on_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show_bars() as progress:
        assert capsys.readouterr().err == ""
        progress(Progress(kind=ProgressKind.DISK_START, verb="restore", disk="vda", total=1))
        progress(Progress(kind=ProgressKind.DISK_END, verb="restore", disk="vda", done=1, total=1))
    assert "vda" in capsys.readouterr().err


def test_a_backup_that_is_named_and_not_copied_is_a_warning(
    cli: Cli, repo: Retained, tmp_path: Path
) -> None:
    replica = tmp_path / "replica"
    assert cli("copy", repo.path, replica).exit_code == 0
    assert cli("forget", repo.ids[0], "-r", replica).exit_code == 0
    assert cli("copy", repo.path, replica).exit_code == 0
    done = cli("copy", repo.path, replica, repo.ids[0])
    assert done.exit_code == 3
    assert f"backup {repo.ids[0]} was not copied: it was forgotten" in done.stderr


def test_locks_of_a_replica_that_can_have_none(cli: Cli, repo: Retained, tmp_path: Path) -> None:
    done = cli("copy", repo.path, tmp_path / "replica", "--lock", "30d")
    assert done.exit_code == 2
    assert "only a repository in S3 can be locked" in done.stderr
    assert not (tmp_path / "replica").exists()
    done = cli("copy", repo.path, tmp_path / "replica", "--rekey", "--lock", "30d")
    assert done.exit_code == 2
    assert "--lock is about a replica" in done.stderr


def test_doctor_tells_where_no_backup_can_go(cli: Cli, repo: Retained, tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(1 << 20))
    replica = tmp_path / "replica"
    assert cli("copy", repo.path, replica).exit_code == 0
    done = cli("doctor", f"disk:{image}", "-r", replica)
    assert done.exit_code == 1
    assert "is a replica" in done.stdout
    key = f"m/{min(repo.pins(0))}"
    (repo.path / key).write_bytes(b"no manifest")
    done = cli("doctor", f"disk:{image}", "-r", repo.path)
    assert f"manifest {key} is damaged" in done.stdout
