"""A client that is killed while it stores into a real S3 server: the next backup loses nothing, and stores little again."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

import nbdpull
from tests.integration.conftest import Keeper, noise, start
from tests.integration.test_hanging_store import Hang, part
from tests.support.disk import MIB, Disk, compare, create_disk
from tests.support.process import stop
from tests.support.proxy import Proxy, Request
from tests.support.tools import QEMU_10, QEMU_72, QemuTools
from tests.support.vm import Vm

CHANGED = 176 * MIB
"""With one pack acknowledged more is left than the client keeps in memory: it can't have read all."""
PACKED = 60 * MIB
"""Less than two packs hold."""


def is_pack(request: Request) -> bool:
    return request.method == "PUT" and part(request) == "d"


def stored(front: Proxy) -> int:
    """Packs that the server has taken in."""
    return sum(one.call == "PUT" and "/d/" in one.key for one in front.exchanges)


def killed(front: Proxy, far: Keeper, vm: Vm, *, acknowledged: int = 1) -> None:
    """A backup whose client is killed: some packs are acknowledged, one more is stored, no one knows."""
    before = stored(front)
    hang = Hang(is_pack, passing=acknowledged)
    front.plan = hang
    client = start(
        *("backup", vm.uri, "-r", far.repository, "--scratch", far.scratch, "--json"),
        front=front,
    )
    try:
        while not hang.reached.wait(0.1):
            assert client.poll() is None, client.communicate()
        # The proxy tells of the request before it carries it out, and notes its answer after.
        while stored(front) - before <= acknowledged:
            time.sleep(0.05)
        client.send_signal(signal.SIGKILL)
        client.communicate()
    finally:
        stop(client)
        front.plan = lambda _request: None
    assert client.returncode == -signal.SIGKILL
    assert any(vm.leftovers().values())


def check(far: Keeper, vm: Vm, disk: Disk, done: nbdpull.BackupResult, tools: QemuTools) -> None:
    """It restores to what the disk holds, and nothing of the dead run is left in QEMU or on the host."""
    assert not any(vm.leftovers().values())
    assert list(far.scratch.iterdir()) == []
    assert vm.status() == "running"
    vm.qemu_io(disk.name, "flush")
    restored = far.restore(done.backup)[disk.name]
    compare(restored, disk.path, other_format="qcow2", tools=tools)


@pytest.mark.parametrize(
    ("qemu_tools", "resumed"),
    [(QEMU_10, True), (QEMU_72, False)],
    ids=["goes-on", "new-point-in-time"],
)
def test_a_client_killed_while_it_stores_has_its_packs_taken_over(
    qemu_tools: QemuTools, far: Keeper, front: Proxy, tmp_path: Path, *, resumed: bool
) -> None:
    disk = create_disk(tmp_path, "vda", size=256 * MIB, tools=qemu_tools)
    with Vm([disk], tools=qemu_tools, paused=False) as vm:
        vm.qemu_io("vda", "write -q -P 1 200M 1M")
        first = far.backup(vm.uri)
        vm.qemu_io("vda", noise(tmp_path, CHANGED))
        killed(front, far, vm)
        assert [one.backup for one in nbdpull.list_backups(far.repository)] == [first.backup]
        # Beside a dead session that may still commit nothing is deleted, and nothing that counts is touched.
        collected = nbdpull.gc(far.repository, undo_window_s=0)
        assert (collected.packs, collected.revoked, len(collected.live)) == (0, (), 1)
        if not resumed:
            vm.qemu_io("vda", "write -q -P 9 3M 64k")
        second = far.backup(vm.uri, resume_within_s=24 * 3600.0 if resumed else 0.0)
        assert second.resumed is resumed
        assert (second.level, second.parent) == (nbdpull.Level.INCREMENTAL, first.backup)
        (told,) = second.disks
        if resumed:
            # What is stored for sure is not read again.
            assert told.read_bytes < CHANGED - 16 * MIB
        else:
            assert told.read_bytes >= CHANGED
            assert told.reused_bytes > PACKED
        check(far, vm, disk, second, qemu_tools)
        vm.qemu_io("vda", "write -q -P 10 5M 64k")
        third = far.backup(vm.uri)
        assert (third.level, third.parent) == (nbdpull.Level.INCREMENTAL, second.backup)
        assert third.disks[0].changed_bytes == 64 << 10
        check(far, vm, disk, third, qemu_tools)
    # What was taken over is the backups' own now: no collection takes it, and nothing else is left.
    collected = nbdpull.gc(far.repository, undo_window_s=0)
    assert (collected.packs, collected.live) == (0, ())
    assert nbdpull.verify(far.repository, level="full").ok


def test_a_client_killed_after_it_had_taken_over_hands_both_on(
    far: Keeper, front: Proxy, tmp_path: Path
) -> None:
    disk = create_disk(tmp_path, "vda", size=256 * MIB)
    with Vm([disk], paused=False) as vm:
        vm.qemu_io("vda", noise(tmp_path, CHANGED))
        killed(front, far, vm)
        killed(front, far, vm, acknowledged=0)
        durable = sum(one.sent for one in front.exchanges if "/d/" in one.key)
        assert durable > PACKED
        done = far.backup(vm.uri)
        assert done.disks[0].stored_bytes < CHANGED - durable + MIB
        vm.qemu_io(disk.name, "flush")
        restored = far.restore(done.backup)[disk.name]
        compare(restored, disk.path, other_format="qcow2")
        assert nbdpull.gc(far.repository, undo_window_s=0).live == ()
    assert nbdpull.verify(far.repository, level="full").ok
