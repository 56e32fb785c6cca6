"""What a pull works on: disks, their segments under way, and batches of what is to be read of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from nbdpull.model.grain import FRAME_MAX, GRAIN, SEGMENT, Kind, Kinds, frame_runs
from nbdpull.model.segment import Interval, Segment
from nbdpull.ops.extents import Overwritten
from nbdpull.ops.heal import Healer
from nbdpull.ops.kept import Kept
from nbdpull.ops.resuming import take_stored
from nbdpull.ops.waiting import Waiting
from nbdpull.repo.repository import DiskReader, KnownFrame, Session
from nbdpull.source.journal import DiskJournal

__all__ = ["Batch", "DiskPull", "PullCounts", "SegmentWork", "batches", "finish", "left_to_read"]

_BATCH_BYTES: Final = FRAME_MAX
"""Workers put their frames into one pack in turns: the less each takes at a time, the nearer are neighbours on the
disk in the pack, and the fewer requests does a restore from an object store need."""


@dataclass(slots=True)
class PullCounts:
    """What one disk's pull did, in bytes."""

    changed: int = 0
    read: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPull:
    """One disk to pull.

    Attributes:
        name: for progress.
        size: bytes.
        uri: its export.
        context: meta context of what changed; None reads everything that is not known to be zero.
        granularity: bytes of the smallest change that it can tell.
        overwritten: tells after a block status which of its ranges the source may have overwritten meanwhile;
            None where nobody writes.
        trims: what is not read any more is given back, see `nbdpull.ops.trimming`.
        waiting: what of it is not given back yet; None where that is done at once. Only with a `journal`.
        near: `overwritten` may be asked for the whole disk, often.
        connections: that each puller may read through at a time.
        parent: where unchanged grains are looked up; set when `context` is.
        session: where frames and maps go.
        audit: how many clean frames, and clean zeroes, are looked at although the bitmap calls them clean, besides
            the last ones; None where what is clean can't be read.
        lie: set when the audit found that it is wrong, now or in a run that died: then the disk is read in full.
        on_lie: is told of one that was found now.
        healer: what of this disk the repository lost; None when nothing is known to be.
        journal: what a run that died had read of this point in time, and where to note what is read.
        kept: set where a lost connection may be made again: its export is of this point in time, and no other.
    """

    name: str
    size: int
    uri: str
    context: str | None
    parent: DiskReader | None
    session: Session
    audit: int | None = None
    lie: list[str] = field(default_factory=list)
    on_lie: Callable[[str], None] | None = None
    healer: Healer | None = None
    journal: DiskJournal | None = None
    kept: Kept | None = None
    granularity: int = GRAIN
    overwritten: Overwritten | None = None
    trims: bool = False
    waiting: Waiting | None = None
    near: bool = False
    connections: int = 1
    counts: PullCounts = field(default_factory=PullCounts)


@dataclass(slots=True)
class SegmentWork:
    """A segment under way: what is to become of its grains, and how much of it is still out.

    Attributes:
        before: what clean grains are taken from, where that is not simply the parent's map.
    """

    disk: DiskPull
    index: int
    kinds: Kinds
    intervals: list[Interval]
    open_batches: int
    known: Sequence[KnownFrame] = ()
    """What an earlier backup has at these places, sorted."""
    before: Segment | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Runs of grains of one segment, each a frame: the first grain, and how many."""

    work: SegmentWork
    runs: Sequence[tuple[int, int]]


def batches(work: SegmentWork, left: Kinds) -> list[Batch]:
    """What is to be read of a segment: all that is still DATA in `left`."""
    cut: list[Batch] = []
    runs: list[tuple[int, int]] = []
    grains = 0
    for run in frame_runs(left):
        runs.append(run)
        grains += run[1]
        if grains * GRAIN >= _BATCH_BYTES:
            cut.append(Batch(work, runs))
            runs, grains = [], 0
    if runs:
        cut.append(Batch(work, runs))
    work.open_batches = len(cut)
    return cut


def left_to_read(work: SegmentWork) -> list[Batch]:
    """What of a segment is to be read, and what an earlier backup has there."""
    disk, left = work.disk, work.kinds
    if disk.kept is not None:
        left = disk.kept.take(work.index, left, work.intervals)
    if disk.journal is not None:
        asked = left
        left = take_stored(disk.journal, disk.session, work.index, left, work.intervals)
        if disk.waiting is not None and left is not asked:
            taken = np.where(asked != left, np.uint8(Kind.DATA), np.uint8(Kind.CLEAN))
            for first, grains in frame_runs(taken):
                start = work.index * SEGMENT + first * GRAIN
                disk.waiting.add(start, min(start + grains * GRAIN, disk.size), None)
    found = batches(work, left)
    if found:
        work.known = disk.session.known(work.index, left)
    return found


def finish(work: SegmentWork) -> None:
    """Every byte of the segment is in: write its map."""
    disk = work.disk
    before = work.before
    if before is None:
        before = disk.parent.segment(work.index) if disk.parent else Segment.empty()
    work.intervals.sort(key=lambda interval: interval.start)
    disk.session.put_segment(work.index, before.overlay(work.kinds, work.intervals))
    if disk.kept is not None:
        disk.kept.finish(work.index)
