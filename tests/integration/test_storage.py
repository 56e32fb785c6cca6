"""Disks as administrators have them: encrypted, on block devices, behind filters, without any name."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdpull import BackupResult
from tests.integration.conftest import Keeper
from tests.support.disk import Disk, compare, create_disk, identical
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import Vm

SIZE = 64 << 20


def write(vm: Vm, qdev: str, *commands: str) -> None:
    """Write to a disk that the harness knows nothing of, through its device."""
    for command in (*commands, "flush"):
        said = vm.qmp("human-monitor-command", command_line=f'qemu-io -d {qdev} "{command}"')
        assert "rror" not in said
        assert "ailed" not in said


def qdev_of(vm: Vm, disk: Disk) -> str:
    """The device that has the disk's image."""
    for entry in vm.qmp("query-block"):
        if entry.get("inserted", {}).get("file") == str(disk.path):
            return str(entry["qdev"])
    raise KeyError(disk.path)


def levels(result: BackupResult) -> dict[str, str]:
    return {disk.name: str(disk.level) for disk in result.disks}


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A block device, as a logical volume is one, and the file behind it."""
    backing = tmp_path / "volume"
    with backing.open("wb") as file:
        file.truncate(SIZE)
    device = run(["losetup", "--find", "--show", str(backing)]).stdout.strip()
    yield device, backing
    subprocess.run(["losetup", "--detach", device], check=True)


def test_a_block_device_is_incremental_while_qemu_lives_and_differs_only_afterwards(
    qemu_tools: QemuTools, keeper: Keeper, block_device: tuple[str, Path]
) -> None:
    device, backing = block_device
    arguments = [
        *("-blockdev", f"host_device,node-name=low,filename={device},discard=unmap"),
        *("-blockdev", "raw,node-name=lv,file=low,discard=unmap", "-S"),
        *("-device", "virtio-blk-pci,drive=lv,id=data"),
    ]
    qdev = "/machine/peripheral/data/virtio-backend"
    with Vm([], tools=qemu_tools, arguments=arguments) as vm:
        write(vm, qdev, "write -P 7 0 32M")
        full = keeper.backup(vm.uri)
        write(vm, qdev, "write -P 8 5M 1M", "write -z 9M 1M")
        second = keeper.backup(vm.uri)
        assert [levels(one) for one in (full, second)] == [
            {"data": "full"},
            {"data": "incremental"},
        ]
        assert second.disks[0].changed_bytes == 2 << 20
        compare(keeper.restore(second.backup)["data"], backing, tools=qemu_tools)
        vm.quit()
        vm.restart()
        write(vm, qdev, "write -P 9 20M 1M")
        third = keeper.backup(vm.uri)
        assert levels(third) == {"data": "full"}
        assert third.disks[0].read_bytes >= 30 << 20
        # Read whole, since no bitmap outlives QEMU there; stored is what differs.
        assert third.disks[0].reused_bytes >= 29 << 20
        assert third.disks[0].stored_bytes < 1 << 20
        compare(keeper.restore(third.backup)["data"], backing, tools=qemu_tools)


def test_a_luks_disk_is_backed_up_as_its_guest_sees_it(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    image = tmp_path / "disk.luks"
    unlock = "secret,id=sec,data=correct-horse"
    create = [str(qemu_tools.qemu_img), "create", "-q", "--object", unlock, "-f", "luks"]
    run([*create, "-o", "key-secret=sec,iter-time=10", str(image), str(SIZE)])
    arguments = [
        *("-object", unlock, "-S"),
        *(
            "-blockdev",
            f"luks,node-name=plain,key-secret=sec,file.driver=file,file.filename={image}",
        ),
        *("-device", "virtio-blk-pci,drive=plain,id=vault"),
    ]
    qdev = "/machine/peripheral/vault/virtio-backend"
    with Vm([], tools=qemu_tools, arguments=arguments) as vm:
        write(vm, qdev, "write -P 7 0 8M")
        results = [keeper.backup(vm.uri)]
        write(vm, qdev, "write -P 8 3M 1M")
        results.append(keeper.backup(vm.uri, guest_first=True))
        assert [levels(one) for one in results] == [{"vault": "full"}, {"vault": "incremental"}]
        restored = keeper.restore(results[-1].backup)["vault"]
        vm.quit()
    compared = [
        *(str(qemu_tools.qemu_img), "compare", "--object", unlock, "--image-opts"),
        f"driver=raw,file.driver=file,file.filename={restored}",
        f"driver=luks,key-secret=sec,file.driver=file,file.filename={image}",
    ]
    assert "identical" in run(compared).stdout


def test_an_overlay_below_a_copy_on_read_filter_is_one_disk(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    image = str(qemu_tools.qemu_img)
    run([image, "create", "-q", "-f", "qcow2", str(base), str(SIZE)])
    run([str(qemu_tools.qemu_io), "-f", "qcow2", "-c", "write -P 3 0 16M", str(base)])
    run([image, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(top)])
    arguments = [
        *("-blockdev", f"qcow2,node-name=over,file.driver=file,file.filename={top}"),
        *("-blockdev", "copy-on-read,node-name=cor,file=over", "-S"),
        *("-device", "virtio-blk-pci,drive=cor,id=root"),
    ]
    qdev = "/machine/peripheral/root/virtio-backend"
    with Vm([], tools=qemu_tools, arguments=arguments) as vm:
        full = keeper.backup(vm.uri)
        write(vm, qdev, "read 1M 1M", "write -P 4 6M 1M")
        second = keeper.backup(vm.uri)
        assert [levels(one) for one in (full, second)] == [
            {"root": "full"},
            {"root": "incremental"},
        ]
        # What a read copied up is not a change, or costs a second reading at most.
        assert second.disks[0].changed_bytes <= 2 << 20
        compare(keeper.restore(second.backup)["root"], top, other_format="qcow2", tools=qemu_tools)


def test_disks_that_nobody_named_go_on_after_a_restart(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    one, two = (create_disk(tmp_path, name, tools=qemu_tools) for name in ("one", "two"))
    empty = tmp_path / "floppy.img"
    empty.write_bytes(bytes(1440 << 10))
    arguments = [
        *("-drive", f"file={one.path},format=qcow2,if=virtio"),
        *("-drive", f"file={two.path},format=qcow2,if=ide", "-S"),
        *("-drive", f"file={empty},format=raw,if=floppy"),
    ]
    with Vm([], tools=qemu_tools, arguments=arguments) as vm:
        write(vm, qdev_of(vm, one), "write -P 1 0 1M")
        write(vm, qdev_of(vm, two), "write -P 2 0 1M")
        full = keeper.backup(vm.uri)
        assert sorted(levels(full).values()) == ["full", "full"]
        vm.quit()
        # One node more before them: QEMU's own node names are others then.
        extra = [
            "-blockdev",
            f"raw,file.driver=file,file.filename={empty},read-only=on,node-name=x",
        ]
        again = Vm([], tools=qemu_tools, arguments=[*extra, *arguments])
    with again as vm:
        write(vm, qdev_of(vm, two), "write -P 3 5M 1M")
        second = keeper.backup(vm.uri)
        assert levels(second) == dict.fromkeys(levels(full), "incremental")
        restored = list(keeper.restore(second.backup).values())
        same = [
            [
                identical(path, disk.path, other_format="qcow2", tools=qemu_tools)[0]
                for disk in (one, two)
            ]
            for path in restored
        ]
        assert sorted(same) == [[False, True], [True, False]]
