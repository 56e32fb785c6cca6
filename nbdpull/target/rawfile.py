"""A raw disk file: sparse, one `pwrite` a run of data."""

from __future__ import annotations

import os
from pathlib import Path

from nbdpull.target.base import Buffer, runs
from nbdpull.target.flusher import Flusher
from nbdpull.target.partfile import PartFile, failed

__all__ = ["RawFile", "pwrite_all"]

_BLOCK = 4096
"""A hole is at least one file system block; the same as `qemu-img convert` takes."""


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`: one call writes at most 2 GiB, and less on a full disk."""
    while data:
        done = os.pwrite(fd, data, offset)
        data = data[done:]
        offset += done


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
        self._flusher = Flusher(self._part.fd)

    def write(self, offset: int, data: Buffer) -> int:
        """See `Target.write`."""
        view = memoryview(data)
        written = 0
        try:
            for start, end, zero in runs(view, _BLOCK):
                if not zero:
                    pwrite_all(self._part.fd, view[start:end], offset + start)
                    written += end - start
        except OSError as exc:
            raise failed("write to", self.name, exc) from exc
        self._flusher.wrote(written)
        return written

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: a range that was never written is a hole."""

    def finish(self) -> None:
        """See `Target.finish`."""
        self._flusher.stop()
        self._part.publish()

    def abort(self) -> None:
        """See `Target.abort`."""
        self._flusher.stop()
        self._part.remove()
