"""A block device: everything on it is replaced, so zeroes must be made."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

from nbdpull.errors import TargetError, UsageError
from nbdpull.target.base import Buffer, runs
from nbdpull.target.filewriter import FileWriter, pwrite_all
from nbdpull.target.partfile import failed

__all__ = ["BlockDevice"]

_BLOCK = 64 * 1024
"""Shorter runs of zeroes are written as they are: a request of their own costs more."""
_STEP = 256 * 1024 * 1024
"""Longest range for one zeroing call, so that a cancelled restore ends soon."""
_BLANK = memoryview(bytes(1024 * 1024))

_BLKSSZGET = 0x1268  # linux/fs.h: logical block size, an int
_BLKZEROOUT = 0x127F  # linux/fs.h: two u64, start and length
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_UNSUPPORTED = {
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EINVAL,
    errno.EPERM,
    errno.ENODEV,
}


class BlockDevice:
    """An existing block device, held exclusively while it is written.

    Attributes:
        name: its path.
        note: which of its bytes are left alone, when it is larger than the disk.
    """

    def __init__(self, path: str, size: int, *, force: bool) -> None:
        """Open it.

        Args:
            path: the device node.
            size: bytes of the disk to restore.
            force: also take a device that is mounted or held by something else.

        Raises:
            UsageError: not a block device, too small, or in use and not `force`.
            TargetError: it can't be opened.
        """
        self.name = path
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            if not stat.S_ISBLK(Path(path).stat().st_mode):
                raise UsageError(f"'{path}' is not a block device")
            # On a block device O_EXCL without O_CREAT means: fail when mounted or held (open(2)).
            self._fd = os.open(path, flags if force else flags | os.O_EXCL)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise UsageError(
                    f"block device '{path}' is mounted or held by something else; release it, or"
                    " give --force to overwrite it anyway"
                ) from exc
            raise failed("open", path, exc) from exc
        try:
            device_size = os.lseek(self._fd, 0, os.SEEK_END)
            raw = fcntl.ioctl(self._fd, _BLKSSZGET, bytes(4))
            self._writer = FileWriter(self._fd)
        except OSError as exc:
            os.close(self._fd)
            raise failed("ask the size of", path, exc) from exc
        self._sector: int = struct.unpack("=i", raw)[0]
        if device_size < size:
            self.abort()
            raise UsageError(
                f"block device '{path}' has {device_size} bytes, the disk has {size}; choose a larger one"
            )
        self.note = (
            f"bytes {size} to {device_size} of '{path}' are left as they were"
            if device_size > size
            else ""
        )
        # First what also frees space, then what only zeroes, at last plain writes.
        self._ways = [self._punch, self._zero_out, self._write_zeroes]

    def expect(self, offset: int, length: int) -> None:
        """Nothing to do: there is no room to be made."""

    def write(self, offset: int, data: Buffer) -> int:
        """See `Target.write`."""
        data_runs: list[tuple[int, int]] = []
        try:
            for start, end, zero in runs(data, _BLOCK):
                if zero:
                    self.zero(offset + start, end - start)
                else:
                    data_runs.append((start, end))
            return self._writer.write(data, offset, data_runs)
        except OSError as exc:
            raise failed("write to", self.name, exc) from exc

    def zero(self, offset: int, length: int) -> None:
        """See `Target.zero`."""
        end = offset + length
        # Only whole sectors can be zeroed by the device. `offset` is a multiple of a grain.
        aligned = end - end % self._sector
        try:
            while offset < aligned:
                step = min(_STEP, aligned - offset)
                self._zero_sectors(offset, step)
                offset += step
            if offset < end:
                self._write_zeroes(offset, end - offset)
        except OSError as exc:
            raise failed("zero a range of", self.name, exc) from exc

    def _zero_sectors(self, offset: int, length: int) -> None:
        while True:
            way = self._ways[0]
            try:
                way(offset, length)
            except OSError as exc:
                if exc.errno not in _UNSUPPORTED or way == self._write_zeroes:
                    raise
                # Another thread may have dropped the same way meanwhile.
                self._ways = [other for other in self._ways if other != way]
            else:
                return

    def _punch(self, offset: int, length: int) -> None:
        # fallocate(2) on a block device: zeroes for certain, with the blocks unmapped where the
        # device can. BLKDISCARD promises no zeroes.
        if _libc.fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _zero_out(self, offset: int, length: int) -> None:
        fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))

    def _write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            step = min(len(_BLANK), end - offset)
            pwrite_all(self._fd, _BLANK[:step], offset)
            offset += step
        self._writer.wrote(length)

    def finish(self) -> None:
        """See `Target.finish`."""
        self._writer.stop()
        fd, self._fd = self._fd, -1
        try:
            os.fsync(fd)
        except OSError as exc:
            raise TargetError(
                f"can't make the writes to '{self.name}' durable: {exc.strerror}"
            ) from exc
        finally:
            os.close(fd)

    def abort(self) -> None:
        """Let go of it; what was written stays."""
        self._writer.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
