"""NBD servers of all kinds as sources, and bitmaps that somebody else made."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from tests.integration.conftest import Keeper
from tests.support.disk import compare
from tests.support.process import run, spawn, stop
from tests.support.tools import QemuTools
from tests.target.helpers import wait_for_port, wait_for_socket

MIB = 1 << 20


class Servers:
    """NBD servers, all ended at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        self._count = 0

    def start(self, *command: str | Path, export: str = "") -> str:
        """Start one on the unix socket SOCKET, or the TCP port PORT; returns its export's URI."""
        self._count += 1
        path = self._folder / f"s{self._count}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        line = [str(part) for part in command]
        config = self._folder / "config"
        if config.exists():
            config.write_text(config.read_text().replace("PORT", str(port)))
        line = [part.replace("SOCKET", str(path)).replace("PORT", str(port)) for part in line]
        process = spawn(line, log=self._folder / "log")
        self._running.append(process)
        if "SOCKET" in command:
            wait_for_socket(path, process)
            return f"nbd+unix:///{export}?socket={path}"
        wait_for_port(port, process)
        return f"nbd://127.0.0.1:{port}/{export}"

    def stop(self) -> None:
        """End all."""
        while self._running:
            stop(self._running.pop())


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, zeroes and holes; its size is no multiple of anything above 4096."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        for offset, length in ((0, 3 * MIB + 4096), (7 * MIB, 20000), (9 * MIB - 4096, 4096)):
            file.seek(offset)
            file.write(os.urandom(length))
        file.truncate(9 * MIB)
        file.seek(5 * MIB)
        file.write(bytes(300000))
        file.truncate(9 * MIB + 4096)
    return path


EVAL = ["nbdkit", "-f", "-U", "SOCKET", "eval", "get_size=stat -c %s IMAGE"]
EVAL += ["pread=dd if=IMAGE bs=4096 skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none"]
NBDKIT = ["nbdkit", "-f", "-r", "-U", "SOCKET"]
POLICY = ["--filter=blocksize-policy", "file", "IMAGE", "blocksize-error-policy=error"]
NBD_SERVER = """
[generic]
listenaddr = 127.0.0.1
port = PORT
[vda]
exportname = IMAGE
readonly = true
"""
SERVERS = {
    "nbdkit": [*NBDKIT, "file", "IMAGE"],
    "nbdkit-over-tcp": ["nbdkit", "-f", "-i", "127.0.0.1", "-p", "PORT", "file", "IMAGE"],
    "no-extents": [*NBDKIT, "--filter=noextents", "file", "IMAGE"],
    "no-structured-replies": [*NBDKIT, "--no-sr", "file", "IMAGE"],
    "no-multi-conn": [*NBDKIT, "--filter=multi-conn", "file", "IMAGE", "multi-conn-mode=disable"],
    "slow": [*NBDKIT, "--filter=delay", "file", "IMAGE", "delay-read=10ms", "delay-extents=5ms"],
    "writable": ["nbdkit", "-f", "-U", "SOCKET", "--filter=cow", "file", "IMAGE"],
    "blocks-of-4096": [
        *NBDKIT,
        *POLICY,
        *("blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=8192"),
    ],
    "one-small-maximum": [*NBDKIT, *POLICY, "blocksize-minimum=1", "blocksize-maximum=65536"],
    # One extent a reply, at most 64 KiB long.
    "short-extents": [
        *EVAL,
        "can_extents=exit 0",
        'extents=echo "$4 65536 0"',
    ],
    # The first extent of a reply reaches to the end, and says data.
    "long-extents": [*EVAL, "can_extents=exit 0", 'extents=echo "0 $((1 << 40)) 0"'],
    "extents-fail": [*EVAL, "can_extents=exit 0", "extents=echo EIO bad luck >&2; exit 1"],
    "one-connection": ["qemu-nbd", "-r", "-t", "-f", "raw", "-k", "SOCKET", "IMAGE"],
    "qemu-nbd": ["qemu-nbd", "-r", "-t", "-e", "20", "-f", "raw", "-k", "SOCKET", "IMAGE"],
    # It goes to the background at once: a process namespace of its own ends with its first process.
    "nbd-server": [
        *("unshare", "--map-root-user", "--pid", "--fork", "--kill-child"),
        *("sh", "-c", "nbd-server -C CONFIG; exec sleep infinity"),
    ],
}


@pytest.mark.parametrize("kind", SERVERS)
def test_every_server_is_read_to_the_byte(
    keeper: Keeper, servers: Servers, image: Path, kind: str
) -> None:
    config = image.with_name("config")
    config.write_text(NBD_SERVER.replace("IMAGE", str(image)))
    line = [part.replace("IMAGE", str(image)) for part in SERVERS[kind]]
    line = [part.replace("CONFIG", str(config)) for part in line]
    uri = servers.start(*line, export="vda" if kind == "nbd-server" else "")
    result = keeper.backup(f"vda={uri}", vm="web")
    assert [(disk.name, str(disk.level)) for disk in result.disks] == [("vda", "full")]
    compare(keeper.restore(result.backup)["vda"], image)
    # No bitmap: everything is read again.
    again = keeper.backup(f"vda={uri}", vm="web")
    assert again.disks[0].level == "full"
    assert "kept no checkpoint" in again.disks[0].reason


def test_read_errors_fail_the_backup(keeper: Keeper, servers: Servers, image: Path) -> None:
    uri = servers.start(*NBDKIT, "--filter=error", "file", str(image), "error-pread-rate=100%")
    with pytest.raises(nbdpull.NbdError, match=r"read of .* failed"):
        keeper.backup(f"vda={uri}", vm="web")
    assert nbdpull.list_backups(keeper.repository) == ()


class Exported:
    """A qcow2 whose owner keeps bitmaps and serves it read-only."""

    def __init__(self, folder: Path, tools: QemuTools, servers: Servers) -> None:
        self.path = folder / "disk.qcow2"
        self.tools = tools
        self._servers = servers
        run([tools.qemu_img, "create", "-q", "-f", "qcow2", self.path, "16M"])

    def write(self, *commands: str) -> None:
        self._servers.stop()
        options = [option for command in commands for option in ("-c", command)]
        run([self.tools.qemu_io, "-f", "qcow2", *options, self.path])

    def mark(self, bitmap: str, granularity: int = 65536) -> None:
        self._servers.stop()
        options = ["bitmap", "--add", "-g", str(granularity), "-f", "qcow2"]
        run([self.tools.qemu_img, *options, self.path, bitmap])

    def serve(self, bitmap: str | None, clients: int = 20) -> str:
        options = ["-r", "-t", "-f", "qcow2", "-x", "vda", "-e", str(clients), "-k", "SOCKET"]
        if bitmap is not None:
            options += ["-B", bitmap]
        return self._servers.start(self.tools.qemu_nbd, *options, self.path, export="vda")


@pytest.fixture
def exported(tmp_path: Path, qemu_tools: QemuTools, servers: Servers) -> Exported:
    return Exported(tmp_path, qemu_tools, servers)


@pytest.mark.parametrize(("granularity", "clients"), [(512, 1), (512, 20), (1 << 20, 20)])
def test_a_foreign_bitmap_tells_what_changed(
    keeper: Keeper, exported: Exported, clients: int, granularity: int
) -> None:
    exported.write("write -P 1 0 8M")
    exported.mark("b1", granularity)
    full = keeper.backup(exported.serve("b1", clients), vm="web", bitmaps=["qemu:dirty-bitmap:b1"])
    assert "no earlier backup" in full.disks[0].reason
    # Parts of grains become zero, whose other parts are data.
    exported.write("write -z 1081344 327680", "write -z -u 3145728 1M", "write -P 3 12M 1k")
    exported.write("write -z 65024 1024", "discard 6M 512k")
    exported.mark("b2", granularity)
    uri = exported.serve("b1", clients)
    bitmap = "vda=qemu:dirty-bitmap:b1"
    result = keeper.backup(uri, vm="web", bitmaps=[bitmap], since=full.backup[:9])
    assert (result.parent, result.disks[0].level) == (full.backup, "incremental")
    assert "as 'qemu:dirty-bitmap:b1' is said to hold" in result.disks[0].reason
    assert result.disks[0].changed_bytes < 8 * MIB
    compare(keeper.restore(result.backup)["vda"], exported.path, other_format="qcow2")
    exported.write("write -P 9 64k 512")
    last = keeper.backup(exported.serve("b1", clients), "differential", vm="web", bitmaps=[bitmap])
    assert (last.parent, last.disks[0].level) == (full.backup, "differential")
    compare(keeper.restore(last.backup)["vda"], exported.path, other_format="qcow2")


def test_since_pins_the_backup_that_changes_are_counted_from(
    keeper: Keeper, exported: Exported
) -> None:
    exported.mark("b1")
    uri = exported.serve("b1")
    told: dict[str, Any] = {"vm": "web", "bitmaps": ["qemu:dirty-bitmap:b1"]}
    with pytest.raises(nbdpull.UsageError, match="the chain's last backup of it is none"):
        keeper.backup(uri, since="12345678", **told)
    first = keeper.backup(uri, **told)
    second = keeper.backup(uri, since=first.backup, **told)
    with pytest.raises(nbdpull.UsageError, match=f"last backup of it is {second.backup}"):
        keeper.backup(uri, since=first.backup, **told)
    with pytest.raises(nbdpull.UsageError, match="give both, or neither"):
        keeper.backup(uri, vm="web", since=first.backup)
    assert keeper.backup(uri, "differential", since=first.backup, **told).parent == first.backup
    assert len(nbdpull.list_backups(keeper.repository)) == 3


def test_a_disk_that_the_last_backup_left_out_is_read_in_full(
    keeper: Keeper, exported: Exported, servers: Servers, image: Path
) -> None:
    exported.mark("b1")
    other = "vdb=" + servers.start(*NBDKIT, "file", str(image))
    both = [exported.serve("b1"), other]
    bitmaps = ["vda=qemu:dirty-bitmap:b1"]
    keeper.backup(both, vm="web", bitmaps=bitmaps)
    keeper.backup(other, vm="web")
    result = keeper.backup(both, vm="web", bitmaps=bitmaps)
    assert [disk.level for disk in result.disks] == ["full", "full"]
    assert "has not this disk" in result.disks[0].reason


def test_a_bitmap_that_lies_is_found_out(keeper: Keeper, exported: Exported) -> None:
    exported.write("write -P 1 0 1M")
    keeper.backup(exported.serve(None), vm="web")
    exported.write("write -P 2 0 16M")
    exported.mark("late")  # it has recorded nothing of that
    result = keeper.backup(
        exported.serve("late"), vm="web", bitmaps=["qemu:dirty-bitmap:late"], audit=8
    )
    assert result.warnings
    assert result.disks[0].level == "full"
    compare(keeper.restore(result.backup)["vda"], exported.path, other_format="qcow2")


def test_what_can_not_be_is_said(keeper: Keeper, exported: Exported, tmp_path: Path) -> None:
    uri = exported.serve(None)
    with pytest.raises(nbdpull.UsageError, match="name the VM with --vm"):
        keeper.backup(uri)
    with pytest.raises(nbdpull.NbdError, match=r"does not offer .* 'qemu:dirty-bitmap:none'"):
        keeper.backup(uri, vm="web", bitmaps=["qemu:dirty-bitmap:none"])
    with pytest.raises(nbdpull.UsageError, match="'vdx', which is not among vda"):
        keeper.backup(uri, vm="web", bitmaps=["vdx=qemu:dirty-bitmap:b"])
    with pytest.raises(nbdpull.UsageError, match=r"expected \[NAME=\]qemu:dirty-bitmap:BITMAP"):
        keeper.backup(uri, vm="web", bitmaps=["base:allocation"])
    with pytest.raises(nbdpull.UsageError, match="two bitmaps"):
        keeper.backup(uri, vm="web", bitmaps=["qemu:dirty-bitmap:a", "vda=qemu:dirty-bitmap:b"])
    with pytest.raises(nbdpull.UsageError, match="--bitmap is about NBD exports"):
        keeper.backup(f"disk:{exported.path}", vm="web", bitmaps=["qemu:dirty-bitmap:a"])
    with pytest.raises(nbdpull.NbdError, match="can't connect"):
        keeper.backup(f"nbd+unix:///?socket={tmp_path}/none", vm="web")
    assert keeper.cleanup(uri).removed == ()
