"""Standard output or any other descriptor that takes bytes in order only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import threading

from nbdpull.errors import TargetError, UsageError
from nbdpull.nbdio.errors import Cancelled
from nbdpull.target.base import Buffer
from nbdpull.target.partfile import failed

__all__ = ["Stream"]

_TICK_S = 0.25
_PIPE_BUFFER = 1024 * 1024
_BLANK = memoryview(bytes(1024 * 1024))
_ATOMIC = 4096
"""poll(2) promises that so much fits a pipe (PIPE_BUF); more could block for ever."""


class Stream:
    """An open file descriptor that gets the disk's bytes in order, zeroes included.

    A thread that comes before its turn waits in `write`, so what is ahead of the order is at most
    one piece for each thread.

    Attributes:
        name: ``-``.
    """

    note = ""

    def __init__(self, fd: int, cancel: threading.Event) -> None:
        """Take `fd`, which stays open and stays the caller's.

        Args:
            fd: open for writing.
            cancel: once set, every waiting call raises `Cancelled` soon, also when the reader of a
                pipe has stopped reading.

        Raises:
            UsageError: it is a terminal.
        """
        if os.isatty(fd):
            raise UsageError(
                "standard output is a terminal; send it to a file or a pipe (--to - | ...)"
            )
        self.name = "-"
        self._cancel = cancel
        self._next = 0
        self._turn = threading.Condition()
        self._broken = False
        mode = os.fstat(fd).st_mode
        self._blocks = not stat.S_ISREG(mode)
        self._fd, self._own = fd, False
        if stat.S_ISFIFO(mode):
            # O_NONBLOCK on `fd` itself would change it for every process that shares it, such as
            # the shell; another open file description of the same pipe is ours alone.
            with contextlib.suppress(OSError):
                self._fd = os.open(
                    f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
                )
                self._own = True
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_BUFFER)

    def expect(self, offset: int, length: int) -> None:
        """Nothing to do: there is no room to be made."""

    def write(self, offset: int, data: Buffer) -> int:
        """Send `data` as soon as everything below `offset` was sent."""
        self._send(offset, len(data), memoryview(data))
        return len(data)

    def zero(self, offset: int, length: int) -> None:
        """Send zero bytes as soon as everything below `offset` was sent."""
        self._send(offset, length, None)

    def _send(self, offset: int, length: int, data: memoryview | None) -> None:
        with self._turn:
            while self._next != offset:
                if self._broken or self._cancel.is_set():
                    raise Cancelled
                self._turn.wait(_TICK_S)
        try:
            if data is not None:
                self._put(data)
            else:
                for at in range(0, length, len(_BLANK)):
                    self._put(_BLANK[: length - at])
        except BaseException as exc:
            self._broken = True
            if isinstance(exc, BrokenPipeError):
                raise TargetError(
                    "standard output was closed by its reader; nothing more was sent"
                ) from exc
            if isinstance(exc, OSError):
                raise failed("write to", "standard output", exc) from exc
            raise
        with self._turn:
            self._next = offset + length
            self._turn.notify_all()

    def _put(self, data: memoryview) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while data:
            if self._cancel.is_set():
                raise Cancelled
            if self._blocks and not self._own and not poll.poll(_TICK_S * 1000):
                continue
            try:
                part = data[:_ATOMIC] if self._blocks and not self._own else data
                data = data[os.write(self._fd, part) :]
            except OSError as exc:
                if exc.errno != errno.EAGAIN:
                    raise
                poll.poll(_TICK_S * 1000)

    def finish(self) -> None:
        """Make it durable where it is a file; a pipe's reader has to see to that itself."""
        try:
            os.fsync(self._fd)
        except OSError as exc:
            if exc.errno not in {errno.EINVAL, errno.EROFS, errno.ENOTSUP}:
                raise failed("write to", "standard output", exc) from exc
        finally:
            self.abort()

    def abort(self) -> None:
        """See `Target.abort`; what was sent can't be taken back."""
        self._broken = True
        if self._own:
            os.close(self._fd)
            self._own = False
