"""How a disk is divided: grains, frames and segments.

segment  1 GiB   |------------------------------------------------ ... ---|
1 MiB            |---------------|---------------|---------------| ...
grains   64 KiB  |.|#|#|#|.|.|.|.|.|.|.|.|.|.|.|#|#|#|.|.| ...
frames             `-----'                       `' `---'     a frame never crosses a 1 MiB boundary
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DISK_MAX",
    "FRAME_GRAINS",
    "FRAME_MAX",
    "GRAIN",
    "SEGMENT",
    "SEGMENT_GRAINS",
    "Kind",
    "Kinds",
    "frame_runs",
    "segment_count",
    "segment_grains",
]

GRAIN: Final = 64 * 1024
"""Bytes: QEMU's default bitmap granularity, and qcow2's default cluster."""
FRAME_GRAINS: Final = 16
FRAME_MAX: Final = FRAME_GRAINS * GRAIN
"""1 MiB: larger frames hardly compress better and make a damaged one cost more."""
SEGMENT: Final = 1 << 30
SEGMENT_GRAINS: Final = SEGMENT // GRAIN
DISK_MAX: Final = 1 << 50
"""Bytes, 1 PiB: what is known of each segment of a disk takes memory, whether or not anything is in it."""


class Kind(IntEnum):
    """What a backup says of one grain."""

    CLEAN = 0
    """As in the parent."""
    ZERO = 1
    """Reads as zeroes."""
    DATA = 2
    """Is read from the source."""


Kinds: TypeAlias = NDArray[np.uint8]
"""One `Kind` for each grain of one segment; the last segment has only the disk's grains."""


def segment_count(size: int) -> int:
    """Segments of a disk of `size` bytes."""
    return -(-size // SEGMENT)


def segment_grains(size: int, index: int) -> int:
    """Grains of segment `index` of a disk of `size` bytes, the last one possibly short."""
    return -(-min(SEGMENT, size - index * SEGMENT) // GRAIN)


def frame_runs(kinds: Kinds) -> list[tuple[int, int]]:
    """Runs of DATA grains as (first grain, grains), cut where a frame must end."""
    data = kinds == Kind.DATA
    if not data.any():
        return []
    index = np.flatnonzero(data)
    starts_run = np.ones(len(index), dtype=bool)
    starts_run[1:] = (np.diff(index) != 1) | (index[1:] % FRAME_GRAINS == 0)
    first = np.flatnonzero(starts_run)
    counts = np.diff(np.append(first, len(index)))
    return list(zip(index[first].tolist(), counts.tolist(), strict=True))
