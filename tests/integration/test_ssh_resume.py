"""Over ssh: a client that died, or lost its connection, is gone on with; a forwarded socket alone is connected again."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import nbdpull
from nbdpull import Level
from nbdpull.ops import reconnecting
from nbdpull.source.address import SshHost
from nbdpull.source.elsewhere import Elsewhere
from nbdpull.source.journal import Journal
from nbdpull.source.rundir import RunDir, find_run
from nbdpull.source.ssh import SshLink, open_link
from nbdpull.source.unfinished import Unfinished, UnfinishedDisk
from tests.integration.conftest import Keeper
from tests.integration.test_kills import noisy, running_backup
from tests.integration.test_resume import NOISE, SLOWLY, check, packs, read_bytes
from tests.support.bootwriter import BootWriter
from tests.support.cutting import cutting
from tests.support.disk import MIB, Disk
from tests.support.sshd import HOST, SshServer
from tests.support.tools import QEMU_10, QEMU_72, QemuTools
from tests.support.vm import Vm


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    with SshServer(tmp_path / "ssh") as made:
        monkeypatch.setenv("PATH", made.path)
        yield made


@pytest.fixture
def disks(tmp_path: Path, qemu_tools: QemuTools) -> list[Disk]:
    return noisy(tmp_path, qemu_tools, noise=NOISE, size=128 * MIB)


def wait_for_packs(client: subprocess.Popen[bytes], keeper: Keeper, count: int) -> None:
    deadline = time.monotonic() + 120
    while packs(keeper) < count:
        assert client.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_in_the_middle(vm: Vm, keeper: Keeper, source: str, *options: str) -> None:
    there = packs(keeper)
    with running_backup(vm, keeper, *SLOWLY, *options, source=source) as client:
        wait_for_packs(client, keeper, there + 1)
        client.kill()
        client.wait()


def check_next(
    keeper: Keeper,
    vm: Vm,
    source: str,
    before: nbdpull.BackupResult,
    folder: Path,
    *,
    guest_first: bool = False,
) -> None:
    """See that the backup after one counts from it, and is right."""
    with vm.halted():
        truth = vm.copy_disks(folder)
        after = keeper.backup(source, guest_first=guest_first)
    assert not after.resumed
    assert after.parent == before.backup
    assert [disk.level for disk in after.disks] == [Level.INCREMENTAL] * 2
    check(keeper, after, truth, vm.tools)


@pytest.mark.parametrize(
    ("qemu_tools", "first", "second", "guest_first"),
    [
        (QEMU_72, "ssh", "ssh", False),
        (QEMU_10, "ssh", "ssh", True),
        (QEMU_10, "ssh", "here", False),
        (QEMU_72, "here", "ssh", False),
    ],
    ids=["qemu-7.2-ssh-ssh", "qemu-10-ssh-ssh-mode-c", "qemu-10-ssh-here", "qemu-7.2-here-ssh"],
)
def test_a_killed_client_is_gone_on_with_over_ssh_and_on_the_hypervisor_itself(
    qemu_tools: QemuTools,
    keeper: Keeper,
    server: SshServer,
    disks: list[Disk],
    tmp_path: Path,
    first: str,
    second: str,
    *,
    guest_first: bool,
) -> None:
    options = ["--guest-first"] if guest_first else []
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        ways = {"ssh": server.uri(vm.socket), "here": vm.uri}
        vm.wait_written(5)
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "full")
            kill_in_the_middle(vm, keeper, ways[first], *options)
        vm.wait_written(10)
        result = keeper.backup(ways[second], guest_first=guest_first)
        assert result.resumed
        assert 0 < read_bytes(result) < 2 * NOISE - 20 * MIB
        check(keeper, result, truth, qemu_tools)
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []
        check_next(keeper, vm, ways[first], result, tmp_path / "next", guest_first=guest_first)


def test_a_connection_that_is_lost_altogether_is_made_again_and_the_backup_goes_on(
    qemu_tools: QemuTools, keeper: Keeper, server: SshServer, disks: list[Disk], tmp_path: Path
) -> None:
    cuts, resumed = 0, 0
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:

        def cut(event: nbdpull.Progress) -> None:
            """In the pull, when something is stored, and in the pull that goes on."""
            nonlocal cuts, resumed
            resumed += "goes on with the backup of" in (event.text or "")
            if event.kind is nbdpull.ProgressKind.DISK and packs(keeper) and resumed == cuts < 2:
                cuts += 1
                server.cut()
                if cuts == 1:
                    vm.cont()

        source = server.uri(vm.socket)
        vm.wait_written(5)
        vm.pause()
        truth = vm.copy_disks(tmp_path / "full")
        result = keeper.backup(source, progress=cut, rate=32 * MIB)
        assert cuts == resumed == 2
        assert result.resumed
        assert 0 < read_bytes(result) < 2 * NOISE - 20 * MIB
        check(keeper, result, truth, qemu_tools)
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []


def test_a_host_that_stays_away_keeps_the_point_in_time_for_the_next_backup(
    qemu_tools: QemuTools,
    keeper: Keeper,
    server: SshServer,
    disks: list[Disk],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconnecting, "_PAUSES_S", (0.05,) * 3)
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:

        def leave(event: nbdpull.Progress) -> None:
            if event.kind is nbdpull.ProgressKind.DISK and packs(keeper):
                server.client(port=1)
                server.cut()

        source = server.uri(vm.socket)
        vm.wait_written(5)
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "full")
            with pytest.raises(
                nbdpull.PointInTimeLostError, match=f"connection to {HOST} is lost.*run again"
            ):
                keeper.backup(source, progress=leave, rate=32 * MIB)
        vm.wait_written(5)
        assert nbdpull.list_backups(keeper.repository) == ()
        assert len(vm.leftovers()["exports"]) == 4
        server.client()
        result = keeper.backup(source)
        assert result.resumed
        assert 0 < read_bytes(result) < 2 * NOISE - 20 * MIB
        check(keeper, result, truth, qemu_tools)
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []
        check_next(keeper, vm, source, result, tmp_path / "next")


@pytest.mark.parametrize(
    ("qemu_tools", "guest_first"),
    [(QEMU_72, False), (QEMU_10, True)],
    ids=["qemu-7.2-mode-b", "qemu-10-mode-c"],
)
def test_forwarded_nbd_connections_that_are_lost_alone_are_made_again(
    qemu_tools: QemuTools,
    keeper: Keeper,
    server: SshServer,
    disks: list[Disk],
    tmp_path: Path,
    *,
    guest_first: bool,
) -> None:
    nbd, proxy = tmp_path / "nbd", tmp_path / "proxy"
    with (
        Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm,
        cutting(str(nbd), listen=proxy) as cutter,
    ):
        vm.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(nbd)}})
        vm.wait_written(5)
        overwritten: list[str] = []

        def overwrite(progress: nbdpull.Progress) -> None:
            if progress.done and not overwritten:
                overwritten.append("vda")
                vm.qemu_io("vda", f"write -q -P 9 {32 * MIB} {24 * MIB}")
                vm.qemu_io("vda", f"write -q -z -u {56 * MIB} {4 * MIB}")

        cutter.every, cutter.cuts = 20 * MIB, 3
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "full")
            result = keeper.backup(
                server.uri(vm.socket),
                nbd_address=f"nbd+unix:///?socket={proxy}",
                guest_first=guest_first,
                progress=overwrite,
            )
        assert overwritten
        assert cutter.lost == 3
        assert not result.resumed
        assert read_bytes(result) < 2 * NOISE + 3 * 12 * MIB
        check(keeper, result, truth, qemu_tools)
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []


RUN = "01234567"
RECORD = Unfinished(
    backup=f"{RUN}89abcdef",
    chain="0" * 12,
    time=1.0,
    pid=1,
    asked=None,
    disks=(UnfinishedDisk(name="it's", size=MIB, level=Level.FULL, base=None, checkpoint=None),),
    server="0" * 64,
)
NOBODY = 65534


@contextmanager
def linked() -> Iterator[SshLink]:
    """A connection, as one command has it."""
    with asyncio.Runner() as runner:
        opening = open_link(SshHost(destination=HOST))
        link = runner.run(opening.__aenter__())
        try:
            yield link
        finally:
            runner.run(opening.__aexit__(None, None, None))


def begun(link: SshLink, scratch: Path, run: str = RUN) -> tuple[Path, Journal]:
    """A run whose QEMU is of another user, with a record and a journal."""
    made = Elsewhere(link).create(
        str(scratch), run, source="qmp:/q", chain="c", owner=(NOBODY, NOBODY), sizes=[MIB]
    )
    assert made.keep_record(RECORD, None)
    journal = made.journal(RECORD.backup)
    assert journal is not None
    return made.path, journal


def entries(first: int, last: int) -> list[tuple[int, int, bytes]]:
    return [(at * MIB, MIB, bytes([at]) * 32) for at in range(first, last)]


def note(journal: Journal, made: list[tuple[int, int, bytes]]) -> None:
    for entry in made:
        journal.disk(0, 100 * MIB).note(*entry)
    journal.close()


def folder_of(tmp_path: Path) -> Path:
    scratch = tmp_path / "a 'b"  # to be quoted, and short: a socket's path has 107 bytes at most
    scratch.mkdir()
    scratch.chmod(0o755)
    return scratch


def wait_until_over(path: Path) -> None:
    """Until the shell that held the run's lock has ended."""
    deadline = time.monotonic() + 20
    while (found := find_run(path)) is None or found.alive:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_record_journal_and_lock_there_are_taken_over_by_one(
    server: SshServer, tmp_path: Path
) -> None:
    scratch = folder_of(tmp_path)
    scratch.chmod(0o2755)
    with linked() as link:
        path, journal = begun(link, scratch)
        note(journal, entries(0, 40))
        assert path.stat().st_mode & 0o2000
        assert path.stat().st_uid == NOBODY
        (found,) = Elsewhere(link).find_all(str(scratch))
        assert found.alive
    wait_until_over(path)
    # What the end of its client cut short.
    with (path / "journal").open("ab") as file:
        file.write(b"\x10\0\0\0 and no more")
    for round_ in range(2):
        with linked() as link, linked() as rival:
            dead = Elsewhere(link).find(path)
            assert dead is not None
            assert not dead.alive
            assert dead.record() == RECORD
            taken = Elsewhere(link).take_over(path, source="qmp:/q", chain="c")
            with pytest.raises(nbdpull.InUseError, match="held by another process"):
                Elsewhere(rival).take_over(path, source="qmp:/q", chain="c")
            assert path.stat().st_uid == NOBODY
            goes_on = taken.journal(RECORD.backup)
            assert goes_on is not None
            there = goes_on.disk(0, 100 * MIB).segment(0)
            assert list(there) == entries(0, 40 + 10 * round_)
            note(goes_on, entries(40 + 10 * round_, 50 + 10 * round_))
        wait_until_over(path)
    # As whoever goes on with it on that host finds it.
    local = find_run(path)
    assert local is not None
    assert local.record() == RECORD
    taken_here = RunDir.take_over(path, source="qmp:/q", chain="c")
    last = taken_here.journal(RECORD.backup)
    assert last is not None
    assert list(last.disk(0, 100 * MIB).segment(0)) == entries(0, 60)
    last.close()
    taken_here.close()
    assert not path.exists()
    server.wait_ended()


def a_link(file: Path, victim: Path) -> None:
    file.symlink_to(victim)


def a_second_name(file: Path, victim: Path) -> None:
    file.hardlink_to(victim)


def a_file_of_his(file: Path, _victim: Path) -> None:
    file.write_bytes(RECORD.encode())
    os.chown(file, NOBODY, NOBODY)


def a_pipe(file: Path, _victim: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize("name", ["resume", "journal", "lock"])
def test_what_qemus_user_puts_in_the_folder_is_neither_believed_nor_written_through(
    server: SshServer, tmp_path: Path, name: str
) -> None:
    scratch, victim = folder_of(tmp_path), tmp_path / "victim"
    victim.write_bytes(RECORD.encode())
    paths = []
    with linked() as link:
        for number, fake in enumerate((a_link, a_second_name, a_file_of_his, a_pipe)):
            path, journal = begun(link, scratch, f"{number:08x}")
            (path / name).unlink()
            fake(path / name, victim)
            # What is open stays what it was.
            note(journal, entries(0, 40))
            paths.append(path)
    with linked() as link:
        for path in paths:
            found = Elsewhere(link).find(path)
            if name == "lock":
                assert found is None or not found.alive
            else:
                assert found is not None
            if name == "resume":
                assert found is not None
                with pytest.raises(ValueError, match="not a file of ours"):
                    found.record()
            else:
                with pytest.raises(nbdpull.SourceError, match="not ours"):
                    Elsewhere(link).take_over(path, source="qmp:/q", chain="c")
            # The shell there still answers.
            assert link.run("echo well").split() == ["well"]
            assert path.stat().st_uid == NOBODY
    assert victim.read_bytes() == RECORD.encode()


def test_without_a_lock_there_nothing_is_left_on_record(server: SshServer, tmp_path: Path) -> None:
    with linked() as link:
        link.run("flock() { return 127; }", here=True)
        made = Elsewhere(link).create(
            str(folder_of(tmp_path)), RUN, source="qmp:/q", chain="c", owner=None, sizes=[MIB]
        )
        assert not made.keep_record(RECORD, None)
        assert made.journal(RECORD.backup) is None
        found = Elsewhere(link).find(made.path)
        assert found is not None
        with pytest.raises(ValueError, match="nothing on record"):
            found.record()
        made.close()
        assert not made.path.exists()
    server.wait_ended()


@pytest.mark.usefixtures("server")
def test_what_an_audit_found_is_written_into_the_record_or_the_record_goes(tmp_path: Path) -> None:
    scratch = folder_of(tmp_path)
    told = RECORD.with_lie("it's", "bytes 0 to 5 changed")
    with linked() as link:
        made = Elsewhere(link).create(
            str(scratch), RUN, source="qmp:/q", chain="c", owner=(NOBODY, NOBODY), sizes=[MIB]
        )
        assert made.keep_record(RECORD, None)
        made.replace_record(told)
        made.leave()
        found = Elsewhere(link).find(made.path)
        assert found is not None
        assert [one.lie for one in found.record().disks] == ["bytes 0 to 5 changed"]
        # Of a run that is taken over, the record is not open.
        taken = Elsewhere(link).take_over(made.path, source="qmp:/q", chain="c")
        taken.replace_record(told)
        with pytest.raises(ValueError, match="nothing on record"):
            found.record()
        taken.close()


@pytest.mark.usefixtures("server")
def test_nothing_is_left_on_record_of_what_needs_more_than_the_record_there(tmp_path: Path) -> None:
    with linked() as link:
        made = Elsewhere(link).create(
            str(folder_of(tmp_path)), RUN, source="qmp:/q", chain="c", owner=None, sizes=[MIB]
        )
        assert not made.keep_record(RECORD, b"files")
        assert not made.keep_record(replace(RECORD, trims=True), None)
        found = Elsewhere(link).find(made.path)
        assert found is not None
        with pytest.raises(ValueError, match="nothing on record"):
            found.record()
        with pytest.raises(ValueError, match="over ssh"):
            found.machine("0" * 64)
        made.close()


@pytest.mark.usefixtures("server")
def test_whether_a_guest_can_wait_for_room_is_seen_here_and_there(small: Path) -> None:
    with linked() as link:
        made = Elsewhere(link).create(
            str(small), RUN, source="qmp:/q", chain="c", owner=None, sizes=[MIB]
        )
        found = [Elsewhere(link).find(made.path), find_run(made.path)]
        assert [one is not None and one.full() for one in found] == [False, False]
        state = os.statvfs(small)
        (small / "rest").write_bytes(bytes(state.f_bavail * state.f_frsize - MIB // 2))
        assert [one is not None and one.full() for one in found] == [True, True]
        made.close()
        # What can't be seen is not called full.
        assert [one is not None and one.full() for one in found] == [False, False]
