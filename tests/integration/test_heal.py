"""A frame that the repository lost is read again from the running VM, and older backups restore again."""

from __future__ import annotations

from pathlib import Path

import pytest

import nbdpull
from tests.integration.conftest import Keeper
from tests.ops.test_restore import flip
from tests.support.disk import compare, create_disk
from tests.support.tools import QemuTools
from tests.support.vm import Vm


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_next_backup_of_a_running_vm_heals_the_older_ones(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, *, guest_first: bool
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 1M")
        vm.qemu_io("vda", "write -P 2 4M 300k")
        full = keeper.backup(vm.uri, guest_first=guest_first)
        (pack,) = (path for path in Path(keeper.repository).glob("d/*/*") if path.is_file())
        vm.qemu_io("vda", "write -P 3 8M 64k")
        second = keeper.backup(vm.uri, guest_first=guest_first)
        truth = vm.copy_disks(tmp_path / "truth")["vda"]
        flip(pack, 128 + 24)  # in the first frame's digest
        found = nbdpull.verify(keeper.repository)
        assert {damage.backup for damage in found.damaged} == {full.backup, second.backup}
        with pytest.raises(nbdpull.DamagedError):
            keeper.restore(second.backup)
        told: list[str] = []
        healing = keeper.backup(
            vm.uri, guest_first=guest_first, progress=lambda event: told.append(event.text)
        )
        # In mode C an incremental shows only what changed, so what is lost costs a full.
        assert healing.level == ("full" if guest_first else "incremental")
        assert any("1 damaged frames of older backups are healed" in text for text in told)
        after = nbdpull.verify(keeper.repository)
        assert (after.ok, after.healed) == (True, 1)
        for backup in (second.backup, healing.backup):
            restored = nbdpull.restore(keeper.repository, backup, tmp_path / backup)
            compare(Path(restored.disks[0].target), truth, tools=qemu_tools)
