"""A repository in a folder whose server is gone holds up neither the guest, nor QEMU, nor whoever wants to leave."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdpull
from nbdpull.repo import deadline
from tests.integration.conftest import (
    GUARD_S,
    Keeper,
    interrupted,
    new_keeper,
    noise,
    out_of_scratch,
    start,
)
from tests.support.bootwriter import BootWriter
from tests.support.disk import MIB, compare, create_disk
from tests.support.hangingfolder import HangingFolder, hanging_folder
from tests.support.process import run
from tests.support.tools import QEMU_72, QemuTools
from tests.support.vm import Vm


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[HangingFolder]:
    with hanging_folder(tmp_path) as made:
        yield made


@pytest.fixture
def near(folder: HangingFolder, tmp_path: Path) -> Keeper:
    """A repository in the folder, by a way that does not hang."""
    return new_keeper(str(folder.behind / "repo"), tmp_path)


def test_a_signal_ends_a_backup_whose_folder_hangs_and_the_next_one_takes_its_packs_over(
    qemu_tools: QemuTools, near: Keeper, folder: HangingFolder, tmp_path: Path
) -> None:
    signum = signal.SIGINT if qemu_tools is QEMU_72 else signal.SIGTERM
    # What is read waits for its pack then, with a thread of its own.
    more = [] if qemu_tools is QEMU_72 else ["--trim-scratch"]
    disk = create_disk(tmp_path, "vda", size=256 * MIB, tools=qemu_tools)
    with Vm([disk], tools=qemu_tools, paused=False) as vm:
        vm.qemu_io("vda", "write -q -P 1 200M 1M")
        first = near.backup(vm.uri)
        vm.qemu_io("vda", noise(tmp_path, 144 * MIB))
        folder.hang("link", "/d/")
        repository = folder.path / "repo"
        client = start(
            "backup", vm.uri, "-r", repository, "--scratch", near.scratch, "--json", *more
        )
        interrupted(client, folder.reached, signum)
        # The folder hangs still.
        assert not any(vm.leftovers().values())
        assert list(near.scratch.iterdir()) == []
        assert vm.status() == "running"
        assert len(vm.bitmaps("vda")) == 1
        folder.go()
        vm.qemu_io("vda", "write -q -P 9 3M 64k")
        second = nbdpull.backup(vm.uri, repository, scratch=near.scratch)
        assert (second.level, second.parent) == (nbdpull.Level.INCREMENTAL, first.backup)
        assert second.disks[0].reused_bytes > 25 * MIB  # of the one pack
        vm.qemu_io("vda", "flush")
        compare(
            near.restore(second.backup)["vda"], disk.path, other_format="qcow2", tools=qemu_tools
        )


def test_a_signal_while_the_commit_hangs_leaves_a_chain_that_goes_on(
    near: Keeper, folder: HangingFolder, tmp_path: Path
) -> None:
    """The commit was carried out, and nobody can ask: the next backup finds out."""
    disk = create_disk(tmp_path, "vda", size=8 * MIB)
    with Vm([disk], paused=False) as vm:
        vm.qemu_io("vda", "write -q -P 1 1M 1M")
        near.backup(vm.uri)
        vm.qemu_io("vda", "write -q -P 2 2M 64k")
        folder.hang("link", "/m/")
        client = start("backup", vm.uri, "-r", folder.path / "repo", "--scratch", near.scratch)
        assert "can't be told" in interrupted(client, folder.reached, signal.SIGINT)
        assert not any(vm.leftovers().values())
        assert list(near.scratch.iterdir()) == []
        committed = nbdpull.list_backups(near.repository)
        assert len(committed) == 2
        vm.qemu_io("vda", "write -q -P 3 3M 64k")
        third = near.backup(vm.uri)
        assert (third.level, third.parent) == (nbdpull.Level.INCREMENTAL, committed[-1].backup)
        assert third.disks[0].changed_bytes == 64 << 10
        vm.qemu_io("vda", "flush")
        compare(near.restore(third.backup)["vda"], disk.path, other_format="qcow2")


@pytest.mark.parametrize(
    ("hangs", "mode"),
    [("/d/", ()), ("/d/", ("--guest-first",)), ("/s/", ())],
    ids=["mode-b", "mode-c", "before the pull"],
)
def test_scratch_that_fills_up_while_the_folder_hangs_ends_the_backup_and_not_the_guest(
    near: Keeper,
    folder: HangingFolder,
    small: Path,
    tmp_path: Path,
    hangs: str,
    mode: tuple[str, ...],
) -> None:
    disk = create_disk(tmp_path, "vda", size=256 * MIB)
    with Vm([disk], writer=BootWriter(disks=1, pause_us=0)) as vm:
        vm.wait_written(10)
        vm.pause()
        vm.qemu_io("vda", noise(tmp_path, 144 * MIB))
        folder.hang("link", hangs)
        repository = folder.path / "repo"
        client = start("backup", vm.uri, "-r", repository, "--scratch", small, *mode)
        out_of_scratch(client, folder.reached, vm, small)
        folder.go()
        with vm.halted():
            truth = vm.copy_disks(tmp_path / "truth")
            done = nbdpull.backup(vm.uri, repository, scratch=near.scratch)
        compare(near.restore(done.backup)["vda"], truth["vda"])


@pytest.mark.parametrize("verb", ["restore", "copy", "gc", "init"])
def test_a_signal_ends_every_other_verb_whose_folder_hangs(
    near: Keeper, folder: HangingFolder, tmp_path: Path, verb: str
) -> None:
    disk = create_disk(tmp_path, "vda", size=16 * MIB)
    run(["qemu-io", "-f", "qcow2", "-c", noise(tmp_path, 8 * MIB), disk.path])
    near.backup(f"disk:vda={disk.path}")
    out = tmp_path / "out"
    source = folder.path / "repo"
    verbs: dict[str, tuple[list[str | Path], str, str]] = {
        "restore": (["restore", "latest", "-r", source, "--to", out], "open", "/d/"),
        "copy": (["copy", source, out], "open", "/d/"),
        "gc": (["gc", "-r", source], "open", "/m/"),
        "init": (["init", "-r", folder.path / "new"], "mkdir", "/new"),
    }
    arguments, what, part = verbs[verb]
    folder.hang(what, part)
    interrupted(start(*arguments), folder.reached, signal.SIGINT)
    folder.go()
    if verb == "restore":
        assert list(out.iterdir()) == []
    elif verb == "copy":
        nbdpull.copy(source, out)
        assert nbdpull.verify(out, level="full").ok
    elif verb == "init":
        nbdpull.init(folder.path / "new")
    nbdpull.gc(source)
    assert nbdpull.verify(source, level="full").ok


def test_an_embedding_program_gets_control_back_and_is_told_what_hangs(
    near: Keeper,
    folder: HangingFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(deadline, "_SLOW_S", 0.0)
    repository = folder.path / "repo"
    disk = create_disk(tmp_path, "vda", size=128 * MIB)
    with Vm([disk], paused=False) as vm:
        vm.qemu_io("vda", noise(tmp_path, 96 * MIB))
        folder.hang("write", ".tmp-", passing=30)
        with nbdpull.cancellable() as cancel, caplog.at_level(logging.WARNING, "nbdpull"):

            def watch() -> None:
                folder.reached.wait(GUARD_S)
                cancel()

            watcher = threading.Thread(target=watch)
            watcher.start()
            with pytest.raises(BaseException) as caught:
                nbdpull.backup(vm.uri, repository, scratch=near.scratch)
            watcher.join()
        assert type(caught.value).__name__ == "CancelledError"
        told = [text for text in caplog.messages if "hangs" in text]
        assert len(told) == 1
        assert f" {repository}/d/" in told[0]
        # What is left are calls to the folder, by a reader or for somebody else, and those end with their process,
        # however they hang.
        left = [one for one in threading.enumerate() if one.name.startswith("nbdpull")]
        assert left
        assert {one.name for one in left} <= {"nbdpull-store", "nbdpull-worker"}
        assert all(one.daemon for one in left)
        assert not any(vm.leftovers().values())
        # And the next call, from the same program, is not concerned.
        folder.go()
        done = nbdpull.backup(vm.uri, repository, scratch=near.scratch)
        vm.qemu_io("vda", "flush")
        compare(near.restore(done.backup)["vda"], disk.path, other_format="qcow2")
