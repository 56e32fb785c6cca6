"""What a backup would do, told before it does."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import nbdpull
from nbdpull import FindingKind, Level
from tests.integration.conftest import Keeper
from tests.integration.test_kills import running_backup
from tests.support.disk import Disk, create_disk
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import StorageDaemon, Vm

MIB = 1 << 20


def of(result: nbdpull.DoctorResult, kind: FindingKind) -> dict[str, str]:
    return {finding.subject: finding.text for finding in result.findings if finding.kind is kind}


def examine(keeper: Keeper, vm: Vm | StorageDaemon, **options: object) -> nbdpull.DoctorResult:
    given = {"scratch": keeper.scratch, **options}
    return nbdpull.doctor(vm.uri, keeper.repository, **given)  # type: ignore[arg-type]


@pytest.fixture
def disks(tmp_path: Path, qemu_tools: QemuTools) -> list[Disk]:
    return [create_disk(tmp_path, name, tools=qemu_tools) for name in ("vda", "vdb")]


def test_estimate_says_what_the_next_backup_then_reads(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    with Vm(disks, tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 16M")
        first = nbdpull.estimate(vm.uri, keeper.repository)
        assert (first.level, first.parent) == (Level.FULL, None)
        about = [disk.changed_bytes or 0 for disk in first.disks]
        assert 16 * MIB <= about[0] < 17 * MIB
        assert about[1] < MIB
        full = keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -P 2 3M 1M")
        vm.qemu_io("vdb", "write -P 3 0 64k")
        for level in ("auto", "differential"):
            told = nbdpull.estimate(
                vm.uri, keeper.repository, level="auto" if level == "auto" else Level(level)
            )
            assert told.parent == full.backup
            assert [disk.changed_bytes for disk in told.disks] == [MIB, 65536]
        assert not any(vm.leftovers().values())
        done = keeper.backup(vm.uri)
        assert [disk.changed_bytes for disk in done.disks] == [MIB, 65536]
        assert [(d.name, d.level, d.reason) for d in done.disks] == [
            (d.name, d.level, d.reason)
            for d in nbdpull.estimate(vm.uri, keeper.repository, level=done.level).disks
        ]


def test_a_healthy_vm_has_no_problem_and_is_left_as_it_was(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    with Vm(disks, tools=qemu_tools) as vm:
        keeper.backup(vm.uri)
        bitmaps = [set(vm.bitmaps(disk.name)) for disk in disks]
        result = examine(keeper, vm)
        assert result.ok
        assert of(result, FindingKind.PROBLEM) == {}
        expected = {"QEMU"} if qemu_tools is QEMU_72 else set()
        assert set(of(result, FindingKind.WARNING)) - {"scratch"} == expected
        assert "incremental" in of(result, FindingKind.OK)["next backup"]
        assert [set(vm.bitmaps(disk.name)) for disk in disks] == bitmaps
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []


def test_what_would_fail_is_found(qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path) -> None:
    raw = create_disk(tmp_path, "raw", tools=qemu_tools, format="raw")
    fast = create_disk(tmp_path, "fast", tools=qemu_tools, iothread=True)
    with Vm([raw, fast], tools=qemu_tools) as vm:
        path = tmp_path / "nbd"
        vm.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        vm.qmp("block-export-add", type="nbd", id="theirs", node_name=raw.node)
        result = examine(keeper, vm, scratch=tmp_path / "nowhere")
        assert not result.ok
        problems = of(result, FindingKind.PROBLEM)
        assert "--nbd-address" in problems["NBD server"]
        assert "--scratch" in problems["scratch"]
        assert ("disk fast" in problems) is (qemu_tools is QEMU_72)
        warnings = of(result, FindingKind.WARNING)
        assert "keeps no dirty bitmaps" in warnings["disk raw"]
        gone = nbdpull.doctor("qmp:/nowhere/qmp", tmp_path / "norepo")
        assert set(of(gone, FindingKind.PROBLEM)) == {"repository", "source"}


def test_a_scratch_folder_that_qemu_cannot_use_is_found(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    """QEMU gives its rights up after the start, so nobody can tell from outside what it may open."""
    as_nobody = ["-runas", "nobody"] if qemu_tools is QEMU_72 else ["-run-with", "user=nobody"]
    with Vm(disks[:1], tools=qemu_tools, arguments=as_nobody) as vm:
        result = examine(keeper, vm)
        assert "another user" in of(result, FindingKind.PROBLEM)["scratch"]
        assert list(keeper.scratch.iterdir()) == []
        assert not any(vm.leftovers().values())


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_other_runs_are_told(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, number: signal.Signals
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools, size=512 * MIB)
    monitor = tmp_path / "second"
    arguments = ["-qmp", f"unix:{monitor},server=on,wait=off", "-S"]
    with Vm([disk], tools=qemu_tools, arguments=arguments) as vm:
        for at in range(0, 512, 64):
            vm.qemu_io("vda", f"write -P {at + 7} {at}M 64M")
        with running_backup(vm, keeper, "--rate", "16M") as client:
            client.send_signal(number)
            if number is signal.SIGKILL:
                client.wait()
            result = nbdpull.doctor(f"qmp:{monitor}", keeper.repository, scratch=keeper.scratch)
            told = of(result, FindingKind.WARNING)["other runs"]
            if number is signal.SIGKILL:
                assert "nbdpull cleanup" in told
                keeper.cleanup(vm.uri)
                assert not any(vm.leftovers().values())
            else:
                assert str(client.pid) in told
                client.send_signal(signal.SIGCONT)


def test_doctor_of_a_storage_daemon(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    with StorageDaemon(disks, tools=qemu_tools) as daemon:
        assert examine(keeper, daemon).ok
        asked = examine(keeper, daemon, guest_first=True)
        assert "--guest-first" in of(asked, FindingKind.PROBLEM)["disk node-vda"]


def test_a_vm_that_is_shut_down(qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path) -> None:
    qcow2 = create_disk(tmp_path, "vda", tools=qemu_tools)
    raw = create_disk(tmp_path, "vdb", tools=qemu_tools, format="raw")
    images = [f"disk:vda={qcow2.path}", f"disk:vdb={raw.path}"]
    for level in (Level.FULL, Level.INCREMENTAL):
        told = nbdpull.estimate(images, keeper.repository, vm="vm")
        done = nbdpull.backup(images, keeper.repository, vm="vm")
        assert told.level == done.level == level
        assert [disk.level for disk in told.disks] == [disk.level for disk in done.disks]
    result = nbdpull.doctor(images, keeper.repository, vm="vm")
    assert result.ok
    assert f"image {raw.path}" in of(result, FindingKind.WARNING)
    assert f"image {qcow2.path}" in of(result, FindingKind.OK)
