"""The harness itself: what other tests rely on must be true on each QEMU version."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.bootwriter import BLOCK, BootWriter
from tests.support.disk import compare, create_disk, identical, to_raw
from tests.support.linuxguest import LinuxGuest, check_filesystem, create_ext4_disk
from tests.support.process import run, spawn, stop
from tests.support.qmp import QmpError
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import HAS_FUSE, StorageDaemon, Vm, pid_alive

MIB = 1 << 20


def test_boot_writer_writes_to_both_disks_in_step(tmp_path: Path, qemu_tools: QemuTools) -> None:
    disks = [
        create_disk(tmp_path, "vda", size=32 * MIB, tools=qemu_tools),
        create_disk(tmp_path, "vdb", size=32 * MIB, format="raw", tools=qemu_tools),
    ]
    writer = BootWriter(blocks=256)
    with Vm(disks, tools=qemu_tools, writer=writer) as vm:
        vm.wait_written(100)
        with vm.halted():
            copies = vm.copy_disks(tmp_path / "copies")
            done = vm.written()
        assert writer.check_together(list(copies.values())) in {done, done + 1}
        vm.wait_written(10)
        with vm.halted():
            later = vm.copy_disks(tmp_path / "later")
        with pytest.raises(AssertionError, match="different points in time"):
            writer.check_together([later["vda"], copies["vdb"]])
        assert vm.leftovers() == {"jobs": [], "exports": [], "nodes": [], "chardevs": []}


def test_boot_writer_goes_on_after_a_restart(tmp_path: Path) -> None:
    disk = create_disk(tmp_path, "vda", size=4 * MIB, format="raw")
    writer = BootWriter(disks=1, blocks=64)
    with Vm([disk], writer=writer) as vm:
        vm.wait_written(50)
        assert vm.quit() == 0
        before = writer.check(disk.path)
        vm.restart()
        vm.wait_written(20)
        vm.kill()
    assert writer.check(disk.path) >= max(before, 50)


@pytest.mark.parametrize("wrong", ["byte", "later", "missing"])
def test_boot_writer_check_finds_one_wrong_block(tmp_path: Path, wrong: str) -> None:
    writer = BootWriter(disks=1, blocks=64)
    state = 0
    for _ in range(100):
        state = (state * 1664525 + 1013904223) % (1 << 32)
    record = b"NBDW" + (100).to_bytes(4, "little") + state.to_bytes(4, "little")
    raw = tmp_path / "raw"
    raw.write_bytes(record.ljust(BLOCK, b"\0") + writer.expected(100).repeat(1024).tobytes())
    assert writer.check(raw) == 100
    with raw.open("r+b") as file:
        if wrong == "byte":
            file.seek(BLOCK * writer.block_of(99) + 4095)
            file.write(b"x")
        elif wrong == "later":
            file.seek(BLOCK * writer.block_of(102))
            file.write((102).to_bytes(4, "little") * 1024)
        else:
            file.seek(BLOCK * writer.block_of(100))
            file.write(bytes(BLOCK))
    with pytest.raises(AssertionError, match="record says 100"):
        writer.check(raw)


def test_qemu_io_writes_where_a_copy_before_write_filter_sees_it(
    tmp_path: Path, qemu_tools: QemuTools
) -> None:
    disk = create_disk(tmp_path, "vda", size=4 * MIB, tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 64k")
        scratch = tmp_path / "scratch"
        run([qemu_tools.qemu_img, "create", "-q", "-f", "raw", scratch, "4M"])
        file = {"driver": "file", "filename": str(scratch)}
        vm.qmp("blockdev-add", driver="raw", node_name="scratch", file=file)
        vm.qmp("blockdev-backup", job_id="job", device=disk.node, target="scratch", sync="none")
        assert vm.leftovers()["jobs"] == ["job"]
        vm.qemu_io("vda", "write -P 2 0 64k")
        with pytest.raises(AssertionError, match="Pattern verification failed"):
            vm.qemu_io("vda", "read -P 1 0 64k")
        with pytest.raises(QmpError, match="in use"):
            vm.qmp("blockdev-del", node_name="scratch")
        vm.qmp("job-cancel", id="job")
        vm.wait_event("BLOCK_JOB_CANCELLED")
    assert scratch.read_bytes()[: 64 << 10] == b"\1" * (64 << 10)


def test_disk_is_hot_added_and_comes_back_after_a_restart(
    tmp_path: Path, qemu_tools: QemuTools
) -> None:
    first = create_disk(tmp_path, "vda", size=4 * MIB, tools=qemu_tools)
    with Vm([first], tools=qemu_tools) as vm:
        vm.hot_add(create_disk(tmp_path, "vdb", size=8 * MIB, tools=qemu_tools))
        vm.qemu_io("vdb", "write -P 3 1M 64k")
        vm.block_resize("vdb", 16 * MIB)
        vm.quit()
        vm.restart()
        vm.qemu_io("vdb", "read -P 3 1M 64k")
        vm.qemu_io("vdb", "read -P 0 15M 64k")


@pytest.mark.parametrize("device", ["virtio-blk-pci", "scsi-hd", "ide-hd", "nvme"])
def test_every_kind_of_device_is_found_by_its_id(tmp_path: Path, device: str) -> None:
    disk = create_disk(tmp_path, "disk0", size=MIB, device=device, throttled=device == "ide-hd")
    with Vm([disk]) as vm:
        vm.qemu_io("disk0", "write -P 4 0 4k")
        assert vm.bitmaps("disk0") == {}


@pytest.mark.parametrize(
    "nbd_server",
    [
        pytest.param(
            False,
            id="fuse",
            marks=pytest.mark.skipif(not HAS_FUSE, reason="this user may not open /dev/fuse"),
        ),
        pytest.param(True, id="nbd"),
    ],
)
def test_storage_daemon_is_written_to_through_its_guest_export(
    tmp_path: Path, qemu_tools: QemuTools, *, nbd_server: bool
) -> None:
    disk = create_disk(tmp_path, "disk0", size=4 * MIB, tools=qemu_tools)
    with StorageDaemon([disk], tools=qemu_tools, nbd_server=nbd_server) as daemon:
        daemon.qemu_io("disk0", "write -P 5 1M 64k")
        assert daemon.leftovers() == {"jobs": [], "exports": [], "nodes": [], "chardevs": []}
        copy = to_raw(disk.path, tmp_path / "copy", tools=qemu_tools)
    assert copy.read_bytes()[MIB : MIB + 65536] == b"\5" * 65536


def test_compare_sees_one_byte_and_a_longer_tail_of_zeroes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a" * 4096)
    other.write_bytes(b"a" * 4096)
    compare(one, other)
    other.write_bytes(b"a" * 4096 + bytes(4096))
    assert not identical(one, other)[0]
    other.write_bytes(b"a" * 4095 + b"b")
    with pytest.raises(AssertionError, match="mismatch"):
        compare(one, other)


def test_nothing_outlives_a_killed_test_run(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import time
        from tests.support.vm import Vm
        vm = Vm().start()
        print(vm.process.pid, vm.folder, flush=True)
        time.sleep(60)
    """)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        pid, folder = child.stdout.readline().split()
        assert pid_alive(int(pid))
        child.kill()
        deadline = time.monotonic() + 10
        while pid_alive(int(pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        stop(child)
    shutil.rmtree(folder)


def test_a_stopped_child_is_ended_too() -> None:
    child = spawn(["sleep", "60"])
    os.kill(child.pid, signal.SIGSTOP)
    stop(child)
    assert child.returncode == -signal.SIGKILL


def test_linux_guest_survives_a_power_failure_with_every_synced_record(
    tmp_path: Path, qemu_tools: QemuTools
) -> None:
    disks = [
        create_ext4_disk(tmp_path, name, size=128 * MIB, tools=qemu_tools)
        for name in ("vda", "vdb")
    ]
    with LinuxGuest(disks, tools=qemu_tools) as guest:
        guest.wait_synced(20)
        with guest.halted():
            time.sleep(0.2)
            synced = guest.synced
            copies = guest.copy_disks(tmp_path / "copies")
        first, second = (check_filesystem(copy, tmp_path) for copy in copies.values())
        assert first.replayed
        assert synced <= second.records <= first.records <= second.records + 1 <= synced + 2
        guest.wait_synced(synced + 5)
        guest.kill()
        guest.restart()
        guest.wait_synced(synced + 10)


def test_linux_guest_check_finds_a_damaged_record(tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.mkdir()
    (content / "records.log").write_text("1 0123\n")
    disk = create_ext4_disk(
        tmp_path, "vda", size=16 * MIB, content=content, format="raw", tools=QEMU_72
    )
    with pytest.raises(AssertionError, match="record 1 of 1"):
        check_filesystem(disk.path, tmp_path)
