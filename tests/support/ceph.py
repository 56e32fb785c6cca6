"""A real Ceph cluster of a test's own: one monitor and one OSD on loopback, with a pool for block devices."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.process import run, spawn, stop
from tests.support.tools import cache_folder

__all__ = ["Ceph"]

_PREFIX = cache_folder() / "ceph-1"
_START_S = 60.0

# No keys: everything listens on 127.0.0.1 and holds test patterns. BlueStore, which is what clusters have, on a
# sparse file. Nothing outside the folder is read or written, /etc/ceph included.
_CONF = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
keyring = {folder}/keyring
run dir = {folder}
crash dir = {folder}
admin socket =
pid file =
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
plugin dir = {lib}/ceph
erasure code dir = {lib}/ceph/erasure-code
osd class dir = {lib}/rados-classes
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = {folder}/mon
mon data avail crit = 0
mon data avail warn = 0
paxos propose interval = 0.05
paxos min wait = 0.01
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = 1073741824
osd memory target = 939524096
bluestore cache autotune = false
bluestore cache size = 33554432
osd op num shards = 1
osd op num threads per shard = 2
"""


class Ceph:
    """A cluster, running inside a `with` block; its pool is called ``rbd``.

    Attributes:
        folder: its private folder; removed at the end.
        conf: its ceph.conf, as librbd takes it.
        osd: the process that has all data.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="np-ceph-"))
        self.conf = self.folder / "ceph.conf"
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def osd(self) -> subprocess.Popen[bytes]:
        """The process that holds the data."""
        return self._processes[1]

    def start(self) -> Self:
        """Make the cluster and its pool, and wait until an image can be made."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        self.conf.write_text(
            _CONF.format(fsid=fsid, port=port, folder=self.folder, lib=_PREFIX / "lib"),
            encoding="ascii",
        )
        for name in ("mon", "osd"):
            (self.folder / name).mkdir()
        monmap = self.folder / "monmap"
        address = f"[v2:127.0.0.1:{port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, str(monmap))
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap))
        self._spawn("ceph-mon", "-f", "-i", "a")
        self._run("ceph", "--connect-timeout", "30", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("ceph-osd", "-f", "-i", "0")
        self._run("ceph", "osd", "pool", "create", "rbd", "8")
        # Waits for the pool's OSD.
        self._run("rbd", "pool", "init", "rbd")
        return self

    def rbd(self, *arguments: str | Path) -> str:
        """Run Ceph's own ``rbd`` and return what it printed.

        Raises:
            AssertionError: it failed.
        """
        return self._run("rbd", *map(str, arguments))

    def uri(self, image: str) -> str:
        """An image as qemu-img and qemu-nbd take it."""
        return f"rbd:rbd/{image}:conf={self.conf}"

    def close(self) -> None:
        """End both servers and remove everything."""
        for process in self._processes:
            stop(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> str:
        argv: list[str | Path] = [_PREFIX / "bin" / program, "-c", self.conf, *arguments]
        return run(argv, timeout_s=_START_S).stdout

    def _spawn(self, program: str, *arguments: str) -> None:
        argv: list[str | Path] = [_PREFIX / "bin" / program, "-c", self.conf, *arguments]
        self._processes.append(spawn(argv, log=self.folder / f"{program}.stderr"))

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
