"""What to call disks that only their ids are known of."""

from __future__ import annotations

from collections.abc import Iterable

from nbdpull.model.ids import DiskId
from nbdpull.repo.repository import Repository

__all__ = ["disk_names"]


def disk_names(repository: Repository, ids: Iterable[DiskId]) -> tuple[str, ...]:
    """The disks' names, as other backups tell them; the id itself where none does."""
    known = {summary.disk_id: summary.disk for summary in repository.summaries()}
    return tuple(known.get(disk, disk) for disk in ids)
