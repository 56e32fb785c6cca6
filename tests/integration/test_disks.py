"""What happens to disks between two backups, and that the next one still has every byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import nbdpull
from nbdpull import Level
from tests.integration.conftest import Keeper
from tests.support.disk import Disk, compare, create_disk
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import Vm

MIB = 1 << 20


def check(
    keeper: Keeper, vm: Vm, result: nbdpull.BackupResult, disks: list[Disk], tools: QemuTools
) -> None:
    """Restored disks are the images, byte for byte (nothing writes meanwhile)."""
    restored = keeper.restore(result.backup)
    assert set(restored) == {disk.name for disk in disks}
    for disk in disks:
        vm.qemu_io(disk.name, "flush")  # QEMU keeps qcow2's tables in memory
        compare(restored[disk.name], disk.path, other_format=disk.format, tools=tools)


def levels(result: nbdpull.BackupResult) -> dict[str, str]:
    return {disk.name: str(disk.level) for disk in result.disks}


def reason(result: nbdpull.BackupResult, name: str) -> str:
    return next(disk.reason for disk in result.disks if disk.name == name)


@pytest.fixture
def disk(tmp_path: Path, qemu_tools: QemuTools) -> Disk:
    return create_disk(tmp_path, "vda", tools=qemu_tools)


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_zeroed_and_trimmed_ranges_come_back_as_zeroes(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, *, guest_first: bool
) -> None:
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 0xaa 0 16M")
        keeper.backup(vm.uri, guest_first=guest_first)
        vm.qemu_io("vda", "write -z 1M 1M")
        vm.qemu_io("vda", "write -z -u 3M 1M")
        vm.qemu_io("vda", "discard 5M 2M")
        vm.qemu_io("vda", "write -P 0 8M 64k")
        vm.qemu_io("vda", "write -P 0 9M 4k")
        result = keeper.backup(vm.uri, guest_first=guest_first)
        assert levels(result) == {"vda": "incremental"}
        assert result.disks[0].changed_bytes == 4 * MIB + 2 * 65536
        check(keeper, vm, result, [disk], qemu_tools)


def test_a_dirty_zeroed_range_is_not_read(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk
) -> None:
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 0xaa 0 32M")
        keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -z -u 0 32M")
        result = keeper.backup(vm.uri)
        assert result.disks[0].changed_bytes == 32 * MIB
        assert result.disks[0].read_bytes == 0
        check(keeper, vm, result, [disk], qemu_tools)


def test_a_bitmap_that_missed_writes_is_found_out(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    """Switching a bitmap off and on again is how a careless tool loses writes."""
    other = create_disk(tmp_path, "vdb", tools=qemu_tools)
    with Vm([disk, other], tools=qemu_tools) as vm:
        for name in ("vda", "vdb"):
            vm.qemu_io(name, "write -P 1 0 32M")
        first = keeper.backup(vm.uri)
        lied_to = {"vda": "write -P 2 0 16M", "vdb": "write -P 2 32M 32M"}
        for number, (name, write) in enumerate(lied_to.items()):
            honest = vm.disks[1 - number]
            node = vm.disk(name).node
            (bitmap,) = (entry for entry in vm.bitmaps(name) if first.backup in entry)
            vm.qmp("block-dirty-bitmap-disable", node=node, name=bitmap)
            vm.qemu_io(name, write)
            vm.qmp("block-dirty-bitmap-enable", node=node, name=bitmap)
            vm.qemu_io(honest.name, "write -P 3 1M 64k")
            result = keeper.backup(vm.uri, audit=100)
            assert levels(result) == {name: "full", honest.name: "incremental"}
            assert "can't be trusted" in reason(result, name)
            assert f"disk '{name}'" in result.warnings[0]
            check(keeper, vm, result, list(vm.disks), qemu_tools)
            first = keeper.backup(vm.uri, audit=100)
            assert set(levels(first).values()) == {"incremental"}
            assert first.warnings == ()


def test_hot_added_disk_is_read_in_full_alone(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 4M")
        keeper.backup(vm.uri)
        added = create_disk(tmp_path, "vdb", tools=qemu_tools)
        vm.hot_add(added)
        vm.qemu_io("vdb", "write -P 2 7M 4M")
        vm.qemu_io("vda", "write -P 3 0 64k")
        result = keeper.backup(vm.uri, "incremental")
        assert result.level is Level.INCREMENTAL
        assert levels(result) == {"vda": "incremental", "vdb": "full"}
        check(keeper, vm, result, [disk, added], qemu_tools)
        vm.qemu_io("vdb", "write -P 4 8M 64k")
        again = keeper.backup(vm.uri, "differential")
        assert levels(again) == {"vda": "differential", "vdb": "differential"}
        check(keeper, vm, again, [disk, added], qemu_tools)


def test_hot_unplugged_disk_is_left_out_and_comes_back(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    # A SCSI disk goes at once, without the guest's consent.
    other = create_disk(tmp_path, "sda", tools=qemu_tools, device="scsi-hd")
    with Vm([disk, other], tools=qemu_tools) as vm:
        for name in ("vda", "sda"):
            vm.qemu_io(name, "write -P 1 0 4M")
        both = keeper.backup(vm.uri)
        check(keeper, vm, both, [disk, other], qemu_tools)
        vm.hot_remove("sda")
        vm.qemu_io("vda", "write -P 2 1M 64k")
        alone = keeper.backup(vm.uri)
        assert levels(alone) == {"vda": "incremental"}
        assert alone.parent == both.backup
        check(keeper, vm, alone, [disk], qemu_tools)
        assert set(keeper.restore(both.backup, force=True)) == {"vda", "sda"}
        # Its image kept its bitmap: what was written since the backup is all that is read.
        vm.hot_add(other)
        vm.qemu_io("sda", "write -P 3 2M 64k")
        again = keeper.backup(vm.uri)
        assert levels(again) == {"vda": "incremental", "sda": "incremental"}
        assert {one.name: one.changed_bytes for one in again.disks} == {"vda": 0, "sda": 65536}
        check(keeper, vm, again, [disk, other], qemu_tools)


def test_disk_unplugged_during_a_backup_does_no_harm(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    """The frozen view does not need the device: the backup ends well, and holds the disk."""
    other = create_disk(tmp_path, "sda", tools=qemu_tools, device="scsi-hd")
    with Vm([disk, other], tools=qemu_tools) as vm:
        for name in ("vda", "sda"):
            vm.qemu_io(name, "write -P 1 0 4M")
        unplugged: list[str] = []

        def told(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_START and not unplugged:
                unplugged.append("sda")
                vm.qmp("device_del", id="sda")
                vm.wait_event("DEVICE_DELETED")

        result = keeper.backup(vm.uri, progress=told)
        assert unplugged
        assert levels(result) == {"vda": "full", "sda": "full"}
        assert not any(vm.leftovers().values())
        restored = keeper.restore(result.backup)
        for one in (disk, other):
            compare(restored[one.name], one.path, other_format="qcow2", tools=qemu_tools)
        assert levels(keeper.backup(vm.uri)) == {"vda": "incremental"}


@pytest.mark.parametrize("size", [96 * MIB, 32 * MIB + 512], ids=["grown", "shrunk"])
def test_resized_disk_is_read_in_full_alone(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path, size: int
) -> None:
    other = create_disk(tmp_path, "vdb", tools=qemu_tools)
    with Vm([disk, other], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 64M")
        vm.qemu_io("vdb", "write -P 2 0 4M")
        keeper.backup(vm.uri)
        vm.block_resize("vda", size)
        vm.qemu_io("vda", f"write -P 9 {size - 4096} 4096")
        result = keeper.backup(vm.uri)
        assert levels(result) == {"vda": "full", "vdb": "incremental"}
        assert str(64 * MIB) in reason(result, "vda")
        assert str(size) in reason(result, "vda")
        check(keeper, vm, result, [disk, other], qemu_tools)
        vm.qemu_io("vda", "write -P 8 1M 4k")
        again = keeper.backup(vm.uri)
        assert levels(again) == {"vda": "incremental", "vdb": "incremental"}
        check(keeper, vm, again, [disk, other], qemu_tools)


@pytest.mark.parametrize(
    ("size", "last"),
    [(48 * MIB, "write -P 3 60M 1M"), (64 * MIB - 65536, "write -P 3 20M 1M")],
    ids=["much", "one-cluster"],
)
def test_a_disk_that_was_shrunk_and_grown_again_is_read_in_full(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path, size: int, last: str
) -> None:
    """QEMU calls the part that is back clean, and the size is what it was."""
    other = create_disk(tmp_path, "vdb", tools=qemu_tools)
    with Vm([disk, other], tools=qemu_tools) as vm:
        for name in ("vda", "vdb"):
            vm.qemu_io(name, "write -P 1 0 16M")
            vm.qemu_io(name, "write -P 2 52M 12M")
        keeper.backup(vm.uri)
        vm.block_resize("vda", size)
        vm.block_resize("vda", 64 * MIB)
        for name in ("vda", "vdb"):
            vm.qemu_io(name, last)
        result = keeper.backup(vm.uri, audit=0)
        assert levels(result) == {"vda": "full", "vdb": "incremental"}
        assert "shrunk and grown again" in reason(result, "vda")
        assert len(result.warnings) == 1
        check(keeper, vm, result, [disk, other], qemu_tools)
        vm.qemu_io("vda", "write -P 4 1M 64k")
        again = keeper.backup(vm.uri, audit=0)
        assert levels(again) == {"vda": "incremental", "vdb": "incremental"}
        assert again.warnings == ()
        check(keeper, vm, again, [disk, other], qemu_tools)


def test_a_disk_that_was_shrunk_by_a_sector_and_grown_again_is_exact(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk
) -> None:
    """Inside a cluster of qcow2 nothing is cut off, or QEMU writes zeroes there: either is no lie."""
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 2 52M 12M")
        keeper.backup(vm.uri)
        vm.block_resize("vda", 64 * MIB - 512)
        vm.block_resize("vda", 64 * MIB)
        vm.qemu_io("vda", "write -P 3 1M 64k")
        result = keeper.backup(vm.uri)
        assert result.warnings == ()
        check(keeper, vm, result, [disk], qemu_tools)


def test_images_that_changed_places_are_read_in_full(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    """Both have checkpoints of the same backup and the same size."""
    other = create_disk(tmp_path, "vdb", tools=qemu_tools)
    with Vm([disk, other], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 4M")
        vm.qemu_io("vdb", "write -P 2 8M 4M")
        keeper.backup(vm.uri)
        vm.quit()
    swapped = [replace(disk, path=other.path), replace(other, path=disk.path)]
    with Vm(swapped, tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 3 1M 64k")
        result = keeper.backup(vm.uri)
        assert levels(result) == {"vda": "full", "vdb": "full"}
        check(keeper, vm, result, swapped, qemu_tools)
        # What the other disk's checkpoints were went with the old ones.
        assert [len(vm.bitmaps(name)) for name in ("vda", "vdb")] == [1, 1]
        vm.qemu_io("vda", "write -P 4 2M 64k")
        again = keeper.backup(vm.uri)
        assert levels(again) == {"vda": "incremental", "vdb": "incremental"}
        check(keeper, vm, again, swapped, qemu_tools)


def test_removed_bitmap_costs_one_disk_a_full(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    other = create_disk(tmp_path, "vdb", tools=qemu_tools)
    with Vm([disk, other], tools=qemu_tools) as vm:
        for name in ("vda", "vdb"):
            vm.qemu_io(name, "write -P 1 0 4M")
        keeper.backup(vm.uri)
        (bitmap,) = vm.bitmaps("vda")
        vm.qmp("block-dirty-bitmap-remove", node=disk.node, name=bitmap)
        vm.qemu_io("vda", "write -P 2 1M 1M")
        result = keeper.backup(vm.uri)
        assert levels(result) == {"vda": "full", "vdb": "incremental"}
        assert bitmap in reason(result, "vda")
        assert "missing" in reason(result, "vda")
        check(keeper, vm, result, [disk, other], qemu_tools)


def test_a_lost_newest_bitmap_falls_back_to_the_full_ones(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk
) -> None:
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 32M")
        full = keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -P 2 0 1M")
        lost = keeper.backup(vm.uri)
        newest = next(name for name in vm.bitmaps("vda") if lost.backup in name)
        vm.qmp("block-dirty-bitmap-remove", node=disk.node, name=newest)
        vm.qemu_io("vda", "write -P 3 2M 1M")
        result = keeper.backup(vm.uri)
        assert levels(result) == {"vda": "incremental"}
        assert result.parent == full.backup
        assert result.disks[0].changed_bytes == 2 * MIB
        check(keeper, vm, result, [disk], qemu_tools)


@pytest.mark.parametrize("end", ["kill", "quit", "terminate"])
def test_restarted_qemu(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path, end: str
) -> None:
    other = create_disk(tmp_path, "vdb", tools=qemu_tools)
    with Vm([disk, other], tools=qemu_tools) as vm:
        for name in ("vda", "vdb"):
            vm.qemu_io(name, "write -P 1 0 4M")
        keeper.backup(vm.uri)
        if end == "kill":
            # A bitmap that was there when the image was opened comes back inconsistent, one that was
            # added since does not come back: see both.
            vm.quit()
            vm.restart()
            keeper.backup(vm.uri)
            vm.qemu_io("vda", "write -P 2 1M 1M")
            vm.qemu_io("vda", "flush")
            vm.kill()
        else:
            getattr(vm, end)()
        vm.restart()
        vm.qemu_io("vda", "write -P 3 2M 1M")
        result = keeper.backup(vm.uri)
        wanted = "full" if end == "kill" else "incremental"
        assert levels(result) == {"vda": wanted, "vdb": wanted}
        check(keeper, vm, result, [disk, other], qemu_tools)
        vm.qemu_io("vda", "write -P 4 3M 64k")
        again = keeper.backup(vm.uri)
        assert levels(again) == {"vda": "incremental", "vdb": "incremental"}
        check(keeper, vm, again, [disk, other], qemu_tools)
        for name in ("vda", "vdb"):
            assert not any(bitmap.get("inconsistent") for bitmap in vm.bitmaps(name).values())


def test_odd_sizes(qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path) -> None:
    sizes = {"tiny": 512, "odd": 64 * 1024 + 512, "segment": (1 << 30) + 3 * 512}
    disks = [
        create_disk(tmp_path, name, size=size, tools=qemu_tools) for name, size in sizes.items()
    ]
    with Vm(disks, tools=qemu_tools) as vm:
        for level, pattern in (("full", 5), ("incremental", 6), ("incremental", 0)):
            for name, size in sizes.items():
                vm.qemu_io(name, f"write -P {pattern} {size - 512} 512")
            result = keeper.backup(vm.uri, level)
            assert set(levels(result).values()) == {level}
            check(keeper, vm, result, disks, qemu_tools)


def test_devices_and_formats(qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path) -> None:
    disks = [
        create_disk(tmp_path, "scsi0", tools=qemu_tools, device="scsi-hd"),
        create_disk(tmp_path, "ide0", tools=qemu_tools, device="ide-hd"),
        create_disk(tmp_path, "nvme0", tools=qemu_tools, device="nvme"),
        create_disk(tmp_path, "raw0", tools=qemu_tools, format="raw"),
        create_disk(tmp_path, "slow", tools=qemu_tools, throttled=True),
        create_disk(tmp_path, "old", tools=qemu_tools, options="compat=0.10"),
    ]
    with Vm(disks, tools=qemu_tools) as vm:
        for guest_first in (False, True):
            for level in ("full", "incremental"):
                for number, disk in enumerate(disks):
                    vm.qemu_io(disk.name, f"write -P {number + 17} {number}M 200k")
                result = keeper.backup(vm.uri, level, guest_first=guest_first)
                assert levels(result) == {disk.name: level for disk in disks}
                check(keeper, vm, result, disks, qemu_tools)
        assert not any(vm.leftovers().values())


def test_media_are_skipped_and_selection_is_checked(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    fixed = create_disk(tmp_path, "fixed", tools=qemu_tools, read_only=True)
    iso = create_disk(tmp_path, "iso", tools=qemu_tools, format="raw")
    arguments = ["-drive", f"file={iso.path},if=ide,media=cdrom,format=raw", "-S"]
    arguments += [
        "-drive",
        f"file={disk.path},if=none,id=tmp,snapshot=on,format=qcow2,file.locking=off",
    ]
    arguments += ["-device", "virtio-blk-pci,drive=tmp,id=temporary"]
    with Vm([disk, fixed], tools=qemu_tools, arguments=arguments) as vm:
        result = keeper.backup(vm.uri)
        assert levels(result) == {"vda": "full"}
        with pytest.raises(nbdpull.UsageError, match=r"no disk 'vdx'; it has: vda"):
            keeper.backup(vm.uri, include=("vdx",))
        with pytest.raises(nbdpull.UsageError, match=r"'fixed' can't be backed up: read-only"):
            keeper.backup(vm.uri, include=("fixed",))
        with pytest.raises(nbdpull.UsageError, match=r"no disk to back up"):
            keeper.backup(vm.uri, exclude=("vda",))
        assert not any(vm.leftovers().values())


def test_iothread_is_refused_below_9_before_anything_is_touched(
    keeper: Keeper, tmp_path: Path, qemu_tools: QemuTools
) -> None:
    plain = create_disk(tmp_path, "plain", tools=qemu_tools)
    threaded = create_disk(tmp_path, "fast", tools=qemu_tools, iothread=True)
    with Vm([plain, threaded], tools=qemu_tools) as vm:
        vm.qemu_io("fast", "write -P 3 1M 1M")
        if qemu_tools is QEMU_72:
            with pytest.raises(nbdpull.SourceError, match="'fast' runs in iothread"):
                keeper.backup(vm.uri)
            assert not any(vm.leftovers().values())
            result = keeper.backup(vm.uri, exclude=("fast",))
            check(keeper, vm, result, [plain], qemu_tools)
        else:
            for level in ("full", "incremental"):
                result = keeper.backup(vm.uri, level)
                check(keeper, vm, result, [plain, threaded], qemu_tools)
        assert vm.running
