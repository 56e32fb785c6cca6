"""The whole way to other keys: backups in a bucket, copied, gone on with, restored and compared."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.cli.test_object_store import nbdpull
from tests.support.disk import MIB, compare, create_disk
from tests.support.process import run


def test_a_rekeyed_repository_restores_and_its_chain_goes_on(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD", "alpha")
    nbdpull("init", "-r", s3, "--encrypt")
    disk = create_disk(tmp_path, "vda", size=96 * MIB)
    (tmp_path / "noise").write_bytes(random.Random(1).randbytes(40 * MIB))
    taken: list[tuple[str, Path]] = []

    def back_up(repository: str, command: str, level: str) -> None:
        run(["qemu-io", "-f", "qcow2", "-c", command, disk.path])
        done = nbdpull("backup", f"disk:vda={disk.path}", "-r", repository, "--scratch", tmp_path)
        assert done["level"] == level
        image = tmp_path / f"{len(taken)}.qcow2"
        taken.append((done["backup"], Path(shutil.copy(disk.path, image))))

    back_up(s3, f"write -s {tmp_path}/noise 1M 40M", "full")
    back_up(s3, "write -P 7 10M 300k", "incremental")
    new = str(tmp_path / "new")
    monkeypatch.setenv("NBDPULL_PASSWORD", "beta")
    nbdpull("init", "-r", new, "--encrypt")
    monkeypatch.setenv("NBDPULL_PASSWORD", "alpha")
    monkeypatch.setenv("NBDPULL_NEW_PASSWORD", "beta")
    done = nbdpull("copy", "--rekey", s3, new)
    assert done["copied"] == [own for own, _ in taken]
    assert done["written_bytes"] < 42 * MIB
    monkeypatch.setenv("NBDPULL_PASSWORD", "beta")
    back_up(new, "write -P 9 50M 1M", "incremental")
    assert [one["backup"] for one in nbdpull("list", "-r", new)] == [own for own, _ in taken]
    for own, image in taken:
        nbdpull("restore", own, "-r", new, "--to", tmp_path / own)
        compare(tmp_path / own / "vda.raw", image, other_format="qcow2")
    # The old chain knows nothing of it, and goes on too.
    monkeypatch.setenv("NBDPULL_PASSWORD", "alpha")
    back_up(s3, "write -P 3 60M 1M", "incremental")
    nbdpull("restore", taken[-1][0], "-r", s3, "--to", tmp_path / "last")
    compare(tmp_path / "last" / "vda.raw", taken[-1][1], other_format="qcow2")
