"""VMs that are shut down: their images, and the chain that goes on through it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import nbdpull
from tests.integration.conftest import Keeper
from tests.support.disk import Disk, compare, create_disk, image_info
from tests.support.process import run
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import Vm

MIB = 1 << 20


@pytest.fixture
def tools(qemu_tools: QemuTools, monkeypatch: pytest.MonkeyPatch) -> QemuTools:
    """Each QEMU version in turn, as the one that is found in PATH."""
    monkeypatch.setenv("PATH", f"{qemu_tools.bin}:/usr/bin:/bin:/usr/sbin:/sbin")
    return qemu_tools


@pytest.fixture
def disks(tmp_path: Path, tools: QemuTools) -> list[Disk]:
    return [create_disk(tmp_path, name, tools=tools) for name in ("vda", "vdb")]


def io(disk: Disk, *commands: str, tools: QemuTools = QEMU_72) -> None:
    """Change an image that no VM has open."""
    options = [option for command in commands for option in ("-c", command)]
    run([tools.qemu_io, "-f", disk.format, *options, disk.path])


def bitmaps(disk: Disk) -> dict[str, list[str]]:
    """The bitmaps in an image, with their flags."""
    data = image_info(disk.path, format=disk.format)["format-specific"]["data"]
    return {entry["name"]: entry["flags"] for entry in data.get("bitmaps", [])}


def sources(disks: list[Disk], *, named: bool = False) -> list[str]:
    return [f"disk:{disk.name}={disk.path}" if named else f"disk:{disk.path}" for disk in disks]


def check(keeper: Keeper, result: nbdpull.BackupResult, disks: list[Disk]) -> None:
    restored = keeper.restore(result.backup)
    assert set(restored) == {disk.name for disk in disks}
    for disk in disks:
        compare(restored[disk.name], disk.path, other_format=disk.format)


def levels(result: nbdpull.BackupResult) -> list[str]:
    return [str(disk.level) for disk in result.disks]


def test_a_chain_goes_on_through_running_and_shut_down(
    tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    vm = Vm(disks, tools=tools, name="web")
    with vm:
        for disk in disks:
            vm.qemu_io(disk.name, "write -P 1 0 8M")
        full = keeper.backup(vm.uri)
        for disk in disks:
            vm.qemu_io(disk.name, "write -P 2 1M 1M")
        vm.quit()
        # Shut down: what was written since the last backup of the running VM.
        first = keeper.backup(sources(disks))
        assert (first.vm, first.parent, levels(first)) == ("web", full.backup, ["incremental"] * 2)
        assert [disk.changed_bytes for disk in first.disks] == [MIB, MIB]
        assert first.warnings == ()
        check(keeper, first, disks)
        # Changed while it is off, zeroes included.
        io(disks[0], "write -P 3 2M 64k", "write -z 3M 128k", tools=tools)
        second = keeper.backup(sources(disks))
        assert (second.parent, levels(second)) == (first.backup, ["incremental"] * 2)
        assert [disk.changed_bytes for disk in second.disks] == [3 * 65536, 0]
        check(keeper, second, disks)
        third = keeper.backup(sources(disks), "differential")
        assert (third.parent, levels(third)) == (full.backup, ["differential"] * 2)
        assert [disk.changed_bytes for disk in third.disks] == [MIB + 3 * 65536, MIB]
        check(keeper, third, disks)
        # Running again.
        vm.restart()
        vm.qemu_io("vdb", "write -P 4 5M 64k")
        fourth = keeper.backup(vm.uri)
        assert (fourth.parent, levels(fourth)) == (third.backup, ["incremental"] * 2)
        assert [disk.changed_bytes for disk in fourth.disks] == [0, 65536]
        vm.quit()
    check(keeper, fourth, disks)
    for disk in disks:
        # The newest one and the full's, for differentials; both record.
        assert list(bitmaps(disk).values()) == [["auto"], ["auto"]]


def test_copy_writes_nothing_into_the_image(
    tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    io(disks[0], "write -P 1 0 3M", tools=tools)
    keeper.backup(sources(disks), vm="web")
    before = [disk.path.read_bytes() for disk in disks]
    copy = keeper.backup(sources(disks), "copy", vm="web")
    assert [disk.path.read_bytes() for disk in disks] == before
    check(keeper, copy, disks)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_an_image_in_use_is_refused(
    tools: QemuTools, keeper: Keeper, tmp_path: Path, image_format: str
) -> None:
    disk = create_disk(tmp_path, "vda", format=image_format, tools=tools)
    refused = pytest.raises(nbdpull.InUseError, match="through its monitor")
    with Vm([disk], tools=tools), refused:
        keeper.backup(f"disk:{disk.path}")
    assert keeper.backup(f"disk:{disk.path}").vm == "vda"


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_no_vm_can_write_while_its_image_is_read(
    tools: QemuTools, keeper: Keeper, tmp_path: Path, image_format: str
) -> None:
    disk = create_disk(tmp_path, "vda", format=image_format, tools=tools)
    io(disk, "write -P 1 0 4M", tools=tools)
    tried: list[str] = []

    def told(progress: nbdpull.Progress) -> None:
        if progress.kind is nbdpull.ProgressKind.DISK_START:
            options = ["-f", image_format, "-c", "write -P 2 0 4M"]
            tried.append(run([tools.qemu_io, *options, disk.path], check=False).stderr)

    result = keeper.backup(f"disk:{disk.path}", progress=told)
    assert len(tried) == 1
    assert "lock" in tried[0]
    check(keeper, result, [disk])
    io(disk, "write -P 2 0 1M", tools=tools)


def test_a_failed_run_costs_nothing(tools: QemuTools, keeper: Keeper, disks: list[Disk]) -> None:
    io(disks[0], "write -P 1 0 8M", tools=tools)
    first = keeper.backup(sources(disks), vm="web")
    before = [bitmaps(disk) for disk in disks]
    io(disks[0], "write -P 2 2M 2M", tools=tools)

    async def cancel_in_the_middle() -> None:
        task: asyncio.Task[nbdpull.BackupResult]
        loop = asyncio.get_running_loop()

        def told(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_START:
                loop.call_soon_threadsafe(task.cancel)
                time.sleep(0.2)

        task = asyncio.ensure_future(
            nbdpull.aio.backup(
                sources(disks), keeper.repository, vm="web", scratch=keeper.scratch, progress=told
            )
        )
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_in_the_middle())
    assert [bitmaps(disk) for disk in disks] == before
    assert list(keeper.scratch.iterdir()) == []
    again = keeper.backup(sources(disks), vm="web")
    assert (again.parent, again.disks[0].changed_bytes) == (first.backup, 2 * MIB)
    check(keeper, again, disks)


KILLED = """
import os, signal, sys
import nbdpull

def told(progress):
    if progress.kind is nbdpull.ProgressKind.DISK_START:
        os.kill(os.getpid(), signal.SIGKILL)

nbdpull.backup(sys.argv[3:], sys.argv[1], vm="web", scratch=sys.argv[2], progress=told)
"""


@pytest.mark.parametrize("then", ["backup", "cleanup", "running"])
def test_a_killed_run_is_cleaned_up(
    tools: QemuTools, keeper: Keeper, disks: list[Disk], then: str
) -> None:
    io(disks[0], "write -P 1 0 8M", tools=tools)
    first = keeper.backup(sources(disks, named=True), vm="web")
    before = [bitmaps(disk) for disk in disks]
    io(disks[0], "write -P 2 2M 2M", tools=tools)
    command = [sys.executable, "-c", KILLED, keeper.repository, str(keeper.scratch)]
    done = subprocess.run([*command, *sources(disks, named=True)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    # Its servers end by themselves: the images can be written again.
    wait_until_free(disks[0], tools)
    assert [len(bitmaps(disk)) for disk in disks] == [3, 3]
    io(disks[0], "write -P 3 6M 1M", tools=tools)
    if then == "cleanup":
        cleaned = keeper.cleanup(sources(disks))
        assert len(cleaned.removed) == 5
        assert [bitmaps(disk) for disk in disks] == before
        assert keeper.cleanup(sources(disks)).removed == ()
    if then == "running":
        with Vm(disks, tools=tools, name="web") as vm:
            again = keeper.backup(vm.uri)
            vm.quit()
    else:
        again = keeper.backup(sources(disks, named=True), vm="web")
    assert (again.parent, again.disks[0].changed_bytes) == (first.backup, 3 * MIB)
    check(keeper, again, disks)
    for disk in disks:
        assert len(bitmaps(disk)) == 2
        assert not [name for name in bitmaps(disk) if name.startswith("np-")]


def wait_until_free(disk: Disk, tools: QemuTools) -> None:
    deadline = time.monotonic() + 20
    options = ["-f", disk.format, "-c", "write -P 2 2M 64k"]
    while run([tools.qemu_io, *options, disk.path], check=False).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_bitmaps_that_a_killed_vm_left_inconsistent_cost_a_full(
    tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    keeper.backup(sources(disks, named=True), vm="web")
    with Vm(disks, tools=tools, name="web") as vm:
        vm.qemu_io("vda", "write -P 1 0 1M")
        vm.kill()
    assert "in-use" in next(iter(bitmaps(disks[0]).values()))
    result = keeper.backup(sources(disks))
    assert levels(result) == ["full", "full"]
    assert "inconsistent" in result.disks[0].reason
    check(keeper, result, disks)
    assert [list(bitmaps(disk).values()) for disk in disks] == [[["auto"]], [["auto"]]]
    assert levels(keeper.backup(sources(disks))) == ["incremental", "incremental"]


def test_images_without_bitmaps_are_read_in_full(
    tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disks = [
        create_disk(tmp_path, "raw0", format="raw", size=3 * MIB + 512, tools=tools),
        create_disk(tmp_path, "old", options="compat=0.10", tools=tools),
        create_disk(tmp_path, "new", tools=tools),
    ]
    for disk in disks:
        io(disk, "write -P 5 1M 1M", tools=tools)
    for wanted in ("full", "incremental"):
        result = keeper.backup(sources(disks), vm="mixed")
        assert levels(result) == ["full", "full", wanted]
        check(keeper, result, disks)


def test_a_disk_is_known_by_its_checkpoint(
    tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disks = [
        create_disk(tmp_path, "vda", size=64 * MIB, tools=tools),
        create_disk(tmp_path, "vdb", size=65 * MIB, tools=tools),
        create_disk(tmp_path, "vdc", size=65 * MIB, tools=tools),
    ]
    keeper.backup(sources(disks, named=True), vm="web")
    moved = [disk.path.rename(tmp_path / f"other-{disk.name}.qcow2") for disk in disks]
    result = keeper.backup([f"disk:{moved[0]}", f"disk:vdb={moved[1]}", f"disk:vdc={moved[2]}"])
    assert result.vm == "web"
    assert [disk.name for disk in result.disks] == ["vda", "vdb", "vdc"]
    assert levels(result) == ["incremental"] * 3
    # Of two disks of one size, too: the checkpoint's name tells the disk.
    alone = keeper.backup([f"disk:{moved[1]}"])
    assert ([disk.name for disk in alone.disks], levels(alone)) == (["vdb"], ["incremental"])
    # A VM of another name has none of that.
    other = keeper.backup(f"disk:{moved[0]}", vm="other")
    assert (other.vm, [disk.name for disk in other.disks]) == ("other", ["other-vda"])


def test_what_nobody_can_know_is_asked_for(
    tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    with pytest.raises(nbdpull.UsageError, match="name the VM with --vm"):
        keeper.backup(sources(disks))
    with pytest.raises(nbdpull.UsageError, match="--guest-first is about a QEMU that is reached"):
        keeper.backup(sources(disks), vm="web", guest_first=True)
    with pytest.raises(nbdpull.SourceError, match="No such file"):
        keeper.backup(f"disk:{tmp_path}/none.qcow2")
    # A guest can write a qcow2 header to a raw disk: never believe the content.
    crafted = tmp_path / "web.img"
    disks[0].path.rename(crafted)
    with pytest.raises(nbdpull.UsageError, match=r"'disk\+qcow2:"):
        keeper.backup(f"disk:{crafted}")
    raw = keeper.backup(f"disk+raw:{crafted}", vm="raw")
    compare(keeper.restore(raw.backup)["web"], crafted)
    assert keeper.backup(f"disk+qcow2:{crafted}", vm="qcow2").disks[0].size == disks[0].size
    crafted.rename(tmp_path / "web.qcow2")
    (tmp_path / "web.qcow2").write_bytes(b"no image")
    with pytest.raises(nbdpull.SourceError, match="not in qcow2 format"):
        keeper.backup(f"disk:{tmp_path}/web.qcow2")


def test_an_overlay_is_read_with_what_is_below_it(
    tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    below = create_disk(tmp_path, "below", tools=tools)
    io(below, "write -P 1 0 4M", tools=tools)
    options = f"backing_file={below.path},backing_fmt=qcow2"
    disk = create_disk(tmp_path, "vda", options=options, tools=tools)
    io(disk, "write -P 2 1M 64k", "write -z 2M 64k", tools=tools)
    check(keeper, keeper.backup(sources([disk])), [disk])
    io(disk, "write -P 3 3M 64k", tools=tools)
    result = keeper.backup(sources([disk]))
    assert (levels(result), result.disks[0].changed_bytes) == (["incremental"], 65536)
    check(keeper, result, [disk])


def test_a_raw_data_file_has_incrementals_in_its_qcow2(
    tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    options = f"data_file={tmp_path}/vda.raw,data_file_raw=on"
    disk = create_disk(tmp_path, "vda", options=options, tools=tools)
    io(disk, "write -P 1 0 4M", tools=tools)
    keeper.backup(sources([disk]))
    io(disk, "write -P 3 3M 64k", tools=tools)
    result = keeper.backup(sources([disk]))
    assert (levels(result), result.disks[0].changed_bytes) == (["incremental"], 65536)
    check(keeper, result, [disk])


def test_a_link_is_called_by_its_own_name(tools: QemuTools, keeper: Keeper, tmp_path: Path) -> None:
    disk = create_disk(tmp_path, "0f3a", tools=tools)
    link = tmp_path / "vda.qcow2"
    link.symlink_to(disk.path)
    result = keeper.backup(f"disk:{link}", vm="web")
    assert [one.name for one in result.disks] == ["vda"]
    with pytest.raises(nbdpull.UsageError, match="is given 2 times"):
        keeper.backup([f"disk:a={link}", f"disk:b={disk.path}"], vm="web")


def test_images_that_changed_places_are_read_in_full(
    tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    io(disks[0], "write -P 1 0 4M", tools=tools)
    io(disks[1], "write -P 2 8M 4M", tools=tools)
    keeper.backup(sources(disks, named=True), vm="web")
    swapped = [replace(disks[0], path=disks[1].path), replace(disks[1], path=disks[0].path)]
    result = keeper.backup(sources(swapped, named=True), vm="web")
    assert levels(result) == ["full", "full"]
    check(keeper, result, swapped)
    assert [len(bitmaps(disk)) for disk in swapped] == [1, 1]
    again = keeper.backup(sources(swapped, named=True), vm="web")
    assert levels(again) == ["incremental", "incremental"]


def test_images_without_names_go_by_their_own_checkpoints(
    tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    """One size and foreign file names: each checkpoint says whose it is."""
    io(disks[0], "write -P 1 0 4M", tools=tools)
    keeper.backup(sources(disks, named=True), vm="web")
    moved = []
    for disk, name in zip(disks, ("left", "right"), strict=True):
        moved.append(replace(disk, path=disk.path.rename(disk.path.with_name(f"{name}.qcow2"))))
    result = keeper.backup([f"disk:{disk.path}" for disk in reversed(moved)])
    assert {disk.name for disk in result.disks} == {"vda", "vdb"}
    assert levels(result) == ["incremental", "incremental"]
    check(keeper, result, moved)
