"""A real libvirtd of a test's own: in a mount namespace, with its own folders, on its own socket."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import libvirt

from tests.support.disk import Disk
from tests.support.process import spawn
from tests.support.qmp import QmpClient
from tests.support.tools import QEMU_72, QemuTools

__all__ = ["FOLDERS", "QEMU_CONF", "Domain", "Libvirtd"]

_T = TypeVar("_T")

FOLDERS: Mapping[str, str] = {
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "etc": "/etc/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
"""What libvirtd keeps, by the name of what is mounted over it."""

# Everything that would need more of the machine than a test may take is off.
QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
remember_owner = 0
stdio_handler = "file"
"""
_LIBVIRTD_CONF = """\
unix_sock_rw_perms = "0700"
auth_unix_rw = "none"
auth_unix_ro = "none"
"""
_MODULES = Path("/usr/lib/x86_64-linux-gnu/qemu")
_START_S = 60.0


def _quiet(_context: object, _error: object) -> None:
    """Libvirt prints every error, also those that a test asks for."""


libvirt.registerErrorHandler(_quiet, None)


def _root(argv: Sequence[str]) -> list[str]:
    """A mount namespace of its own, in which this user is root."""
    own = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--mount", "--propagation", "private", *own, "--", *argv]


class Libvirtd:
    """A libvirtd, running inside a `with` block, with the domains that are defined in it.

    Args:
        tools: the QEMU version of its domains.
    """

    def __init__(self, *, tools: QemuTools = QEMU_72) -> None:
        self.tools = tools
        self.folder = Path(tempfile.mkdtemp(prefix="np-lv-"))
        self.folder.chmod(0o755)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: libvirt.virConnect | None = None
        self._domains: list[Domain] = []

    @property
    def uri(self) -> str:
        """Libvirt's URI of it."""
        return f"qemu+unix:///system?socket={self.folder}/run/libvirt-sock"

    @property
    def connection(self) -> libvirt.virConnect:
        """The test's own connection."""
        if self._connection is None:
            self._connection = libvirt.open(self.uri)
        return self._connection

    def start(self) -> Self:
        """Start it, also after `kill`: domains that run go on."""
        mounts = []
        for name, place in FOLDERS.items():
            own = self.folder / name
            own.mkdir(exist_ok=True)
            mounts.append(f"mkdir -p {place} && mount --bind {own} {place}")
        (self.folder / "etc" / "qemu.conf").write_text(QEMU_CONF, encoding="ascii")
        (self.folder / "etc" / "libvirtd.conf").write_text(_LIBVIRTD_CONF, encoding="ascii")
        if self.tools is not QEMU_72:
            # Asked for all its types, as libvirt does, QEMU 10 also loads what it does not find in its own
            # folder from the system's, and ends at the first module of another version.
            own = self.tools.bin.parent / _MODULES.relative_to("/")
            mounts.append(f"mount --bind {own} {_MODULES}")
        script = " && ".join([*mounts, 'exec libvirtd --pid-file "$0/pid"'])
        argv = _root(["sh", "-c", script, str(self.folder)])
        self._process = spawn(argv, log=self.folder / "stderr")
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self._connection = libvirt.open(self.uri)
            except libvirt.libvirtError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"libvirtd did not start: {self._said()}") from None
                time.sleep(0.05)
            else:
                return self

    def _said(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def kill(self) -> None:
        """End the daemon, as a crash or an upgrade of it does; its QEMUs go on."""
        if self._connection is not None:
            with suppress(libvirt.libvirtError):
                self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def domain(self, name: str, disks: Sequence[Disk], **more: Any) -> Domain:
        """Define a domain and start it; see `Domain`."""
        made = Domain(self, name, disks, **more)
        self._domains.append(made)
        made.define()
        made.start()
        return made

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for domain in self._domains:
            domain.kill()
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Domain:
    """An emulated VM of a `Libvirtd` whose guest does not run: only the test writes to its disks.

    Args:
        libvirtd: where.
        name: its name.
        disks: by their targets: ``vda``, ``vdb`` ...
        devices: more XML of devices.
        head: more XML of the domain itself.
        driver: more attributes of each disk's driver.
        boot: XML of what is booted; else the firmware finds nothing.
        floppy: image of one to boot, which finds the disks in their order.
        memory: MiB.
    """

    def __init__(
        self,
        libvirtd: Libvirtd,
        name: str,
        disks: Sequence[Disk],
        *,
        devices: str = "",
        head: str = "",
        driver: str = "",
        boot: str = "",
        floppy: Path | None = None,
        memory: int = 64,
    ) -> None:
        self.libvirtd = libvirtd
        self.name = name
        self.disks = list(disks)
        self.tools = libvirtd.tools
        self._devices = devices
        self._head = head
        self._driver = driver
        self._boot = boot
        self._floppy = floppy
        self._memory = memory
        self._folder = Path(tempfile.mkdtemp(prefix="np-"))
        self._folder.chmod(0o777)
        self._uuid = uuid.uuid4()
        self._control: QmpClient | None = None
        self._pid = 0

    @property
    def uri(self) -> str:
        """The product's SOURCE."""
        return f"libvirt+{self.libvirtd.uri}#{self.name}"

    @property
    def handle(self) -> libvirt.virDomain:
        """What libvirt's own functions are called on."""
        return self.libvirtd.connection.lookupByName(self.name)

    def xml(self) -> str:
        """Its definition."""
        order = 1 if self._floppy is not None else None
        disks = "".join(
            f"<disk type='file' device='disk'>{_order(order, number)}"
            f"<driver name='qemu' type='{disk.format}' discard='unmap' {self._driver}/>"
            f"<source file='{disk.path}'/><target dev='{disk.name}' bus='virtio'/></disk>"
            for number, disk in enumerate(self.disks, 1)
        )
        if self._floppy is not None:
            disks += (
                f"<disk type='file' device='floppy'>{_order(order, 0)}<driver name='qemu' type='raw'/>"
                f"<source file='{self._floppy}'/><target dev='fda' bus='fdc'/><readonly/></disk>"
            )
        control = f"unix:{self._folder}/control,server=on,wait=off"
        return (
            "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
            f"<name>{self.name}</name><uuid>{self._uuid}</uuid>"
            f"<memory unit='MiB'>{self._memory}</memory>"
            f"<vcpu>1</vcpu><features><acpi/></features>{self._head}"
            f"<os><type arch='x86_64' machine='pc'>hvm</type>{self._boot}</os>"
            f"<devices><emulator>{self.tools.qemu_system}</emulator>{disks}{self._devices}</devices>"
            f"<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='{control}'/></qemu:commandline>"
            "</domain>"
        )

    def define(self) -> None:
        """Make it known to libvirt."""
        self.libvirtd.connection.defineXML(self.xml())

    def undefine(self) -> None:
        """Have libvirt forget it, its checkpoints included; one that runs becomes transient."""
        self.handle.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)

    def start(self) -> None:
        """Start it."""
        self.handle.create()
        state = self.libvirtd.folder / "run" / "qemu" / f"{self.name}.pid"
        self._pid = int(state.read_text(encoding="ascii"))

    def shutdown(self) -> None:
        """End its QEMU in good order: bitmaps are saved."""
        self._disconnect()
        self.handle.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    def crash(self) -> None:
        """End its QEMU with SIGKILL and wait until libvirt knows."""
        self.kill()
        deadline = time.monotonic() + 20
        while self.handle.isActive():
            if time.monotonic() > deadline:
                raise TimeoutError("libvirt does not see that QEMU ended")
            time.sleep(0.02)

    def kill(self) -> None:
        """End its QEMU with SIGKILL."""
        self._disconnect()
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._pid = 0

    def _disconnect(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control = None

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command on the test's own monitor."""
        if self._control is None:
            self._control = QmpClient(self._folder / "control")
        return self._control.execute(command, **arguments)

    def write(self, name: str, *commands: str) -> None:
        """Run `qemu-io` commands on a disk's device, above whatever filter is there, and flush."""
        number = [disk.name for disk in self.disks].index(name)
        qdev = next(
            entry["qdev"]
            for entry in self.qmp("query-block")
            if f"virtio-disk{number}/" in entry.get("qdev", "")
        )
        for command in (*commands, "flush"):
            said = self.qmp("human-monitor-command", command_line=f'qemu-io -d {qdev} "{command}"')
            if "rror" in said or "failed" in said:
                raise AssertionError(f"qemu-io {command}: {said}")

    def checkpoints(self) -> set[str]:
        """Names of those that libvirt knows."""
        return {one.getName() for one in self.handle.listAllCheckpoints()}

    def bitmaps(self, name: str) -> set[str]:
        """Names of the dirty bitmaps that QEMU has on a disk."""
        path = str(next(disk.path for disk in self.disks if disk.name == name))
        return {
            bitmap["name"]
            for node in self.qmp("query-named-block-nodes", flat=True)
            if node["drv"] == "qcow2" and node["file"] == path
            for bitmap in node.get("dirty-bitmaps", [])
            if bitmap.get("name")
        }

    def job(self) -> str | None:
        """The XML of the backup job that runs, if any."""
        return _or_none(self.handle.backupGetXMLDesc)


def _order(first: int | None, number: int) -> str:
    return "" if first is None else f"<boot order='{first + number}'/>"


def _or_none(function: Callable[[], _T]) -> _T | None:
    try:
        return function()
    except libvirt.libvirtError:
        return None
