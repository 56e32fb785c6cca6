"""A client that died: the next backup goes on at its point in time, if QEMU holds it, and reads only the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from nbdpull import Level
from nbdpull.source.rundir import RunDir
from tests.integration.conftest import Keeper
from tests.integration.test_kills import HasUri, noisy, running_backup
from tests.support.bootwriter import BootWriter
from tests.support.disk import MIB, Disk, compare, create_disk
from tests.support.process import run
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import StorageDaemon, Vm

NOISE = 64 * MIB
SLOWLY = ("--rate", "32M")
"""Two disks fill a pack each at the same time: after 64 MiB both are durable. What is left to read then must last
longer than any write of a pack does."""
MODES = pytest.mark.parametrize("mode", [(), ("--guest-first",)], ids=["mode-b", "mode-c"])


@pytest.fixture
def disks(tmp_path: Path, qemu_tools: QemuTools) -> list[Disk]:
    return noisy(tmp_path, qemu_tools, noise=NOISE, size=256 * MIB)


def packs(keeper: Keeper) -> int:
    """Durable ones in the repository."""
    files = (Path(keeper.repository) / "d").rglob("[0-9a-f]*")
    return sum(1 for path in files if path.is_file())


def kill_in_the_middle(vm: HasUri, keeper: Keeper, *options: str, stored: int = 2) -> None:
    """Kill a client that has made some packs durable."""
    there = packs(keeper)
    with running_backup(vm, keeper, *SLOWLY, *options) as client:
        deadline = time.monotonic() + 120
        while packs(keeper) < there + stored:
            assert client.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        client.send_signal(signal.SIGKILL)
        client.wait()


def write_noise(vm: Vm, file: Path) -> None:
    """Write 70 MiB of each disk anew, from 130 MiB on; `file` is in between."""
    for disk in vm.disks:
        for place in range(130, 200, 5):
            file.write_bytes(os.urandom(5 * MIB))
            vm.qemu_io(disk.name, f"write -q -s {file} {place * MIB} {5 * MIB}")


@contextmanager
def frozen_truth(vm: Vm, folder: Path) -> Iterator[dict[str, Path]]:
    """What the disks hold while nothing is written: as long as the body runs."""
    with vm.halted():
        truth = vm.copy_disks(folder)
        yield truth


def read_bytes(result: nbdpull.BackupResult) -> int:
    return sum(disk.read_bytes for disk in result.disks)


def options_of(mode: tuple[str, ...]) -> dict[str, Any]:
    return {"guest_first": bool(mode)}


def check(
    keeper: Keeper, result: nbdpull.BackupResult, truth: dict[str, Path], tools: QemuTools
) -> None:
    restored = keeper.restore(result.backup)
    assert restored.keys() == truth.keys()
    for name, path in restored.items():
        compare(path, truth[name], tools=tools)


@MODES
def test_what_a_killed_client_began_is_finished_at_its_point_in_time(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disks: list[Disk],
    tmp_path: Path,
    mode: tuple[str, ...],
) -> None:
    options = options_of(mode)
    told: list[str] = []
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        vm.wait_written(5)
        with frozen_truth(vm, tmp_path / "full") as truth:
            kill_in_the_middle(vm, keeper, *mode)
            killed = time.time()
        vm.wait_written(10)
        result = keeper.backup(
            vm.uri, progress=lambda event: told.append(event.text or ""), **options
        )
        assert result.resumed
        assert result.time < killed
        assert any("goes on with the backup of" in text for text in told)
        assert 0 < read_bytes(result) < 2 * NOISE - 32 * MIB
        check(keeper, result, truth, qemu_tools)
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []

        # What was written since is in the next one, which is cut short, too.
        write_noise(vm, tmp_path / "noise")
        with frozen_truth(vm, tmp_path / "incremental") as truth:
            kill_in_the_middle(vm, keeper, *mode, stored=1)
        vm.wait_written(10)
        result = keeper.backup(vm.uri, **options)
        assert result.resumed
        assert [disk.level for disk in result.disks] == [Level.INCREMENTAL] * 2
        assert 0 < read_bytes(result) < 2 * 70 * MIB - 8 * MIB
        check(keeper, result, truth, qemu_tools)
        with frozen_truth(vm, tmp_path / "last") as truth:
            last = keeper.backup(vm.uri, **options)
        assert not last.resumed
        assert [disk.level for disk in last.disks] == [Level.INCREMENTAL] * 2
        assert last.parent == result.backup
        check(keeper, last, truth, qemu_tools)
        assert all(len(vm.bitmaps(disk.name)) <= 2 for disk in disks)
    assert nbdpull.verify(keeper.repository).damaged == ()


def test_a_run_that_goes_on_and_is_killed_is_gone_on_with(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    noise = 96 * MIB
    disks = noisy(tmp_path, qemu_tools, noise=noise, size=256 * MIB)
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        vm.wait_written(5)
        with frozen_truth(vm, tmp_path / "truth") as truth:
            kill_in_the_middle(vm, keeper, stored=1)
        vm.wait_written(5)
        kill_in_the_middle(vm, keeper, stored=1)
        vm.wait_written(5)
        result = keeper.backup(vm.uri)
        assert result.resumed
        # Each had made a pack durable.
        assert 0 < read_bytes(result) < 2 * noise - 40 * MIB
        check(keeper, result, truth, qemu_tools)
        with frozen_truth(vm, tmp_path / "next") as truth:
            check(keeper, keeper.backup(vm.uri), truth, qemu_tools)


def swept(
    vm: Vm, keeper: Keeper, truth_folder: Path, tools: QemuTools, **options: Any
) -> tuple[nbdpull.BackupResult, str]:
    """A backup that must take a new point in time, and what it says about the old one."""
    told: list[str] = []
    with frozen_truth(vm, truth_folder) as truth:
        result = keeper.backup(
            vm.uri, progress=lambda event: told.append(event.text or ""), **options
        )
    assert not result.resumed
    assert not any(vm.leftovers().values())
    check(keeper, result, {disk.name: truth[disk.name] for disk in result.disks}, tools)
    assert all(len(vm.bitmaps(disk.name)) <= 1 for disk in vm.disks)
    return result, next(text for text in told if "can't be gone on with" in text)


def cancelled_at_take_over(keeper: Keeper, uri: str) -> None:
    """A backup that is cancelled while it takes a dead run's folder over."""
    take_over = RunDir.take_over
    with nbdpull.cancellable() as cancel, pytest.MonkeyPatch.context() as patch:

        def take(path: Path, *, source: str, chain: str) -> RunDir:
            taken = take_over(path, source=source, chain=chain)
            cancel()
            time.sleep(0.5)  # the cancellation arrives while this thread is at it
            return taken

        patch.setattr(RunDir, "take_over", take)
        with pytest.raises(BaseException) as caught:
            keeper.backup(uri)
    assert type(caught.value).__name__ == "CancelledError"


@pytest.mark.parametrize("qemu_tools", [QEMU_72], ids=["qemu-7.2"])
def test_who_is_cancelled_as_he_takes_over_leaves_it_to_the_next(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        vm.wait_written(5)
        with frozen_truth(vm, tmp_path / "truth") as truth:
            kill_in_the_middle(vm, keeper, stored=1)
        cancelled_at_take_over(keeper, vm.uri)
        result = keeper.backup(vm.uri)
        assert result.resumed
        check(keeper, result, truth, qemu_tools)


@pytest.mark.parametrize("qemu_tools", [QEMU_72], ids=["qemu-7.2"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"resume_within_s": 0}, "--resume-within"),
        ({"level": "copy"}, "copy is asked for"),
        ({"exclude": ["vdb"]}, "other disks"),
        ({"guest_first": True}, "--guest-first"),
        ({"trim_scratch": True}, "--trim-scratch"),
        ({"machine": True}, "--machine"),
    ],
)
def test_a_point_in_time_that_is_not_what_is_asked_for_is_swept_and_the_reason_told(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disks: list[Disk],
    tmp_path: Path,
    options: dict[str, Any],
    reason: str,
) -> None:
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        kill_in_the_middle(vm, keeper, stored=1)
        _, told = swept(vm, keeper, tmp_path / "truth", qemu_tools, **options)
        assert reason in told


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("restart", "no more"),
        ("export", "the export of disk 'vdb' is gone"),
        ("job", "no more"),
        ("record", "damaged"),
    ],
)
def test_a_point_in_time_that_is_not_whole_is_swept_and_the_reason_told(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disks: list[Disk],
    tmp_path: Path,
    how: str,
    reason: str,
) -> None:
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        kill_in_the_middle(vm, keeper, stored=1)
        (folder,) = keeper.scratch.glob("nbdpull-*")
        name = f"np-{folder.name.removeprefix('nbdpull-')}"
        if how == "restart":
            vm.kill()
            vm.restart()
            vm.wait_written(5)
        elif how == "export":
            vm.qmp("block-export-del", id=f"{name}-e1")
        elif how == "job":
            # As an administrator may, in the right order.
            since = len(vm.events)
            vm.qmp("block-export-del", id=f"{name}-e0")
            vm.wait_event("BLOCK_EXPORT_DELETED", since=since)
            vm.qmp("blockdev-del", node_name=f"{name}-acc0")
            vm.qmp("job-cancel", id=f"{name}-bk0")
        else:
            raw = bytearray((folder / "resume").read_bytes())
            raw[-10] ^= 1
            (folder / "resume").write_bytes(raw)
        _, told = swept(vm, keeper, tmp_path / "truth", qemu_tools)
        assert reason in told


def test_a_scratch_that_failed_meanwhile_leads_to_a_new_point_in_time(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    """Guest first, a write that finds no room breaks the view, and nothing tells of it but reading it."""
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", small])
    try:
        told: list[str] = []
        with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
            kill_in_the_middle(vm, keeper, "--scratch", str(small), "--guest-first", stored=1)
            vm.qemu_io("vda", f"write -q -P 5 {40 * MIB} {60 * MIB}")
            with frozen_truth(vm, tmp_path / "truth") as truth:
                result = nbdpull.backup(
                    vm.uri,
                    keeper.repository,
                    scratch=small,
                    guest_first=True,
                    progress=lambda event: told.append(event.text or ""),
                )
            assert not result.resumed
            assert any("can't be" in text for text in told), told
            assert vm.status() == "running"
            assert not any(vm.leftovers().values())
            assert list(small.iterdir()) == []
            check(keeper, result, truth, qemu_tools)
    finally:
        run(["umount", small])


def test_a_guest_that_waits_for_room_in_the_scratch_of_a_dead_run_goes_on(
    qemu_tools: QemuTools, keeper: Keeper, small: Path, tmp_path: Path
) -> None:
    disks = [create_disk(tmp_path, name, tools=qemu_tools) for name in ("vda", "vdb")]
    told: list[str] = []
    with Vm(disks, tools=qemu_tools, writer=BootWriter(pause_us=0)) as vm:
        with running_backup(vm, keeper, "--rate", "1M", "--scratch", str(small)) as client:
            client.kill()
            client.wait()
        deadline = time.monotonic() + 60
        while vm.status() != "io-error":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # Into a folder with room: whether this one is done before the guest has filled the small one again
        # is another question.
        result = nbdpull.backup(
            vm.uri,
            keeper.repository,
            scratch=keeper.scratch,
            progress=lambda event: told.append(event.text or ""),
        )
        assert not result.resumed
        assert any("pause of the guest" in text for text in told)
        assert vm.status() == "running"
        vm.wait_written(10)
        assert not any(vm.leftovers().values())
        assert list(small.iterdir()) == []


def test_a_storage_daemon_holds_a_point_in_time_too(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    truth = {}
    for disk in disks:
        truth[f"node-{disk.name}"] = tmp_path / f"{disk.name}.truth"
        run(
            [
                qemu_tools.qemu_img,
                "convert",
                "-O",
                "raw",
                disk.path,
                tmp_path / f"{disk.name}.truth",
            ]
        )
    with StorageDaemon(disks, tools=qemu_tools) as daemon:
        kill_in_the_middle(daemon, keeper, "--vm", "daemon", stored=1)
        result = keeper.backup(daemon.uri, vm="daemon")
        assert result.resumed
        assert read_bytes(result) < 2 * NOISE - 20 * MIB
        assert not any(daemon.leftovers().values())
        check(keeper, result, truth, qemu_tools)


BEFORE_SEALING = (
    "from nbdpull.ops import backuprun",
    "def die(self, pulls): os.kill(os.getpid(), signal.SIGKILL)",
    "backuprun.Run._seal = die",
)
"""For `die_at`: all is read, and the guest is free of it."""


def die_at(vm: Vm, keeper: Keeper, *patch: str, options: tuple[str, ...] = ()) -> None:
    """Run a client that is killed where the lines of `patch` say."""
    program = "\n".join(
        (
            "import os, signal, sys, nbdpull",
            *patch,
            f"nbdpull.backup(sys.argv[1], sys.argv[2], {', '.join(('scratch=sys.argv[3]', *options))})",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", program, vm.uri, keeper.repository, str(keeper.scratch)],
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL


def test_a_client_killed_after_its_last_read_has_its_packs_taken_over(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    """The guest is free of it by then: a new point in time is taken, and only what is new is stored."""
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        die_at(vm, keeper, *BEFORE_SEALING)
        left = vm.leftovers()
        assert not any(left[kind] for kind in ("jobs", "exports", "nodes"))
        with frozen_truth(vm, tmp_path / "truth") as truth:
            result = keeper.backup(vm.uri)
        assert not result.resumed
        assert [disk.level for disk in result.disks] == [Level.FULL] * 2
        # The guest goes on writing: some frames are other ones by now.
        assert sum(disk.reused_bytes for disk in result.disks) > NOISE
        check(keeper, result, truth, qemu_tools)


def test_a_backup_that_counts_is_not_gone_on_with(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    """Killed between its commit and its confirmation."""
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        die_at(
            vm,
            keeper,
            "from nbdpull.source.fleecing import QemuPointInTime",
            "async def die(self, obsolete): os.kill(os.getpid(), signal.SIGKILL)",
            "QemuPointInTime.confirm = die",
        )
        (first,) = nbdpull.list_backups(keeper.repository)
        with frozen_truth(vm, tmp_path / "truth") as truth:
            result = keeper.backup(vm.uri)
        assert not result.resumed
        assert result.parent == first.backup
        assert [disk.level for disk in result.disks] == [Level.INCREMENTAL] * 2
        check(keeper, result, truth, qemu_tools)
