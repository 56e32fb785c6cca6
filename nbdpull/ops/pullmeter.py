"""How far a pull is, for its counts and for whoever is shown its progress."""

from __future__ import annotations

import threading
import time
from typing import Final

from nbdpull.model.results import Progress, ProgressCallback, ProgressKind
from nbdpull.ops.pullwork import DiskPull

__all__ = ["Meter"]

_PROGRESS_S: Final = 0.25


class Meter:
    """Counts bytes and tells the callback, at most a few times a second for each disk."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._told: dict[str, float] = {}

    def start(self, disk: DiskPull) -> None:
        """Begin to count a disk, or begin again."""
        with self._lock:
            again = disk.name in self._done
            self._done[disk.name] = 0
            if again:
                return
            self._tell(ProgressKind.DISK_START, disk, 0)

    def add(self, disk: DiskPull, done: int, *, read: int = 0, changed: int = 0) -> None:
        """Count `done` bytes of a disk as dealt with, however that was."""
        with self._lock:
            disk.counts.read += read
            disk.counts.changed += changed
            total = self._done[disk.name] = self._done[disk.name] + done
            now = time.monotonic()
            if total >= disk.size:
                self._tell(ProgressKind.DISK, disk, total)
                self._tell(ProgressKind.DISK_END, disk, total)
            elif now - self._told.get(disk.name, 0.0) >= _PROGRESS_S:
                self._told[disk.name] = now
                self._tell(ProgressKind.DISK, disk, total)

    def _tell(self, kind: ProgressKind, disk: DiskPull, done: int) -> None:
        if self._callback is not None:
            self._callback(
                Progress(
                    kind=kind,
                    verb="backup",
                    disk=disk.name,
                    done=done,
                    total=disk.size,
                    fields={
                        "read_bytes": disk.counts.read,
                        "changed_bytes": disk.counts.changed,
                        "stored_bytes": disk.session.stored_bytes,
                        "reused_bytes": disk.session.reused_bytes,
                    },
                )
            )
