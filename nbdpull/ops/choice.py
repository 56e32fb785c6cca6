"""What a backup does with each disk: from what it is counted, what it is compared with, what its checkpoint is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nbdpull.model.chain import Decision, obsolete
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest
from nbdpull.model.results import Level
from nbdpull.ops.backupoptions import BackupOptions
from nbdpull.ops.disknames import check_names
from nbdpull.ops.lineage import Chain
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Backup
from nbdpull.source.base import Disk, Source
from nbdpull.source.names import checkpoint_name, checkpoint_parts

__all__ = ["Chosen", "choose", "count_from", "distrust", "obsolete_bitmaps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One disk and what is to be done with it.

    Attributes:
        like: an earlier backup that a disk which is read in full is compared with.
    """

    disk: Disk
    decision: Decision
    parent: Manifest | None
    like: Manifest | None
    checkpoint: str | None


def distrust(lie: str) -> str:
    """Why a disk is read in full although a bitmap tells its changes."""
    return f"its changed-block tracking can't be trusted: {lie}"


def count_from(one: Chosen) -> str | None:
    """What tells the changes of a disk; None reads all of it."""
    if one.decision.base is None:
        return None
    return one.disk.told or one.decision.base.checkpoint


async def choose(
    source: Source,
    chain: Chain,
    options: BackupOptions,
    *,
    base: Backup | None,
    backup: BackupId,
    level: Level | None,
    distrusted: Mapping[str, str],
) -> list[Chosen]:
    """Decide what to do with each disk of a source.

    Args:
        source: what is backed up.
        chain: that the backup belongs to.
        options: of the backup.
        base: the backup that the user named, to compare with.
        backup: its id.
        level: that is asked for; None for the cheapest one.
        distrusted: disks whose changes are not believed, with the reason: they are read in full.

    Raises:
        SourceError, UsageError: the disks can't be told, or are not those that are asked for.
    """
    disks = await source.disks(include=options.include, exclude=options.exclude)
    check_names("disk", (disk.name for disk in disks))
    chosen = []
    for disk in disks:
        decision, parent = await call(chain.choose, disk, level, options.since)
        if decision.base is not None and disk.name in distrusted:
            reason = distrust(distrusted[disk.name])
            decision, parent = Decision(level=Level.FULL, reason=reason), None
        like = await call(chain.like, disk, base) if parent is None else None
        if like is not None:
            reason = f"{decision.reason}; what backup {like.summary.backup} has is not stored again"
            decision = replace(decision, reason=reason)
        checkpoint = None
        if decision.level is not Level.COPY and disk.records:
            named = None if disk.shares_checkpoint else disk.name
            checkpoint = checkpoint_name(chain.id, backup, named)
        chosen.append(
            Chosen(disk=disk, decision=decision, parent=parent, like=like, checkpoint=checkpoint)
        )
    return chosen


def obsolete_bitmaps(chosen: Sequence[Chosen], chain: Chain) -> dict[str, tuple[str, ...]]:
    """The chain's bitmaps that nothing is counted from any more, by disk name."""
    doomed = {}
    for one in chosen:
        if one.checkpoint is None:
            continue  # a copy leaves the chain as it is
        owned = [
            name
            for name in one.disk.bitmaps
            if (parts := checkpoint_parts(name)) is not None and parts[0] == chain.id
        ]
        full = one.checkpoint
        if one.decision.level is not Level.FULL:
            full = chain.full_checkpoint(one.disk.name) or one.checkpoint
        if full in one.disk.bitmaps and one.disk.bitmaps[full].inconsistent:
            full = one.checkpoint
        doomed[one.disk.name] = obsolete(owned, newest=one.checkpoint, full=full)
    return doomed
