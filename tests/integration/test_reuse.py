"""What is stored when a disk is read in full although the repository has most of it."""

from __future__ import annotations

import random
from pathlib import Path

import nbdpull
from nbdpull import Level
from tests.integration.conftest import Keeper
from tests.support.disk import MIB, compare, create_disk
from tests.support.tools import QemuTools
from tests.support.vm import Vm


def noise(path: Path, size: int, *, at: int = 0, seed: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(random.Random(seed).randbytes(size))


def the_disk(result: nbdpull.BackupResult) -> nbdpull.DiskInfo:
    (disk,) = result.disks
    return disk


def test_a_raw_disk_after_a_restart_of_qemu_is_read_in_full_and_stores_the_difference(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", format="raw", tools=qemu_tools)
    noise(disk.path, 40 * MIB)
    with Vm([disk], tools=qemu_tools) as vm:
        first = keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -P 7 60M 64k")
        assert keeper.backup(vm.uri).level is Level.INCREMENTAL
        vm.quit()
        vm.restart()
        vm.qemu_io("vda", "write -P 1 3M 4k")
        vm.qemu_io("vda", "write -P 2 20M 64k")
        vm.qemu_io("vda", "write -P 3 50M 64k")
        third = keeper.backup(vm.uri)
        again = keeper.backup(vm.uri, "full")
        vm.qemu_io("vda", "flush")
        for result in (third, again):
            compare(keeper.restore(result.backup)["vda"], disk.path, tools=qemu_tools)
    assert the_disk(first).stored_bytes > 40 * MIB
    info = the_disk(third)
    assert info.level is Level.FULL
    assert "is missing" in info.reason
    assert "not stored again" in info.reason
    assert info.read_bytes > 40 * MIB
    assert info.reused_bytes == info.read_bytes - 2 * MIB - 64 * 1024
    assert 2 * MIB - 128 * 1024 < info.stored_bytes < 2 * MIB + 20_000
    assert the_disk(again).stored_bytes < 20_000
    assert the_disk(again).reused_bytes == the_disk(again).read_bytes
    assert nbdpull.verify(keeper.repository).ok


def test_an_incremental_does_not_store_bytes_that_were_written_again(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        for number in range(4):
            vm.qemu_io("vda", f"write -P {number + 1} {number}M 1M")
        keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -P 2 1M 1M")
        vm.qemu_io("vda", "write -P 9 2M 1M")
        second = keeper.backup(vm.uri)
        vm.qemu_io("vda", "flush")
        restored = keeper.restore(second.backup)["vda"]
        compare(restored, disk.path, other_format="qcow2", tools=qemu_tools)
    info = the_disk(second)
    assert info.level is Level.INCREMENTAL
    assert (info.read_bytes, info.reused_bytes) == (2 * MIB, MIB)


def test_a_full_of_a_new_chain_is_compared_with_the_disk_in_another_one(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", format="raw", tools=qemu_tools)
    noise(disk.path, 8 * MIB)
    with Vm([disk], tools=qemu_tools) as vm:
        keeper.backup(vm.uri, chain="a")
        other = the_disk(keeper.backup(vm.uri, chain="b"))
        copy = the_disk(keeper.backup(vm.uri, "copy"))
    assert other.reused_bytes == copy.reused_bytes == 8 * MIB
    assert max(other.stored_bytes, copy.stored_bytes) < 20_000


def test_clones_of_a_template_store_it_once_with_a_base_or_a_cache(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    golden = create_disk(tmp_path, "vda", tools=qemu_tools)
    with Vm([golden], tools=qemu_tools) as vm:
        for number in range(8):
            vm.qemu_io("vda", f"write -P {number + 1} {number}M 1M")
        cache = tmp_path / "cache"
        first = keeper.backup(vm.uri, "copy", vm="golden", digest_cache=cache)
        vm.quit()
    stored = []
    for name, options in (("a", {"base": first.backup}), ("b", {"digest_cache": cache})):
        folder = tmp_path / name
        folder.mkdir()
        disk = create_disk(
            folder, "vda", tools=qemu_tools, options=f"backing_file={golden.path},backing_fmt=qcow2"
        )
        with Vm([disk], tools=qemu_tools) as vm:
            vm.qemu_io("vda", "write -P 99 20M 64k")
            result = keeper.backup(vm.uri, vm=name, **options)
            vm.qemu_io("vda", "flush")
            restored = keeper.restore(result.backup)["vda"]
            compare(restored, disk.path, other_format="qcow2", tools=qemu_tools)
        info = the_disk(result)
        assert info.reused_bytes == 8 * MIB
        stored.append(info.stored_bytes)
    assert max(stored) < 5000
