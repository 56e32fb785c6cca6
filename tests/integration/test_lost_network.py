"""QEMU goes on, and the network between it and the client does not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from nbdpull import Level
from nbdpull.ops import persist
from tests.integration.conftest import Keeper
from tests.integration.test_kills import noisy
from tests.support.bootwriter import BootWriter
from tests.support.cutting import Cutter, cutting
from tests.support.disk import MIB, Disk, compare
from tests.support.tools import QemuTools
from tests.support.vm import Vm

NOISE = 48 * MIB
MODES = pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])


@pytest.fixture
def disks(tmp_path: Path, qemu_tools: QemuTools) -> list[Disk]:
    return noisy(tmp_path, qemu_tools, noise=NOISE, size=128 * MIB)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def over_network(disks: list[Disk], tools: QemuTools) -> Iterator[tuple[Vm, Cutter, Cutter]]:
    """A VM whose monitor and NBD server are reached through what may be cut."""
    monitor, nbd = free_port(), free_port()
    arguments = ["-qmp", f"tcp:127.0.0.1:{monitor},server=on,wait=off"]
    with ExitStack() as stack:
        vm = stack.enter_context(Vm(disks, tools=tools, writer=BootWriter(), arguments=arguments))
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(nbd)}}
        vm.qmp("nbd-server-start", addr=address)
        vm.wait_written(5)
        yield (
            vm,
            stack.enter_context(cutting(("127.0.0.1", monitor))),
            stack.enter_context(cutting(("127.0.0.1", nbd))),
        )


def addressed(monitor: Cutter, nbd: Cutter) -> dict[str, Any]:
    return {
        "source": f"qmp+tcp://127.0.0.1:{monitor.port}",
        "nbd_address": f"nbd://127.0.0.1:{nbd.port}",
    }


def check(
    keeper: Keeper, result: nbdpull.BackupResult, truth: dict[str, Path], tools: QemuTools
) -> None:
    for name, path in keeper.restore(result.backup).items():
        compare(path, truth[name], tools=tools)


@MODES
def test_nbd_connections_that_are_lost_are_made_again_on_the_same_point_in_time(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disks: list[Disk],
    tmp_path: Path,
    *,
    guest_first: bool,
) -> None:
    with over_network(disks, qemu_tools) as (vm, monitor, nbd):
        options = addressed(monitor, nbd) | {"guest_first": guest_first}
        nbd.every, nbd.cuts = 20 * MIB, 3
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "full")
            full = keeper.backup(**options)
        assert nbd.lost == 3
        assert sum(disk.read_bytes for disk in full.disks) < 2 * NOISE + 3 * 12 * MIB
        check(keeper, full, truth, qemu_tools)
        vm.qemu_io("vda", f"write -q -P 7 {60 * MIB} {40 * MIB}")
        nbd.every, nbd.cuts = 10 * MIB, 2
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "incremental")
            result = keeper.backup(**options)
        assert nbd.lost == 5
        assert [disk.level for disk in result.disks] == [Level.INCREMENTAL] * 2
        check(keeper, result, truth, qemu_tools)
        assert not any(vm.leftovers().values())


def test_a_network_that_stays_away_ends_the_backup_and_the_view(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the monitor answers nothing is left: nobody would watch the scratch."""
    monkeypatch.setattr(persist, "_PAUSES_S", (0.05,) * 3)
    with over_network(disks, qemu_tools) as (vm, monitor, nbd):
        options = addressed(monitor, nbd)

        def cut(event: nbdpull.Progress) -> None:
            if event.kind is nbdpull.ProgressKind.DISK and event.done:
                nbd.away = True
                nbd.cut()

        with pytest.raises(nbdpull.NbdError):
            keeper.backup(**options, progress=cut)
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []
        nbd.away = False
        assert not keeper.backup(**options).resumed


def test_a_backup_whose_monitor_is_lost_as_well_is_gone_on_with(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disks: list[Disk],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(persist, "_PAUSES_S", (0.05,) * 3)
    with over_network(disks, qemu_tools) as (vm, monitor, nbd):
        options = addressed(monitor, nbd)

        def cut(event: nbdpull.Progress) -> None:
            if event.kind is nbdpull.ProgressKind.DISK and event.done > 40 * MIB:
                for one in (monitor, nbd):
                    one.away = True
                    one.cut()

        with vm.halted():
            truth = vm.copy_disks(tmp_path / "truth")
            with pytest.raises(nbdpull.NbdError):
                keeper.backup(**options, progress=cut, rate=64 * MIB)
        vm.wait_written(5)
        monitor.away = nbd.away = False
        result = keeper.backup(**options)
        assert result.resumed
        check(keeper, result, truth, qemu_tools)
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "next")
            after = keeper.backup(**options)
        assert after.parent == result.backup
        assert [disk.level for disk in after.disks] == [Level.INCREMENTAL] * 2
        check(keeper, after, truth, qemu_tools)
        assert not any(vm.leftovers().values())


def test_a_backup_whose_monitor_alone_is_lost_counts(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    with over_network(disks, qemu_tools) as (vm, monitor, nbd):
        options = addressed(monitor, nbd)

        def cut(event: nbdpull.Progress) -> None:
            if event.kind is nbdpull.ProgressKind.DISK and event.done:
                monitor.away = True
                monitor.cut()

        with vm.halted():
            truth = vm.copy_disks(tmp_path / "truth")
            result = keeper.backup(**options, progress=cut)
        assert result.warnings
        check(keeper, result, truth, qemu_tools)
        monitor.away = False
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "next")
            after = keeper.backup(**options)
        assert not after.resumed
        assert after.parent == result.backup
        check(keeper, after, truth, qemu_tools)
        assert not any(vm.leftovers().values())
