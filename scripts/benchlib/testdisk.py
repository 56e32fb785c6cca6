"""The disks that everything is measured on.

A disk of `size` bytes, three quarters of them used, in these parts:

    ext4 | the machine's own programs and libraries (65 %) | archives (15 %) | random bytes (10 %) |
    then zeroes that take clusters (4 %), and free space
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

from scripts.benchlib.measure import run

__all__ = ["SparseDisk", "build", "sample", "scattered_offsets", "sparse_with_bitmap"]

_MIB = 1 << 20
_GRAIN = 64 << 10
_SEED = 20250131


def _link_tree(root: Path, wanted: int) -> int:
    """Hard links (else copies) of the files of /usr, up to `wanted` bytes; how many they are."""
    done = 0
    for folder, names, files in os.walk("/usr"):
        names.sort()
        target = root / folder.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        for name in sorted(files):
            source = Path(folder, name)
            if source.is_symlink() or not source.is_file():
                continue
            size = source.stat().st_size
            if size > 64 * _MIB:
                continue
            try:
                os.link(source, target / name)
            except OSError:
                shutil.copyfile(source, target / name)
            done += size
            if done >= wanted:
                return done
    return done


def _random_file(path: Path, size: int) -> None:
    generator = random.Random(_SEED)  # noqa: S311 - incompressible is all it has to be
    with path.open("wb") as file:
        for at in range(0, size, _MIB):
            file.write(generator.randbytes(min(_MIB, size - at)))


def _archives(folder: Path, tree: Path, size: int) -> None:
    """Files that are compressed already, `size` bytes of them."""
    folder.mkdir()
    with (folder / "usr.tar.gz").open("wb") as out:
        tar = subprocess.Popen(["tar", "-C", tree, "-cf", "-", "."], stdout=subprocess.PIPE)
        packed = subprocess.Popen(["gzip", "-1"], stdin=tar.stdout, stdout=subprocess.PIPE)
        if packed.stdout is None or tar.stdout is None:
            raise RuntimeError("no pipe")
        tar.stdout.close()
        left = size
        while left > 0 and (block := packed.stdout.read(min(left, 4 * _MIB))):
            out.write(block)
            left -= len(block)
        packed.kill()
        tar.kill()
        packed.wait()
        tar.wait()


def build(folder: Path, size: int) -> Path:
    """The test disk, as qcow2; one that was built before is taken."""
    disk = folder / f"disk-{size >> 20}.qcow2"
    if disk.exists():
        return disk
    folder.mkdir(parents=True, exist_ok=True)
    used = size * 3 // 4
    # Hard links need the same file system as /usr: beside the cache they mostly are.
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    raw = folder / "disk.raw"
    part = folder / "disk.part"
    try:
        _link_tree(tree, used * 65 // 100)
        _archives(tree / "archives", tree / "usr", used * 15 // 100)
        _random_file(tree / "random", used * 10 // 100)
        with raw.open("wb") as file:
            file.truncate(size)
        run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", "-d", tree, raw])
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, part])
        zeroes = used * 4 // 100 // _MIB * _MIB
        hole = _last_hole(raw, zeroes)
        # Written as data, not as a zero cluster: what a guest leaves that wipes its free space.
        writes = [f"write -q -P 0 {at} {_MIB}" for at in range(hole, hole + zeroes, _MIB)]
        commands = [part for line in writes for part in ("-c", line)]
        run(["qemu-io", "-f", "qcow2", *commands, part])
        part.rename(disk)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        raw.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    return disk


def _last_hole(raw: Path, wanted: int) -> int:
    """Where the last free range of `wanted` bytes begins."""
    fd = os.open(raw, os.O_RDONLY)
    best = -1
    try:
        end = os.fstat(fd).st_size
        at = 0
        while at < end:
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            if hole >= end:
                break
            try:
                data = os.lseek(fd, hole, os.SEEK_DATA)
            except OSError:
                data = end
            start = -(-hole // _MIB) * _MIB
            if data - start >= wanted:
                best = (data - wanted) // _MIB * _MIB
                best = max(best, start)
            at = data
    finally:
        os.close(fd)
    if best < 0:
        raise RuntimeError(f"the disk has no free range of {wanted} bytes")
    return best


def sample(raw: Path, target: Path, wanted: int) -> Path:
    """An even sample of a raw disk's data, in pieces of 1 MiB, for `zstd -b`."""
    fd = os.open(raw, os.O_RDONLY)
    pieces: list[int] = []
    try:
        end = os.fstat(fd).st_size
        at = 0
        while at < end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                break
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            pieces += range(at // _MIB * _MIB, hole, _MIB)
            at = hole
        step = max(1, len(pieces) * _MIB // wanted)
        with target.open("wb") as out:
            for piece in pieces[::step]:
                out.write(os.pread(fd, _MIB, piece))
    finally:
        os.close(fd)
    return target


def scattered_offsets(size: int, percent: float, round_: int) -> list[int]:
    """Offsets of distinct grains that are `percent` of the disk, the same ones for a round."""
    grains = size // _GRAIN
    generator = random.Random(_SEED + round_)  # noqa: S311 - repeatable is what it has to be
    return [
        grain * _GRAIN
        for grain in sorted(generator.sample(range(grains), int(grains * percent / 100)))
    ]


class SparseDisk:
    """A qcow2 file of many TiB that holds nothing but a dirty bitmap.

    Attributes:
        path: the image.
        bitmap: its bitmap's name.
        extents: dirty extents in it, of one grain each.
    """

    def __init__(self, path: Path, bitmap: str, extents: int) -> None:
        self.path = path
        self.bitmap = bitmap
        self.extents = extents


def sparse_with_bitmap(path: Path, size: int, extents: int) -> SparseDisk:
    """A sparse disk with so many scattered dirty extents of 64 KiB, made without writing them.

    A bitmap in a qcow2 file is a table of clusters with one bit a grain (docs/interop/qcow2.txt in
    QEMU, section "Bitmaps"). All entries of the table are made to point at one cluster of bits, so a
    disk of 16 TiB takes a few hundred KiB. Only for reading: the cluster's refcount is wrong.
    """
    cluster = 64 << 10
    path.unlink(missing_ok=True)
    run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)])
    run(["qemu-img", "bitmap", "--add", "-g", str(_GRAIN), path, "b0"])
    grains = size // _GRAIN
    clusters = -(-grains // (cluster * 8))
    each = extents // clusters
    generator = random.Random(_SEED)  # noqa: S311 - repeatable is what it has to be
    bits = bytearray(cluster)
    # Every second grain at most, so that no two are one extent.
    for place in generator.sample(range(cluster * 4), each):
        bits[place // 4] |= 1 << (place % 4 * 2)
    with path.open("r+b") as file:
        header = file.read(4096)
        directory = _bitmap_directory(header)
        file.seek(directory)
        table = int.from_bytes(file.read(8), "big")
        entries = int.from_bytes(file.read(4), "big")
        if not table or entries != clusters:
            raise RuntimeError(f"bitmap table of {entries} entries at {table}, expected {clusters}")
        file.seek(0, os.SEEK_END)
        data = -(-file.tell() // cluster) * cluster
        file.truncate(data)
        file.seek(data)
        file.write(bits)
        file.seek(table)
        file.write(data.to_bytes(8, "big") * entries)
    return SparseDisk(path, "b0", each * clusters)


def _bitmap_directory(header: bytes) -> int:
    at = int.from_bytes(header[100:104], "big")
    while True:
        kind, length = (int.from_bytes(header[at + n : at + n + 4], "big") for n in (0, 4))
        if kind == 0x23852875:
            return int.from_bytes(header[at + 24 : at + 32], "big")
        if kind == 0:
            raise RuntimeError("the image has no bitmap extension")
        at += 8 + -(-length // 8) * 8
