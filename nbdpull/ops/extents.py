"""From block status to what becomes of each grain: what changed, and what of that is zero."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nbdpull.model.grain import GRAIN, Kind, Kinds
from nbdpull.nbdio.connection import ReplyError
from nbdpull.nbdio.status import Allocation, Dirty, StatusReader

__all__ = ["Overwritten", "mark", "mark_changed", "plan_changed", "zero_where_known"]

log = logging.getLogger(__name__)

Overwritten = Callable[[int, int], Sequence[tuple[int, int]]]
"""Ranges of [start, end), in bytes, that the source may have overwritten since the point in time."""

_ASK_GRAINS: Final = 4
"""Shorter dirty runs are read without asking whether they are zero: the question costs as much."""


def mark(kinds: Kinds, starts: np.ndarray, ends: np.ndarray, base: int, kind: Kind) -> None:
    """Set `kind` on every grain that one of the extents touches."""
    first = (starts - base) // GRAIN
    last = -((base - ends) // GRAIN)
    if len(first) < 32:
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            kinds[a:b] = kind
        return
    steps = np.zeros(len(kinds) + 1, dtype=np.int32)
    np.add.at(steps, first, 1)
    np.add.at(steps, last, -1)
    kinds[np.cumsum(steps[:-1]) > 0] = kind


def zero_where_known(
    kinds: Kinds,
    allocation: StatusReader | None,
    base: int,
    start: int,
    end: int,
    overwritten: Overwritten | None = None,
    told: NDArray[np.bool_] | None = None,
) -> None:
    """Turn DATA in [start, end) into ZERO where the server says that it reads as zeroes.

    QEMU 7.2 tells of a point in time (snapshot-access) what overwritten blocks are *now*: what the guest
    has zeroed since would be kept as zero. So what was overwritten is read, whatever its status says.

    Grains that are set in `told` are not asked about: they may be trimmed, and a status that touches one is refused.
    With it `start` must be a grain's.
    """
    if allocation is None:
        return
    if told is not None:
        for first, last in _runs(~told[(start - base) // GRAIN : -((base - end) // GRAIN)]):
            since, until = start + first * GRAIN, min(start + last * GRAIN, end)
            zero_where_known(kinds, allocation, base, since, until, overwritten)
        return
    try:
        starts, ends, flags = allocation.read(start, end)
    except ReplyError as exc:
        log.debug("reading all of bytes %d to %d: %s", start, end, exc)
        return
    data = (flags & Allocation.ZERO) == 0
    first, last = (start - base) // GRAIN, -((base - end) // GRAIN)
    kinds[first:last] = Kind.ZERO
    if data.any():
        mark(kinds, starts[data], ends[data], base, Kind.DATA)
    for since, until in overwritten(start, end) if overwritten is not None else ():
        kinds[(since - base) // GRAIN : -((base - until) // GRAIN)] = Kind.DATA


def _runs(wanted: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def mark_changed(kinds: Kinds, dirty: StatusReader, base: int, end: int) -> bool:
    """Set DATA on every grain of [base, end) that changed; returns whether any did."""
    starts, ends, flags = dirty.read(base, end)
    changed = (flags & Dirty.DIRTY) != 0
    mark(kinds, starts[changed], ends[changed], base, Kind.DATA)
    return bool(changed.any())


def plan_changed(
    kinds: Kinds,
    dirty: StatusReader,
    allocation: StatusReader | None,
    base: int,
    end: int,
    overwritten: Overwritten | None = None,
    told: NDArray[np.bool_] | None = None,
) -> int:
    """Fill in `kinds` from a dirty bitmap; returns the changed bytes."""
    starts, ends, flags = dirty.read(base, end)
    changed = (flags & Dirty.DIRTY) != 0
    if not changed.any():
        return 0
    starts, ends = starts[changed], ends[changed]
    changed_bytes = int((ends - starts).sum())
    mark(kinds, starts, ends, base, Kind.DATA)
    # A grain that changed in part is zero only if all of it is.
    starts = starts // GRAIN * GRAIN
    ends = np.minimum(-(-ends // GRAIN) * GRAIN, end)
    # Asking for strictly what changed matters where the point in time shows nothing else (mode C).
    for index in np.flatnonzero(ends - starts >= _ASK_GRAINS * GRAIN).tolist():
        first, last = int(starts[index]), int(ends[index])
        zero_where_known(kinds, allocation, base, first, last, overwritten, told)
    return changed_bytes
