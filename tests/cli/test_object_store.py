"""The whole way through the command line, with the repository in an object store."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdpull.repo.location import open_store
from tests.support.disk import MIB, compare, create_disk
from tests.support.process import run
from tests.support.stores import SeaweedFs

NBDPULL = Path(sys.executable).with_name("nbdpull")


def nbdpull(verb: str, *arguments: str | Path) -> Any:
    """Run a verb in a process of its own and return its result."""
    return json.loads(run([NBDPULL, verb, *arguments, "--json"]).stdout)


def flip_a_byte_of_each_pack(weed: SeaweedFs, s3: str) -> None:
    """Damage what is stored, behind nbdpull's back."""
    for entry in open_store(s3).list("d"):
        path = f"{s3.removeprefix('s3:/')}/{entry.key}"
        raw = bytearray(weed.client.request("GET", path).body)
        raw[len(raw) // 2] ^= 1
        assert weed.client.request("PUT", path, body=bytes(raw)).status == 200


def test_backups_in_a_bucket_are_listed_verified_and_restored(
    weed: SeaweedFs, s3: str, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", size=128 * MIB)
    (tmp_path / "noise").write_bytes(random.Random(1).randbytes(80 * MIB))  # three packs
    fill = f"write -s {tmp_path}/noise 1M 80M"
    taken: list[tuple[str, Path]] = []
    assert nbdpull("init", "-r", s3)["warnings"] == []
    for level, command in (("full", fill), ("incremental", "write -P 7 10M 300k")):
        run(["qemu-io", "-f", "qcow2", "-c", command, disk.path])
        done = nbdpull("backup", f"disk:vda={disk.path}", "-r", s3, "--scratch", tmp_path)
        assert done["level"] == level
        taken.append((done["backup"], Path(shutil.copy(disk.path, tmp_path / f"{level}.qcow2"))))
    assert [one["backup"] for one in nbdpull("list", "-r", s3)] == [own for own, _ in taken]
    assert nbdpull("show", "latest", "-r", s3)["backup"] == taken[1][0]
    assert nbdpull("verify", "-r", s3)["ok"]
    for own, image in taken:
        nbdpull("restore", own, "-r", s3, "--to", tmp_path / own)
        compare(tmp_path / own / "vda.raw", image, other_format="qcow2")
    flip_a_byte_of_each_pack(weed, s3)
    done = run([NBDPULL, "verify", "-r", s3, "--json"], check=False)
    assert done.returncode == 1
    damaged = {one["backup"] for one in json.loads(done.stdout)["damaged"]}
    assert damaged >= {own for own, _ in taken}


def test_a_wrong_place_is_one_line_and_the_exit_code(s3: str) -> None:
    done = run([NBDPULL, "list", "-r", s3], check=False)
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr.count("\n") == 1
    for location, code in (("s3://nosuch/x", 1), ("s3://AK:secret@bucket/x", 2)):
        done = run([NBDPULL, "init", "-r", location], check=False)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.count("\n") == 1
        assert "secret@" not in done.stderr


def test_an_encrypted_repository_in_a_bucket_is_restored_with_the_recovery_key_alone(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD", "alpha")
    assert nbdpull("init", "-r", s3, "--encrypt")["encrypted"]
    disk = create_disk(tmp_path, "vda", size=8 * MIB)
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 300k", disk.path])
    nbdpull("backup", f"disk:vda={disk.path}", "-r", s3, "--scratch", tmp_path)
    run([NBDPULL, "key", "export", tmp_path / "recovery.key", "-r", s3])
    monkeypatch.delenv("NBDPULL_PASSWORD")
    (slot,) = json.loads(run([NBDPULL, "key", "list", "-r", s3, "--json"]).stdout)
    run([NBDPULL, "key", "remove", slot["key"], "--force", "-r", s3])
    assert run([NBDPULL, "list", "-r", s3], check=False).returncode == 12
    monkeypatch.setenv("NBDPULL_KEY_FILE", str(tmp_path / "recovery.key"))
    nbdpull("restore", "latest", "-r", s3, "--to", tmp_path / "out")
    compare(tmp_path / "out" / "vda.raw", disk.path, other_format="qcow2")
