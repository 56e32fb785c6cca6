"""Going on with a run that died, where more is to be as it was than the disks: trimmed, with files, over TLS, with a lie."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from nbdpull import Level
from nbdpull.nbdio.connection import Connection, ReplyError, unix_uri
from tests.integration.conftest import Keeper
from tests.integration.test_kills import noisy, running_backup
from tests.integration.test_resume import (
    BEFORE_SEALING,
    MODES,
    NOISE,
    SLOWLY,
    check,
    die_at,
    frozen_truth,
    kill_in_the_middle,
    options_of,
    packs,
    read_bytes,
    swept,
    write_noise,
)
from tests.support.bootwriter import BootWriter
from tests.support.certificates import Authority
from tests.support.disk import MIB, Disk, create_disk
from tests.support.process import run
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import Vm

TRIMS = ("--trim-scratch",)


@pytest.fixture
def disks(tmp_path: Path, qemu_tools: QemuTools) -> list[Disk]:
    return noisy(tmp_path, qemu_tools, noise=NOISE, size=256 * MIB)


def is_refused(scratch: Path, offset: int) -> bool:
    """Whether QEMU shows a place of the only run's first disk no more."""
    (path,) = scratch.glob("nbdpull-*/nbd.sock")
    with Connection.open(unix_uri(str(path), f"np-{path.parent.name[8:]}-e0")) as connection:
        try:
            connection.read_into(memoryview(bytearray(512)), offset)
        except ReplyError:
            return True
    return False


def kill_when(vm: Vm, keeper: Keeper, *options: str, so: Callable[[], bool]) -> None:
    """Kill a client once something is so."""
    with running_backup(vm, keeper, *SLOWLY, *options) as client:
        deadline = time.monotonic() + 120
        while not so():
            assert client.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        client.send_signal(signal.SIGKILL)
        client.wait()


def overwrite(vm: Vm, first: int, last: int) -> None:
    """Let the guest overwrite what lies behind the area that it writes to all the time."""
    for disk in vm.disks:
        vm.qemu_io(disk.name, f"write -q -P 9 {first} {last - first}")


@MODES
def test_what_was_trimmed_is_found_in_the_repository_and_the_rest_is_read(
    qemu_tools: QemuTools,
    keeper: Keeper,
    disks: list[Disk],
    tmp_path: Path,
    mode: tuple[str, ...],
) -> None:
    options = options_of(mode) | {"trim_scratch": True}
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        vm.wait_written(5)
        with frozen_truth(vm, tmp_path / "full") as truth:
            kill_when(vm, keeper, *TRIMS, *mode, so=lambda: is_refused(keeper.scratch, 20 * MIB))
            # Noted and let go before it was ever read.
            assert is_refused(keeper.scratch, 200 * MIB)
        overwrite(vm, 17 * MIB, 100 * MIB)
        vm.wait_written(10)
        result = keeper.backup(vm.uri, **options)
        assert result.resumed
        assert 0 < read_bytes(result) < 2 * NOISE - 16 * MIB
        check(keeper, result, truth, qemu_tools)
        assert not any(vm.leftovers().values())
        assert list(keeper.scratch.iterdir()) == []

        # Data, zeroes and what did not change.
        for disk in disks:
            vm.qemu_io(disk.name, f"write -q -z {40 * MIB} {40 * MIB}")
        write_noise(vm, tmp_path / "noise")
        with frozen_truth(vm, tmp_path / "incremental") as truth:
            kill_when(vm, keeper, *TRIMS, *mode, so=lambda: is_refused(keeper.scratch, 131 * MIB))
            assert is_refused(keeper.scratch, 60 * MIB)
            assert is_refused(keeper.scratch, 30 * MIB)
            assert is_refused(keeper.scratch, 230 * MIB)
        overwrite(vm, 17 * MIB, 256 * MIB)
        vm.wait_written(10)
        result = keeper.backup(vm.uri, **options)
        assert result.resumed
        assert [disk.level for disk in result.disks] == [Level.INCREMENTAL] * 2
        # 17 to 40, 80 to 100 and 130 to 200 MiB are data.
        assert 0 < read_bytes(result) < 2 * 113 * MIB - 16 * MIB
        check(keeper, result, truth, qemu_tools)
        with frozen_truth(vm, tmp_path / "last") as truth:
            last = keeper.backup(vm.uri, **options)
        assert not last.resumed
        assert [disk.level for disk in last.disks] == [Level.INCREMENTAL] * 2
        check(keeper, last, truth, qemu_tools)
    assert nbdpull.verify(keeper.repository).damaged == ()


def test_what_two_dead_runs_trimmed_is_found(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disks = noisy(tmp_path, qemu_tools, noise=96 * MIB, size=256 * MIB)
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        vm.wait_written(5)
        with frozen_truth(vm, tmp_path / "truth") as truth:
            kill_when(vm, keeper, *TRIMS, so=lambda: is_refused(keeper.scratch, 20 * MIB))
        overwrite(vm, 17 * MIB, 40 * MIB)
        kill_in_the_middle(vm, keeper, *TRIMS, stored=2)
        overwrite(vm, 40 * MIB, 120 * MIB)
        result = keeper.backup(vm.uri, trim_scratch=True)
        assert result.resumed
        assert 0 < read_bytes(result) < 2 * 96 * MIB - 64 * MIB
        check(keeper, result, truth, qemu_tools)


def test_what_an_earlier_backup_has_at_the_same_place_is_trimmed_and_found_there(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        vm.wait_written(5)
        keeper.backup(vm.uri)
        with frozen_truth(vm, tmp_path / "truth") as truth:
            there = packs(keeper)
            kill_when(
                vm,
                keeper,
                *TRIMS,
                *("--level", "full"),
                so=lambda: is_refused(keeper.scratch, 20 * MIB),
            )
            assert packs(keeper) == there
        overwrite(vm, 17 * MIB, 64 * MIB)
        result = keeper.backup(vm.uri, "full", trim_scratch=True)
        assert result.resumed
        assert read_bytes(result) < 2 * NOISE
        check(keeper, result, truth, qemu_tools)


def test_what_was_trimmed_and_is_in_the_repository_no_more_leads_to_a_new_point_in_time(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    told: list[str] = []
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        kill_when(vm, keeper, *TRIMS, so=lambda: is_refused(keeper.scratch, 20 * MIB))
        for path in (Path(keeper.repository) / "d").rglob("*"):
            if path.is_file():
                path.unlink()
        overwrite(vm, 17 * MIB, 64 * MIB)
        with frozen_truth(vm, tmp_path / "truth") as truth:
            result = keeper.backup(
                vm.uri, trim_scratch=True, progress=lambda event: told.append(event.text or "")
            )
        assert not result.resumed
        assert any("can't be read any more" in text for text in told), told
        assert not any(vm.leftovers().values())
        check(keeper, result, truth, qemu_tools)


@contextmanager
def small(path: Path) -> Iterator[Path]:
    """A folder with 96 MiB of room."""
    path.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", path])
    try:
        yield path
    finally:
        run(["umount", path])


@pytest.mark.parametrize("qemu_tools", [QEMU_72], ids=["qemu-7.2"])
def test_where_scratch_has_little_room_what_is_read_is_let_go_at_once_and_nobody_goes_on(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    with small(tmp_path / "small") as scratch, Vm(disks, tools=qemu_tools) as vm:
        there = packs(keeper)
        kill_when(
            vm,
            keeper,
            *TRIMS,
            *("--scratch", str(scratch)),
            so=lambda: is_refused(scratch, 1 * MIB),
        )
        assert packs(keeper) == there
        other = Keeper(keeper.repository, scratch, keeper.restored)
        _, told = swept(vm, other, tmp_path / "truth", qemu_tools, trim_scratch=True)
        assert "let go of what it read early" in told


def test_files_that_are_kept_with_a_backup_are_those_of_its_point_in_time(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path
) -> None:
    definition, tpm = tmp_path / "vm.sh", tmp_path / "tpm"
    definition.write_text("then")
    tpm.mkdir()
    (tpm / "state").write_bytes(b"then")
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        with frozen_truth(vm, tmp_path / "truth") as truth:
            kill_in_the_middle(
                vm, keeper, *("--definition", str(definition)), *("--tpm-state", str(tpm)), stored=1
            )
        vm.wait_written(5)
        definition.write_text("now")
        (tpm / "state").write_bytes(b"now")
        (tpm / "more").write_bytes(b"now")
        result = keeper.backup(vm.uri, definitions=[definition], tpm_state=tpm)
        assert result.resumed
        check(keeper, result, truth, qemu_tools)
        assert list(keeper.scratch.iterdir()) == []
        kept = keeper.restored / result.backup / "machine"
        assert (kept / "definition" / "1-vm.sh").read_text() == "then"
        assert (kept / "tpm" / "state").read_bytes() == b"then"
        assert not (kept / "tpm" / "more").exists()
        assert b"query-version" in (kept / "qemu.json").read_bytes()
        last = keeper.backup(vm.uri, definitions=[definition], tpm_state=tpm)
        keeper.restore(last.backup)
        kept = keeper.restored / last.backup / "machine"
        assert (kept / "definition" / "1-vm.sh").read_text() == "now"


@pytest.mark.parametrize("qemu_tools", [QEMU_72], ids=["qemu-7.2"])
@pytest.mark.parametrize("how", ["none now", "other", "damaged"])
def test_a_run_that_was_to_keep_other_files_is_swept(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path, how: str
) -> None:
    definition = tmp_path / "vm.sh"
    definition.write_text("then")
    options: dict[str, Any] = {"definitions": [definition]}
    reason = "other files"
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        kill_in_the_middle(vm, keeper, "--definition", str(definition), stored=1)
        if how == "none now":
            options = {}
        elif how == "other":
            options["machine"] = True
            options["definitions"] = []
        else:
            (file,) = keeper.scratch.glob("nbdpull-*/machine")
            file.write_bytes(file.read_bytes().replace(b"then", b"than"))
            reason = "damaged"
        _, told = swept(vm, keeper, tmp_path / "truth", qemu_tools, **options)
        assert reason in told


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("ours", [True, False], ids=["started-by-us", "users-own"])
def test_a_server_at_the_users_address_is_ended_by_who_goes_on_only_if_the_dead_run_started_it(
    qemu_tools: QemuTools, keeper: Keeper, disks: list[Disk], tmp_path: Path, *, ours: bool
) -> None:
    tls = Authority(tmp_path / "authority").issue(tmp_path / "pki", "client", "server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    address = f"nbds://127.0.0.1:{port}"
    with Vm(disks, tools=qemu_tools, writer=BootWriter()) as vm:
        if not ours:
            creds = {"qom_type": "tls-creds-x509", "id": "t", "endpoint": "server"}
            vm.qmp("object-add", **creds, dir=str(tls), verify_peer=True)
            inet = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
            vm.qmp("nbd-server-start", addr=inet, tls_creds="t")
        vm.wait_written(5)
        with frozen_truth(vm, tmp_path / "truth") as truth:
            kill_in_the_middle(
                vm, keeper, *("--tls", str(tls)), *("--nbd-address", address), stored=1
            )
        vm.wait_written(5)
        result = keeper.backup(vm.uri, tls=tls, nbd_address=address)
        assert result.resumed
        assert 0 < read_bytes(result) < 2 * NOISE - 16 * MIB
        check(keeper, result, truth, qemu_tools)
        assert not any(vm.leftovers().values())
        assert "-tls'" not in str(vm.qmp("qom-list", path="/objects"))
        assert listens(port) is not ours


@contextmanager
def lied_to(disk: Disk, keeper: Keeper, tools: QemuTools) -> Iterator[Vm]:
    """A VM whose chain's bitmap missed writes, all over the disk but at its end, which is always looked at."""
    with Vm([disk], tools=tools) as vm:
        vm.qemu_io("vda", "write -P 1 0 64M")
        first = keeper.backup(vm.uri)
        (bitmap,) = (entry for entry in vm.bitmaps("vda") if first.backup in entry)
        vm.qmp("block-dirty-bitmap-disable", node=vm.disk("vda").node, name=bitmap)
        vm.qemu_io("vda", "write -P 2 0 60M")
        vm.qmp("block-dirty-bitmap-enable", node=vm.disk("vda").node, name=bitmap)
        yield vm


FOUND = (
    "from nbdpull.ops import backuprun",
    "note = backuprun.Run._note_lie",
    "def die(self, *args): note(self, *args); os.kill(os.getpid(), signal.SIGKILL)",
    "backuprun.Run._note_lie = die",
)


@pytest.mark.parametrize(
    ("swept_for", "trim_scratch"),
    [(None, False), (None, True), ("resume_within_s", False), ("twice", True)],
    ids=["gone-on-with", "gone-on-with-trimmed", "swept", "swept-twice"],
)
def test_a_bitmap_that_a_dead_run_found_lying_is_not_believed_again(
    qemu_tools: QemuTools,
    keeper: Keeper,
    tmp_path: Path,
    swept_for: str | None,
    *,
    trim_scratch: bool,
) -> None:
    """Without the record the next one, which looks at nothing but the end, would believe it."""
    disk = create_disk(tmp_path, "vda", size=64 * MIB, tools=qemu_tools)
    with (
        lied_to(disk, keeper, qemu_tools) as vm,
        frozen_truth(vm, tmp_path / "truth") as truth,
    ):
        options = (f"trim_scratch={trim_scratch}", "audit=100")
        die_at(vm, keeper, *FOUND, options=options)
        if swept_for == "twice":
            # A run that was told of it, reads all for it, and dies before it ends.
            die_at(
                vm,
                keeper,
                *BEFORE_SEALING,
                options=(f"trim_scratch={trim_scratch}", "audit=0", "resume_within_s=0"),
            )
        more: dict[str, Any] = {"resume_within_s": 0} if swept_for == "resume_within_s" else {}
        result = keeper.backup(vm.uri, audit=0, trim_scratch=trim_scratch, **more)
        assert result.resumed is (swept_for is None)
        assert result.disks[0].level is Level.FULL
        assert "can't be trusted" in result.disks[0].reason
        assert "may miss writes" in result.warnings[0]
        check(keeper, result, truth, qemu_tools)
        last = keeper.backup(vm.uri, audit=100)
        assert last.disks[0].level is Level.INCREMENTAL
        assert last.warnings == ()
