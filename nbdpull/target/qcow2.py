"""A new qcow2 file, written by QEMU itself: `qemu-img create`, then `qemu-nbd`."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from nbdpull.errors import TargetError
from nbdpull.nbdio.connection import Cancelled, RefusedError, unix_uri
from nbdpull.target.base import Buffer
from nbdpull.target.export import Export
from nbdpull.target.flusher import Flusher
from nbdpull.target.partfile import PartFile

__all__ = ["Qcow2File"]

_START_S = 20.0
_STOP_S = 10.0
_TICK_S = 0.02
_SECTOR = 512


class Qcow2File:
    """A qcow2 file (version 3, 64 KiB clusters) of the disk's size; zeroes take no clusters.

    Attributes:
        name: the final path.
        note: set when the disk's size is no multiple of 512, which qcow2 can't express.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        *,
        force: bool,
        cancel: threading.Event,
        connections: int = 4,
    ) -> None:
        """Create it under a temporary name and start a private qemu-nbd for it.

        Raises:
            UsageError: `path` exists and not `force`.
            TargetError: a program is missing or failed.
        """
        self.name = str(path)
        rounded = -(-size // _SECTOR) * _SECTOR
        self.note = (
            f"'{path}' has {rounded - size} zero bytes behind the disk's {size}: qcow2 counts in sectors"
            if rounded != size
            else ""
        )
        self._cancel = cancel
        self._cleanup = contextlib.ExitStack()
        with contextlib.ExitStack() as cleanup:
            self._part = PartFile(path, force=force)
            cleanup.callback(self._part.remove)
            self._create(rounded)
            # A socket's path holds 107 bytes at most, so it can't lie beside the file.
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="nbdpull-"))
            self._log = cleanup.enter_context((Path(folder) / "stderr").open("w+b"))
            socket = str(Path(folder) / "nbd")
            self._process = self._start(socket, connections)
            cleanup.callback(self._stop)
            self._export = self._connect(socket, rounded, connections)
            cleanup.callback(self._export.abort)
            self._flusher = Flusher(self._part.fd)
            cleanup.callback(self._flusher.stop)
            self._cleanup = cleanup.pop_all()

    def _create(self, size: int) -> None:
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1", "--"]
        try:
            done = subprocess.run(
                [*command, _literal(self._part.path), str(size)],
                check=False,
                capture_output=True,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError as exc:
            raise _missing("qemu-img") from exc
        if done.returncode:
            raise TargetError(f"can't create '{self.name}': {_tail(done.stderr)}")

    def _start(self, socket: str, connections: int) -> subprocess.Popen[bytes]:
        # Without --persistent it ends when the last client has gone: nothing stays behind even if
        # this process is killed. Writes need no ordering between data and metadata (cache=unsafe):
        # a file that was not finished is thrown away, and `publish` syncs a finished one.
        command = ["qemu-nbd", "--format=qcow2", "--cache=unsafe", "--discard=unmap"]
        command += [f"--shared={connections + 1}", f"--socket={socket}", "--"]
        try:
            return subprocess.Popen(
                [*command, _literal(self._part.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C in the terminal is for us: we stop it in order
            )
        except FileNotFoundError as exc:
            raise _missing("qemu-nbd") from exc

    def _connect(self, socket: str, size: int, connections: int) -> Export:
        """Wait until qemu-nbd listens. Its socket is there a moment before it does."""
        deadline = time.monotonic() + _START_S
        while True:
            if self._process.poll() is not None:
                raise TargetError(f"qemu-nbd for '{self.name}' ended at once: {self._error()}")
            if self._cancel.is_set():
                raise Cancelled
            if time.monotonic() > deadline:
                raise TargetError(f"qemu-nbd for '{self.name}' did not start in {_START_S:g} s")
            if Path(socket).is_socket():
                try:
                    return Export(
                        unix_uri(socket),
                        size,
                        cancel=self._cancel,
                        connections=connections,
                        blank=True,
                    )
                except TargetError as exc:
                    if not isinstance(exc.__cause__, RefusedError):
                        raise
            time.sleep(_TICK_S)

    def _error(self) -> str:
        self._log.seek(0)
        return _tail(self._log.read())

    def expect(self, offset: int, length: int) -> None:
        """Nothing to do: there is no room to be made."""

    def write(self, offset: int, data: Buffer) -> int:
        """See `Target.write`."""
        try:
            written = self._export.write(offset, data)
        except TargetError as exc:
            raise TargetError(
                f"can't write to '{self.name}': {exc}; qemu-nbd: {self._error()}"
            ) from exc
        self._flusher.wrote(written)
        return written

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: a cluster that was never written reads as zeroes."""

    def finish(self) -> None:
        """See `Target.finish`."""
        self._export.finish()
        while self._process.poll() is None:
            if self._cancel.is_set():
                raise Cancelled
            time.sleep(_TICK_S)
        if self._process.returncode:
            raise TargetError(
                f"qemu-nbd for '{self.name}' ended with status {self._process.returncode}: {self._error()}"
            )
        self._flusher.stop()
        self._part.publish()
        self.abort()

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def abort(self) -> None:
        """See `Target.abort`."""
        with contextlib.suppress(OSError):
            self._cleanup.close()


def _literal(path: Path) -> str:
    # QEMU takes "json:..." and "nbd:..." as something else than a path; "./" and "/" never are.
    return str(path.absolute())


def _missing(program: str) -> TargetError:
    return TargetError(f"'{program}' is not installed; install the Debian package qemu-utils")


def _tail(log: bytes) -> str:
    lines = log.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it gave no reason"
