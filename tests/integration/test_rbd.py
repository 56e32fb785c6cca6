"""Disks in a real Ceph: block devices of RADOS, which QEMU reaches through librbd."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdpull
from nbdpull import Level
from tests.integration.conftest import Keeper
from tests.integration.test_exports import Servers
from tests.integration.test_kills import running_backup
from tests.support.ceph import Ceph
from tests.support.disk import compare
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import Vm

MIB = 1 << 20
SIZE = 64 * MIB
QDEV = "/machine/peripheral/data/virtio-backend"

_numbers = itertools.count()


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    with Ceph() as cluster:
        yield cluster


@pytest.fixture
def image(ceph: Ceph) -> str:
    """A new image with RBD's default features: exclusive lock, object map and fast diff among them."""
    name = f"disk{next(_numbers)}"
    ceph.rbd("create", "--size", "64M", name)
    return name


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tmp_path)
    yield made
    made.stop()


def machine(ceph: Ceph, image: str, tools: QemuTools, way: str = "raw") -> Vm:
    """A VM with one disk: a ``raw`` node above one of rbd, as libvirt has it, or ``bare``, or a ``drive``."""
    rbd = {"driver": "rbd", "pool": "rbd", "image": image, "conf": str(ceph.conf)}
    raw = {"driver": "raw", "node-name": "disk", "discard": "unmap"}
    arguments = {
        "raw": ["-blockdev", json.dumps({**raw, "file": {**rbd, "discard": "unmap"}})],
        "bare": ["-blockdev", json.dumps({**rbd, "node-name": "disk", "discard": "unmap"})],
        "drive": ["-drive", f"id=disk,if=none,format=raw,file={ceph.uri(image)}"],
    }[way]
    device = ["-device", "virtio-blk-pci,drive=disk,id=data", "-S"]
    return Vm([], tools=tools, arguments=[*arguments, *device])


def write(vm: Vm, *commands: str) -> None:
    """Write as the guest would; it is in Ceph afterwards."""
    for command in (*commands, "flush"):
        said = vm.qmp("human-monitor-command", command_line=f'qemu-io -d {QDEV} "{command}"')
        assert "rror" not in said
        assert "ailed" not in said


def noise(vm: Vm, folder: Path) -> None:
    """Fill the first 32 MiB with what is in no frame twice."""
    run(["dd", "if=/dev/urandom", f"of={folder / 'noise'}", "bs=1M", "count=32"])
    write(vm, f"write -s {folder / 'noise'} 0 32M")


def the_disk(result: nbdpull.BackupResult) -> nbdpull.DiskInfo:
    (disk,) = result.disks
    assert disk.name == "data"
    return disk


def check_restored(keeper: Keeper, backup: str, ceph: Ceph, image: str, truth: Path) -> None:
    """The restored disk is what Ceph's own tool exports."""
    truth.unlink(missing_ok=True)
    ceph.rbd("export", image, truth)
    compare(keeper.restore(backup)["data"], truth)


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_every_level_before_and_after_a_restart(
    qemu_tools: QemuTools,
    keeper: Keeper,
    ceph: Ceph,
    image: str,
    tmp_path: Path,
    *,
    guest_first: bool,
) -> None:
    truth = tmp_path / "truth"

    def backup(level: str = "auto") -> nbdpull.DiskInfo:
        result = keeper.backup(vm.uri, level, guest_first=guest_first)
        check_restored(keeper, result.backup, ceph, image, truth)
        assert not any(vm.leftovers()[kind] for kind in ("jobs", "exports", "chardevs"))
        return the_disk(result)

    with machine(ceph, image, qemu_tools) as vm:
        noise(vm, tmp_path)
        holders = ceph.rbd("lock", "ls", image)
        assert "auto" in holders
        full = backup()
        assert full.level is Level.FULL
        # What was never written has no objects in RADOS, and is not read.
        assert full.read_bytes == 32 * MIB
        write(vm, "write -P 8 5M 64k", "write -P 9 50M 1M", "write -z 9M 1M")
        second = backup()
        assert (second.level, second.changed_bytes) == (Level.INCREMENTAL, 2 * MIB + 64 * 1024)
        # A whole object, and a part of one.
        write(vm, "discard 12M 4M", "discard 21M 1M", "write -P 3 22M 64k")
        third = backup()
        assert (third.level, third.changed_bytes) == (Level.INCREMENTAL, 5 * MIB + 64 * 1024)
        differential = backup("differential")
        assert differential.level is Level.DIFFERENTIAL
        assert differential.changed_bytes == 7 * MIB + 2 * 64 * 1024
        assert ceph.rbd("lock", "ls", image) == holders
        vm.quit()
        vm.restart()
        write(vm, "write -P 4 20M 64k", "discard 28M 4M")
        after = backup()
        assert after.level is Level.FULL
        assert "is missing" in after.reason
        assert "not stored again" in after.reason
        assert after.read_bytes > 20 * MIB
        # The frame at 20 MiB, and those at 5 and 22 MiB: the incrementals have stored 64 KiB of each.
        assert after.stored_bytes < 3 * MIB
        assert after.reused_bytes > 20 * MIB
        write(vm, "write -P 5 40M 64k")
        last = backup()
        assert (last.level, last.changed_bytes) == (Level.INCREMENTAL, 64 * 1024)
    assert nbdpull.verify(keeper.repository).ok


@pytest.mark.parametrize("way", ["bare", "drive"])
def test_other_ways_of_naming_an_image(
    qemu_tools: QemuTools, keeper: Keeper, ceph: Ceph, image: str, tmp_path: Path, way: str
) -> None:
    with machine(ceph, image, qemu_tools, way) as vm:
        write(vm, "write -P 1 0 8M")
        keeper.backup(vm.uri)
        write(vm, "write -P 2 3M 1M")
        second = keeper.backup(vm.uri)
        assert (the_disk(second).level, the_disk(second).changed_bytes) == (Level.INCREMENTAL, MIB)
        check_restored(keeper, second.backup, ceph, image, tmp_path / "truth")


def test_an_image_that_no_vm_has_open_goes_out_and_in_through_qemu_nbd(
    qemu_tools: QemuTools,
    keeper: Keeper,
    ceph: Ceph,
    image: str,
    servers: Servers,
    tmp_path: Path,
) -> None:
    with machine(ceph, image, qemu_tools) as vm:
        noise(vm, tmp_path)
        running = keeper.backup(vm.uri)
        vm.quit()
    with pytest.raises(nbdpull.UsageError, match=r"qemu-nbd --read-only .* rbd:rbd/"):
        keeper.backup(f"disk:{ceph.uri(image)}")
    nbd: list[str | Path] = [qemu_tools.qemu_nbd, "-f", "raw", "-t", "-e", "20", "-k", "SOCKET"]
    source = servers.start(*nbd, "--read-only", ceph.uri(image))
    stopped = keeper.backup(f"data={source}", vm=running.vm)
    assert the_disk(stopped).read_bytes == 32 * MIB
    assert the_disk(stopped).stored_bytes < 20_000
    target = f"{image}-restored"
    ceph.rbd("create", "--size", "64M", target)
    # What is there already must not shine through.
    run([qemu_tools.qemu_io, "-f", "raw", "-c", "write -P 7 30M 8M", ceph.uri(target)])
    into = servers.start(*nbd, "--discard=unmap", ceph.uri(target))
    nbdpull.restore(keeper.repository, stopped.backup, into)
    servers.stop()
    truth, restored = tmp_path / "truth", tmp_path / "restored.raw"
    ceph.rbd("export", image, truth)
    ceph.rbd("export", target, restored)
    compare(restored, truth)


@pytest.mark.parametrize("mode", [(), ("--guest-first",)], ids=["mode-b", "mode-c"])
def test_a_backup_that_is_interrupted_while_ceph_hangs_is_torn_down_when_it_answers(
    qemu_tools: QemuTools,
    keeper: Keeper,
    ceph: Ceph,
    image: str,
    tmp_path: Path,
    mode: tuple[str, ...],
) -> None:
    with machine(ceph, image, qemu_tools) as vm:
        noise(vm, tmp_path)
        keeper.backup(vm.uri)
        with running_backup(vm, keeper, "-l", "full", "--rate", "8M", *mode) as client:
            ceph.osd.send_signal(signal.SIGSTOP)
            try:
                time.sleep(0.5)
                client.send_signal(signal.SIGTERM)
                # What QEMU has asked Ceph for can't be taken back.
                with pytest.raises(subprocess.TimeoutExpired):
                    client.wait(timeout=2)
                assert vm.status() == "prelaunch"
            finally:
                ceph.osd.send_signal(signal.SIGCONT)
            _, errors = client.communicate(timeout=60)
            assert client.returncode == 143, errors.decode()
        assert vm.leftovers() == {"jobs": [], "exports": [], "nodes": ["disk"], "chardevs": []}
        assert list(keeper.scratch.iterdir()) == []
        write(vm, "write -P 6 33M 64k")
        after = keeper.backup(vm.uri)
        assert (the_disk(after).level, the_disk(after).changed_bytes) == (
            Level.INCREMENTAL,
            64 * 1024,
        )
        check_restored(keeper, after.backup, ceph, image, tmp_path / "truth")
