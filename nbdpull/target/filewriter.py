"""Data into a file or a device: past the page cache where that is cheaper.

A restored disk is written once and read by nobody soon, and must be durable in the end. Through the page
cache that costs a copy, the memory's pages, and a second pass that writes them out, which all writers of
one file wait for: about half of the CPU time of a restore. Handed to the storage directly (O_DIRECT,
open(2)) it costs next to nothing. What doesn't fit direct writing goes through the page cache: the disk's
last bytes, buffers that aren't whole pages, and data in many small runs, which would wait for the storage
once each. The two never meet in one page.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from nbdpull.target.base import Buffer
from nbdpull.target.flusher import Flusher

__all__ = ["FileWriter", "pwrite_all"]

_PAGE = mmap.PAGESIZE
_WORTH = 128 * 1024
"""Bytes for each direct write, on the average, from which on they are."""
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE, linux/falloc.h
_PUNCH_HOLE = 2  # FALLOC_FL_PUNCH_HOLE
_HOLES_MAX = 4096
_HOLES_BYTES = 32 << 20
"""So much room a restore may take for zeroes, before it gives it back: punching waits for all direct writes."""
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}


def _fallocate_of_libc() -> Callable[[int, int, int, int], int]:
    """fallocate(2), of a descriptor, a mode, an offset and a length: not 0 where it failed.

    Python has posix_fallocate alone, which writes into every block where the storage can't allocate.
    """
    libc = ctypes.CDLL(None)
    # "64" takes 64-bit offsets on every machine; libraries without it have no others.
    call = getattr(libc, "fallocate64", None) or libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        return int(call(fd, mode, offset, length))

    return fallocate


_fallocate = _fallocate_of_libc()


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`: one call writes at most 2 GiB, and less on a full disk."""
    while data:
        done = os.pwrite(fd, data, offset)
        data = data[done:]
        offset += done


class FileWriter:
    """Writes into an open file or device. Any thread may call `write`, for ranges of its own.

    Attributes:
        direct: whether the storage takes direct writes, as far as is known.
    """

    def __init__(self, fd: int) -> None:
        """Take `fd`, open for reading and writing; it stays the caller's.

        Raises:
            OSError: it can't be opened once more.
        """
        self._fd = fd
        self._flusher = Flusher(fd)
        self._direct_fd = -1
        with suppress(OSError):
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT
            self._direct_fd = os.open(f"/proc/self/fd/{fd}", flags)
        self.direct = self._direct_fd >= 0
        self._lock = threading.Lock()
        self._allocates = self.direct
        self._allocated = False
        self._holes: list[tuple[int, int]] = []
        self._hole_bytes = 0

    def make_room(self, offset: int, length: int) -> None:
        """Have room for direct writes into a range, where this storage can be asked for it.

        ext4 takes a file's lock alone for a direct write into a hole, until the storage has answered, and shares
        it where room was allocated before. Allocating waits for all direct writes that are on their way: better
        once for much than for each of them.
        """
        if not self._allocates:
            return
        if _fallocate(self._fd, _KEEP_SIZE, offset, length):
            # Where the disk is full a write says so in a moment.
            self._allocates = False
        else:
            self._allocated = True

    def leave(self, offset: int, length: int) -> None:
        """Note that nothing is written into whole pages for which there may be room: they shall take none."""
        if not self._allocated:
            return
        with self._lock:
            self._holes.append((offset, length))
            self._hole_bytes += length
            if len(self._holes) < _HOLES_MAX and self._hole_bytes < _HOLES_BYTES:
                return
            holes, self._holes, self._hole_bytes = self._holes, [], 0
        self._punch(holes)

    def give_back(self) -> None:
        """Let go of the room that `leave` was told of; no write is under way."""
        holes, self._holes = self._holes, []
        self._punch(holes)

    def _punch(self, holes: Sequence[tuple[int, int]]) -> None:
        for offset, length in holes:
            # Where it fails zeroes take room: they read the same.
            _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def write(self, data: Buffer, offset: int, runs: Sequence[tuple[int, int]]) -> int:
        """Put the `runs` of `data`, which begins at `offset` of the file, where they belong.

        Args:
            data: whose place in memory decides whether direct writing is possible.
            offset: bytes.
            runs: (start, end) in `data`, without overlap.

        Returns:
            How many bytes they are.

        Raises:
            OSError: the storage refused or failed.
        """
        view = memoryview(data)
        total = sum(end - start for start, end in runs)
        direct = self.direct and total >= _WORTH * len(runs) > 0 and _fits(view, offset)
        buffered = 0
        for start, end in runs:
            whole = start
            if direct and start % _PAGE == 0:
                whole = self._write_direct(view, offset, start, end - end % _PAGE)
            if whole < end:
                pwrite_all(self._fd, view[whole:end], offset + whole)
                buffered += end - whole
        self._flusher.wrote(buffered)
        return total

    def _write_direct(self, view: memoryview, offset: int, start: int, end: int) -> int:
        """Write whole pages; where in `view` it stopped, because this storage takes no more of them."""
        while start < end and self.direct:
            try:
                done = os.pwrite(self._direct_fd, view[start:end], offset + start)
            except OSError as exc:
                if exc.errno not in _REFUSED:
                    raise
                self.direct = False
                break
            # Short on a full disk; the next call tells, or the page cache takes a part of a page.
            start += done
            if done % _PAGE:
                break
        return start

    def wrote(self, length: int) -> None:
        """Count bytes that the caller wrote through the page cache by other means."""
        self._flusher.wrote(length)

    def stop(self) -> None:
        """End its thread and close what it opened; a second call does nothing."""
        self._flusher.stop()
        fd, self._direct_fd = self._direct_fd, -1
        self.direct = False
        if fd >= 0:
            os.close(fd)


def _fits(view: memoryview, offset: int) -> bool:
    if not len(view) or offset % _PAGE:
        return False
    address = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    return bool(address % _PAGE == 0)
