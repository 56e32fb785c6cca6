"""Which frames of a backup lie in packs that something is wrong with, and where they belong on its disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from nbdpull.errors import DamagedError, StoreError
from nbdpull.model.damage import DamagedFrame, Place
from nbdpull.model.frame import FrameKind
from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.model.ids import SessionId
from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo.damage import KNOWN_MAX, Pack
from nbdpull.repo.repository import DiskReader, Repository

__all__ = [
    "PARTIAL",
    "Suspect",
    "damaged_frame",
    "mend_indexes",
    "record_damage",
    "record_lost",
    "suspects",
]

_log = logging.getLogger(__name__)

PARTIAL: Final = (
    "it can't be made again, because not all of its packs are there: those that are there are read by what"
    " each says of itself, and new backups build on none of them"
)
"""What of an index is told that `DiskReader.partial` has."""


class Suspect(NamedTuple):
    """A frame in one of these packs, at one place of a disk.

    Attributes:
        session: index into the manifest's sessions.
        frame_start: where on the disk the whole frame begins.
        start, end: the disk's bytes that are read from it.
        read: reads it.

    A frame whose middle was overwritten comes once for each part.
    """

    place: Place
    session: int
    clen: int
    kind: FrameKind
    frame_start: int
    start: int
    end: int
    read: Callable[[], object]


def suspects(
    reader: DiskReader, packs: Container[Pack], cancel: threading.Event
) -> Iterator[Suspect]:
    """Every frame of a backup that lies in one of the packs, in disk order, maps before what they map.

    Of a map that can't be read only itself comes.
    """
    manifest = reader.manifest
    size = manifest.summary.size
    sids = [session.sid for session in manifest.sessions]
    for index, ref in enumerate(manifest.segments):
        if cancel.is_set():
            raise Cancelled
        if ref is None:
            continue
        base = index * SEGMENT
        end = min(base + SEGMENT, size)
        own = Place(sids[ref.session], ref.seq, ref.offset)
        if own[:2] in packs:
            yield Suspect(
                own,
                ref.session,
                ref.clen,
                FrameKind.MAP,
                base,
                base,
                end,
                partial(reader.segment, index),
            )
        if not any((sids[session], seq) in packs for session, seq in ref.packs):
            continue
        try:
            segment = reader.segment(index)
        except DamagedError:
            continue
        for interval in segment:
            place = Place(sids[interval.session], interval.seq, interval.offset)
            if place[:2] not in packs:
                continue
            start = base + interval.start * GRAIN
            yield Suspect(
                place,
                interval.session,
                interval.clen,
                FrameKind.DATA,
                start - interval.skip * GRAIN,
                start,
                min(start + interval.n * GRAIN, size),
                partial(reader.read, interval),
            )


def damaged_frame(repository: Repository, reader: DiskReader, one: Suspect) -> list[DamagedFrame]:
    """What to put on record of a frame that is lost: itself, and the copies of it, which are lost too."""
    rlen, digest = 0, bytes(32)
    try:
        header = reader.written(one.session, one.place.seq, one.place.offset)
        rlen, digest = header.rlen, header.digest
    except DamagedError:
        pass  # its index is lost too: then nothing can be compared with it
    first = DamagedFrame(
        place=one.place,
        clen=one.clen,
        rlen=rlen,
        digest=digest,
        kind=one.kind,
        disk=reader.manifest.summary.disk_id,
        start=one.frame_start,
    )
    copies = [
        DamagedFrame(
            place=healed.copy,
            clen=healed.clen,
            rlen=healed.rlen,
            digest=healed.digest,
            kind=one.kind,
            disk=first.disk,
            start=first.start,
        )
        for healed in repository.damage.copies(one.place)
    ]
    return [first, *copies]


def record_damage(repository: Repository, rows: list[DamagedFrame]) -> int:
    """Put rows on record where the repository can be written; how many were new."""
    unknown = repository.config.unknown("write")
    if unknown is not None:
        _log.warning("the damage is not recorded: the repository needs %s for that", unknown)
        return 0
    try:
        return repository.damage.add_damage(rows)
    except StoreError as exc:
        _log.warning("the damage can't be recorded, so no backup will heal it: %s", exc)
        return 0


def mend_indexes(repository: Repository, reader: DiskReader) -> set[str]:
    """Put indexes back that are gone, where the repository can be written; the keys of these."""
    if not reader.rebuilt or repository.config.unknown("write") is not None:
        return set()
    try:
        return repository.mend(reader)
    except StoreError as exc:
        _log.warning("what is gone can't be put back: %s", exc)
        return set()


def record_lost(
    repository: Repository, reader: DiskReader, keys: Sequence[str], cancel: threading.Event
) -> bool:
    """Put on record what of these objects a restore can't read; whether there is anything such."""
    packs = set()
    beyond = False
    for key in keys:
        kind, sid, number = (*key.split("/"), "", "")[:3]
        if kind == "d":
            packs.add((SessionId(sid), int(number, 16)))
        else:
            beyond = True  # of an index, or the manifest, only 'verify' can tell what it costs
    rows: list[DamagedFrame] = []
    for one in suspects(reader, packs, cancel):
        try:
            one.read()
        except DamagedError:
            rows += damaged_frame(repository, reader, one)
        if len(rows) >= KNOWN_MAX:
            break
    if rows:
        record_damage(repository, list(dict.fromkeys(rows)))
    return beyond or bool(rows)
