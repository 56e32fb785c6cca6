"""list: the backups in a repository."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nbdpull.model.ids import DiskId
from nbdpull.model.keysource import KeySource
from nbdpull.model.results import BackupInfo, DiskInfo
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Backup, Repository

__all__ = ["ListOptions", "backup_info", "disk_names", "list_backups"]

_log = logging.getLogger(__name__)

_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions:
    """Which backups.

    Attributes:
        vm: only those of this VM; None for any.
        chain: only those of this chain; None for any.
        incomplete: also those that lack the manifest of a disk.
        forgotten: also those that are forgotten and can still be brought back.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    vm: str | None = None
    chain: str | None = None
    incomplete: bool = False
    forgotten: bool = False
    keys: KeySource | None = None


async def list_backups(options: ListOptions) -> tuple[BackupInfo, ...]:
    """The backups, oldest first. A manifest that can't be read is logged as a warning.

    Raises:
        RepositoryNotFoundError: there is no repository.
        StoreError: the storage can't be read.
    """
    return await call(_list, options)


def _list(options: ListOptions) -> tuple[BackupInfo, ...]:
    repository = Repository.open(options.repository, keys=options.keys)
    everything, unreadable = repository.everything()
    found = [one for one in everything if options.forgotten or one.forgotten is None]
    for one in unreadable:
        # The backup it belongs to can't be told, and must not just be absent.
        _log.warning("%s", one.error)
    names = disk_names(found)
    vms = sorted({backup.vm for backup in found})
    if options.vm is not None and vms and options.vm not in vms:
        more = f" and {len(vms) - _LISTED} more" if len(vms) > _LISTED else ""
        _log.warning(
            "no backup is of a VM '%s'; there are backups of %s%s",
            options.vm,
            ", ".join(f"'{vm}'" for vm in vms[:_LISTED]),
            more,
        )
    chosen = [
        backup_info(backup, names)
        for backup in found
        if (backup.complete or options.incomplete)
        and options.vm in {None, backup.vm}
        and options.chain in {None, backup.chain}
    ]
    return tuple(sorted(chosen, key=lambda info: (info.time, info.backup)))


def disk_names(backups: Iterable[Backup]) -> dict[DiskId, str]:
    """The names of all disks that any of the backups has: an id alone tells nobody anything."""
    return {summary.disk_id: summary.disk for backup in backups for summary in backup.disks}


def backup_info(backup: Backup, names: Mapping[DiskId, str]) -> BackupInfo:
    """What is public of a backup; its disks are sorted by name."""
    summaries = sorted(backup.real_disks, key=lambda summary: summary.disk)
    return BackupInfo(
        backup=backup.id,
        vm=backup.vm,
        chain=backup.chain,
        level=backup.level,
        parent=backup.parent,
        time=backup.time,
        duration_s=backup.duration_s,
        disks=tuple(
            DiskInfo(
                name=summary.disk,
                size=summary.size,
                level=summary.disk_level,
                reason=summary.reason,
                changed_bytes=summary.changed_bytes,
                read_bytes=summary.read_bytes,
                stored_bytes=summary.stored_bytes,
                reused_bytes=summary.reused_bytes,
            )
            for summary in summaries
        ),
        complete=backup.complete,
        missing=tuple(sorted(names.get(disk, disk) for disk in backup.missing)),
        tags=backup.tags,
        forgotten=backup.forgotten is not None,
        protected=backup.protected,
        machine=() if backup.machine is None else backup.machine.machine or (),
    )
