"""A store that takes requests and answers none holds up neither the guest, nor QEMU, nor whoever wants to leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import nbdpull
from tests.integration.conftest import GUARD_S, Keeper, interrupted, noise, out_of_scratch, start
from tests.support.bootwriter import BootWriter
from tests.support.disk import MIB, compare, create_disk
from tests.support.process import run, stop
from tests.support.proxy import Fault, Proxy, Request
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import Vm


class Hang:
    """From some request on, requests are carried out and never answered."""

    def __init__(self, wanted: Callable[[Request], bool], *, passing: int = 0, hanging: int = 1):
        self._wanted = wanted
        self._passing = passing
        self._left = hanging
        self.reached = threading.Event()

    def __call__(self, request: Request) -> Fault | None:
        """The plan of a proxy."""
        if not self._wanted(request):
            return None
        if self._passing:
            self._passing -= 1
            return None
        self._left -= 1
        if self._left <= 0:
            self.reached.set()
        return Fault.HANG


def part(request: Request) -> str:
    """What kind of object it is about: ``d``, ``m`` and so on."""
    parts = request.key.split("/")  # test, a number
    return parts[2] if len(parts) > 2 else ""


def test_a_signal_ends_a_backup_whose_packs_hang_and_the_next_one_takes_them_over(
    qemu_tools: QemuTools, far: Keeper, front: Proxy, tmp_path: Path
) -> None:
    signum = signal.SIGINT if qemu_tools is QEMU_72 else signal.SIGTERM
    disk = create_disk(tmp_path, "vda", size=256 * MIB, tools=qemu_tools)
    with Vm([disk], tools=qemu_tools, paused=False) as vm:
        vm.qemu_io("vda", "write -q -P 1 200M 1M")
        first = far.backup(vm.uri)
        vm.qemu_io("vda", noise(tmp_path, 144 * MIB))
        hang = Hang(
            lambda request: request.method == "PUT" and part(request) == "d", passing=1, hanging=2
        )
        front.plan = hang
        client = start(
            "backup", vm.uri, "-r", far.repository, "--scratch", far.scratch, "--json", front=front
        )
        interrupted(client, hang.reached, signum)
        front.plan = lambda _request: None
        assert not any(vm.leftovers().values())
        assert list(far.scratch.iterdir()) == []
        assert vm.status() == "running"
        assert len(vm.bitmaps("vda")) == 1
        vm.qemu_io("vda", "write -q -P 9 3M 64k")
        second = far.backup(vm.uri)
        assert (second.level, second.parent) == (nbdpull.Level.INCREMENTAL, first.backup)
        assert second.disks[0].reused_bytes > 30 * MIB
        vm.qemu_io("vda", "flush")
        compare(
            far.restore(second.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
def test_a_signal_while_the_commit_hangs_leaves_a_chain_that_goes_on(
    far: Keeper, front: Proxy, tmp_path: Path, *, asked: bool
) -> None:
    """The commit was carried out. Where that can be asked the backup counts at once, else by the next one."""
    disk = create_disk(tmp_path, "vda", size=8 * MIB)
    with Vm([disk], paused=False) as vm:
        vm.qemu_io("vda", "write -q -P 1 1M 1M")
        far.backup(vm.uri)
        vm.qemu_io("vda", "write -q -P 2 2M 64k")
        begun = threading.Event()

        def wanted(request: Request) -> bool:
            commits = request.method == "PUT" and part(request) == "m"
            if commits:
                begun.set()
            return commits or (begun.is_set() and not asked)

        front.plan = hang = Hang(wanted)
        client = start(
            "backup", vm.uri, "-r", far.repository, "--scratch", far.scratch, front=front
        )
        try:
            interrupted(client, hang.reached, signal.SIGINT)
        finally:
            front.plan = lambda _request: None
        assert not any(vm.leftovers().values())
        assert list(far.scratch.iterdir()) == []
        assert vm.status() == "running"
        committed = nbdpull.list_backups(far.repository)
        assert len(committed) == 2
        vm.qemu_io("vda", "write -q -P 3 3M 64k")
        third = far.backup(vm.uri)
        assert (third.level, third.parent) == (nbdpull.Level.INCREMENTAL, committed[-1].backup)
        assert third.disks[0].changed_bytes == 64 << 10
        vm.qemu_io("vda", "flush")
        compare(far.restore(third.backup)["vda"], disk.path, other_format="qcow2")


@pytest.mark.parametrize("mode", [(), ("--guest-first",)], ids=["mode-b", "mode-c"])
def test_scratch_that_fills_up_while_the_store_hangs_ends_the_backup_and_not_the_guest(
    far: Keeper, front: Proxy, small: Path, tmp_path: Path, mode: tuple[str, ...]
) -> None:
    disk = create_disk(tmp_path, "vda", size=256 * MIB)
    with Vm([disk], writer=BootWriter(disks=1, pause_us=0)) as vm:
        vm.wait_written(10)
        vm.pause()
        vm.qemu_io("vda", noise(tmp_path, 144 * MIB))
        front.plan = hang = Hang(
            lambda request: request.method == "PUT" and part(request) == "d", hanging=2
        )
        options = ["-r", far.repository, "--scratch", str(small), *mode]
        client = start("backup", vm.uri, *options, front=front)
        out_of_scratch(client, hang.reached, vm, small)
        front.plan = lambda _request: None
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "truth")
            done = far.backup(vm.uri)
        # Two packs were stored, of which the guest has overwritten up to 16 MiB.
        assert done.disks[0].reused_bytes > 40 * MIB
        compare(far.restore(done.backup)["vda"], truth["vda"])


@pytest.mark.parametrize("verb", ["restore", "restore -", "verify", "copy", "gc", "list"])
def test_a_signal_ends_every_other_verb_whose_reads_hang(
    far: Keeper, front: Proxy, tmp_path: Path, verb: str
) -> None:
    disk = create_disk(tmp_path, "vda", size=16 * MIB)
    run(["qemu-io", "-f", "qcow2", "-c", noise(tmp_path, 8 * MIB), disk.path])
    far.backup(f"disk:vda={disk.path}")
    out = tmp_path / "out"
    source = far.repository
    verbs: dict[str, tuple[list[str | Path], str]] = {
        "restore": (["restore", "latest", "-r", source, "--to", out], "d"),
        "restore -": (["restore", "latest", "-r", source, "--to", "-"], "d"),
        "verify": (["verify", "--level", "full", "-r", source], "d"),
        "copy": (["copy", source, out], "d"),
        "gc": (["gc", "-r", source], "m"),
        "list": (["list", "-r", source], "m"),
    }
    arguments, kind = verbs[verb]
    front.plan = hang = Hang(
        lambda request: request.method == "GET" and not request.lists and part(request) == kind
    )
    interrupted(start(*arguments, front=front), hang.reached, signal.SIGINT)
    front.plan = lambda _request: None
    if verb == "restore":
        assert list(out.iterdir()) == []
    elif verb == "copy":
        nbdpull.copy(source, out)
        assert nbdpull.verify(out, level="full").ok
    nbdpull.gc(source)
    assert nbdpull.verify(source, level="full").ok


def test_an_embedding_program_gets_control_back(
    far: Keeper, front: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = create_disk(tmp_path, "vda", size=16 * MIB)
    run(["qemu-io", "-f", "qcow2", "-c", noise(tmp_path, 8 * MIB), disk.path])
    far.backup(f"disk:vda={disk.path}")
    front.plan = hang = Hang(lambda request: request.method == "GET" and part(request) == "d")
    monkeypatch.setenv("AWS_ENDPOINT_URL", front.endpoint)
    with nbdpull.cancellable() as cancel:

        def watch() -> None:
            hang.reached.wait(GUARD_S)
            cancel()

        watcher = threading.Thread(target=watch)
        watcher.start()
        with pytest.raises(BaseException) as caught:
            nbdpull.restore(far.repository, "latest", tmp_path / "out")
        watcher.join()
    assert type(caught.value).__name__ == "CancelledError"
    assert list((tmp_path / "out").iterdir()) == []
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"nbdpull", "nbdpull-worker"}
    # And the next call, from the same program, is not concerned.
    front.plan = lambda _request: None
    assert far.restore("latest")


def test_after_a_point_in_time_that_breaks_a_new_one_goes_to_the_same_store(
    far: Keeper, front: Proxy, tmp_path: Path
) -> None:
    """The pull that fails gives the store up, and the one that follows needs it."""
    disk = create_disk(tmp_path, "vda", size=256 * MIB)
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small])
    try:
        with Vm([disk], paused=False) as vm:
            vm.qemu_io("vda", noise(tmp_path, 144 * MIB))
            front.plan = hang = Hang(
                lambda request: request.method == "PUT" and part(request) == "d", passing=1
            )
            options = ("--scratch", small, "--guest-first", "--rate", "64M")
            client = start("backup", vm.uri, "-r", far.repository, *options, front=front)
            try:
                while not hang.reached.wait(0.1):
                    assert client.poll() is None, client.communicate()
            finally:
                stop(client)
            # More than there is room for: the view breaks, and nothing tells of it but reading it.
            vm.qemu_io("vda", f"write -q -P 5 {80 * MIB} {60 * MIB}")
            told: list[str] = []
            done = nbdpull.backup(
                vm.uri,
                far.repository,
                scratch=small,
                guest_first=True,
                progress=lambda event: told.append(event.text or ""),
            )
            assert not done.resumed
            assert any("can't be" in text for text in told), told
            assert not any(vm.leftovers().values())
            vm.qemu_io("vda", "flush")
            compare(far.restore(done.backup)["vda"], disk.path, other_format="qcow2")
    finally:
        run(["umount", small])
