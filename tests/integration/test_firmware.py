"""A machine with real firmware and a real TPM, OVMF and swtpm, starts again from what a backup kept."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import nbdpull
from tests.integration.conftest import Keeper
from tests.support.disk import create_disk
from tests.support.firmware import OVMF_VARIABLES, pflash, uefi_variables
from tests.support.tools import QemuTools
from tests.support.tpm import nv_read, nv_write, tpm_of_a_vm
from tests.support.vm import Vm


def boots(vm: Vm, flash: Path) -> int:
    """How often the firmware has come up with this flash: it counts that in a variable, MTC.

    The upper half of the monotonic count goes up once a boot.
    """
    assert vm.running
    return int.from_bytes(uefi_variables(flash.read_bytes()).get("MTC", b""), "little")


def wait_for_boot(vm: Vm, flash: Path, before: int) -> None:
    """Wait until the firmware has written all that it writes while it comes up; the VM is paused then."""
    deadline = time.monotonic() + 90
    while True:
        count = boots(vm, flash)
        # What it can boot from it writes last, one after the other.
        if count > before and uefi_variables(flash.read_bytes()).keys() >= {
            "BootOrder",
            "Boot0000",
        }:
            break
        assert time.monotonic() < deadline, f"the firmware does not come up: {count}"
        time.sleep(0.1)
    vm.pause()


def test_a_machine_starts_again_with_its_uefi_variables_and_its_tpm(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    secret = os.urandom(24)
    flash, tpm = tmp_path / "vars.fd", tmp_path / "tpm"
    shutil.copy(OVMF_VARIABLES, flash)
    tpm.mkdir()
    nv_write(tpm, secret)
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    assert uefi_variables(flash.read_bytes()) == {}
    with (
        tpm_of_a_vm(tpm, tmp_path / "t1") as arguments,
        Vm([disk], tools=qemu_tools, arguments=[*pflash(flash), *arguments]) as vm,
    ):
        wait_for_boot(vm, flash, 0)
        truth = flash.read_bytes()
        done = keeper.backup(vm.uri, machine=True, tpm_state=tpm)
        kept = {path.name: path.read_bytes() for path in tpm.iterdir() if path.name != ".lock"}
    assert sorted(one.name for one in done.disks) == ["pflash1", "vda"]
    # Of the old machine nothing is left.
    shutil.rmtree(tpm)
    flash.unlink()
    folder = tmp_path / "out"
    nbdpull.restore(keeper.repository, done.backup, folder)
    again, state = folder / "pflash1.raw", folder / "machine" / "tpm"
    assert again.read_bytes() == truth
    assert {path.name: path.read_bytes() for path in state.iterdir()} == kept
    with (
        tpm_of_a_vm(state, tmp_path / "t2") as arguments,
        Vm([disk], tools=qemu_tools, arguments=[*pflash(again), *arguments]) as vm,
    ):
        # It goes on counting, instead of making a store of its own.
        before = int.from_bytes(uefi_variables(truth)["MTC"], "little")
        wait_for_boot(vm, again, before)
        assert boots(vm, again) == before + 1
        after = uefi_variables(again.read_bytes())
    was = uefi_variables(truth)
    changed = {name for name in was if was[name] != after.get(name)}
    # Where the first machine was stopped before it had found all it can boot from, this one goes on.
    assert changed - {"BootOrder"} == {"MTC"}
    assert {"BootOrder", "Boot0000", "TCG2_VERSION"} <= was.keys()
    assert nv_read(state, len(secret)) == secret
