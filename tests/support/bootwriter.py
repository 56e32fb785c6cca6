"""A guest without an operating system that writes to its disks all the time.

It is one boot sector on a read-only floppy, and writes through the BIOS (int 13h, AH=43h). For
n = 1, 2, 3 ... it does, in this order and each step waiting for the one before:

    disk 0x80: 4 KiB of data at block(n), then the record (n) in sector 0
    disk 0x81: the same
    ...        up to the last disk

The data is the 32-bit number n over and over, but all zeroes when n is a multiple of 8; block(n)
is 1 + a pseudo-random number, in units of 4 KiB, never block 0. So at any one point in time

    record(0x80) - record(0x81) is 0 or 1, and
    a disk whose record is n holds data 1..n, and perhaps data n+1, and nothing later,

and `BootWriter.check` tests that for every byte of the area. The record survives a restart: the
guest goes on from the last disk's. (A qcow2 image whose QEMU was killed may have lost metadata
that was never flushed, as any crash may: then only compare with what `qemu-img` reads.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["BLOCK", "BootWriter", "Record"]

BLOCK = 4096
_MAGIC = b"NBDW"

# 16-bit code for address 0x7c00, as assembled by nasm 2.16.01. The data buffer is at 0x8000, the
# record at 0x9000. What it is told is at the end of the sector: mask, pause, last.
_CODE = bytes.fromhex(
    "fa"  # start: cli
    "31c0"  # xor ax, ax
    "8ed8"  # mov ds, ax
    "8ec0"  # mov es, ax
    "8ed0"  # mov ss, ax
    "bc007c"  # mov sp, 0x7c00
    "fb"  # sti
    "fc"  # cld
    "8a16fa7d"  # mov dl, [last]
    "bec07c"  # mov si, record_dap
    "b442"  # mov ah, 0x42
    "cd13"  # int 0x13
    "66813e00904e424457"  # cmp dword [0x9000], 0x5744424e
    "7415"  # je resume
    "bf0090"  # mov di, 0x9000
    "b98000"  # mov cx, 128
    "6631c0"  # xor eax, eax
    "f366ab"  # rep stosd
    "66c70600904e424457"  # mov dword [0x9000], 0x5744424e
    "66a10490"  # next: mov eax, [0x9004]
    "6640"  # inc eax
    "66a30490"  # mov [0x9004], eax
    "a807"  # test al, 7
    "7503"  # jnz fill
    "6631c0"  # xor eax, eax
    "bf0080"  # fill: mov di, 0x8000
    "b90004"  # mov cx, 1024
    "f366ab"  # rep stosd
    "66a10890"  # mov eax, [0x9008]
    "6669c00d661900"  # imul eax, eax, 1664525
    "66055ff36e3c"  # add eax, 1013904223
    "66a30890"  # mov [0x9008], eax
    "66c1e808"  # shr eax, 8
    "662306f27d"  # and eax, [mask]
    "6640"  # inc eax
    "66c1e003"  # shl eax, 3
    "66a3b87c"  # mov [data_lba], eax
    "b280"  # mov dl, 0x80
    "beb07c"  # disk: mov si, data_dap
    "e82200"  # call write
    "bec07c"  # mov si, record_dap
    "e81c00"  # call write
    "fec2"  # inc dl
    "3a16fa7d"  # cmp dl, [last]
    "76ec"  # jbe disk
    "8b16f67d"  # mov dx, [pause]
    "8b0ef87d"  # mov cx, [pause+2]
    "89c8"  # mov ax, cx
    "09d0"  # or ax, dx
    "749a"  # jz next
    "b486"  # mov ah, 0x86
    "cd15"  # int 0x15
    "eb94"  # jmp next
    "60"  # write: pusha
    "b80043"  # mov ax, 0x4300
    "cd13"  # int 0x13
    "61"  # popa
    "72f7"  # jc write
    "c3"  # ret
    "90"  # align 4
    "1000"  # data_dap: db 16, 0
    "0800"  # dw 8
    "00800000"  # dw 0x8000, 0
    "0000000000000000"  # data_lba: dq 0
    "1000"  # record_dap: db 16, 0
    "0100"  # dw 1
    "00900000"  # dw 0x9000, 0
    "0000000000000000"  # dq 0
)
_SETTINGS = 498
"""Offset of: mask of the block number (u32), pause in microseconds (u32), last BIOS disk (u8)."""


@dataclass(frozen=True, slots=True)
class Record:
    """Sector 0 of a disk: the last data block whose writing was over.

    Attributes:
        n: 0 on a disk the guest never wrote to.
        state: the random generator after block(n) was drawn.
    """

    n: int
    state: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BootWriter:
    """The guest, and what its disks must hold.

    Attributes:
        disks: how many disks it writes to, the first ones by `bootindex`.
        blocks: size of the area it writes at random in, in blocks of 4 KiB: a power of two. The
            disks must hold one block more. The default is 16 MiB.
        pause_us: what it sleeps after each round, in steps of about 1 ms; 0 = flat out, which
            costs a host CPU.
    """

    disks: int = 2
    blocks: int = 4096
    pause_us: int = 1000

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.blocks & (self.blocks - 1):
            raise ValueError(f"blocks must be a power of two, got {self.blocks}")

    def floppy(self) -> bytes:
        """A 1440 KiB floppy image that boots it."""
        settings = b"".join(
            (
                (self.blocks - 1).to_bytes(4, "little"),
                self.pause_us.to_bytes(4, "little"),
                (0x80 + self.disks - 1).to_bytes(1, "little"),
            )
        )
        sector = bytearray(512)
        sector[: len(_CODE)] = _CODE
        sector[_SETTINGS : _SETTINGS + len(settings)] = settings
        sector[510:] = b"\x55\xaa"
        return bytes(sector).ljust(1440 << 10, b"\0")

    def record(self, raw: Path) -> Record:
        """The record on a disk given as a raw image."""
        with raw.open("rb") as file:
            sector = file.read(512)
        if sector[:4] != _MAGIC:
            return Record(0, 0)
        return Record(int.from_bytes(sector[4:8], "little"), int.from_bytes(sector[8:12], "little"))

    def block_of(self, n: int) -> int:
        """Number of the block that data `n` goes to; `n` counts from 1."""
        return int(self._blocks_of(n)[-1])

    def expected(self, n: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """The value that fills each block once data 1..`n` is written; index 0 is block 1.

        A block that was never written counts as zero: start from empty disks.
        """
        values = np.zeros(self.blocks, dtype=np.uint32)
        numbers = np.arange(1, n + 1, dtype=np.uint32)
        # On a block that was hit twice the later value stays: numpy assigns in order.
        values[self._blocks_of(n) - 1] = np.where(numbers % 8 == 0, 0, numbers)
        return values

    def check(self, raw: Path) -> int:
        """Check every byte of one disk, a raw image, and return its record's number.

        Raises:
            AssertionError: it is not what the guest had written at one point in time.
        """
        record = self.record(raw)
        area = np.fromfile(raw, dtype="<u4", offset=BLOCK, count=self.blocks * BLOCK // 4)
        found = area.reshape(self.blocks, BLOCK // 4)
        wanted = self.expected(record.n)
        with raw.open("rb") as file:
            rest = file.read(BLOCK)[512 if record.n else 0 :]
        if any(rest):
            raise AssertionError(f"{raw}: block 0 holds something behind the record")
        wrong = np.flatnonzero((found != wanted[:, None]).any(axis=1))
        ahead = self.block_of(record.n + 1) - 1
        value = 0 if (record.n + 1) % 8 == 0 else record.n + 1
        wrong = wrong[(wrong != ahead) | (found[wrong] != value).any(axis=1)]
        if wrong.size:
            first = int(wrong[0])
            raise AssertionError(
                f"{raw}: record says {record.n}, but {wrong.size} of {self.blocks} blocks are "
                f"wrong; the first is block {first + 1}: expected {int(wanted[first])}, "
                f"got {sorted(set(found[first].tolist()))[:4]}"
            )
        return record.n

    def check_together(self, raws: list[Path]) -> int:
        """Check all disks, in the guest's order, and that they are from one point in time.

        Returns the first disk's record.

        Raises:
            AssertionError: a disk is wrong, or they are from different moments.
        """
        numbers = [self.check(raw) for raw in raws]
        steps = [early - late for early, late in itertools.pairwise(numbers)]
        if any(step < 0 for step in steps) or sum(steps) > 1:
            raise AssertionError(f"the disks are from different points in time: records {numbers}")
        return numbers[0]

    def _blocks_of(self, n: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        states = np.empty(n, dtype=np.uint32)
        state = 0
        for index in range(n):
            state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
            states[index] = state
        return 1 + ((states >> np.uint32(8)) & np.uint32(self.blocks - 1))
