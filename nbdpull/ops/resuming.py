"""Going on at the point in time of a backup whose client died, instead of taking a new one.

    QEMU         holds the view and the bitmaps: `source.takeover` sees whether all of it is as it was made
    repository   has the parent still, and no backup of the chain since: the plan that would be made now must be
                 the one that was made then
    journal      what was read; where a frame is durable, too, it is referred to, and not read again

Whenever any of that is not so, what the dead one left is swept and a new point in time is taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

from nbdpull.model.grain import GRAIN, SEGMENT, Kind, Kinds
from nbdpull.model.results import Level
from nbdpull.model.segment import Interval
from nbdpull.ops.lineage import Chain
from nbdpull.ops.machinestate import TPM
from nbdpull.repo.repository import KnownFrame, Session
from nbdpull.source.base import CannotGoOnError, Resumable, Source
from nbdpull.source.journal import ZEROES, DiskJournal
from nbdpull.source.unfinished import Unfinished, UnfinishedDisk
from nbdpull.units import format_duration

__all__ = ["RESUME_WITHIN_S", "check_files", "check_same", "find_unfinished", "take_stored"]

RESUME_WITHIN_S: Final = 12 * 3600.0
"""Seconds: a retry goes on, and tomorrow night's backup is of tomorrow night."""


async def find_unfinished(
    source: Source,
    chain: Chain,
    *,
    level: Level | None,
    within_s: float,
) -> Unfinished | None:
    """The dead run of the chain that is to be gone on with; None when none died.

    Args:
        source: what is backed up.
        chain: of the backup.
        level: that is asked for now; None for any.
        within_s: how old its point in time may be; 0 for never.

    Raises:
        CannotGoOnError: there is one, and it is not gone on with.
    """
    if not isinstance(source, Resumable):
        return None
    record = await source.unfinished(chain.id)
    if record is None:
        return None
    age_s = time.time() - record.time
    if not 0 <= age_s < within_s:
        how = f"{format_duration(age_s)} old" if age_s >= 0 else "of a time that is still to come"
        raise CannotGoOnError(f"its point in time is {how} (see --resume-within)", record)
    if chain.knows(record.backup):
        raise CannotGoOnError("the repository has a part of it, or all", record)
    if chain.backups and chain.backups[0].time >= record.time:
        raise CannotGoOnError("the chain has a later backup", record)
    if level not in {None, record.asked}:
        raise CannotGoOnError(
            f"its level is {record.asked or 'auto'}, and {level} is asked for", record
        )
    if level is None and record.asked is Level.COPY:
        raise CannotGoOnError("it is a copy, which the chain can't go on from", record)
    return record


def check_same(record: Unfinished, now: Sequence[UnfinishedDisk]) -> None:
    """See that what would be done now is what was begun then.

    Raises:
        CannotGoOnError: it is not.
    """
    then = {disk.name: disk for disk in record.disks}
    if {disk.name for disk in now} != then.keys():
        raise CannotGoOnError("other disks are asked for, or are there now")
    for disk in now:
        if disk.size != then[disk.name].size:
            raise CannotGoOnError(f"disk '{disk.name}' has another size now")
        if disk != then[disk.name]:
            raise CannotGoOnError(f"disk '{disk.name}' would be read otherwise now")


def check_files(then: Iterable[str], now: Iterable[str]) -> None:
    """See that the files which are to be kept are those that were; their content is of then.

    Raises:
        CannotGoOnError: they are others.
    """
    if _asked(then) != _asked(now):
        raise CannotGoOnError(
            "other files are to be kept with it (--machine, --definition, --tpm-state)"
        )


def _asked(names: Iterable[str]) -> frozenset[str]:
    # Which files a TPM's state has is the TPM's business.
    return frozenset(TPM if name.startswith(TPM) else name for name in names)


def take_stored(
    journal: DiskJournal, session: Session, index: int, kinds: Kinds, intervals: list[Interval]
) -> Kinds:
    """Refer to what of segment `index` was read before and is durable, or is what an earlier backup has there.

    Args:
        journal: of the disk.
        session: that is being written.
        index: of the segment.
        kinds: what is to become of its grains.
        intervals: is added to.

    Returns:
        What is left to read, as DATA.
    """
    entries = journal.segment(index)
    if not entries:
        return kinds
    left = kinds.copy()
    at_place: dict[int, KnownFrame] | None = None
    for start, length, digest in entries:
        first, grains = (start - index * SEGMENT) // GRAIN, -(-length // GRAIN)
        if not (left[first : first + grains] == Kind.DATA).all():
            continue
        if digest != ZEROES:
            found = session.find_adopted(digest, length)
            if found is None:
                if at_place is None:
                    at_place = {known.start: known for known in session.known(index, kinds)}
                known = at_place.get(first)
                if known is None or not session.refer_unread(known, digest, length):
                    continue
                found = known.found
            intervals.append(
                Interval(
                    start=first,
                    n=grains,
                    session=found.session,
                    seq=found.seq,
                    offset=found.offset,
                    clen=found.clen,
                    skip=0,
                    flen=grains,
                )
            )
        left[first : first + grains] = Kind.CLEAN
    return left
