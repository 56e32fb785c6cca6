"""Reading a point in time: blocks that the guest has overwritten since are read as they were."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import nbdpull
from nbdpull.nbdio.connection import Connection, unix_uri
from tests.integration.conftest import Keeper
from tests.support.disk import MIB, compare, create_disk, to_raw
from tests.support.tools import QemuTools
from tests.support.vm import Vm

KIB = 1 << 10


def test_overwritten_blocks_are_read_as_they_were_beside_untouched_ones(
    qemu_tools: QemuTools, tmp_path: Path
) -> None:
    """Each read covers both: QEMU 7.2 gets a request that does so wrong, so none may be sent."""
    size = 8 * MIB
    disk = create_disk(tmp_path, "vda", size=size, tools=qemu_tools)
    scratch = tmp_path / "scratch"
    with scratch.open("wb") as file:
        file.truncate(size)
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", f"write -q -P 1 0 {size}")
        vm.qmp("blockdev-add", driver="file", node_name="scratch", filename=str(scratch))
        vm.qmp(
            "blockdev-backup",
            job_id="job",
            device=disk.node,
            target="scratch",
            sync="none",
            filter_node_name="filter",
        )
        vm.qmp("blockdev-add", driver="snapshot-access", node_name="access", file="filter")
        path = vm.folder / "nbd"
        vm.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        vm.qmp("block-export-add", type="nbd", id="e0", name="e0", node_name="access")
        for offset in range(64 * KIB, size, 256 * KIB):
            vm.qemu_io("vda", f"write -q -P 2 {offset + 4 * KIB} 4k")
        chance = random.Random(7)
        reads = [(0, MIB), (64 * KIB, 128 * KIB), (32 * KIB, 96 * KIB), (3, 2 * MIB)]
        reads += [(chance.randrange(size - MIB), chance.randrange(1, MIB)) for _ in range(40)]
        with Connection.open(unix_uri(str(path), "e0")) as connection:
            for offset, length in reads:
                buffer = bytearray(length)
                connection.read_into(memoryview(buffer), offset)
                assert buffer == b"\1" * length, (offset, length)


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
@pytest.mark.parametrize("level", ["full", "incremental"])
def test_what_is_zeroed_during_a_backup_is_kept_as_it_was(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, level: str, *, guest_first: bool
) -> None:
    """QEMU 7.2 tells block status of the point in time as it is now, wherever the guest wrote since."""
    disk = create_disk(tmp_path, "vda", size=64 * MIB, tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -q -P 1 0 32M")
        keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -q -P 2 0 32M")
        truth = to_raw(disk.path, tmp_path / "truth", tools=qemu_tools)

        def zero(progress: nbdpull.Progress) -> None:
            # The point in time is there, and nothing of the disk was looked at yet.
            if progress.kind is nbdpull.ProgressKind.DISK_START:
                for command in (
                    "write -q -z 1M 64k",
                    "write -q -z -u 2M 1M",
                    "discard -q 4M 1M",
                    "write -q -z 8M 16M",
                    "write -q -P 3 40M 1M",
                ):
                    vm.qemu_io("vda", command)

        done = keeper.backup(vm.uri, level, guest_first=guest_first, progress=zero)
        assert done.level == level
        compare(keeper.restore(done.backup)["vda"], truth, tools=qemu_tools)
        after = keeper.backup(vm.uri, guest_first=guest_first)
        assert after.disks[0].level == "incremental"
        compare(
            keeper.restore(after.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )
