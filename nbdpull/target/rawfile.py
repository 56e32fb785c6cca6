"""A raw disk file: sparse, one write a run of data."""

from __future__ import annotations

import os
from pathlib import Path

from nbdpull.target.base import Buffer, runs
from nbdpull.target.filewriter import FileWriter
from nbdpull.target.partfile import PartFile, failed

__all__ = ["RawFile"]

_BLOCK = 4096
"""A hole is at least one file system block; the same as `qemu-img convert` takes."""
_ROOM = 1024 * 1024
"""Room is made for ranges from this length on: for shorter ones there would be more calls than writes."""


class RawFile:
    """A new raw file; zeroes stay holes.

    Attributes:
        name: the final path.
    """

    note = ""

    def __init__(self, path: Path, size: int, *, force: bool) -> None:
        """Create it under a temporary name, `size` bytes long and without any data.

        Raises:
            UsageError: `path` exists and not `force`.
            TargetError: it can't be created, or the file system can't hold a file of that size.
        """
        self.name = str(path)
        self._part = PartFile(path, force=force)
        try:
            os.ftruncate(self._part.fd, size)
        except OSError as exc:
            self._part.remove()
            raise failed(f"make a file of {size} bytes at", self.name, exc) from exc
        self._writer = FileWriter(self._part.fd)

    def expect(self, offset: int, length: int) -> None:
        """See `Target.expect`."""
        if length >= _ROOM:
            self._writer.make_room(offset, length)

    def write(self, offset: int, data: Buffer) -> int:
        """See `Target.write`."""
        data_runs: list[tuple[int, int]] = []
        for start, end, zero in runs(data, _BLOCK):
            if zero:
                self._writer.leave(offset + start, end - start)
            else:
                data_runs.append((start, end))
        try:
            return self._writer.write(data, offset, data_runs)
        except OSError as exc:
            raise failed("write to", self.name, exc) from exc

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: a range that was never written is a hole."""

    def finish(self) -> None:
        """See `Target.finish`."""
        self._writer.give_back()
        self._writer.stop()
        self._part.publish()

    def abort(self) -> None:
        """See `Target.abort`."""
        self._writer.stop()
        self._part.remove()
