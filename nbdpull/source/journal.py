"""What a run has read of its point in time, by place and digest: so that another process need not read it again.

    block    entries u32 | BLAKE3-128 of (backup, number of the block, entries) | entries
    entry    disk u32 | bytes u32 | place u64 | digest, 32 bytes; of zeroes all zero        (little-endian)

An entry is a claim about the point in time, nothing more: it counts when a frame of that digest is found among
those that are durable. So it may be written before its pack is. A block that a kill cut short, and what follows
it, does not count. A full folder ends the journal, not the backup.

An entry of no bytes says that the disk's audit found nothing. Zeroes may be longer than a frame, within a segment.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nbdpull.model.grain import FRAME_MAX, GRAIN, SEGMENT

__all__ = [
    "ENTRIES_MAX",
    "JOURNAL_MAX",
    "ZEROES",
    "DiskJournal",
    "FileHere",
    "Journal",
    "JournalFile",
]

log = logging.getLogger(__name__)

ZEROES: Final = bytes(32)
"""In place of a digest: the range reads as zeroes."""

ENTRIES_MAX: Final = 1 << 20
"""48 MiB: a TiB in frames of 1 MiB. What is read beyond is not noted, and would be read again."""

_ENTRY: Final = np.dtype([("disk", "<u4"), ("length", "<u4"), ("start", "<u8"), ("digest", "V32")])
_HEAD: Final = 20
_BLOCK: Final = 16
"""Entries; so many at most are lost by a kill: 16 MiB, and less than a pack."""
_BLOCK_MAX: Final = 4096
_AUDITED: Final = b"audited".ljust(32, b"\0")

JOURNAL_MAX: Final = ENTRIES_MAX * (_ENTRY.itemsize + _HEAD)
"""Bytes: of one with an entry in each block."""


class JournalFile(Protocol):
    """The file of a journal, wherever it is. All raise OSError where that can't be done."""

    def read(self, at: int, length: int) -> bytes:
        """Up to `length` bytes at `at`; fewer only at its end."""

    def cut(self, length: int) -> None:
        """Take away what is behind the first `length` bytes; what is appended comes there."""

    def append(self, raw: bytes) -> None:
        """Write behind what is there."""

    def room(self) -> int:
        """Bytes that are free beside it; 0 where that is not told."""

    def close(self) -> None:
        """Let it go."""


class FileHere:
    """See `JournalFile`: one of this host."""

    def __init__(self, fd: int) -> None:
        """Take an open file, for reading and writing, which becomes this object's."""
        self._fd = fd

    def read(self, at: int, length: int) -> bytes:
        """See `JournalFile.read`."""
        return os.pread(self._fd, length, at)

    def cut(self, length: int) -> None:
        """See `JournalFile.cut`."""
        os.ftruncate(self._fd, length)
        os.lseek(self._fd, length, os.SEEK_SET)

    def append(self, raw: bytes) -> None:
        """See `JournalFile.append`."""
        if os.write(self._fd, raw) != len(raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def room(self) -> int:
        """See `JournalFile.room`."""
        state = os.fstatvfs(self._fd)
        return state.f_bavail * state.f_frsize

    def close(self) -> None:
        """See `JournalFile.close`."""
        os.close(self._fd)


def _check(backup: bytes, number: int, raw: bytes) -> bytes:
    return blake3(backup + number.to_bytes(8, "little") + raw).digest(16)


class Journal:
    """The journal of one run. All but `close` may be called by many threads; nothing raises."""

    def __init__(self, file: JournalFile, backup: str, record: Path | None = None) -> None:
        """Read what is there, and go on behind it.

        Args:
            file: of it, which becomes this object's.
            backup: the id of the backup that it is of.
            record: the file without which nobody goes on with the run.
        """
        self._file: JournalFile | None = file
        self._record = record
        self._complete = True
        self._backup = bytes.fromhex(backup)
        self._lock = threading.Lock()
        self._open: list[tuple[int, int, int, bytes]] = []
        self._blocks = 0
        self._count = 0
        entries, good = self._read(file)
        keys = (entries["disk"].astype(np.uint64) << np.uint64(48)) + entries["start"] // GRAIN
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._entries = entries
        self._order = order
        with suppress(OSError):
            file.cut(good)

    def _read(self, file: JournalFile) -> tuple[NDArray[np.void], int]:
        """All entries of the blocks that are whole, and where these end."""
        parts: list[bytes] = []
        good = 0
        while self._count < ENTRIES_MAX:
            head = file.read(good, _HEAD)
            count = int.from_bytes(head[:4], "little")
            if len(head) < _HEAD or not 1 <= count <= _BLOCK_MAX:
                break
            raw = file.read(good + _HEAD, count * _ENTRY.itemsize)
            if head[4:] != _check(self._backup, self._blocks, raw):
                break
            if len(raw) != count * _ENTRY.itemsize:
                break
            parts.append(raw)
            good += _HEAD + len(raw)
            self._blocks += 1
            self._count += count
        return np.frombuffer(b"".join(parts), dtype=_ENTRY), good

    def disk(self, number: int, size: int) -> DiskJournal:
        """Of one disk, by its number in the run; `size` in bytes."""
        return DiskJournal(self, number, size)

    def within(self, disk: int, start: int, end: int) -> Iterator[tuple[int, int, bytes]]:
        """(place, bytes, digest) of what was read before of [start, end) of a disk, sorted by place."""
        bounds = [(disk << 48) + -(-at // GRAIN) for at in (start, end)]
        first, last = np.searchsorted(self._keys, np.array(bounds, dtype=np.uint64)).tolist()
        for at in self._order[first:last]:
            entry = self._entries[at]
            if entry["disk"] == disk:
                yield int(entry["start"]), int(entry["length"]), entry["digest"].tobytes()

    def note(self, disk: int, start: int, length: int, digest: bytes) -> None:
        """Note that `length` bytes at `start` have that digest, or are zero."""
        with self._lock:
            if self._file is None or self._count >= ENTRIES_MAX:
                self._complete = False
                return
            self._open.append((disk, length, start, digest))
            self._count += 1
            if len(self._open) >= _BLOCK:
                self._write()

    @property
    def kept(self) -> bool:
        """Whether somebody may go on with the run by what is noted, as far as is known."""
        return self._file is not None

    def flush(self) -> bool:
        """Write what is noted, so that it outlives this process; False where anything of it was not."""
        with self._lock:
            self._write()
            return self._file is not None and self._complete

    def room(self) -> int:
        """Bytes that are free beside it, where the scratch is; 0 where it has ended."""
        with self._lock:
            return 0 if self._file is None else self._file.room()

    def give_up(self, why: str) -> None:
        """Let nobody go on with the run any more: what is noted is going to be less than what is let go."""
        with self._lock:
            record, self._record = self._record, None
            if record is not None:
                log.debug("nobody could go on with this run from here on: %s", why)
                # Were it still there, QEMU would refuse to show what was let go.
                with suppress(OSError):
                    record.unlink()
            self._open.clear()
            self._end()

    def _write(self) -> None:
        if not self._open or self._file is None:
            return
        raw = np.array(self._open, dtype=_ENTRY).tobytes()
        block = len(self._open).to_bytes(4, "little")
        block += _check(self._backup, self._blocks, raw) + raw
        self._open.clear()
        self._blocks += 1
        try:
            self._file.append(block)
        except OSError as exc:
            log.debug("what is read is not noted any more: %s", exc)
            self._end()

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            # On a network's file system, or over a quota, the end of what was written may fail here.
            with suppress(OSError):
                file.close()

    def close(self) -> None:
        """Write what is left, and let the file go; a second call does nothing."""
        with self._lock:
            self._write()
            self._end()


class DiskJournal:
    """One disk's part of a journal."""

    def __init__(self, journal: Journal, number: int, size: int) -> None:
        self._journal = journal
        self._number = number
        self._size = size

    def note(self, start: int, length: int, digest: bytes) -> None:
        """See `Journal.note`."""
        self._journal.note(self._number, start, length, digest)

    def note_audited(self) -> None:
        """Note that what the disk's bitmap calls clean was looked at, and found so."""
        self._journal.note(self._number, 0, 0, _AUDITED)

    @property
    def audited(self) -> bool:
        """Whether that was noted before."""
        found = self._journal.within(self._number, 0, GRAIN)
        return any((length, digest) == (0, _AUDITED) for _, length, digest in found)

    @property
    def kept(self) -> bool:
        """See `Journal.kept`."""
        return self._journal.kept

    @property
    def began_before(self) -> bool:
        """Whether anything of the disk was noted by a run that died."""
        found = self._journal.within(self._number, 0, self._size)
        return next(found, None) is not None

    def flush(self) -> bool:
        """See `Journal.flush`."""
        return self._journal.flush()

    def room(self) -> int:
        """See `Journal.room`."""
        return self._journal.room()

    def give_up(self, why: str) -> None:
        """See `Journal.give_up`."""
        self._journal.give_up(why)

    def segment(self, index: int) -> Sequence[tuple[int, int, bytes]]:
        """(place, bytes, digest) of what was read before of segment `index`, sorted by place.

        Each is of whole grains, but for the disk's end, and lies within a frame's place; zeroes within the segment.
        """
        begin = index * SEGMENT
        found = self._journal.within(self._number, begin, min(begin + SEGMENT, self._size))
        return [one for one in found if self._sound(*one)]

    def _sound(self, start: int, length: int, digest: bytes) -> bool:
        end = start + length
        place = SEGMENT if digest == ZEROES else FRAME_MAX
        return (
            length > 0
            and start % GRAIN == 0
            and end <= self._size
            and (end % GRAIN == 0 or end == self._size)
            and start // place == (end - 1) // place
        )

    @property
    def nbytes(self) -> int:
        """What was read before of the disk, in bytes."""
        return sum(
            length
            for index in range(-(-self._size // SEGMENT))
            for _, length, _ in self.segment(index)
        )
