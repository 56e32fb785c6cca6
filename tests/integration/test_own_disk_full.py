"""A VM whose own disk is full: QEMU tells it as it tells a full scratch, and it is not ours to mend."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import nbdpull
from tests.integration.conftest import Keeper
from tests.support.bootwriter import BootWriter
from tests.support.disk import MIB, compare, create_disk
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import Vm


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_a_guest_that_waits_for_room_on_its_own_disk_is_left_alone(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, *, guest_first: bool
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small])
    try:
        disk = create_disk(small, "vda", tools=qemu_tools)
        with Vm([disk], tools=qemu_tools, writer=BootWriter(disks=1, pause_us=0)) as vm:
            vm.wait_written(2)
            vm.pause()
            truth = vm.copy_disks(tmp_path / "truth")
            state = os.statvfs(small)
            used = (state.f_blocks - state.f_bfree) * state.f_frsize
            run(["mount", "-o", f"remount,size={used + MIB}", small])
            since = len(vm.events)

            def fill(progress: nbdpull.Progress) -> None:
                nonlocal since
                if progress.kind is nbdpull.ProgressKind.DISK_START:
                    vm.cont()
                    vm.wait_event("BLOCK_IO_ERROR", since=since, timeout_s=60)
                    since = len(vm.events)

            done = keeper.backup(vm.uri, guest_first=guest_first, progress=fill)
            assert len(done.warnings) == 1
            assert "itself during the backup" in done.warnings[0]
            assert vm.status() == "io-error"
            assert not [one for one in vm.events[since:] if one["event"] == "RESUME"]
            assert not any(vm.leftovers().values())
            compare(keeper.restore(done.backup)["vda"], truth["vda"], tools=qemu_tools)
            run(["mount", "-o", "remount,size=64m", small])
            vm.cont()
            vm.wait_written(10)
    finally:
        run(["umount", small])
