"""One SSH connection to another host, by the system's OpenSSH client: a shell there, and sockets from there.

    nbdpull -- stdin, stdout -- ssh (control master) ==== sshd -- sh
       |                          |                        |
       +----- f0, f1, ... --------+                        +----- QMP socket, NBD socket, ...
              unix sockets in a private folder                    unix sockets there

`ssh` reads ~/.ssh/config itself, so that hosts, keys, jump hosts and known hosts are the user's; it never
asks. The connection ends with this process, whatever ends that: the shell's input is closed then.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import select
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Final

from nbdpull.errors import MonitorError, UsageError
from nbdpull.source.address import SshHost
from nbdpull.source.whole import whole

__all__ = ["ScriptError", "SshLink", "open_link", "quoted"]

_START_S: Final = 90.0
_COMMAND_S: Final = 30.0
_END_S: Final = 5.0
_OUTPUT_MAX: Final = 1 << 20
_PATH_MAX: Final = 107
_CONTROL_EXTRA: Final = 17
"""ssh makes its control socket under a longer name first."""

_OPTIONS: Final = (
    "BatchMode=yes",
    "ConnectTimeout=30",
    # A connection that is dead is noticed in 45 s.
    "ServerAliveInterval=15",
    "ServerAliveCountMax=3",
    "ExitOnForwardFailure=yes",
    "StreamLocalBindUnlink=yes",
    "StreamLocalBindMask=0177",
    # Nothing of the user's configuration that would do more than connect.
    "ClearAllForwardings=yes",
    "ControlPersist=no",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "RequestTTY=no",
)


# The shell ends when its input does, and takes the server's side of the connection along: else ssh would
# wait for the sockets of a dead nbdpull, and the lifeline (a half-closed socket, which QEMU does not
# notice) would look alive.
_BEGIN: Final = "LC_ALL=C; export LC_ALL; umask 077; trap 'kill -HUP \"$PPID\"' EXIT"


class SshLink:
    """An open connection. Its methods may be called from any thread.

    Attributes:
        host: where to.
    """

    def __init__(self, host: SshHost, folder: Path) -> None:
        self.host = host
        self._folder = folder
        self._control = folder / "c"
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._forwards: dict[str, str] = {}
        self._closing = False
        port = [] if host.port is None else ["-p", str(host.port)]
        options = [part for option in _OPTIONS for part in ("-o", option)]
        line = ["ssh", "-M", "-S", str(self._control), *options, *port, "--", host.destination]
        try:
            with (folder / "stderr").open("wb") as log:
                self._process = subprocess.Popen(
                    # Any login shell understands this.
                    [*line, "exec sh"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    # Ctrl-C is for nbdpull, which still needs the connection then.
                    start_new_session=True,
                )
        except FileNotFoundError as exc:
            raise MonitorError(
                f"there is no program 'ssh' to reach {host} with; install OpenSSH's client"
            ) from exc

    @property
    def _input(self) -> IO[bytes]:
        return _there(self._process.stdin)

    @property
    def _output(self) -> IO[bytes]:
        return _there(self._process.stdout)

    def last_line(self) -> str:
        """What ssh said last; empty when it said nothing."""
        with suppress(OSError):
            text = (self._folder / "stderr").read_bytes()[-4096:].decode(errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return lines[-1] if lines else ""
        return ""

    def _why(self) -> str:
        said = self.last_line()
        return f": ssh said '{said}'" if said else ""

    def start(self) -> None:
        """Wait until the shell there answers.

        Raises:
            MonitorError: no connection; ssh's own last line is in the message.
        """
        try:
            self.run(_BEGIN, timeout_s=_START_S, here=True)
        except MonitorError as exc:
            raise MonitorError(
                f"can't reach {self.host} by ssh{self._why() or f' ({exc})'}; 'ssh"
                f" {self.host.destination} true' must work without asking anything"
            ) from exc

    def run(self, script: str, *, timeout_s: float = _COMMAND_S, here: bool = False) -> str:
        """Run a script in the shell there and return what it printed, standard error included.

        Args:
            script: for a POSIX shell. Whatever is put into it must be quoted (`shlex.quote`).
            timeout_s: the connection is given up after that.
            here: in the shell itself, whose settings it may change.

        Raises:
            ScriptError: it ended with another status than 0.
            MonitorError: the connection is lost.
        """
        mark = secrets.token_hex(16)
        left, right = ("{", "}") if here else ("(", ")")
        text = f"{left} {script}\n{right} </dev/null 2>&1; printf '\\n%s %d\\n' {mark} $?\n"
        with self._lock:
            try:
                self._input.write(text.encode())
                self._input.flush()
                output, status = self._answer(mark.encode(), time.monotonic() + timeout_s)
            except (OSError, EOFError, ValueError) as exc:
                # Whatever comes later would be taken for the answer to something else.
                self._process.kill()
                self._process.wait()
                reason = str(exc) if isinstance(exc, TimeoutError) else "it ended"
                raise MonitorError(
                    f"the ssh connection to {self.host} is lost ({reason}){self._why()}"
                ) from exc
        if status:
            raise ScriptError(output.strip() or f"status {status}")
        return output

    def post(self, script: str) -> None:
        """Have a script run in the shell there, in its turn, of whose end nothing is told.

        Raises:
            MonitorError: the connection is lost.
        """
        with self._lock:
            try:
                self._input.write(f"( {script}\n) </dev/null >/dev/null 2>&1\n".encode())
                self._input.flush()
            except (OSError, ValueError) as exc:
                raise MonitorError(
                    f"the ssh connection to {self.host} is lost{self._why()}"
                ) from exc

    def _answer(self, mark: bytes, deadline: float) -> tuple[str, int]:
        data = b""
        while True:
            head, found, tail = data.partition(b"\n" + mark + b" ")
            if found and b"\n" in tail:
                return head.decode(errors="replace"), int(tail.split(b"\n")[0])
            if len(data) > _OUTPUT_MAX:
                raise EOFError
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._output], [], [], left)[0]:
                raise TimeoutError("no answer")
            more = os.read(self._output.fileno(), 65536)
            if not more:
                raise EOFError
            data += more

    async def forward(self, path: str) -> str:
        """The path of a unix socket here behind which is the one at `path` there, made or not.

        Raises:
            UsageError: ssh can't be told such a path.
            MonitorError: ssh refused.
        """
        if path not in self._forwards:
            self._forwards[path] = await whole(self._forward, path)
        return self._forwards[path]

    def _forward(self, path: str) -> str:
        if "${" in path or "\n" in path:
            raise UsageError(f"ssh can't forward a socket at '{path}'; choose a simpler path")
        there = path.replace("\\", "\\\\").replace(":", "\\:").replace("%", "%%")
        here = str(self._folder / f"f{len(self._forwards)}")
        # The user's configuration was for the connection: its forwards are not asked for again.
        line = ["ssh", "-F", "none", "-S", str(self._control), "-O", "forward"]
        line += ["-L", f"{here}:{there}", "--", self.host.destination]
        try:
            done = subprocess.run(
                line, check=False, capture_output=True, text=True, timeout=_COMMAND_S
            )
        except subprocess.TimeoutExpired as exc:
            raise MonitorError(f"ssh to {self.host} does not answer") from exc
        if done.returncode or not Path(here).is_socket():
            said = (done.stderr.strip().splitlines() or [self.last_line()])[-1]
            raise MonitorError(f"ssh to {self.host} can't forward {path}: {said}")
        return here

    async def lost(self) -> MonitorError:
        """Wait until the connection ends by itself, and say why."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def wait() -> None:
            self._process.wait()
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(ended.set)

        # Not in the pool of `to_thread`: it would take one of its few threads all the time.
        threading.Thread(target=wait, name="ssh-ended", daemon=True).start()
        await ended.wait()
        return MonitorError(f"the ssh connection to {self.host} is lost{self._why()}")

    def close(self) -> None:
        """End the connection; never raises."""
        with suppress(OSError):
            self._input.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()


class ScriptError(MonitorError):
    """A script there failed; the message is what it printed."""


def _there(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("ssh was started without pipes")
    return stream


@asynccontextmanager
async def open_link(host: SshHost) -> AsyncIterator[SshLink]:
    """Connect, as long as the context lasts.

    Raises:
        UsageError: the folder for temporary files is too deep for sockets.
        MonitorError: no connection.
    """
    folder = Path(tempfile.mkdtemp(prefix="nbdpull-ssh-"))  # 0700
    try:
        if len(os.fsencode(folder / "c")) + _CONTROL_EXTRA > _PATH_MAX:
            raise UsageError(
                f"the folder for temporary files, {folder.parent}, is too deep: a socket's path has at most"
                f" {_PATH_MAX} bytes; set TMPDIR to a shorter one"
            )
        link = SshLink(host, folder)
        try:
            await whole(link.start)
            yield link
        finally:
            await whole(link.close)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quoted(path: str | Path) -> str:
    """A path as one word of a script."""
    return shlex.quote(str(path))
