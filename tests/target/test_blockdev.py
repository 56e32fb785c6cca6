"""Block devices: real ones through a loop device, which needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdpull.errors import UsageError
from nbdpull.target.blockdev import BlockDevice
from tests.target.helpers import MIB, allocated, disk_bytes, fill, random_bytes

SIZE = 16 * MIB


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(random_bytes(SIZE))
    return path


@pytest.fixture
def loop(backing: Path) -> Iterator[str]:
    command = ["losetup", "--find", "--show", str(backing)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs loop devices: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("size", [SIZE, SIZE - MIB - 77, 4096])
def test_device_full_of_garbage_gets_the_disk_and_keeps_the_rest(
    backing: Path, loop: str, size: int
) -> None:
    before = backing.read_bytes()
    disk = disk_bytes(size)
    target = BlockDevice(loop, size, force=False)
    assert bool(target.note) == (size != SIZE)
    fill(target, disk)
    assert backing.read_bytes() == disk + before[size:]


def test_zeroes_free_the_space_of_a_device_that_can(backing: Path, loop: str) -> None:
    target = BlockDevice(loop, SIZE, force=False)
    target.zero(0, SIZE)
    target.finish()
    assert backing.read_bytes() == bytes(SIZE)
    assert allocated(backing) < MIB


@pytest.mark.parametrize("unsupported", [1, 2])
def test_device_without_a_way_to_zero_gets_zeroes_written(
    backing: Path, loop: str, unsupported: int
) -> None:
    def refuse(offset: int, length: int) -> None:
        raise OSError(95, "Operation not supported")

    target = BlockDevice(loop, SIZE, force=False)
    target._ways[:unsupported] = [refuse] * unsupported
    fill(target, bytes(SIZE))
    assert backing.read_bytes() == bytes(SIZE)


def test_too_small_device_is_refused(loop: str) -> None:
    with pytest.raises(UsageError, match=f"has {SIZE} bytes, the disk has {SIZE + 1}"):
        BlockDevice(loop, SIZE + 1, force=False)


def test_device_that_is_held_is_only_taken_by_force(loop: str) -> None:
    holder = os.open(loop, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(UsageError, match=r"mounted or held.*--force"):
            BlockDevice(loop, SIZE, force=False)
        BlockDevice(loop, SIZE, force=True).abort()
    finally:
        os.close(holder)
    BlockDevice(loop, SIZE, force=False).abort()


def test_regular_file_is_not_a_device(backing: Path) -> None:
    with pytest.raises(UsageError, match="is not a block device"):
        BlockDevice(str(backing), SIZE, force=False)
