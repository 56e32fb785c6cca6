"""A backup that is cancelled at any moment leaves nothing behind, in QEMU or in the scratch folder."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from nbdpull.repo.repository import Repository, Session
from nbdpull.source.names import checkpoint_parts
from nbdpull.source.qmp import Monitor
from tests.integration.conftest import Keeper
from tests.support.disk import MIB, compare, create_disk
from tests.support.tools import QemuTools
from tests.support.vm import Vm


def backup_of(bitmap: str) -> str | None:
    parts = checkpoint_parts(bitmap)
    return None if parts is None else parts[1]


def cancelled_at(
    number: int, keeper: Keeper, vm: Vm, patch: pytest.MonkeyPatch, *, guest_first: bool
) -> nbdpull.BackupResult | None:
    """A backup that is cancelled when its `number`th QMP command is on its way; None if it was in time."""
    real = Monitor.execute
    told = 0

    async def run() -> nbdpull.BackupResult | None:
        async def execute(
            self: Monitor, command: str, arguments: Mapping[str, object] | None = None, **more: Any
        ) -> Any:
            nonlocal told
            told += 1
            if told == number:
                asyncio.get_running_loop().call_soon(task.cancel)
            return await real(self, command, arguments, **more)

        patch.setattr(Monitor, "execute", execute)
        task = asyncio.ensure_future(
            nbdpull.aio.backup(
                vm.uri, keeper.repository, scratch=keeper.scratch, guest_first=guest_first
            )
        )
        try:
            return await task
        except asyncio.CancelledError:
            return None

    done = asyncio.run(run())
    patch.undo()
    assert told >= number or done is not None
    return done


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_cancelled_at_every_command(
    qemu_tools: QemuTools,
    keeper: Keeper,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    guest_first: bool,
) -> None:
    disks = [create_disk(tmp_path, name, size=4 * MIB, tools=qemu_tools) for name in ("a", "b")]
    with Vm(disks, tools=qemu_tools, paused=False) as vm:
        number = 0
        done = None
        while done is None:
            number += 1
            vm.qemu_io("a", f"write -q -P {number} {number % 4}M 64k")
            before = {backup.backup for backup in nbdpull.list_backups(keeper.repository)}
            done = cancelled_at(number, keeper, vm, monkeypatch, guest_first=guest_first)
            assert not any(vm.leftovers().values()), number
            assert list(keeper.scratch.iterdir()) == []
            assert vm.status() == "running"
            after = {backup.backup for backup in nbdpull.list_backups(keeper.repository)}
            # One that was committed already counts, and keeps its checkpoint.
            assert len(after - before) <= 1
            for disk in disks:
                marks = {backup_of(name) for name in vm.bitmaps(disk.name)}
                assert marks <= after, number
        assert number > 20
        vm.qemu_io("a", "write -q -P 99 3M 64k")
        last = keeper.backup(vm.uri)
        assert {disk.level for disk in last.disks} == {"incremental"}
        vm.qemu_io("a", "flush")
        for name, path in keeper.restore(last.backup).items():
            compare(path, vm.disk(name).path, other_format="qcow2", tools=qemu_tools)


@pytest.mark.parametrize("step", ["put", "seal", "commit"])
def test_a_store_that_goes_away_costs_no_checkpoint(
    qemu_tools: QemuTools,
    keeper: Keeper,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """Not even when it can't be asked afterwards whether the backup is there."""
    disk = create_disk(tmp_path, "vda", size=4 * MIB, tools=qemu_tools)

    def fail(*_: object, **_more: object) -> None:
        monkeypatch.setattr(Repository, "backups", fail)
        raise nbdpull.StoreError("the store is gone")

    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -q -P 1 0 1M")
        keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -q -P 2 1M 64k")
        base = keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -q -P 3 2M 64k")
        monkeypatch.setattr(Session, step, fail)
        with pytest.raises(nbdpull.StoreError, match="is gone"):
            keeper.backup(vm.uri)
        monkeypatch.undo()
        assert base.backup in map(backup_of, vm.bitmaps("vda"))
        done = keeper.backup(vm.uri)
        assert (done.level, done.parent) == ("incremental", base.backup)
        assert done.disks[0].changed_bytes == 65536
        assert len(vm.bitmaps("vda")) == 2
        compare(
            keeper.restore(done.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )
