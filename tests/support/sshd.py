"""A real OpenSSH server on loopback, with keys of its own; the client's configuration for it is private too."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from tests.support.process import run, spawn, stop

__all__ = ["HOST", "SshServer", "children"]

HOST = "hypervisor"
"""What the client's configuration calls the server."""

_SSHD = "/usr/sbin/sshd"
_START_S = 30.0


class SshServer:
    """Runs inside a `with` block. Nothing of the system's or the user's ssh is read or changed.

    Attributes:
        folder: of the server's files and the client's.
        bin: a folder with a program `ssh` that knows the server as `HOST`: put it first into PATH.
        log: what the server said.
    """

    def __init__(self, folder: Path, *, options: str = "") -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.bin.mkdir(parents=True)
        for name in ("host", "user", "stranger"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name])
        shutil.copy(folder / "user.pub", folder / "authorized")
        public = (folder / "host.pub").read_text(encoding="ascii")
        (folder / "known").write_text(f"{HOST} {public}", encoding="ascii")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n{options}\n",
            encoding="ascii",
        )
        self.client()

    def client(self, *, key: str = "user", port: int | None = None) -> None:
        """Write the client's configuration."""
        (self.folder / "config").write_text(
            f"Host {HOST}\n HostName 127.0.0.1\n HostKeyAlias {HOST}\n Port {port or self.port}\n"
            f" IdentityFile {self.folder}/{key}\n IdentitiesOnly yes\n IdentityAgent none\n"
            f" UserKnownHostsFile {self.folder}/known\n GlobalKnownHostsFile none\n"
            " StrictHostKeyChecking yes\n LocalForward 1 127.0.0.1:1\n",
            encoding="ascii",
        )
        program = self.bin / "ssh"
        program.write_text(
            f'#!/bin/sh\nexec /usr/bin/ssh -F {self.folder}/config "$@"\n', encoding="ascii"
        )
        program.chmod(0o755)

    @property
    def path(self) -> str:
        """PATH with the client first."""
        return f"{self.bin}:{os.environ['PATH']}"

    def uri(self, socket_path: Path) -> str:
        """The product's SOURCE."""
        return f"qmp+ssh://{HOST}{socket_path}"

    def __enter__(self) -> Self:
        if os.geteuid() == 0:
            # Where sshd keeps its unprivileged part; the system's service makes it at its start.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        line = [_SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self._process = spawn(line, log=self.log)
        deadline = time.monotonic() + _START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"sshd did not start: {self.log.read_text()}")
            time.sleep(0.02)

    def __exit__(self, *_exc: object) -> None:
        if self._process is not None:
            try:
                self.cut()
            finally:
                stop(self._process)

    def sessions(self) -> list[int]:
        """Process ids of the server's sides of all connections: they and their descendants but shells."""
        if self._process is None:
            return []
        found, todo = [], [self._process.pid]
        while todo:
            for child in children(todo.pop()):
                if _name(child) == "sshd":
                    found.append(child)
                    todo.append(child)
        return found

    def wait_ended(self, *, timeout_s: float = 20.0) -> None:
        """Wait until no connection has a side here any more: it ends soon after its client's."""
        deadline = time.monotonic() + timeout_s
        while left := self.sessions():
            assert time.monotonic() < deadline, f"processes {left} of the server have not ended"
            time.sleep(0.02)

    def cut(self) -> None:
        """End all connections, as a network that fails would."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to the server's side of all connections."""
        for pid in self.sessions():
            # One whose client has just gone ends by itself between being found and being sent the signal.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [found for found in pids if _stat(found)[1:2] == [str(pid)]]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
