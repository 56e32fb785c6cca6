"""A VM that is migrated to another QEMU on the same images: between backups, during one, and over leftovers."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import nbdpull
from nbdpull import FindingKind, Level
from tests.integration.conftest import Keeper
from tests.integration.test_kills import SLOWLY, noisy, running_backup
from tests.support.disk import MIB, Disk, compare, create_disk
from tests.support.tools import QemuTools
from tests.support.vm import Vm

_END_S = 60.0


@pytest.fixture
def disks(tmp_path: Path, qemu_tools: QemuTools) -> list[Disk]:
    """One whose bitmaps are in its image, and one whose bitmaps are in memory only."""
    return [
        create_disk(tmp_path, "vda", size=32 * MIB, tools=qemu_tools),
        create_disk(tmp_path, "vdb", size=16 * MIB, format="raw", tools=qemu_tools),
    ]


@contextmanager
def two(disks: list[Disk], tools: QemuTools, *, bitmaps: bool = False) -> Iterator[tuple[Vm, Vm]]:
    """A running VM, and another QEMU on its images that waits for it."""
    incoming = ("-incoming", "defer")
    with (
        Vm(disks, tools=tools, paused=False) as source,
        Vm(disks, tools=tools, paused=False, arguments=incoming) as target,
    ):
        for vm in (source, target):
            capability = {"capability": "dirty-bitmaps", "state": bitmaps}
            vm.qmp("migrate-set-capabilities", capabilities=[capability])
        target.qmp("migrate-incoming", uri=f"unix:{target.folder}/m")
        yield source, target


def migrate(source: Vm, target: Vm) -> str:
    """Migrate, and return what became of it."""
    source.qmp("migrate", uri=f"unix:{target.folder}/m")
    return ended(source)


def ended(source: Vm) -> str:
    deadline = time.monotonic() + _END_S
    while True:
        status: str = source.qmp("query-migrate")["status"]
        if status in {"completed", "failed", "cancelled"} or time.monotonic() > deadline:
            return status
        time.sleep(0.05)


@pytest.mark.parametrize("bitmaps", [True, False], ids=["with-bitmaps", "without"])
def test_what_came_along_is_read_incrementally_and_the_rest_in_full(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], *, bitmaps: bool
) -> None:
    with two(disks, qemu_tools, bitmaps=bitmaps) as (source, target):
        for name in ("vda", "vdb"):
            source.qemu_io(name, "write -q -P 1 1M 4M")
        first = keeper.backup(source.uri)
        for name in ("vda", "vdb"):
            source.qemu_io(name, "write -q -P 2 2M 1M")
        with pytest.raises(nbdpull.SourceError, match="waits for a VM that is migrated to it"):
            keeper.backup(target.uri)
        if bitmaps:
            # As a run leaves it that dies between its release and its commit.
            source.qmp("block-dirty-bitmap-add", node=disks[0].node, name="np-0123abcd-exp")
        assert migrate(source, target) == "completed"
        for name in ("vda", "vdb"):
            target.qemu_io(name, "write -q -P 3 3M 1M")
        # QEMU 7.2 would let the one that the VM has left be backed up.
        with pytest.raises(nbdpull.SourceError, match="has handed its VM over to another QEMU"):
            keeper.backup(source.uri)
        told = nbdpull.doctor(source.uri, scratch=keeper.scratch)
        assert "has handed its VM over" in str(told)
        assert not told.ok
        assert not any(source.leftovers().values())

        second = keeper.backup(target.uri)
        by_name = {disk.name: disk for disk in second.disks}
        assert (by_name["vda"].level, by_name["vda"].changed_bytes) == (Level.INCREMENTAL, 2 * MIB)
        if bitmaps:
            assert by_name["vdb"].level is Level.INCREMENTAL
            assert by_name["vdb"].changed_bytes == 2 * MIB
        else:
            assert by_name["vdb"].level is Level.FULL
            assert f"backup {first.backup} can't be built on" in by_name["vdb"].reason
            assert "is missing" in by_name["vdb"].reason
        assert "np-0123abcd-exp" not in target.bitmaps("vda")
        for name, path in keeper.restore(second.backup).items():
            with target.halted():
                truth = target.copy_disks(keeper.scratch.parent / f"truth-{name}")
            compare(path, truth[name], tools=qemu_tools)
        target.qemu_io("vdb", "write -q -P 4 0 64k")
        third = keeper.backup(target.uri)
        assert third.level is Level.INCREMENTAL
        assert third.disks[1].changed_bytes == 65536


@pytest.mark.parametrize(
    ("bitmaps", "guest_first"),
    [(True, False), (False, True)],
    ids=["with-bitmaps-mode-b", "without-mode-c"],
)
def test_a_migration_during_a_backup_fails_and_harms_neither(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disks: list[Disk],
    *,
    bitmaps: bool,
    guest_first: bool,
) -> None:
    with two(disks, qemu_tools, bitmaps=bitmaps) as (source, target):
        source.qemu_io("vda", "write -q -P 1 1M 4M")
        truth = source.copy_disks(keeper.scratch.parent / "truth")
        results: list[str] = []

        def told(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_START and not results:
                results.append(migrate(source, target))
                source.qemu_io("vda", "write -q -P 2 2M 1M")

        result = keeper.backup(source.uri, guest_first=guest_first, progress=told)
        assert results == ["failed"]
        assert source.status() == "running"
        assert not any(source.leftovers().values())
        for name, path in keeper.restore(result.backup).items():
            compare(path, truth[name], tools=qemu_tools)
        after = keeper.backup(source.uri, guest_first=guest_first)
        assert after.level is Level.INCREMENTAL
        assert after.disks[0].changed_bytes == MIB


def test_a_backup_during_a_migration_is_refused(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    """The destination takes nothing off its socket, which does not hold that much memory's pages."""
    with (
        Vm(disks, tools=qemu_tools, paused=False, memory=512) as vm,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(str(vm.folder / "m"))
        listener.listen()
        vm.qmp("migrate", uri=f"unix:{vm.folder}/m")
        with pytest.raises(nbdpull.InUseError, match="is being migrated") as caught:
            keeper.backup(vm.uri)
        assert caught.value.exit_code == 11
        told = nbdpull.doctor(vm.uri, scratch=keeper.scratch)
        problems = [one.text for one in told.findings if one.kind is FindingKind.PROBLEM]
        assert "is being migrated" in problems[0]
        assert vm.qmp("query-migrate")["status"] == "active"
        vm.qmp("migrate_cancel")
        listener.close()
        assert ended(vm) == "cancelled"
        assert keeper.backup(vm.uri).level is Level.FULL


def test_leftovers_that_keep_a_vm_from_being_migrated_are_told_and_cleaned_up(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disks = noisy(tmp_path, qemu_tools, noise=64 * MIB, size=128 * MIB)[:1]
    with Vm(disks, tools=qemu_tools, paused=False) as source:
        with running_backup(source, keeper, *SLOWLY) as client:
            client.kill()
            client.wait()
        told = nbdpull.doctor(source.uri, scratch=keeper.scratch)
        assert "until then the VM can't be migrated" in str(told)

        def go() -> str:
            arguments = ("-incoming", "defer")
            with Vm(disks, tools=qemu_tools, paused=False, arguments=arguments) as target:
                target.qmp("migrate-incoming", uri=f"unix:{target.folder}/m")
                done = migrate(source, target)
                if done == "completed":
                    assert keeper.backup(target.uri).level is Level.FULL
                return done

        assert go() == "failed"
        assert source.status() == "running"
        assert keeper.cleanup(source.uri).kept == ()
        assert go() == "completed"
