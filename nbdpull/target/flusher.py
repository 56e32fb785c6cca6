"""Keeps the storage busy while the CPU decompresses, so that the last `fsync` has little left to do."""

from __future__ import annotations

import contextlib
import os
import threading

__all__ = ["Flusher"]

_STEP = 64 * 1024 * 1024


class Flusher:
    """Syncs a file in the background, each time another 64 MiB were written.

    Its errors are dropped on purpose: `fsync` of the same descriptor reports them again to whoever
    calls it last (a write-back error is kept for each open file description until it was reported,
    so the flusher has its own).
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
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
            with contextlib.suppress(OSError):
                os.fdatasync(self._fd)

    def stop(self) -> None:
        """End the thread; a second call does nothing."""
        if self._fd < 0:
            return
        self._stopping = True
        self._due.set()
        self._thread.join()
        os.close(self._fd)
        self._fd = -1
