"""Runs whose folder can't be seen from where the sweep of dead runs is: QEMU itself tells whether they live."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import nbdpull
from nbdpull.source.qmp import Monitor
from tests.integration.conftest import Keeper
from tests.integration.test_kills import SLOWLY, noisy, running_backup
from tests.support.disk import MIB, Disk, compare
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import StorageDaemon, Vm


def elsewhere(
    keeper: Keeper, *words: str, scratch: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run nbdpull where the scratch folder is another one, as in a container with a /tmp of its own."""
    options = ["-m"] if os.geteuid() == 0 else ["-r", "-m"]
    script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    line = ["unshare", *options, "sh", "-c", script, "sh", str(keeper.scratch)]
    line += [
        sys.executable,
        "-m",
        "nbdpull",
        *words,
        "--scratch",
        str(scratch or keeper.scratch),
        "--json",
    ]
    return run(line, check=False)


@pytest.fixture
def disk(tmp_path: Path, qemu_tools: QemuTools) -> Disk:
    return noisy(tmp_path, qemu_tools, noise=64 * MIB, size=256 * MIB)[0]


def test_a_run_that_is_out_of_sight_is_left_alone_while_it_lives(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    other = f"qmp:{tmp_path}/other"
    monitor = ("-qmp", f"unix:{tmp_path}/other,server=on,wait=off")
    with Vm([disk], tools=qemu_tools, arguments=monitor, paused=True) as vm:
        with running_backup(vm, keeper, *SLOWLY) as client:
            client.send_signal(signal.SIGSTOP)
            os.waitpid(client.pid, os.WUNTRACED)
            there = vm.leftovers()
            cleaned = json.loads(elsewhere(keeper, "cleanup", other).stdout)
            assert cleaned["removed"] == []
            assert "a process that can't be seen from here" in cleaned["kept"][0]
            told = json.loads(elsewhere(keeper, "doctor", other).stdout)
            assert "can't be seen from here" in str(told["findings"])
            backup = ("backup", other, "-r", keeper.repository, "--vm", "testvm")
            refused = elsewhere(keeper, *backup)
            assert refused.returncode == 11
            assert "is being backed up by a process that can't be seen from here" in refused.stderr
            assert vm.leftovers() == there
            client.send_signal(signal.SIGCONT)
            output, _ = client.communicate()
            assert client.returncode == 0
        assert not any(vm.leftovers().values())
        result = json.loads(output)
        compare(keeper.restore(result["backup"])["vda"], disk.path, other_format="qcow2")


def test_a_run_that_is_out_of_sight_and_dies_is_waited_for(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, tmp_path: Path
) -> None:
    """As over ssh, where QEMU is told a while later that a client was killed."""
    other = f"qmp:{tmp_path}/other"
    monitor = ("-qmp", f"unix:{tmp_path}/other,server=on,wait=off")
    with Vm([disk], tools=qemu_tools, arguments=monitor, paused=True) as vm:
        with running_backup(vm, keeper, *SLOWLY) as client:
            client.send_signal(signal.SIGSTOP)
            os.waitpid(client.pid, os.WUNTRACED)
            own = tmp_path / "own"
            own.mkdir()
            dying = threading.Timer(2.0, client.kill)
            dying.start()
            began = time.monotonic()
            backup = ("backup", other, "-r", keeper.repository, "--vm", "testvm")
            done = elsewhere(keeper, *backup, scratch=own)
            dying.join()
            client.wait()
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began > 2.0
        assert not any(vm.leftovers().values())
        compare(
            keeper.restore(json.loads(done.stdout)["backup"])["vda"],
            disk.path,
            other_format="qcow2",
        )


def test_a_run_that_is_out_of_sight_is_cleaned_up_once_it_is_dead(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk
) -> None:
    with Vm([disk], tools=qemu_tools) as vm:
        with running_backup(vm, keeper, *SLOWLY) as client:
            client.kill()
            client.wait()
        cleaned = json.loads(elsewhere(keeper, "cleanup", vm.uri).stdout)
        assert cleaned["kept"] == []
        kinds = [line.split(" ")[0] for line in cleaned["removed"]]
        assert kinds[-2:] == ["NBD", "lifeline"]
        assert not any(vm.leftovers().values())
        # The folder is left, for whoever sees it.
        assert [line.split(" of run")[0] for line in keeper.cleanup(vm.uri).removed] == [
            "scratch folder"
        ]
        assert keeper.cleanup(vm.uri).removed == ()
        assert keeper.backup(vm.uri).level == "full"


def test_a_run_of_a_storage_daemon_is_known_to_live(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk
) -> None:
    with StorageDaemon([disk], tools=qemu_tools) as daemon:
        lines: list[str] = []

        def told(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_START:
                lines.extend(f"{entry['filename']}" for entry in daemon.qmp("query-chardev"))

        keeper.backup(daemon.uri, progress=told)
        (life,) = (line for line in lines if line.split(",")[0].endswith("/life"))
        assert life.startswith("unix:")
        assert not any(daemon.leftovers().values())


def test_where_qemu_cannot_tell_what_is_out_of_sight_is_left_to_the_user(
    qemu_tools: QemuTools, keeper: Keeper, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU without chardev-add; the folder is the evidence then, and without it nothing is."""
    learn = Monitor._learn

    async def learn_less(self: Monitor) -> None:
        await learn(self)
        self.commands -= {"chardev-add"}

    with Vm([disk], tools=qemu_tools) as vm:
        with running_backup(vm, keeper, *SLOWLY) as client:
            client.kill()
            client.wait()
        vm.qmp("chardev-remove", id=vm.leftovers()["chardevs"][0])
        monkeypatch.setattr(Monitor, "_learn", learn_less)
        there = vm.leftovers()
        (keeper.scratch.parent / "elsewhere").mkdir()
        seen_from = keeper.scratch.parent / "elsewhere"
        for folder in keeper.scratch.iterdir():
            folder.rename(seen_from / folder.name)
        kept = keeper.cleanup(vm.uri)
        assert kept.removed == ()
        assert vm.leftovers() == there
        assert keeper.cleanup(vm.uri, force=True).removed
        assert not any(vm.leftovers().values())
