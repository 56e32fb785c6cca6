"""Giving the scratch back: a guest may overwrite everything, and a few MiB hold it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import nbdpull
from nbdpull.nbdio.connection import Connection, ReplyError, unix_uri
from nbdpull.nbdio.tls import Tls
from nbdpull.ops import pull, pullmeter
from nbdpull.ops.threads import worker_count
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.open import check_source
from tests.integration.conftest import Keeper
from tests.support.bootwriter import BootWriter
from tests.support.disk import MIB, Disk, compare, create_disk, to_raw
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import StorageDaemon, Vm

KIB = 1 << 10
BOTH = pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])


@pytest.fixture
def few_mib(tmp_path: Path) -> Iterator[Path]:
    """A scratch folder with room for 8 MiB, of which the backup leaves up to 2 free."""
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small])
    try:
        yield small
    finally:
        run(["umount", small])


@pytest.fixture
def every_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pull tell of each frame that it read; with as many workers as on two cores."""
    monkeypatch.setattr(pullmeter, "_PROGRESS_S", 0.0)
    monkeypatch.setattr(pull, "worker_count", lambda: 4)


def noise(disk: Disk, *, size: int, tools: QemuTools) -> None:
    """Let a disk begin with random data."""
    raw = disk.path.with_suffix(".noise")
    with raw.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    run([tools.qemu_img, "convert", "-f", "raw", "-O", "qcow2", raw, disk.path])
    raw.unlink()
    run([tools.qemu_img, "resize", "-q", disk.path, str(disk.size)])


READ_OUT_OF_ORDER = (worker_count() + 1) * 5 * MIB
"""Each worker has 4 MiB of its own, and a frame that it stores once the next is begun; what lies further back than that is read for good."""


@BOTH
def test_what_was_read_costs_no_room_when_it_is_overwritten(
    qemu_tools: QemuTools,
    keeper: Keeper,
    tmp_path: Path,
    few_mib: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    guest_first: bool,
) -> None:
    """The disk ends inside 64 KiB: a QEMU 7.2 that is asked to trim a part of these aborts."""
    disk = create_disk(
        tmp_path, "vda", size=READ_OUT_OF_ORDER + 25 * MIB + 3 * 512, tools=qemu_tools
    )
    noise(disk, size=READ_OUT_OF_ORDER + 24 * MIB, tools=qemu_tools)
    truth = to_raw(disk.path, tmp_path / "truth", tools=qemu_tools)
    overwritten = 0
    with Vm([disk], tools=qemu_tools) as vm:

        def overwrite(progress: nbdpull.Progress) -> None:
            nonlocal overwritten
            upto = (progress.done - READ_OUT_OF_ORDER) // MIB * MIB
            if progress.kind is nbdpull.ProgressKind.DISK and upto > overwritten:
                vm.qemu_io("vda", f"write -q -P 9 {overwritten} {upto - overwritten}")
                overwritten = upto

        done = nbdpull.backup(
            vm.uri,
            keeper.repository,
            scratch=few_mib,
            trim_scratch=True,
            guest_first=guest_first,
            rate=200 * MIB,
            progress=overwrite,
        )
        assert overwritten >= 16 * MIB
        assert done.cost is not None
        assert done.cost.scratch_peak_bytes <= MIB
        assert not any(vm.leftovers().values())
        compare(keeper.restore(done.backup)["vda"], truth, tools=qemu_tools)
        assert "Disconnect" not in vm.stderr()  # every trim's answer was waited for
    assert not [one for one in caplog.records if one.name == "nbdpull.ops.trimming"]


@BOTH
def test_a_real_guest_overwrites_everything_on_few_mib_of_scratch(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, few_mib: Path, *, guest_first: bool
) -> None:
    """It writes to 4 MiB of each of two disks: some of that before it is read, all of it after."""
    names = ("vda", "vdb")
    disks = [
        create_disk(tmp_path, name, size=READ_OUT_OF_ORDER + 12 * MIB, tools=qemu_tools)
        for name in names
    ]
    for disk in disks:
        noise(disk, size=READ_OUT_OF_ORDER + 12 * MIB, tools=qemu_tools)
    read = dict.fromkeys(names, 0)
    # 65 blocks of 64 KiB a disk: 140 writes at random hit nine of ten, which is more than there is room for.
    rounds = [140, 5]
    with Vm(disks, tools=qemu_tools, writer=BootWriter(blocks=1024, pause_us=0)) as vm:
        vm.wait_written(1)
        vm.pause()
        truth = vm.copy_disks(tmp_path / "truth")

        def write(progress: nbdpull.Progress) -> None:
            if progress.disk is None or not rounds:
                return
            read[progress.disk] = progress.done
            if len(rounds) == 2 or min(read.values()) > READ_OUT_OF_ORDER + 4 * MIB:
                vm.cont()
                vm.wait_written(rounds.pop())
                vm.pause()

        done = nbdpull.backup(
            vm.uri,
            keeper.repository,
            scratch=few_mib,
            trim_scratch=True,
            guest_first=guest_first,
            progress=write,
        )
        assert not rounds
        assert vm.written() >= 146
        assert not any(vm.leftovers().values())
        for name, path in keeper.restore(done.backup).items():
            compare(path, truth[name], tools=qemu_tools)


@BOTH
@pytest.mark.usefixtures("every_progress")
def test_what_a_guest_is_about_to_overwrite_is_read_first(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, few_mib: Path, *, guest_first: bool
) -> None:
    """It overwrites upwards from the middle, 512 KiB for each 4 MiB that are read: 12 MiB before they meet."""
    disk = create_disk(tmp_path, "vda", size=192 * MIB, tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -q -P 1 0 192M")
        truth = to_raw(disk.path, tmp_path / "truth", tools=qemu_tools)
        written = 0

        def overwrite(progress: nbdpull.Progress) -> None:
            nonlocal written
            while written < progress.done // 8 - 512 * KIB:
                vm.qemu_io("vda", f"write -q -P 2 {96 * MIB + written} 512k")
                written += 512 * KIB

        done = nbdpull.backup(
            vm.uri,
            keeper.repository,
            scratch=few_mib,
            trim_scratch=True,
            guest_first=guest_first,
            progress=overwrite,
        )
        assert written > 20 * MIB
        assert done.cost is not None
        assert done.cost.scratch_peak_bytes <= 5 * MIB
        compare(keeper.restore(done.backup)["vda"], truth, tools=qemu_tools)


@BOTH
def test_what_did_not_change_costs_neither_room_nor_a_copy(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, few_mib: Path, *, guest_first: bool
) -> None:
    disk = create_disk(tmp_path, "vda", size=64 * MIB, tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -q -P 1 0 40M")
        keeper.backup(vm.uri)
        vm.qemu_io("vda", "write -q -P 2 20M 1M")
        vm.qemu_io("vda", "write -q -z 24M 2M")
        truth = to_raw(disk.path, tmp_path / "truth", tools=qemu_tools)

        def overwrite(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_END:
                wait_until_refused(few_mib, 30 * MIB)
                vm.qemu_io("vda", "write -q -P 3 0 20M")
                vm.qemu_io("vda", "write -q -P 3 21M 3M")
                vm.qemu_io("vda", "write -q -P 3 26M 38M")

        done = nbdpull.backup(
            vm.uri,
            keeper.repository,
            scratch=few_mib,
            trim_scratch=True,
            guest_first=guest_first,
            progress=overwrite,
        )
        assert done.level == "incremental"
        assert done.cost is not None
        assert done.cost.copied_bytes == 0
        compare(keeper.restore(done.backup)["vda"], truth, tools=qemu_tools)
        after = keeper.backup(vm.uri, trim_scratch=True, guest_first=guest_first)
        compare(
            keeper.restore(after.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )


def wait_until_refused(scratch: Path, offset: int) -> None:
    """Wait until that place of the only disk of the only run can't be read any more."""
    (socket,) = scratch.glob("nbdpull-*/nbd.sock")
    with Connection.open(unix_uri(str(socket), f"np-{socket.parent.name[8:]}-e0")) as connection:
        for _ in range(1000):
            try:
                connection.read_into(memoryview(bytearray(512)), offset)
            except ReplyError:
                return
            time.sleep(0.02)
    pytest.fail(f"byte {offset} can still be read")


def test_disks_of_a_storage_daemon_are_trimmed_too(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = create_disk(tmp_path, "vda", size=20 * MIB + 512, tools=qemu_tools)
    noise(disk, size=12 * MIB, tools=qemu_tools)
    with StorageDaemon([disk], tools=qemu_tools) as daemon:
        done = [keeper.backup(daemon.uri, vm="daemon", trim_scratch=True) for _ in range(2)]
        assert [one.level for one in done] == ["full", "incremental"]
        assert not any(daemon.leftovers().values())
    for one in done:
        path = keeper.restore(one.backup)[disk.node]
        compare(path, disk.path, other_format="qcow2", tools=qemu_tools)
    assert not [one for one in caplog.records if one.name == "nbdpull.ops.trimming"]


def test_only_a_private_socket_can_be_trimmed() -> None:
    private = QemuOptions(trim_scratch=True)
    check_source(["qmp:/nowhere"], private)
    address, tls = "nbd://127.0.0.1:10809", Tls(path="/nowhere", user=None)
    for shared in (replace(private, nbd_address=address), replace(private, tls=tls)):
        with pytest.raises(nbdpull.UsageError, match="over a private socket only"):
            check_source(["qmp:/nowhere"], shared)
    with pytest.raises(nbdpull.UsageError, match="--trim-scratch is about a QEMU that is reached"):
        check_source(["disk:vda=/nowhere"], private)
