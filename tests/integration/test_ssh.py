"""A QEMU on another host, reached by ssh: a real sshd on loopback, whose only way to QEMU is its sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from nbdpull import FindingKind, Level
from tests.integration.conftest import Keeper
from tests.integration.test_kills import SLOWLY, answers, noisy, running_backup
from tests.support.bootwriter import BootWriter
from tests.support.disk import MIB, Disk, compare, create_disk
from tests.support.process import run
from tests.support.sshd import HOST, SshServer, children
from tests.support.tools import QEMU_10, QEMU_72, QemuTools
from tests.support.vm import StorageDaemon, Vm, pid_alive

only_qemu_10 = pytest.mark.parametrize("qemu_tools", [QEMU_10], ids=["qemu-10"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    with SshServer(tmp_path / "ssh") as made:
        monkeypatch.setenv("PATH", made.path)
        yield made


@pytest.fixture
def disk(tmp_path: Path, qemu_tools: QemuTools) -> Disk:
    return noisy(tmp_path, qemu_tools, noise=64 * MIB, size=128 * MIB)[0]


def listening(*pids: int) -> set[str]:
    """The TCP sockets of some processes that listen."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in tcp_lines(name)]
    inodes = {f"socket:[{words[9]}]": words[1] for words in lines if words[3] == "0A"}
    opened = {
        str(file.readlink())
        for pid in pids
        for file in Path(f"/proc/{pid}/fd").iterdir()
        if file.is_symlink()
    }
    return {address for inode, address in inodes.items() if inode in opened}


def tcp_lines(name: str) -> list[str]:
    return Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]


def our_ssh(parent: int) -> list[int]:
    """Process ids of the ssh clients that a process started."""
    return [
        pid
        for pid in children(parent)
        if Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip() == "ssh"
    ]


@pytest.mark.parametrize("guest_first", [False, True], ids=["mode-b", "mode-c"])
def test_a_vm_is_backed_up_over_ssh(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, tmp_path: Path, *, guest_first: bool
) -> None:
    disks = [create_disk(tmp_path, name, size=32 * MIB, tools=qemu_tools) for name in ("a", "b")]
    with Vm(disks, tools=qemu_tools, paused=False) as vm:
        source = server.uri(vm.socket)
        ports: list[set[str]] = []

        def overwrite(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_START and not ports:
                ssh = our_ssh(os.getpid())
                assert ssh
                ports.append(listening(vm.process.pid, *ssh, *server.sessions()))
                # What QEMU 7.2 tells of a zeroed range is what it is now: the scratch is asked, too.
                vm.qemu_io("a", "write -q -z -u 1M 1M")
                vm.qemu_io("a", "write -q -P 99 3M 3M")

        for level in ("full", "incremental"):
            ports.clear()
            vm.qemu_io("a", f"write -q -P {len(level)} 0 5M")
            vm.qemu_io("b", f"write -q -P {len(level)} 2M 64k")
            truth = vm.copy_disks(tmp_path / level)
            result = keeper.backup(source, level, guest_first=guest_first, progress=overwrite)
            assert [one.level for one in result.disks] == [level] * 2
            assert ports == [set()]
            assert result.cost is not None
            assert result.cost.scratch_peak_bytes >= 4 * MIB
            for name, path in keeper.restore(result.backup).items():
                compare(path, truth[name], tools=qemu_tools)
            assert not any(vm.leftovers().values())
            assert list(keeper.scratch.iterdir()) == []
            assert vm.status() == "running"
        vm.qemu_io("b", "write -q -P 3 1M 1M")
        estimated = nbdpull.estimate(source, keeper.repository)
        assert [one.changed_bytes for one in estimated.disks] == [4 * MIB, MIB]
        found = nbdpull.doctor(source, keeper.repository, scratch=keeper.scratch)
        assert all(one.kind is not FindingKind.PROBLEM for one in found.findings)
        assert "QEMU can write there" in str(found)
        assert keeper.cleanup(source).removed == ()
        assert list(keeper.scratch.iterdir()) == []


def test_the_scratch_there_is_trimmed_too(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "a", size=64 * MIB, tools=qemu_tools)
    with Vm([disk], tools=qemu_tools, paused=False) as vm:
        vm.qemu_io("a", "write -q -P 1 0 64M")
        truth = vm.copy_disks(tmp_path / "truth")

        def overwrite(progress: nbdpull.Progress) -> None:
            if progress.kind is nbdpull.ProgressKind.DISK_END:
                vm.qemu_io("a", "write -q -P 9 0 64M")

        result = keeper.backup(server.uri(vm.socket), trim_scratch=True, progress=overwrite)
        assert result.cost is not None
        # The last frame of each worker may be on its way still.
        assert result.cost.copied_bytes <= 32 * MIB
        compare(keeper.restore(result.backup)["a"], truth["a"], tools=qemu_tools)
        assert not any(vm.leftovers().values())


@only_qemu_10
def test_a_storage_daemon_and_a_server_of_somebody_else_work_over_ssh(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, disk: Disk
) -> None:
    with StorageDaemon([disk], tools=qemu_tools, nbd_server=True) as daemon:
        source = server.uri(daemon.socket)
        with pytest.raises(nbdpull.SourceError, match="has an NBD server already"):
            keeper.backup(source)
        result = keeper.backup(source, nbd_address=daemon.nbd_address)
        assert not any(daemon.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []
        (restored,) = keeper.restore(result.backup).values()
        compare(restored, disk.path, other_format="qcow2")


def test_a_lost_connection_fails_the_backup_and_the_next_one_clears_up(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, disk: Disk
) -> None:
    with Vm([disk], tools=qemu_tools, writer=BootWriter(disks=1)) as vm:
        source = server.uri(vm.socket)
        first = keeper.backup(source)
        vm.wait_written(10)
        options = ("-l", "full", "--resume-within", "0s", *SLOWLY)
        with running_backup(vm, keeper, *options, source=source) as client:
            server.cut()
            _, errors = client.communicate(timeout=60)
        assert client.returncode == 1
        said = errors.decode()
        assert "nbdpull cleanup" in said
        assert f"the ssh connection to {HOST} is lost" in said.splitlines()[-1]
        vm.wait_written(10)
        assert answers(vm) < 5
        assert any(vm.leftovers().values())
        assert len(nbdpull.list_backups(keeper.repository)) == 1
        told = nbdpull.doctor(source, scratch=keeper.scratch)
        assert "a run that is dead left" in str(told)
        with vm.halted():
            truth = vm.copy_disks(keeper.scratch.parent / "truth")
            # That it may go on where the lost one was is another matter, see test_ssh_resume.
            after = keeper.backup(source, resume_within_s=0)
        assert (after.level, after.parent) == (Level.INCREMENTAL, first.backup)
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []
        compare(keeper.restore(after.backup)["vda"], truth["vda"], tools=qemu_tools)


@only_qemu_10
def test_a_killed_client_leaves_no_ssh_and_cleanup_works_from_anywhere(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, disk: Disk
) -> None:
    with Vm([disk], tools=qemu_tools, writer=BootWriter(disks=1)) as vm:
        source = server.uri(vm.socket)
        for cleaner in (source, vm.uri):
            with running_backup(vm, keeper, "-l", "full", *SLOWLY, source=source) as client:
                ssh = our_ssh(client.pid)
                assert ssh
                client.kill()
                client.wait()
            deadline = time.monotonic() + 20
            while any(map(pid_alive, ssh)) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not any(map(pid_alive, ssh))
            vm.wait_written(5)
            cleaned = keeper.cleanup(cleaner)
            assert cleaned.kept == ()
            assert any(line.startswith("scratch folder") for line in cleaned.removed)
            assert not any(vm.leftovers().values())
            assert list(keeper.scratch.iterdir()) == []
            assert keeper.cleanup(cleaner).removed == ()
        # And what a run of the hypervisor itself left.
        with running_backup(vm, keeper, "-l", "full", *SLOWLY) as client:
            client.kill()
            client.wait()
        assert keeper.cleanup(source).kept == ()
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("qemu_tools", "stopped"),
    [(QEMU_10, "client"), (QEMU_72, "ssh"), (QEMU_10, "ssh"), (QEMU_72, "sshd")],
    ids=["qemu-10-client", "qemu-7.2-ssh", "qemu-10-ssh", "qemu-7.2-sshd"],
)
def test_whatever_is_stopped_the_vm_goes_on(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, disk: Disk, stopped: str
) -> None:
    with Vm([disk], tools=qemu_tools, writer=BootWriter(disks=1)) as vm:
        source = server.uri(vm.socket)
        with running_backup(vm, keeper, source=source) as client:
            pids = {
                "client": [client.pid],
                "ssh": our_ssh(client.pid),
                "sshd": server.sessions(),
            }[stopped]
            assert pids
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            for _ in range(4):
                vm.wait_written(2, timeout_s=10)
                assert answers(vm) < 5
                time.sleep(0.3)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            output, errors = client.communicate(timeout=120)
        assert client.returncode == 0, errors.decode()
        assert not any(vm.leftovers().values())
        assert set(keeper.restore(json.loads(output)["backup"])) == {"vda"}


@only_qemu_10
def test_scratch_there_that_runs_out_ends_the_backup_and_not_the_guest(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, disk: Disk, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small])
    try:
        with Vm([disk], tools=qemu_tools, writer=BootWriter(disks=1, pause_us=0)) as vm:
            vm.wait_written(10)
            command = [sys.executable, "-m", "nbdpull", "backup", server.uri(vm.socket)]
            command += ["-r", keeper.repository, "--scratch", str(small), "--rate", "8M"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 13, done.stderr
            assert vm.status() == "running"
            vm.wait_written(10)
            assert not any(vm.leftovers().values())
            assert list(small.iterdir()) == []
    finally:
        run(["umount", small])


def no_ssh(server: SshServer, _path: Path) -> str:
    (server.bin / "ssh").unlink()
    os.environ["PATH"] = str(server.bin)  # put back by the fixture
    return "there is no program 'ssh'"


def nobody_listens(server: SshServer, _path: Path) -> str:
    server.client(port=1)
    return r"can't reach hypervisor by ssh: ssh said '.*Connection refused'"


def key_is_refused(server: SshServer, _path: Path) -> str:
    server.client(key="stranger")
    return r"can't reach hypervisor by ssh: ssh said '.*Permission denied \(publickey\)\.'"


def host_key_is_another(server: SshServer, _path: Path) -> str:
    other = (server.folder / "stranger.pub").read_text(encoding="ascii")
    (server.folder / "known").write_text(f"{HOST} {other}", encoding="ascii")
    return r"can't reach hypervisor by ssh: ssh said 'Host key verification failed\.'"


def no_socket(_server: SshServer, _path: Path) -> str:
    return "no QMP socket at .* on hypervisor"


def a_file(_server: SshServer, path: Path) -> str:
    path.write_text("x")
    return "on hypervisor is no socket"


def a_dead_socket(_server: SshServer, path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return r"ssh said: channel \d+: open failed: connect failed"


@pytest.mark.parametrize(
    "fault",
    [
        no_ssh,
        nobody_listens,
        key_is_refused,
        host_key_is_another,
        no_socket,
        a_file,
        a_dead_socket,
    ],
)
def test_what_is_in_the_way_is_told_in_one_line(
    keeper: Keeper, server: SshServer, tmp_path: Path, fault: Callable[[SshServer, Path], str]
) -> None:
    path = tmp_path / "qmp"
    words = fault(server, path)
    with pytest.raises(nbdpull.MonitorError) as caught:
        keeper.backup(server.uri(path), vm="web")
    assert re.search(words, str(caught.value))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_forwarding_that_the_server_forbids_is_told(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Vm() as vm, SshServer(tmp_path / "ssh", options="AllowStreamLocalForwarding no") as server:
        monkeypatch.setenv("PATH", server.path)
        with pytest.raises(
            nbdpull.MonitorError, match=r"ssh said: .*open failed; .*AllowStreamLocalForwarding"
        ):
            keeper.backup(server.uri(vm.socket))


def test_a_monitor_that_is_taken_is_told(keeper: Keeper, server: SshServer) -> None:
    with Vm() as vm, socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(vm.socket))
        with pytest.raises(nbdpull.MonitorInUseError, match="another client"):
            keeper.backup(server.uri(vm.socket))


@only_qemu_10
def test_an_nbd_server_that_is_dead_there_fails_the_backup_and_leaves_nothing(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, disk: Disk, tmp_path: Path
) -> None:
    dead = tmp_path / "dead"
    with Vm([disk], tools=qemu_tools) as vm:
        vm.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(dead))
        with pytest.raises(nbdpull.NbdError, match="can't connect"):
            keeper.backup(server.uri(vm.socket), nbd_address=f"nbd+unix:///?socket={dead}")
        assert not any(vm.leftovers().values())
        assert vm.bitmaps("vda") == {}
        assert list(keeper.scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quiesce": True}, "--quiesce does not work over ssh"),
        ({"tls": "PATH"}, "--tls is about NBD over TCP"),
    ],
)
def test_what_does_not_work_over_ssh_is_refused_first(
    keeper: Keeper, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {
        name: tmp_path if value == "PATH" else value for name, value in options.items()
    }
    for name in ("ca-cert", "client-cert", "client-key", "server-cert", "server-key"):
        (tmp_path / f"{name}.pem").touch()
    with pytest.raises(nbdpull.UsageError, match=words):
        keeper.backup("qmp+ssh://nowhere.invalid/run/qmp", **given)
