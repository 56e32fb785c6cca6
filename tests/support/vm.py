"""Real QEMU servers: a virtual machine, and a storage daemon."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.bootwriter import BootWriter
from tests.support.disk import Disk, to_raw
from tests.support.process import run, spawn, stop
from tests.support.qmp import Event, QmpClient, QmpError
from tests.support.tools import QEMU_72, QemuTools

__all__ = ["HAS_FUSE", "QemuProcess", "QmpError", "StorageDaemon", "Vm", "pid_alive"]

_START_S = 30.0

HAS_FUSE = os.access("/dev/fuse", os.R_OK | os.W_OK)
"""Whether this user may mount FUSE files, as a `StorageDaemon` without `nbd_server` does."""


class QemuProcess:
    """What a VM and a storage daemon have in common: a process with two QMP monitors.

    Attributes:
        tools: its QEMU version.
        folder: its private folder, with a short name since it holds sockets; removed at the end.
        socket: the monitor that is left for the product.
        log: QEMU's standard error of all starts.
        output: QEMU's standard output of all starts.
    """

    def __init__(self, tools: QemuTools) -> None:
        self.tools = tools
        self.folder = Path(tempfile.mkdtemp(prefix="np-"))
        self.socket = self.folder / "qmp"
        self.log = self.folder / "stderr"
        self.output = self.folder / "stdout"
        self._control = self.folder / "control"
        self._client: QmpClient | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._disks: list[Disk] = []

    def argv(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    @property
    def uri(self) -> str:
        """The product's SOURCE."""
        return f"qmp:{self.socket}"

    @property
    def disks(self) -> tuple[Disk, ...]:
        """All disks, hot-added ones included."""
        return tuple(self._disks)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The QEMU process: `process.pid` is QEMU's own."""
        if self._process is None:
            raise RuntimeError("QEMU was not started")
        return self._process

    @property
    def monitor(self) -> QmpClient:
        """The test's own QMP connection, made when first needed."""
        if self._client is None:
            self._client = QmpClient(self._control)
        return self._client

    @property
    def events(self) -> list[Event]:
        """The QMP events that were received so far, oldest first."""
        return self.monitor.events

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command on the test's own monitor; `_` in names stands for `-`.

        Raises:
            QmpError: QEMU refused it.
            TimeoutError: no answer within 20 s.
        """
        return self.monitor.execute(command, **arguments)

    def wait_event(self, name: str, *, since: int = 0, timeout_s: float = 20.0) -> Event:
        """Wait for the first event `name` at index `since` of `events` or later."""
        return self.monitor.wait_event(name, since=since, timeout_s=timeout_s)

    def stderr(self) -> str:
        """What QEMU wrote on standard error, all starts together."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self) -> Self:
        """Start QEMU and wait until its monitor answers.

        Raises:
            AssertionError: it ended first, or did not answer; its standard error is in the message.
        """
        self.socket.unlink(missing_ok=True)
        self._control.unlink(missing_ok=True)
        # A file makes QEMU's output buffered, and qemu_io() must see it at once.
        self._process = spawn(["stdbuf", "-oL", *self.argv()], output=self.output, log=self.log)
        deadline = time.monotonic() + _START_S
        while True:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise AssertionError(f"QEMU ended with {code}: {self.stderr()}")
            try:
                self._client = QmpClient(self._control)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise AssertionError(f"QEMU did not start: {self.stderr()}") from None
                time.sleep(0.02)
        return self

    def quit(self, *, timeout_s: float = 30.0) -> int:
        """End QEMU with QMP `quit`, which saves persistent bitmaps, and return its exit code."""
        with suppress(ConnectionError):
            self.qmp("quit")
        return self._ended(timeout_s)

    def terminate(self, *, timeout_s: float = 30.0) -> int:
        """End QEMU with SIGTERM and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self._ended(timeout_s)

    def kill(self) -> None:
        """End QEMU with SIGKILL, as a crash of the host's process would."""
        self._disconnect()
        if self._process is not None:
            stop(self._process)

    @property
    def running(self) -> bool:
        """Whether the process is there (a paused guest counts)."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End QEMU if it runs, and remove its folder; images elsewhere stay."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

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

    def disk(self, name: str) -> Disk:
        """The disk of that name."""
        for disk in self._disks:
            if disk.name == name:
                return disk
        raise KeyError(name)

    def bitmaps(self, name: str) -> dict[str, dict[str, Any]]:
        """The named dirty bitmaps on a disk's format node, by name, as QEMU describes them."""
        nodes: list[dict[str, Any]] = self.qmp("query-named-block-nodes", flat=True)
        wanted = self.disk(name).node
        for node in nodes:
            if node["node-name"] == wanted:
                bitmaps = node.get("dirty-bitmaps", [])
                return {bitmap["name"]: bitmap for bitmap in bitmaps if "name" in bitmap}
        raise KeyError(wanted)

    def leftovers(self) -> dict[str, list[str]]:
        """Ids of all jobs, exports, named nodes and chardevs that did not come from the harness.

        All lists are empty after a clean run.
        """
        own = {disk.node for disk in self._disks}
        own |= {f"file-{disk.name}" for disk in self._disks}
        own |= {disk.top for disk in self._disks}
        nodes: list[dict[str, Any]] = self.qmp("query-named-block-nodes", flat=True)
        names = [node["node-name"] for node in nodes]
        return {
            "jobs": [job["id"] for job in self.qmp("query-jobs")],
            "exports": [
                export["id"]
                for export in self.qmp("query-block-exports")
                if not export["id"].startswith("guest-")
            ],
            # QEMU itself names nodes that nobody named '#block123'.
            "nodes": [name for name in names if name not in own and not name.startswith("#")],
            "chardevs": [
                entry["label"]
                for entry in self.qmp("query-chardev")
                if entry["label"].startswith("np-")
            ],
        }

    def block_resize(self, name: str, size: int) -> None:
        """Resize a disk to `size` bytes while it is in use."""
        self.qmp("block_resize", node_name=self.disk(name).node, size=size)

    def _ended(self, timeout_s: float) -> int:
        code = self.process.wait(timeout=timeout_s)
        self._disconnect()
        return code

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class Vm(QemuProcess):
    """A virtual machine on the TCG accelerator, running inside a `with` block.

    Disks are `-blockdev` nodes; the n-th is BIOS disk 0x80 + n and `bootindex` n + 1.

    Args:
        disks: its disks, in order.
        tools: the QEMU version.
        writer: boot this guest; without one nothing is booted.
        paused: start with `-S`; `cont()` starts the guest.
        name: QEMU's `-name`.
        memory: MiB.
        arguments: more arguments for the command line, as they are.
    """

    def __init__(
        self,
        disks: Sequence[Disk] = (),
        *,
        tools: QemuTools = QEMU_72,
        writer: BootWriter | None = None,
        paused: bool | None = None,
        name: str = "testvm",
        memory: int = 64,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(tools)
        self._disks = list(disks)
        self.writer = writer
        self.name = name
        self._paused = writer is None and not arguments if paused is None else paused
        self._memory = memory
        self._arguments = list(arguments)

    def argv(self) -> list[str]:
        line = [
            str(self.tools.qemu_system),
            *("-name", self.name, "-machine", "pc,accel=tcg", "-cpu", "max"),
            *("-m", str(self._memory), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-qmp", f"unix:{self.socket},server=on,wait=off"),
            *("-qmp", f"unix:{self._control},server=on,wait=off"),
        ]
        if self._paused:
            line.append("-S")
        if self.writer is not None:
            floppy = self.folder / "floppy"
            floppy.write_bytes(self.writer.floppy())
            line += ["-drive", f"if=floppy,format=raw,readonly=on,file={floppy}"]
            line += ["-global", "isa-fdc.bootindexA=0"]
        if any(disk.device == "scsi-hd" for disk in self._disks):
            line += ["-device", "virtio-scsi-pci,id=scsi"]
        for index, disk in enumerate(self._disks):
            if disk.throttled:
                group = f"group-{disk.name}"
                limits = {"bps-total": disk.throttle_bps} if disk.throttle_bps else {}
                options = {"qom-type": "throttle-group", "id": group, "limits": limits}
                line += ["-object", json.dumps(options)]
            line += ["-blockdev", json.dumps(self._blockdev(disk))]
            if disk.iothread:
                line += ["-object", f"iothread,id=io-{disk.name}"]
            line += ["-device", json.dumps({**_device(disk), "bootindex": index + 1})]
        return line + self._arguments

    def pause(self) -> None:
        """Stop the guest (QMP `stop`); when it returns, all its writes have arrived."""
        self.qmp("stop")

    def cont(self) -> None:
        """Let the guest run."""
        self.qmp("cont")

    def status(self) -> str:
        """QEMU's run state: ``running``, ``paused``, ``io-error``, ``prelaunch`` ..."""
        status: str = self.qmp("query-status")["status"]
        return status

    @contextmanager
    def halted(self) -> Iterator[None]:
        """Keep the guest paused inside a `with` block."""
        self.pause()
        try:
            yield
        finally:
            self.cont()

    def restart(self) -> None:
        """Start again what `kill`, `quit` or `terminate` ended, on the same images."""
        if self.running:
            raise RuntimeError("QEMU is still running: kill(), quit() or terminate() it first")
        self._disconnect()
        self.start()

    def qemu_io(self, name: str, command: str) -> str:
        """Read or write a disk as its guest would, with a `qemu-io` command such as ``write -P 1 0 64k``.

        It is flushed, so that `qemu-img` sees it in the image.

        It goes through the device, so that whatever filter is in the guest's path now sees it. (By
        node name it would pass below a copy-before-write filter and break the point in time.)

        Raises:
            QmpError: there is no such disk.
            AssertionError: qemu-io said that it failed.
        """
        qdev = self.qdev(name)
        before = self.output.stat().st_size
        text: str = self._hmp(f'qemu-io -d {qdev} "{command}"')
        # The monitor gets QEMU's own errors; what qemu-io prints goes to QEMU's standard output.
        with self.output.open("rb") as file:
            file.seek(before)
            text += file.read().decode(errors="replace")
        if any(word in text.lower() for word in ("error", "failed", "not found", "invalid")):
            raise AssertionError(f"qemu-io {name} {command}: {text}")
        self._hmp(f"qemu-io -d {qdev} flush")
        return text

    def qdev(self, name: str) -> str:
        """The `qdev` by which `query-block` lists a disk: an id or a QOM path."""
        for entry in self.qmp("query-block"):
            qdev: str = entry.get("qdev", "")
            if name in qdev.split("/"):
                return qdev
        raise KeyError(name)

    def hot_add(self, disk: Disk) -> None:
        """Add a disk to the running VM; it comes back after `restart` too."""
        self.qmp("blockdev-add", **disk.blockdev())
        self.qmp("device_add", **_device(disk))
        self._disks.append(disk)

    def hot_remove(self, name: str, *, timeout_s: float = 20.0) -> None:
        """Unplug a disk. A guest without an operating system never agrees, so only use it with one."""
        since = len(self.events)
        self.qmp("device_del", id=name)
        gone = None
        while gone != name:  # its backend is told first, and the node is in use until both are gone
            event = self.wait_event("DEVICE_DELETED", since=since, timeout_s=timeout_s)
            gone = event["data"].get("device")
            since = self.events.index(event, since) + 1
        disk = self.disk(name)
        self.qmp("blockdev-del", node_name=disk.node)
        self._disks.remove(disk)

    def copy_disks(self, folder: Path) -> dict[str, Path]:
        """Copy every disk to ``folder/NAME.raw`` and return these, by name: what a backup must hold.

        The guest must be paused (`halted()`), or must not write.
        """
        # Even on a paused VM `stop` flushes all disks: a qcow2 keeps metadata in memory until then.
        if self.running and self.status() != "running":
            self.pause()
        folder.mkdir(parents=True, exist_ok=True)
        return {
            disk.name: to_raw(
                disk.path, folder / f"{disk.name}.raw", format=disk.format, tools=self.tools
            )
            for disk in self._disks
        }

    def written(self) -> int:
        """How many rounds the boot-sector guest has finished on all its disks by now."""
        if self.writer is None:
            raise RuntimeError("this VM has no writer")
        # The guest keeps the record that it is writing at 0x9000: looking there disturbs nothing.
        words = re.findall(r"0x([0-9a-f]{8})", self._hmp("xp /2wx 0x9000"))
        magic, number = (int(word, 16).to_bytes(4, "little") for word in words[-2:])
        return max(0, int.from_bytes(number, "little") - 1) if magic == b"NBDW" else 0

    def wait_written(self, rounds: int, *, timeout_s: float = 60.0) -> int:
        """Wait until the boot-sector guest has finished `rounds` rounds more; return the new count."""
        goal = self.written() + rounds
        deadline = time.monotonic() + timeout_s
        while (now := self.written()) < goal:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the guest wrote {now} of {goal} rounds; {self.status()}")
            time.sleep(0.02)
        return now

    def _hmp(self, line: str) -> str:
        text: str = self.qmp("human-monitor-command", command_line=line)
        return text

    def _blockdev(self, disk: Disk) -> dict[str, Any]:
        if not disk.throttled:
            return disk.blockdev()
        return {
            "driver": "throttle",
            "node-name": disk.top,
            "throttle-group": f"group-{disk.name}",
            "read-only": disk.read_only,
            "discard": "unmap",
            "file": disk.blockdev(),
        }


def _device(disk: Disk) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if disk.device == "nvme":
        extra["serial"] = disk.name
    if disk.iothread:
        extra["iothread"] = f"io-{disk.name}"
    return {
        "driver": disk.device,
        "id": disk.name,
        "drive": disk.top,
        **extra,
        **disk.device_options,
    }


class StorageDaemon(QemuProcess):
    """A qemu-storage-daemon that holds disks, running inside a `with` block.

    A disk's device settings don't count. Each disk has one writable export, ``guest-NAME``, which
    stands for the guest: `qemu_io` and `guest_uri` write through it, above any filter.

    Args:
        disks: its disks.
        tools: the QEMU version.
        nbd_server: False: the guest's exports are FUSE files, and the daemon's one NBD server is
            left for the product to start. True: its NBD server runs from the start, at
            `nbd_address`, and holds the guest's exports.
        arguments: more arguments for the command line, as they are.
    """

    def __init__(
        self,
        disks: Sequence[Disk] = (),
        *,
        tools: QemuTools = QEMU_72,
        nbd_server: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(tools)
        self._disks = list(disks)
        self._nbd_server = nbd_server
        self._arguments = list(arguments)
        self.nbd_socket = self.folder / "nbd"

    @property
    def nbd_address(self) -> str:
        """URI of the NBD server that runs from the start."""
        return f"nbd+unix:///?socket={self.nbd_socket}"

    def argv(self) -> list[str]:
        line = [str(self.tools.storage_daemon)]
        for name, path in (("product", self.socket), ("control", self._control)):
            line += ["--chardev", f"socket,id={name},path={path},server=on,wait=off"]
            line += ["--monitor", f"chardev={name}"]
        if self._nbd_server:
            line += ["--nbd-server", f"addr.type=unix,addr.path={self.nbd_socket}"]
        for disk in self._disks:
            line += ["--blockdev", json.dumps(disk.blockdev())]
            export: dict[str, Any] = {
                "id": f"guest-{disk.name}",
                "node-name": disk.node,
                "writable": True,
            }
            if self._nbd_server:
                export |= {"type": "nbd", "name": f"guest-{disk.name}"}
            else:
                mount = self.folder / f"guest-{disk.name}"
                mount.touch()
                export |= {"type": "fuse", "mountpoint": str(mount)}
            line += ["--export", json.dumps(export)]
        return line + self._arguments

    def kill(self) -> None:
        super().kill()
        # The mount of a daemon that was killed stays, and answers every access with an error.
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        for disk in self._disks:
            mount = str(self.folder / f"guest-{disk.name}")
            if f" {mount} " in mounts:
                tool = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
                run([*tool, mount])

    def guest_uri(self, name: str) -> str:
        """What `qemu-img` and `qemu-io` open (as ``-f raw``) to act as the guest of a disk."""
        if self._nbd_server:
            return f"nbd+unix:///guest-{name}?socket={self.nbd_socket}"
        return str(self.folder / f"guest-{name}")

    def qemu_io(self, name: str, command: str) -> str:
        """Read or write a disk as its guest would, with a `qemu-io` command; it is flushed."""
        uri = self.guest_uri(name)
        return run([self.tools.qemu_io, "-f", "raw", "-c", command, "-c", "flush", uri]).stdout


def pid_alive(pid: int) -> bool:
    """Whether a process of that pid is there and no zombie."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
