"""Watches the room that scratch images take, so that the guest never waits for room that is not there.

    free at the start   |=========================================|
    held back           |##########|                                 a file of real blocks
    given up below      |#####|                                      left beside what is held back

A backup job whose scratch is full makes QEMU pause the guest. So the backup ends before; and what is held
back is let go at that moment, which is room for what the guest overwrites while the view is taken down.
Were the guest paused all the same, its write finds room when it goes on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from typing import Final

from nbdpull.errors import ScratchFullError, SourceError, UsageError
from nbdpull.source.place import RunFolder

__all__ = ["Overwritten", "ScratchGuard"]

_HELD: Final = 64 << 20
_LEAST: Final = 1 << 20
"""Bytes of room without which nothing is begun."""
_RECENT_S: Final = 5.0


class ScratchGuard:
    """Of one run's folder.

    Attributes:
        peak: most bytes that the scratch images were seen to take at once.
    """

    def __init__(self, rundir: RunFolder, on_full: Callable[[ScratchFullError], None]) -> None:
        """Hold room back.

        Raises:
            UsageError: there is too little room to begin.
        """
        self._rundir = rundir
        self._on_full = on_full
        self.peak = 0
        free, _ = rundir.room()
        if free < _LEAST:
            raise UsageError(
                f"scratch folder {rundir.path.parent} has {free} bytes free, expected at least {_LEAST}"
                " (and as much as the guest overwrites during the backup); make room, or choose"
                " another folder with --scratch"
            )
        held = min(_HELD, free // 4)
        rundir.hold_back(held)
        self._low = held // 2
        # Far more than is written between two looks.
        self._tight = min((free - held) // 2, 4 * held)
        self._tight_at = -_RECENT_S
        self._let_go = False
        self._spare = 0

    def check(self) -> ScratchFullError | None:
        """Look once: the error when there is too little room to go on."""
        free, used = self._rundir.room()
        self.peak = max(self.peak, used)
        self._spare = free - self._low
        if free < self._tight:
            self._tight_at = time.monotonic()
        if free >= self._low:
            return None
        return self.full(f"it has {free} bytes left, and the backup ends at {self._low}")

    @property
    def pressed(self) -> bool:
        """Whether a write can have found no room: it was seen low some seconds ago, or was let go.

        Not the room of this moment: a trim may have made some since.
        """
        return self._let_go or time.monotonic() - self._tight_at < _RECENT_S

    def full(self, found: str) -> ScratchFullError:
        """Let go what was held back, and make the error."""
        self._let_go = True
        self._rundir.let_go()
        return ScratchFullError(
            f"the room in scratch folder {self._rundir.path.parent} ran out: {found}, so that the guest"
            f" need not wait; {self.peak} bytes that the guest has overwritten lay there: choose a folder with"
            " more room with --scratch, need less with --trim-scratch, or back up when the guest writes less"
        )

    async def watch(self) -> None:
        """Look until there is too little room, and tell that once."""
        while True:
            try:
                exc = await asyncio.to_thread(self.check)
            except SourceError:
                return  # the host is lost, which is told elsewhere
            if exc is not None:
                self._on_full(exc)
                return
            await asyncio.sleep(self._rundir.pace_s(self._spare))


class Overwritten:
    """Which blocks of a disk the guest may have overwritten since the point in time: those in its scratch.

    A block's old content is in the scratch before the guest's write goes on. So whoever looks here *after* a
    block status sees every block that the status can have been wrong about.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def close(self) -> None:
        """Let the file go; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __call__(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges of [start, end), as (start, end) in bytes; one thread at a time may ask."""
        ranges = []
        while start < end:
            try:
                first = os.lseek(self._fd, start, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # no data from there on, see lseek(2)
                    break
                raise
            if first >= end:
                break
            last = min(os.lseek(self._fd, first, os.SEEK_HOLE), end)
            ranges.append((first, last))
            start = last
        return ranges
