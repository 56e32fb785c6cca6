"""Keeps the storage busy while the CPU decompresses, so that the last sync has little left to do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

__all__ = ["FileFlusher", "Flusher"]

_STEP = 64 * 1024 * 1024


class Flusher:
    """Makes what was written durable, in the background, each time another 64 MiB were.

    Attributes:
        failure: what the first call that failed raised; the thread has ended then.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        """`sync` is called by a thread of the flusher, never twice at a time."""
        self.failure: BaseException | None = None
        self._sync = sync
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._stopping = False
        self._pending = 0
        self._thread = threading.Thread(target=self._run, name="nbdpull-flusher", daemon=True)
        self._thread.start()

    def wrote(self, length: int) -> None:
        """Count `length` more bytes."""
        with self._lock:
            self._pending += length
            if self._pending < _STEP:
                return
            self._pending = 0
        self._due.set()

    def _run(self) -> None:
        while True:
            self._due.wait()
            if self._stopping:
                return
            self._due.clear()
            try:
                self._sync()
            except BaseException as exc:  # noqa: BLE001 - told by who asks for it
                self.failure = exc
                return

    def stop(self) -> None:
        """End the thread; a second call does nothing."""
        self._stopping = True
        self._due.set()
        self._thread.join()


class FileFlusher(Flusher):
    """Syncs a file or device.

    Its failure need not be looked at: `fsync` of the same file reports it again to whoever calls it last (a
    write-back error is kept for each open file description until it was reported, and the flusher has
    its own).
    """

    def __init__(self, fd: int) -> None:
        """Take the file of `fd`, which stays the caller's.

        Raises:
            OSError: it can't be opened once more.
        """
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        super().__init__(lambda: os.fdatasync(self._fd))

    def stop(self) -> None:
        """End the thread; a second call does nothing."""
        super().stop()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
