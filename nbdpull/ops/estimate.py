"""estimate: what a backup would read now, without making one."""

from __future__ import annotations

from dataclasses import dataclass

from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import DiskEstimate, EstimateResult
from nbdpull.model.results import Level
from nbdpull.ops.lineage import Chain, backup_level, known_disks, parent_of
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Repository
from nbdpull.source.base import Source
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.open import check_source, open_source

__all__ = ["EstimateOptions", "estimate", "estimate_open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateOptions:
    """Of which backup; see `BackupOptions`."""

    source: tuple[str, ...]
    repository: str
    level: Level | None = None
    vm: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    chain: str = "default"
    keys: KeySource | None = None


async def estimate(options: EstimateOptions) -> EstimateResult:
    """Choose a base for each disk as a backup would, and count what its bitmap holds.

    Raises:
        UsageError: the options can't be.
        InUseError, SourceError: the source can't be asked.
        RepositoryNotFoundError: no repository there.
    """
    # A disk that a backup would refuse can be counted all the same.
    qemu = QemuOptions(force=True)
    check_source(options.source, qemu)
    repository = await call(Repository.open, options.repository, keys=options.keys)
    known = await call(known_disks, repository, options.vm)
    async with open_source(options.source, qemu, known=known) as source:
        return await estimate_open(source, repository, options)


async def estimate_open(
    source: Source, repository: Repository, options: EstimateOptions
) -> EstimateResult:
    """`estimate` of a source that is open."""
    vm = options.vm or (await source.vm_name())[0]
    chain = await call(Chain, repository, vm, options.chain, sees_changes_only=False)
    disks = []
    decisions = []
    for disk in await source.disks(include=options.include, exclude=options.exclude):
        decision, _ = await call(chain.choose, disk, options.level, None)
        changed = disk.allocated
        if decision.base is not None:
            bitmap = disk.bitmaps.get(decision.base.checkpoint or "")
            changed = None if bitmap is None else bitmap.count
        if changed is not None:
            # A bitmap counts whole grains, also the last one that is cut by the disk's end.
            changed = min(changed, disk.size)
        decisions.append(decision)
        disks.append(
            DiskEstimate(
                name=disk.name,
                size=disk.size,
                level=decision.level,
                reason=decision.reason,
                changed_bytes=changed,
            )
        )
    return EstimateResult(
        vm=vm,
        chain=options.chain,
        level=backup_level(decisions),
        parent=parent_of(decisions, chain),
        disks=tuple(disks),
    )
