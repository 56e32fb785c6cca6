"""What a backup does with the work of one that died, and without a parent that goes meanwhile."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from nbdpull import Level
from nbdpull.repo.repository import Repository, Session
from tests.integration.conftest import Keeper
from tests.support.disk import MIB, compare, create_disk
from tests.support.tools import QemuTools
from tests.support.vm import Vm


def test_what_a_killed_client_stored_is_not_stored_again(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", format="raw", tools=qemu_tools)
    with disk.path.open("r+b") as file:
        file.write(random.Random(3).randbytes(48 * MIB))
    said: list[str] = []
    with Vm([disk], tools=qemu_tools) as vm:
        arguments = ["backup", vm.uri, "-r", keeper.repository, "--rate", "16M"]
        arguments += ["--scratch", str(keeper.scratch)]
        client = subprocess.Popen(
            [sys.executable, "-m", "nbdpull", *arguments, "--json"], stdout=subprocess.DEVNULL
        )
        packs = Path(keeper.repository) / "d"
        while not list(packs.glob("*/*[0-9a-f]")):
            assert client.poll() is None
            time.sleep(0.02)
        client.kill()
        client.wait()
        vm.qemu_io("vda", "write -q -P 5 3M 64k")

        def tell(progress: nbdpull.Progress) -> None:
            said.append(progress.text or "")

        result = keeper.backup(vm.uri, progress=tell)
        vm.qemu_io("vda", "flush")
        compare(keeper.restore(result.backup)["vda"], disk.path, tools=qemu_tools)
    (info,) = result.disks
    assert info.reused_bytes > 25 * MIB
    assert info.stored_bytes < 22 * MIB
    assert any("did not come to its end stored" in text for text in said)
    nbdpull.gc(keeper.repository, undo_window_s=0)
    report = nbdpull.verify(keeper.repository, level="full")
    assert report.ok


def test_a_parent_that_is_given_up_after_the_freeze_makes_it_a_full(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    real = Repository.begin

    def begin(self: Repository, **options: Any) -> Session:
        if (parent := options["parent"]) is not None:
            pin = f"{parent.summary.disk_id}/{parent.summary.session}"
            self._store.create(f"t/{pin}", b"")
        return real(self, **options)

    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -q -P 1 1M 2M")
        first = keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -q -P 2 2M 64k")
        monkeypatch.setattr(Repository, "begin", begin)
        second = keeper.backup(vm.uri)
        monkeypatch.undo()
        nbdpull.gc(keeper.repository, undo_window_s=0)
        vm.qemu_io("vda", "flush")
        compare(
            keeper.restore(second.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )
        # And the chain goes on from it.
        vm.qemu_io("vda", "write -q -P 3 4M 64k")
        third = keeper.backup(vm.uri)
        vm.qemu_io("vda", "flush")
        compare(
            keeper.restore(third.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )
        assert not any(vm.leftovers().values())
    assert second.level is Level.FULL
    assert "is being forgotten" in second.disks[0].reason
    assert second.parent is None
    assert third.level is Level.INCREMENTAL
    assert third.parent == second.backup
    assert first.backup not in {one.backup for one in nbdpull.list_backups(keeper.repository)}
