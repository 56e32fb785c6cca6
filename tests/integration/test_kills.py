"""Clients that die or stop in the middle, monitors that are taken: the VM must not notice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

import nbdpull
from nbdpull import Level
from tests.integration.conftest import Keeper, new_keeper
from tests.support.bootwriter import BootWriter
from tests.support.disk import Disk, compare, create_disk
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import QemuProcess, StorageDaemon, Vm

MIB = 1 << 20


class HasUri(Protocol):
    """What a backup is taken of."""

    @property
    def uri(self) -> str: ...


@contextmanager
def running_backup(
    vm: HasUri, keeper: Keeper, *options: str, source: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A backup by the command line, in the middle of its pull."""
    command = [sys.executable, "-m", "nbdpull", "backup", source or vm.uri]
    command += ["-r", keeper.repository]
    command += ["--scratch", str(keeper.scratch), "--progress", "json", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stderr is not None
        try:
            for line in client.stderr:
                event: dict[str, Any] = json.loads(line)
                if event.get("done", 0) > 0 and event["done"] < event["total"]:
                    break
            else:
                pytest.fail("the backup ended before it could be caught")
            yield client
        finally:
            if client.poll() is None:
                client.kill()


SLOWLY = ("--rate", "32M")
"""So that a pull of `disks` takes seconds."""


def noisy(folder: Path, tools: QemuTools, *, noise: int, size: int) -> list[Disk]:
    """Two disks that begin with random data."""
    made = [create_disk(folder, name, size=size, tools=tools) for name in ("vda", "vdb")]
    for disk in made:
        raw = folder / "noise"
        with raw.open("wb") as file:
            for _ in range(noise // (8 * MIB)):
                file.write(os.urandom(8 * MIB))
        run([tools.qemu_img, "convert", "-f", "raw", "-O", "qcow2", raw, disk.path])
        raw.unlink()
        run([tools.qemu_img, "resize", "-q", disk.path, str(size)])
    return made


@pytest.fixture
def disks(tmp_path: Path, qemu_tools: QemuTools) -> list[Disk]:
    return noisy(tmp_path, qemu_tools, noise=64 * MIB, size=256 * MIB)


def answers(vm: QemuProcess) -> float:
    """Seconds that QEMU takes for commands that drain all its disks."""
    begin = time.monotonic()
    machine = isinstance(vm, Vm)
    if machine:
        vm.qmp("stop")
    vm.qmp(
        "transaction",
        actions=[
            {
                "type": "block-dirty-bitmap-add",
                "data": {"node": disk.node, "name": f"probe-{begin}"},
            }
            for disk in vm.disks
        ],
    )
    for disk in vm.disks:
        vm.qmp("block-dirty-bitmap-remove", node=disk.node, name=f"probe-{begin}")
    if machine:
        vm.qmp("cont")
    return time.monotonic() - begin


@pytest.mark.parametrize("mode", [(), ("--guest-first",)], ids=["mode-b", "mode-c"])
def test_killed_client_leaves_a_guest_that_goes_on(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], mode: tuple[str, ...]
) -> None:
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        first = keeper.backup(vm.uri)
        vm.wait_written(10)
        with running_backup(vm, keeper, "-l", "full", *SLOWLY, *mode) as client:
            client.send_signal(signal.SIGKILL)
            client.wait()
        vm.wait_written(10)
        assert answers(vm) < 5
        assert any(vm.leftovers().values())
        backups = nbdpull.list_backups(keeper.repository)
        assert [found.backup for found in backups] == [first.backup]
        cleaned = keeper.cleanup(vm.uri)
        assert cleaned.removed
        assert not any(vm.leftovers().values())
        assert keeper.cleanup(vm.uri).removed == ()
        assert all(set(vm.bitmaps(disk.name)) <= set_of(first, vm, disk) for disk in disks)
        assert list(keeper.scratch.iterdir()) == []
        with vm.halted():
            truth = vm.copy_disks(keeper.scratch.parent / "truth")
            after = keeper.backup(vm.uri)
        assert [disk.level for disk in after.disks] == [Level.INCREMENTAL] * 2
        for name, path in keeper.restore(after.backup).items():
            compare(path, truth[name], tools=qemu_tools)


def set_of(result: nbdpull.BackupResult, vm: Vm, disk: Disk) -> set[str]:
    """The bitmaps on a disk that belong to one backup."""
    return {name for name in vm.bitmaps(disk.name) if f"-{result.backup}-" in name}


def test_the_next_backup_cleans_up_after_a_killed_one(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        with running_backup(vm, keeper, *SLOWLY) as client:
            client.kill()
            client.wait()
        vm.wait_written(5)
        with vm.halted():
            truth = vm.copy_disks(keeper.scratch.parent / "truth")
            # That it may go on where the dead one was is another matter, see test_resume.
            result = keeper.backup(vm.uri, resume_within_s=0)
        assert not any(vm.leftovers().values())
        for disk in disks:
            assert len(vm.bitmaps(disk.name)) == 1
        for name, path in keeper.restore(result.backup).items():
            compare(path, truth[name], tools=qemu_tools)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_tears_down_before_the_exit(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], number: signal.Signals
) -> None:
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        with running_backup(vm, keeper, *SLOWLY) as client:
            client.send_signal(number)
            output, _ = client.communicate(timeout=30)
        assert client.returncode == 128 + number
        assert output == b""
        assert not any(vm.leftovers().values())
        assert [vm.bitmaps(disk.name) for disk in disks] == [{}, {}]
        assert list(keeper.scratch.iterdir()) == []
        assert nbdpull.list_backups(keeper.repository) == ()


def test_stopped_client_does_not_freeze_the_vm(qemu_tools: QemuTools, tmp_path: Path) -> None:
    """In modes B and C at a time: it is mostly waiting."""
    with ThreadPoolExecutor() as both:
        runs = [
            both.submit(stop_in_the_middle, tmp_path / name, qemu_tools, *options)
            for name, options in (("b", ()), ("c", ("--guest-first",)))
        ]
        for one in runs:
            one.result()


def stop_in_the_middle(folder: Path, tools: QemuTools, *mode: str) -> None:
    """Stop a client for 30 s in its pull."""
    folder.mkdir()
    keeper = new_keeper(str(folder / "repo"), folder)
    # A pull at full speed takes seconds, with requests on their way at any moment.
    disks = noisy(folder, tools, noise=512 * MIB, size=1 << 30)
    with Vm(disks, tools=tools, writer=BootWriter()) as vm:
        with running_backup(vm, keeper, *mode) as client:
            client.send_signal(signal.SIGSTOP)
            end = time.monotonic() + 30
            slowest = 0.0
            while time.monotonic() < end:
                vm.wait_written(2, timeout_s=10)
                slowest = max(slowest, answers(vm))
                time.sleep(0.5)
            assert slowest < 5
            # It still holds its run: nobody takes that away under it.
            kept = keeper.cleanup(vm.uri) if not monitor_is_taken(vm) else None
            assert kept is None or kept.kept
            client.send_signal(signal.SIGCONT)
            output, errors = client.communicate(timeout=120)
        assert client.returncode == 0, errors.decode()
        result = json.loads(output)
        assert not any(vm.leftovers().values())
        restored = keeper.restore(result["backup"])
        assert set(restored) == {"vda", "vdb"}


def monitor_is_taken(vm: Vm) -> bool:
    """Whether a client holds the product's monitor: a second one gets no greeting."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        probe.connect(str(vm.socket))
        try:
            return not probe.recv(1)
        except TimeoutError:
            return True


def test_killed_client_of_a_storage_daemon(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk]
) -> None:
    with StorageDaemon(disks, tools=qemu_tools) as daemon:
        with running_backup(daemon, keeper, "--vm", "daemon", *SLOWLY) as client:
            client.kill()
            client.wait()
        assert answers(daemon) < 5
        assert any(daemon.leftovers().values())
        keeper.cleanup(daemon.uri)
        assert not any(daemon.leftovers().values())


def test_a_live_run_hides_no_disk_of_a_storage_daemon(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    second = tmp_path / "second"
    arguments = ["--chardev", f"socket,id=second,path={second},server=on,wait=off"]
    arguments += ["--monitor", "chardev=second"]
    with StorageDaemon(disks, tools=qemu_tools, arguments=arguments) as daemon:
        with running_backup(daemon, keeper, "--vm", "d", "--chain", "a", *SLOWLY) as client:
            told = nbdpull.estimate(f"qmp:{second}", keeper.repository, vm="d", chain="b")
            assert {disk.name for disk in told.disks} == {"node-vda", "node-vdb"}
            # It is alive, whatever monitor it came by.
            assert nbdpull.cleanup(f"qmp:{second}", scratch=keeper.scratch).removed == ()
            client.kill()
            client.wait()
        assert nbdpull.cleanup(f"qmp:{second}", scratch=keeper.scratch).removed
        assert not any(daemon.leftovers().values())


def test_taken_monitor_is_an_error_in_seconds(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm, socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(vm.socket))
        assert holder.recv(10)
        begin = time.monotonic()
        with pytest.raises(nbdpull.MonitorInUseError, match="monitor of its own") as caught:
            keeper.backup(vm.uri)
        assert time.monotonic() - begin < 10
        assert caught.value.exit_code == 11


def test_nbd_server_that_runs_already(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    path = tmp_path / "nbd"
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qemu_io("vda", "write -P 4 1M 1M")
        vm.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        with pytest.raises(nbdpull.SourceError, match="--nbd-address"):
            keeper.backup(vm.uri)
        assert not any(vm.leftovers().values())
        assert vm.bitmaps("vda") == {}
        result = keeper.backup(vm.uri, nbd_address=f"nbd+unix:///?socket={path}")
        assert path.exists()
        vm.qemu_io("vda", "flush")
        compare(
            keeper.restore(result.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )
        # It is not ours to stop.
        vm.qmp("nbd-server-stop")
        with pytest.raises(
            nbdpull.SourceError, match=r"has no NBD server at .* leave --nbd-address"
        ):
            keeper.backup(vm.uri, nbd_address=f"nbd+unix:///?socket={path}")
        assert not any(vm.leftovers().values())


def test_tcp_monitor(qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off", "-S"]
    with Vm([disk], tools=qemu_tools, arguments=arguments) as vm:
        vm.qemu_io("vda", "write -P 4 1M 1M")
        result = keeper.backup(f"qmp+tcp://127.0.0.1:{port}")
        vm.qemu_io("vda", "flush")
        compare(
            keeper.restore(result.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )


@pytest.mark.parametrize("mode", [(), ("--guest-first",)], ids=["mode-b", "mode-c"])
def test_full_scratch_ends_the_backup_and_not_the_guest(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path, mode: tuple[str, ...]
) -> None:
    """The guest overwrites 16 MiB on each disk during the backup, and there is room for four."""
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small])
    try:
        with Vm(disks, tools=qemu_tools, writer=BootWriter(pause_us=0)) as vm:
            keeper.backup(vm.uri)
            before = vm.wait_written(10)
            # Slow enough that the guest is always faster.
            command = [sys.executable, "-m", "nbdpull", "backup", vm.uri, "-r", keeper.repository]
            command += ["--scratch", str(small), "-l", "full", "--rate", "8M", *mode]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 13, done.stderr
            assert "--scratch" in done.stderr.splitlines()[-1]
            assert vm.status() == "running"
            vm.wait_written(10)
            assert vm.written() > before
            assert not any(vm.leftovers().values())
            assert list(small.iterdir()) == []
            with vm.halted():
                truth = vm.copy_disks(tmp_path / "truth")
                result = keeper.backup(vm.uri)
            assert [disk.level for disk in result.disks] == [Level.INCREMENTAL] * 2
            for name, path in keeper.restore(result.backup).items():
                compare(path, truth[name], tools=qemu_tools)
    finally:
        run(["umount", small])


def test_scratch_folder_without_any_room_is_told_before_anything_is_touched(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", small])
    try:
        with Vm([disk], tools=qemu_tools) as vm:
            with pytest.raises(nbdpull.UsageError, match="expected at least"):
                nbdpull.backup(vm.uri, keeper.repository, scratch=str(small))
            assert not any(vm.leftovers().values())
            assert vm.bitmaps("vda") == {}
            assert list(small.iterdir()) == []
    finally:
        run(["umount", small])


def test_unwritable_scratch_folder_is_told_before_anything_is_touched(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", tools=qemu_tools)
    with Vm([disk], tools=qemu_tools) as vm:
        with pytest.raises(nbdpull.UsageError, match="--scratch"):
            nbdpull.backup(vm.uri, keeper.repository, scratch="/proc/self/fd")
        assert not any(vm.leftovers().values())
        assert vm.bitmaps("vda") == {}
