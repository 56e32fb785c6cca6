"""Direct writes and those through the page cache give the same file, whatever the storage takes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdpull.errors import TargetError
from nbdpull.target import filewriter
from nbdpull.target.base import Buffer
from nbdpull.target.filewriter import FileWriter
from nbdpull.target.rawfile import RawFile
from tests.target.helpers import MIB, disk_bytes, fill, random_bytes

SIZE = 9 * MIB + 4096 + 512 + 3


class Paged:
    """A target that gets its data in whole pages of memory, as a restore gives them."""

    note = ""

    def __init__(self, target: RawFile) -> None:
        self._target = target
        self.name = target.name

    def expect(self, offset: int, length: int) -> None:
        self._target.expect(offset, length)

    def write(self, offset: int, data: Buffer) -> int:
        room = memoryview(mmap.mmap(-1, len(data)))
        room[:] = data
        return self._target.write(offset, room)

    def zero(self, offset: int, length: int) -> None:
        self._target.zero(offset, length)

    def finish(self) -> None:
        self._target.finish()

    def abort(self) -> None:
        self._target.abort()


def direct_writes(monkeypatch: pytest.MonkeyPatch, then: Sequence[int | OSError] = ()) -> list[int]:
    """Note the length of each direct write; the first ones end as `then` says (bytes, or an error)."""
    lengths: list[int] = []
    pwrite = os.pwrite
    rest = list(then)

    def noted(fd: int, data: Buffer, offset: int) -> int:
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return pwrite(fd, data, offset)
        lengths.append(len(data))
        end = rest.pop(0) if rest else None
        if isinstance(end, OSError):
            raise end
        return pwrite(fd, memoryview(data)[:end], offset)

    monkeypatch.setattr(os, "pwrite", noted)
    return lengths


def test_whole_pages_are_written_directly_and_the_rest_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = direct_writes(monkeypatch)
    disk = disk_bytes(SIZE)
    path = tmp_path / "d.raw"
    fill(Paged(RawFile(path, SIZE, force=False)), disk)
    assert path.read_bytes() == disk
    # Where the storage refuses to be opened for it, nothing is.
    assert bool(lengths) == _takes_direct(tmp_path)
    assert all(length % mmap.PAGESIZE == 0 for length in lengths)


def _takes_direct(folder: Path) -> bool:
    path = folder / "probe"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "then",
    [
        [OSError(errno.EINVAL, "no direct writes here")],
        [MIB // 2, OSError(errno.EOPNOTSUPP, "nor here")],
        [MIB // 2 + 512, 4096],
    ],
    ids=["refused", "refused-after-a-part", "short"],
)
def test_what_the_storage_does_not_take_directly_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: list[int | OSError]
) -> None:
    direct_writes(monkeypatch, then)
    disk = random_bytes(3 * MIB)
    path = tmp_path / "d.raw"
    fill(Paged(RawFile(path, len(disk), force=False)), disk, threads=1)
    assert path.read_bytes() == disk


def test_what_is_expected_has_its_room_before_it_is_written_and_no_more_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room: list[int] = []
    pwrite = os.pwrite

    def noted(fd: int, data: Buffer, offset: int) -> int:
        room.append(os.fstat(fd).st_blocks * 512)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", noted)
    path = tmp_path / "d.raw"
    target = Paged(RawFile(path, 8 * MIB, force=False))
    target.expect(3 * MIB, 2 * MIB)
    for at in (3 * MIB, 4 * MIB):
        target.write(at, random_bytes(MIB))
    target.zero(0, 3 * MIB)
    target.zero(5 * MIB, 3 * MIB)
    target.finish()
    assert bool(room[0] >= 2 * MIB) == _takes_direct(tmp_path)
    assert path.stat().st_size == 8 * MIB
    assert path.stat().st_blocks * 512 < 3 * MIB


@pytest.mark.parametrize("most", [1, 1000], ids=["on the way", "at the end"])
def test_zeroes_in_what_was_expected_take_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(filewriter, "_HOLES_MAX", most)
    piece = random_bytes(MIB // 4)
    half = piece + bytes(MIB // 4)
    disk = half * 8 + bytes(4096) + piece[4096:] + half[:-5]
    path = tmp_path / "d.raw"
    target = Paged(RawFile(path, len(disk), force=False))
    target.expect(0, len(disk))
    for at in range(0, len(disk), MIB):
        target.write(at, disk[at : at + MIB])
    target.finish()
    assert path.read_bytes() == disk
    assert path.stat().st_blocks * 512 < len(disk) * 2 // 3


def test_storage_that_cannot_allocate_is_asked_once_and_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(_fd: int, _mode: int, offset: int, _length: int) -> int:
        asked.append(offset)
        return -1

    monkeypatch.setattr(filewriter, "_fallocate", refuse)
    disk = random_bytes(3 * MIB)
    path = tmp_path / "d.raw"
    target = Paged(RawFile(path, len(disk), force=False))
    for at in (0, MIB):
        target.expect(at, MIB)
    fill(target, disk, threads=1)
    assert path.read_bytes() == disk
    assert len(asked) == (1 if _takes_direct(tmp_path) else 0)


def test_a_failed_direct_write_is_a_target_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct_writes(monkeypatch, [OSError(errno.EIO, os.strerror(errno.EIO))])
    target = Paged(RawFile(tmp_path / "d.raw", MIB, force=False))
    if not _takes_direct(tmp_path):
        monkeypatch.setattr(os, "pwrite", _fails)
    with pytest.raises(TargetError, match=r"can't write to .*d\.raw"):
        target.write(0, random_bytes(MIB))
    target.abort()


def _fails(*_args: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_many_small_runs_and_unaligned_memory_are_not_written_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = direct_writes(monkeypatch)
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * MIB))
    fd = os.open(path, os.O_RDWR)
    writer = FileWriter(fd)
    room = memoryview(mmap.mmap(-1, 2 * MIB))
    room[:] = random_bytes(2 * MIB)
    small = [(at, at + 4096) for at in range(0, MIB, 8192)]
    assert writer.write(room[:MIB], 0, small) == MIB // 2
    assert writer.write(room[512 : MIB + 512], MIB, [(0, MIB)]) == MIB
    writer.stop()
    os.close(fd)
    assert lengths == []
    got = path.read_bytes()
    assert all(got[a:b] == room[a:b] for a, b in small)
    assert all(not any(got[b : b + 4096]) for _, b in small)
    assert got[MIB:] == room[512 : MIB + 512]
