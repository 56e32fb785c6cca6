"""A real Linux guest: Debian's cloud kernel, busybox, and two ext4 disks that it writes to.

What it does is in ``linux-init``. It tells on its serial console how far it is, so that the host
knows which records were durable on both disks at any moment.
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.support.disk import Disk
from tests.support.process import run
from tests.support.tools import QEMU_72, QemuTools, cache_folder
from tests.support.vm import Vm

__all__ = [
    "KERNEL_LINE",
    "Filesystem",
    "LinuxGuest",
    "check_filesystem",
    "create_ext4_disk",
    "initramfs",
]

_INIT = Path(__file__).with_name("linux-init")
_BOOT_S = 90.0
_SLOW_HOST = "no_timer_check"
"""The kernel panics when its timer seems not to tick, as on a host that is too busy to emulate it in time."""
KERNEL_LINE = f"console=ttyS0 quiet panic=-1 {_SLOW_HOST}"
"""Of the guest's kernel."""


def initramfs() -> bytes:
    """A cpio archive with busybox, the virtio modules and ``linux-init`` as ``/init``."""
    files: list[tuple[str, int, bytes]] = [
        ("bin", 0o040755, b""),
        ("dev", 0o040755, b""),
        ("modules", 0o040755, b""),
        ("bin/busybox", 0o100755, Path("/bin/busybox").read_bytes()),
        ("bin/sh", 0o120777, b"busybox"),
        ("init", 0o100755, _INIT.read_bytes()),
    ]
    agent = cache_folder() / "linux-guest-2" / "qemu-ga"
    files.append(("bin/qemu-ga", 0o100755, agent.read_bytes()))
    # Built for this Debian: it finds its libraries where they are here.
    linked = run(["ldd", agent]).stdout
    libraries = [Path(path) for path in re.findall(r"(/\S+) \(0x", linked)]
    folders = {parent for path in libraries for parent in path.parents if parent.name}
    files += [(str(folder)[1:], 0o040755, b"") for folder in sorted(folders)]
    files += [(str(path)[1:], 0o100755, path.read_bytes()) for path in libraries]
    modules = sorted((cache_folder() / "linux-guest-2" / "modules").glob("*.ko"))
    files += [(f"modules/{module.name}", 0o100644, module.read_bytes()) for module in modules]
    out = bytearray()
    for number, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        # Format "newc" has a magic, then 13 fields of 8 hex digits. These are inode, mode, uid, gid,
        # links, mtime, size, two devices as major and minor, length of the name with its NUL, and
        # a checksum that is not used.
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % value for value in fields)
        out += name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def create_ext4_disk(
    folder: Path,
    name: str,
    *,
    size: int,
    content: Path | None = None,
    format: str = "qcow2",  # noqa: A002 - qemu-img's own word
    tools: QemuTools = QEMU_72,
    **more: Any,
) -> Disk:
    """Make an image with one ext4 file system over the whole disk, filled from folder `content`."""
    raw = folder / f"{name}.mkfs"
    with raw.open("wb") as file:
        file.truncate(size)
    filled: list[str | Path] = [] if content is None else ["-d", content]
    run(["/sbin/mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", *filled, raw])
    path = folder / f"{name}.{format}"
    run([tools.qemu_img, "convert", "-f", "raw", "-O", format, raw, path])
    raw.unlink()
    return Disk(name=name, path=path, size=size, format=format, **more)


class LinuxGuest(Vm):
    """The guest, running inside a `with` block; its disks A and B are the first two."""

    def __init__(
        self,
        disks: Sequence[Disk],
        *,
        tools: QemuTools = QEMU_72,
        name: str = "linux",
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(disks, tools=tools, name=name, memory=256, paused=False)
        image = self.folder / "initramfs"
        image.write_bytes(initramfs())
        self._console_path = self.folder / "console"
        self._arguments = [
            *("-kernel", str(cache_folder() / "linux-guest-2" / "vmlinuz")),
            *("-initrd", str(image), "-append", KERNEL_LINE),
            *("-chardev", f"socket,id=console,path={self._console_path},server=on,wait=on"),
            *("-serial", "chardev:console", "-no-reboot"),
            *arguments,
        ]
        self.console = bytearray()
        """Everything the guest said, all starts together."""
        self._times: list[float] = []
        self._numbers: list[int] = []
        self._news = threading.Condition()

    def start(self) -> Self:
        self._console_path.unlink(missing_ok=True)
        # QEMU waits for a client of the console before anything else, so that nothing said is lost.
        reader = threading.Thread(target=self._read_console, name="console", daemon=True)
        reader.start()
        super().start()
        return self

    @property
    def synced(self) -> int:
        """The last record that the guest said is durable on both disks, 0 before the first."""
        with self._news:
            return self._numbers[-1] if self._numbers else 0

    def synced_at(self, moment: float) -> int:
        """The last record that the guest had said is durable by `moment` (seconds since epoch)."""
        with self._news:
            index = bisect_right(self._times, moment)
            return self._numbers[index - 1] if index else 0

    def wait_synced(self, number: int, *, timeout_s: float = _BOOT_S) -> int:
        """Wait until record `number` is durable on both disks, and return the last one that is.

        Raises:
            TimeoutError: it did not get there; the console's end is in the message.
        """
        with self._news:
            if not self._news.wait_for(
                lambda: bool(self._numbers) and self._numbers[-1] >= number, timeout=timeout_s
            ):
                said = self.console[-2000:].decode(errors="replace")
                raise TimeoutError(f"no record {number} within {timeout_s} s; console: {said}")
            return self._numbers[-1]

    def _read_console(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = time.monotonic() + 30
        while True:
            try:
                connection.connect(str(self._console_path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    connection.close()
                    return
                time.sleep(0.01)
        with connection:
            rest = b""
            while data := self._receive(connection):
                now = time.time()
                *lines, rest = (rest + data).split(b"\n")
                with self._news:
                    self.console += data
                    for line in lines:
                        if found := re.fullmatch(rb"synced (\d+)\r?", line):
                            self._times.append(now)
                            self._numbers.append(int(found[1]))
                    self._news.notify_all()

    @staticmethod
    def _receive(connection: socket.socket) -> bytes:
        try:
            return connection.recv(1 << 16)
        except ConnectionError:
            return b""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """What was found on one of the guest's disks.

    Attributes:
        records: how many: they are 1, 2, 3 ... without a gap, and every checksum is right.
        files: names in its folder ``files``.
        replayed: the journal had to be replayed, as after a power failure.
    """

    records: int
    files: int
    replayed: bool


def check_filesystem(raw: Path, scratch: Path) -> Filesystem:
    """Check one of the guest's disks, a raw image, and read its records.

    A backup of a running guest is what a power failure at that moment would leave: the journal
    must be replayed before the file system is consistent. So a copy in folder `scratch` first gets
    what every boot does (`e2fsck -p`: replay, and no repair that needs a decision), and then
    `e2fsck -fn` must find nothing at all to repair.

    Raises:
        AssertionError: the file system is damaged, or a record is missing, wrong or out of order.
    """
    copy = scratch / f"{raw.name}.fsck"
    run(["cp", raw, copy])
    replay = run(["/sbin/e2fsck", "-p", copy], check=False)
    if replay.returncode > 1:
        raise AssertionError(f"{raw}: {replay.stdout}{replay.stderr}")
    clean = run(["/sbin/e2fsck", "-fn", copy], check=False)
    if clean.returncode != 0:
        raise AssertionError(f"{raw}: e2fsck finds damage: {clean.stdout}{clean.stderr}")
    lines = run(["/sbin/debugfs", "-R", "cat /records.log", copy]).stdout.splitlines()
    for number, line in enumerate(lines, 1):
        digest = hashlib.md5(b"record %d\n" % number, usedforsecurity=False).hexdigest()
        if line != f"{number} {digest}":
            raise AssertionError(f"{raw}: record {number} of {len(lines)} is {line!r}")
    listing = run(["/sbin/debugfs", "-R", "ls -p /files", copy]).stdout
    names = [row.split("/")[5] for row in listing.splitlines() if row.count("/") >= 6]
    copy.unlink()
    return Filesystem(
        records=len(lines),
        files=sum(name.isdigit() for name in names),
        replayed="recovering journal" in replay.stdout,
    )
