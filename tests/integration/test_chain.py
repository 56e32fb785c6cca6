"""The main job: a guest that writes all the time, every level, restored to the byte."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import nbdpull
from nbdpull import Level
from tests.integration.conftest import Keeper
from tests.support.bootwriter import BootWriter
from tests.support.disk import compare, create_disk
from tests.support.tools import QEMU_10, QemuTools
from tests.support.vm import QemuProcess, StorageDaemon, Vm

STEPS = ("full", "incremental", "incremental", "differential", "failed", "incremental")


def fail_in_the_middle(
    keeper: Keeper, vm: QemuProcess, *, guest_first: bool = False, name: str | None = None
) -> None:
    """Cancel a backup once its pull has begun."""

    async def run() -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def told(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_START:
                loop.call_soon_threadsafe(started.set)

        task = asyncio.ensure_future(
            nbdpull.aio.backup(
                vm.uri,
                keeper.repository,
                vm=name,
                scratch=str(keeper.scratch),
                guest_first=guest_first,
                progress=told,
            )
        )
        begun = asyncio.ensure_future(started.wait())
        await asyncio.wait([begun, task], return_when=asyncio.FIRST_COMPLETED)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_every_level_restores_one_point_in_time(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, *, guest_first: bool
) -> None:
    writer = BootWriter()
    disks = [create_disk(tmp_path, name, tools=qemu_tools) for name in ("vda", "vdb")]
    with Vm(disks, tools=qemu_tools, writer=writer) as vm:
        vm.wait_written(50)
        taken: list[str] = []
        for step in STEPS:
            before = vm.wait_written(20)
            if step == "failed":
                fail_in_the_middle(keeper, vm, guest_first=guest_first)
                assert not any(vm.leftovers().values())
                continue
            live = keeper.backup(vm.uri, step, guest_first=guest_first)
            after = vm.written()
            assert live.level == step
            assert [disk.level for disk in live.disks] == [step, step]
            assert live.warnings == ()
            # While it ran: every byte is what the guest had written at one moment of the run.
            restored = keeper.restore(live.backup)
            moment = writer.check_together([restored["vda"], restored["vdb"]])
            assert before <= moment <= after + 1
            # While it is paused: byte for byte the paused disks, says qemu-img.
            vm.wait_written(20)
            with vm.halted():
                truth = vm.copy_disks(tmp_path / f"truth-{len(taken)}")
                still = keeper.backup(vm.uri, "incremental", guest_first=guest_first)
                assert vm.status() == "paused"
            for name, path in keeper.restore(still.backup).items():
                compare(path, truth[name], tools=qemu_tools)
            assert still.parent == live.backup
            taken += [live.backup, still.backup]
            assert not any(vm.leftovers().values())
        # Nothing later changed what an earlier backup restores.
        for index, backup in enumerate(taken[1::2]):
            folder = str(tmp_path / "again" / backup)
            for disk in nbdpull.restore(keeper.repository, backup, folder).disks:
                compare(
                    Path(disk.target),
                    tmp_path / f"truth-{2 * index}" / f"{disk.name}.raw",
                    tools=qemu_tools,
                )
        # The chain needs two bitmaps a disk: its newest, and its full's for a differential.
        for name in ("vda", "vdb"):
            assert len(vm.bitmaps(name)) == 2


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_disks_in_iothreads_restore_one_point_in_time(
    keeper: Keeper, tmp_path: Path, *, guest_first: bool
) -> None:
    # Each disk's writes go on in a thread of its own while the main one runs the transaction; allowed from QEMU 9 on.
    writer = BootWriter()
    disks = [create_disk(tmp_path, name, tools=QEMU_10, iothread=True) for name in ("vda", "vdb")]
    with Vm(disks, tools=QEMU_10, writer=writer) as vm:
        vm.wait_written(50)
        for level in ("full", *["incremental"] * 3, "differential"):
            before = vm.wait_written(5)
            result = keeper.backup(vm.uri, level, guest_first=guest_first)
            after = vm.written()
            restored = keeper.restore(result.backup)
            moment = writer.check_together([restored["vda"], restored["vdb"]])
            assert before <= moment <= after + 1
        vm.wait_written(20)
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "truth")
            still = keeper.backup(vm.uri, "incremental", guest_first=guest_first)
        for name, path in keeper.restore(still.backup).items():
            compare(path, truth[name], tools=QEMU_10)
        assert not any(vm.leftovers().values())


def test_every_level_of_a_storage_daemon(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disks = [create_disk(tmp_path, name, tools=qemu_tools) for name in ("one", "two")]
    taken: list[nbdpull.BackupResult] = []
    with StorageDaemon(disks, tools=qemu_tools) as daemon:
        for number, step in enumerate(STEPS):
            for disk in disks:
                daemon.qemu_io(disk.name, f"write -P {number + 1} {number}M 300k")
                daemon.qemu_io(disk.name, f"write -z {number}M 70k")
            if step == "failed":
                before = {disk.name: set(daemon.bitmaps(disk.name)) for disk in disks}
                fail_in_the_middle(keeper, daemon, name="daemon")
                assert not any(daemon.leftovers().values())
                assert {disk.name: set(daemon.bitmaps(disk.name)) for disk in disks} == before
                continue
            result = keeper.backup(daemon.uri, step, vm="daemon")
            taken.append(result)
            assert [disk.level for disk in result.disks] == [step, step]
            for disk in disks:
                restored = keeper.restored / f"{number}-{disk.name}"
                nbdpull.restore(
                    keeper.repository, result.backup, restored, disk=f"node-{disk.name}"
                )
                target = restored / f"node-{disk.name}.raw"
                compare(target, disk.path, other_format="qcow2", tools=qemu_tools)
        # What was written before the failed one is in the last, too.
        assert [disk.changed_bytes for disk in taken[-1].disks] == [2 * 5 * 65536] * 2
        assert not any(daemon.leftovers().values())


def test_copy_leaves_the_chain_alone(qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 1M")
        full = keeper.backup(vm.uri)
        bitmaps = set(vm.bitmaps("vda"))
        vm.qemu_io("vda", "write -P 2 1M 1M")
        copy = keeper.backup(vm.uri, "copy")
        assert set(vm.bitmaps("vda")) == bitmaps
        assert (copy.level, copy.parent) == (Level.COPY, None)
        vm.qemu_io("vda", "write -P 3 2M 64k")
        third = keeper.backup(vm.uri)
        assert third.parent == full.backup
        assert third.disks[0].changed_bytes == (1 << 20) + (64 << 10)
        for result in (copy, third):
            assert result.disks[0].name == "vda"
        vm.qemu_io("vda", "flush")
        compare(
            keeper.restore(third.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )


def test_two_chains_and_two_repositories_do_not_meet(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    second = str(tmp_path / "second")
    nbdpull.init(second)
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 1M")
        first = keeper.backup(vm.uri, chain="a")
        other = keeper.backup(vm.uri, chain="b")
        foreign = nbdpull.backup(vm.uri, second)
        assert {first.level, other.level, foreign.level} == {Level.FULL}
        for number in range(3):
            vm.qemu_io("vda", f"write -P {7 + number} {4 + number}M 64k")
            keeper.backup(vm.uri, chain="a")
        b = keeper.backup(vm.uri, chain="b")
        away = nbdpull.backup(vm.uri, second)
        assert (b.parent, away.parent) == (other.backup, foreign.backup)
        assert b.disks[0].changed_bytes == away.disks[0].changed_bytes == 3 * 65536
        vm.qemu_io("vda", "flush")
        compare(keeper.restore(b.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools)
        folder = tmp_path / "away"
        nbdpull.restore(second, away.backup, folder)
        compare(folder / "vda.raw", disk.path, other_format="qcow2", tools=qemu_tools)
