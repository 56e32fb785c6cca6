"""One VM under a private libvirtd, with a monitor for nbdpull and one for the bench."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scripts.benchlib.measure import run
from tests.support.libvirtd import FOLDERS, QEMU_CONF
from tests.support.qmp import QmpClient

__all__ = ["Domain", "private_libvirtd"]

_DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{folder}/qmp,server=on,wait=off'/>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{folder}/control,server=on,wait=off'/>
  </qemu:commandline>
</domain>
"""


class private_libvirtd:  # noqa: N801 - used like a function, in `with`
    """A libvirtd of our own while a `with` block runs; the mount namespace must be private."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for name, place in FOLDERS.items():
            own = self._folder / name
            own.mkdir(parents=True)
            if name == "etc" and Path(place).is_dir():
                shutil.copytree(place, own, dirs_exist_ok=True, symlinks=True)
            Path(place).mkdir(parents=True, exist_ok=True)
            run(["mount", "--bind", own, place])
        Path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF, encoding="ascii")
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", "libvirtd", "-p", self._folder / "pid"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while subprocess.run(["virsh", "list"], capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError("libvirtd did not start in 30 s")
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for place in FOLDERS.values():
            subprocess.run(["umount", "-l", place], capture_output=True, check=False)


class Domain:
    """A VM whose guest does not run: only what is measured touches the disk.

    Attributes:
        name: in libvirt.
        disk: its image.
        pid: of its QEMU.
        uri: nbdpull's SOURCE.
        control: the bench's own monitor.
    """

    def __init__(self, name: str, disk: Path, folder: Path) -> None:
        self.name = name
        self.disk = disk
        self._folder = folder
        self.pid = 0
        self.uri = f"qmp:{folder}/qmp"
        self._control: QmpClient | None = None

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        definition = self._folder / "domain.xml"
        definition.write_text(
            _DOMAIN.format(name=self.name, disk=self.disk, folder=self._folder), encoding="utf-8"
        )
        run(["virsh", "define", definition])
        run(["virsh", "start", "--paused", self.name])
        self.pid = int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text(encoding="ascii"))
        self._control = QmpClient(self._folder / "control", timeout_s=600)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._control is not None:
            self._control.close()
        subprocess.run(["virsh", "destroy", self.name], capture_output=True, check=False)
        subprocess.run(
            ["virsh", "undefine", "--checkpoints-metadata", self.name],
            capture_output=True,
            check=False,
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command on the bench's own monitor."""
        if self._control is None:
            raise RuntimeError("the domain was not started")
        return self._control.execute(command, **arguments)

    @property
    def _block(self) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = self.qmp("query-block")
        return next(block for block in blocks if "virtio-disk0" in block.get("qdev", ""))

    @property
    def qdev(self) -> str:
        """The disk's device, through which a write is a guest's."""
        return str(self._block["qdev"])

    @property
    def node(self) -> str:
        """The disk's format node."""
        return str(self._block["inserted"]["node-name"])

    def write(self, commands: list[str]) -> None:
        """Run `qemu-io` commands on the disk's device, above whatever filter is there."""
        qdev = self.qdev
        for command in commands:
            said = self.qmp("human-monitor-command", command_line=f'qemu-io -d {qdev} "{command}"')
            if "rror" in said or "failed" in said:
                raise RuntimeError(f"qemu-io {command}: {said}")

    def push_begin(self, target: Path, *, compress: bool = False) -> None:
        """Have QEMU make a full backup by itself, into a new qcow2: what qmpbackup asks it for."""
        size = int(self._block["inserted"]["image"]["virtual-size"])
        run(["qemu-img", "create", "-q", "-f", "qcow2", target, str(size)])
        file = {"driver": "file", "filename": str(target)}
        self.qmp("blockdev-add", driver="qcow2", node_name="push", discard="unmap", file=file)
        self.qmp(
            "blockdev-backup",
            job_id="push",
            device=self.node,
            target="push",
            sync="full",
            compress=compress,
            auto_dismiss=False,
        )

    def push_runs(self) -> bool:
        """Whether it is still at it.

        Raises:
            RuntimeError: it failed.
        """
        jobs = {job["id"]: job for job in self.qmp("query-jobs")}
        if jobs["push"].get("error"):
            raise RuntimeError(f"push: {jobs['push']['error']}")
        return bool(jobs["push"]["status"] != "concluded")

    def push_end(self) -> None:
        """Let go of the job and of its target, which writes what is left of it."""
        self.qmp("job-dismiss", id="push")
        self.qmp("blockdev-del", node_name="push")

    def push(self, target: Path, *, compress: bool) -> None:
        """A whole push, from its beginning to its end."""
        self.push_begin(target, compress=compress)
        while self.push_runs():
            time.sleep(0.02)
        self.push_end()
