"""A client that is stopped with replies outstanding: QEMU must go on, whatever kind of reply it is.

The most that a socket holds was measured with reads of data in one piece. Fragmented ones take more, and
block status counts as well, so this is the worst disk there can be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdpull.nbdio.connection import unix_uri
from tests.integration.test_kills import answers
from tests.support.bootwriter import BootWriter
from tests.support.disk import Disk, create_disk
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import Vm

GIB = 1 << 30

# Asks as the product does, and never takes an answer off its sockets.
CLIENT = """
import os, signal, sys
from nbdpull.nbdio.connection import Connection
from nbdpull.nbdio.status import allocation_reader, dirty_reader

uri, dirty = sys.argv[1:]

def no_answer(connection):
    # The request goes out at once; the reply is waited for elsewhere.
    connection._wait = lambda *_: (_ for _ in ()).throw(InterruptedError)
    return connection

def issue(work):
    try:
        work()
    except InterruptedError:
        return
    raise SystemExit("it was answered")

kept = [bytearray(1 << 20) for _ in range(4)]
readers = [no_answer(Connection.open(uri)) for _ in kept]
for reader, buffer in zip(readers, kept):
    issue(lambda: reader.read_into(memoryview(buffer), 0))
bitmap = no_answer(Connection.open(uri, contexts=(dirty,)))
issue(lambda: dirty_reader(bitmap, dirty).read(0, 1 << 30))
allocation = no_answer(Connection.open(uri, contexts=("base:allocation",)))
issue(lambda: allocation_reader(allocation, strict=False).read(0, 1 << 30))
print("asked", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def fragmented(tmp_path: Path, qemu_tools: QemuTools) -> Disk:
    """1 GiB: in the bitmap `b` every other grain is dirty, and the first 4 MiB alternate each 512 bytes."""
    disk = create_disk(tmp_path, "vda", size=GIB, tools=qemu_tools, options="cluster_size=512")
    image = disk.path
    run([qemu_tools.qemu_img, "bitmap", "-f", "qcow2", "--add", "-g", "64k", image, "b"])
    commands = tmp_path / "commands"
    commands.write_text(
        "".join(f"write -q -P 1 {at} 512\n" for at in range(0, 4 << 20, 1024))
        + "".join(f"write -q -P 1 {at} 512\n" for at in range(4 << 20, GIB, 128 << 10))
    )
    with commands.open() as file:
        subprocess.run(
            [qemu_tools.qemu_io, "-t", "unsafe", "-f", "qcow2", image],
            stdin=file,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    # An enabled bitmap can't be exported read-only.
    run([qemu_tools.qemu_img, "bitmap", "-f", "qcow2", "--disable", image, "b"])
    return disk


def test_outstanding_reads_and_block_status_do_not_freeze_the_vm(
    qemu_tools: QemuTools, fragmented: Disk, tmp_path: Path
) -> None:
    with Vm([fragmented], tools=qemu_tools, writer=BootWriter(disks=1)) as vm:
        path = vm.folder / "nbd"
        vm.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        vm.qmp(
            "block-export-add",
            type="nbd",
            id="e0",
            name="e0",
            node_name=fragmented.node,
            bitmaps=[{"node": fragmented.node, "name": "b"}],
        )
        command = [sys.executable, "-c", CLIENT, unix_uri(str(path), "e0")]
        command.append("qemu:dirty-bitmap:b")
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            try:
                assert client.stdout is not None
                assert client.stdout.readline() == b"asked\n"
                os.waitpid(client.pid, os.WUNTRACED)
                for _ in range(5):
                    vm.wait_written(5, timeout_s=20)
                    assert answers(vm) < 5
                    time.sleep(0.2)
            finally:
                client.kill()
                client.send_signal(signal.SIGCONT)
        vm.wait_written(5)
