"""Counts bytes of one verb and tells its progress callback, not too often."""

from __future__ import annotations

import threading
import time

from nbdpull.model.results import Progress, ProgressCallback, ProgressKind

__all__ = ["Meter"]

_INTERVAL_S = 0.25


class Meter:
    """Progress of one disk, or of one whole run where `disk` is None. Any thread may call it."""

    def __init__(
        self, callback: ProgressCallback | None, *, verb: str, disk: str | None, total: int
    ) -> None:
        self._callback = callback
        self._verb = verb
        self._disk = disk
        self._total = total
        self._lock = threading.Lock()
        self._told = time.monotonic()
        self._done = 0
        self._counts: dict[str, str | int | float] = {}

    def start(self) -> None:
        """Tell that it begins."""
        self._tell(ProgressKind.DISK_START)

    def add(self, done: int, **counts: int) -> None:
        """Count `done` more bytes of the total, and more of whatever else is counted."""
        with self._lock:
            self._done += done
            for name, count in counts.items():
                self._counts[name] = int(self._counts.get(name, 0)) + count
            now = time.monotonic()
            if now - self._told < _INTERVAL_S:
                return
            self._told = now
            self._tell(ProgressKind.DISK)

    def count(self, name: str) -> int:
        """What was counted under `name` so far."""
        with self._lock:
            return int(self._counts.get(name, 0))

    def end(self) -> None:
        """Tell that it is done."""
        with self._lock:
            self._tell(ProgressKind.DISK_END)

    def message(self, text: str) -> None:
        """Tell a milestone."""
        if self._callback is not None:
            self._callback(
                Progress(kind=ProgressKind.MESSAGE, verb=self._verb, disk=self._disk, text=text)
            )

    def _tell(self, kind: ProgressKind) -> None:
        if self._callback is not None:
            self._callback(
                Progress(
                    kind=kind,
                    verb=self._verb,
                    disk=self._disk,
                    done=self._done,
                    total=self._total,
                    fields=dict(self._counts),
                )
            )
