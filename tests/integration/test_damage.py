"""A repository that is not as it was written, through the command line: an error, and no wrong byte."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup
from tests.support.disk import identical

MIB = 1 << 20
SIZE = 6 * MIB

Spoil = Callable[[Path], None]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One backup of two disks of incompressible data."""
    path = tmp_path / "repo"
    disks = {
        name: Disk.of(random.Random(seed).randbytes(SIZE)) for seed, name in enumerate("ab", 1)
    }
    add_backup(Repository.create(str(path)), disks)
    for name, disk in disks.items():
        disk.write_to(tmp_path / f"{name}.truth")
    return path


def nbdpull(repository: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "nbdpull", *arguments, "-r", repository]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error: the last line of standard error, and no traceback before it."""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nbdpull: ")
    return last


def packs(repository: Path) -> list[Path]:
    return sorted(path for path in (repository / "d").rglob("*") if path.is_file())


def spoil_settings(repository: Path, **changes: object) -> None:
    path = repository / "nbdpull.json"
    fields = json.loads(path.read_text())
    path.chmod(0o600)
    path.write_text(json.dumps(fields | changes))


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        (("list",), "read"),
        (("show", "latest"), "read"),
        (("verify",), "read"),
        (("restore", "latest", "--to", "OUT"), "read"),
        (("backup", "qmp:/none"), "read"),
        (("backup", "qmp:/none"), "write"),
    ],
)
def test_unknown_mandatory_feature_stops_every_command_that_it_concerns(
    repository: Path, tmp_path: Path, arguments: tuple[str, ...], feature: str
) -> None:
    features: dict[str, list[str]] = {"read": [], "write": [], "gc": []} | {feature: ["later"]}
    spoil_settings(repository, features=features)
    out = tmp_path / "out"
    done = nbdpull(repository, *(word.replace("OUT", str(out)) for word in arguments))
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{feature} feature 'later'" in one_line(done)
    assert not out.exists()


def test_unknown_format_is_refused(repository: Path, tmp_path: Path) -> None:
    spoil_settings(repository, format=2)
    done = nbdpull(repository, "restore", "latest", "--to", tmp_path / "out")
    assert done.returncode == 1
    assert "format 2" in one_line(done)


def test_feature_that_does_not_concern_reading_lets_one_restore(
    repository: Path, tmp_path: Path
) -> None:
    spoil_settings(repository, features={"read": [], "write": ["later"], "gc": ["later"]})
    done = nbdpull(repository, "restore", "latest", "--to", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert identical(tmp_path / "out" / "a.raw", tmp_path / "a.truth")[0]


def flip(path: Path, at: int) -> None:
    path.chmod(0o600)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_flipped_byte_in_a_pack_leaves_no_file_and_names_what_is_lost(
    repository: Path, tmp_path: Path, form: str
) -> None:
    pack = packs(repository)[0]
    flip(pack, pack.stat().st_size // 2)
    out = tmp_path / "out"
    done = nbdpull(repository, "restore", "latest", "--to", out, "--format", form)
    assert done.returncode == 1
    line = one_line(done)
    assert str(pack.relative_to(repository)) in line
    assert "are lost" in line
    # The other disk may be there, whole; nothing of the damaged one is.
    for path in out.iterdir():
        same, words = identical(path, tmp_path / f"{path.stem}.truth", one_format=form)
        assert same, words
    assert len(list(out.iterdir())) < 2


def test_flipped_byte_writes_no_wrong_byte_into_a_pipe(repository: Path, tmp_path: Path) -> None:
    for pack in packs(repository):
        flip(pack, pack.stat().st_size // 2)
    line: list[str | Path] = [
        sys.executable,
        "-m",
        "nbdpull",
        "restore",
        "latest",
        "-r",
        repository,
    ]
    done = subprocess.run([*line, "--disk", "a", "--to", "-"], capture_output=True, check=False)
    assert done.returncode == 1
    assert len(done.stdout) < SIZE
    assert (tmp_path / "a.truth").read_bytes().startswith(done.stdout)


@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut"])
def test_missing_pack_is_told_before_anything_is_written(
    repository: Path, tmp_path: Path, *, cut: bool
) -> None:
    pack = packs(repository)[0]
    if cut:
        pack.chmod(0o600)
        pack.write_bytes(pack.read_bytes()[: pack.stat().st_size // 2])
    else:
        pack.unlink()
    out = tmp_path / "out"
    done = nbdpull(repository, "restore", "latest", "--to", out)
    assert done.returncode == 1
    assert str(pack.relative_to(repository)) in one_line(done)
    assert not out.exists() or not list(out.iterdir())


def test_pack_that_lost_only_its_footer_restores_exactly(repository: Path, tmp_path: Path) -> None:
    """A restore does without what stands around the frames; verify tells of it."""
    pack = packs(repository)[0]
    pack.chmod(0o600)
    pack.write_bytes(pack.read_bytes()[:-1])
    out = tmp_path / "out"
    assert nbdpull(repository, "restore", "latest", "--to", out).returncode == 0
    for name in "ab":
        same, words = identical(out / f"{name}.raw", tmp_path / f"{name}.truth")
        assert same, words
    assert nbdpull(repository, "verify").returncode == 1


@pytest.mark.parametrize("how", ["flip", "remove"])
def test_verify_tells_what_is_damaged(repository: Path, how: str) -> None:
    pack = packs(repository)[0]
    if how == "flip":
        flip(pack, pack.stat().st_size // 2)
    else:
        pack.unlink()
    done = nbdpull(repository, "verify", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert [damage["key"] for damage in told["damaged"]] == [str(pack.relative_to(repository))]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_no_flip_in_a_manifest_gives_a_wrong_byte(repository: Path, tmp_path: Path) -> None:
    """Each is flipped in its middle, alone."""
    for number, path in enumerate(files(repository / "m")):
        sound = path.read_bytes()
        flip(path, len(sound) // 2)
        out = tmp_path / f"out{number}"
        done = nbdpull(repository, "restore", "latest", "--to", out)
        assert done.returncode == 1, path
        one_line(done)
        for restored in out.iterdir() if out.exists() else ():
            assert identical(restored, tmp_path / f"{restored.stem}.truth")[0]
        path.write_bytes(sound)


@pytest.mark.parametrize("how", ["flip", "remove"])
def test_a_backup_whose_indexes_are_damaged_restores_exactly(
    repository: Path, tmp_path: Path, how: str
) -> None:
    """Their packs say the same; verify tells of it."""
    for path in files(repository / "x"):
        if how == "flip":
            flip(path, path.stat().st_size // 2)
        else:
            path.unlink()
    out = tmp_path / "out"
    assert nbdpull(repository, "restore", "latest", "--to", out).returncode == 0
    for name in "ab":
        same, words = identical(out / f"{name}.raw", tmp_path / f"{name}.truth")
        assert same, words
    assert nbdpull(repository, "verify").returncode == 1
    assert nbdpull(repository, "verify").returncode == (1 if how == "flip" else 0)
