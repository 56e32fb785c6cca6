"""show: one backup and what it descends from."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from nbdpull.errors import DamagedError, StoreError, WrongKeyError
from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import ShowResult
from nbdpull.ops.list import backup_info, disk_names
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Backup, Repository

__all__ = ["ShowOptions", "show"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """Which backup.

    Attributes:
        backup: its id, a unique prefix of it, or ``latest``.
        vm: only look among the backups of this VM; None for any.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    backup: str
    vm: str | None = None
    keys: KeySource | None = None


async def show(options: ShowOptions) -> ShowResult:
    """One backup with its ancestors.

    Raises:
        RepositoryNotFoundError: there is no repository.
        BackupNotFoundError: no backup fits, or more than one.
        StoreError: the storage can't be read.
    """
    return await call(_show, options)


def _show(options: ShowOptions) -> ShowResult:
    repository = Repository.open(options.repository, keys=options.keys)
    wanted = repository.find(options.backup, vm=options.vm)
    by_id: dict[str, Backup] = {found.id: found for found in repository.backups()}
    names = disk_names(by_id.values())
    lineage: list[Backup] = []
    # A parent is older than its child, so this ends; but what is stored is not to be trusted.
    seen: set[str] = {wanted.id}
    parent: str | None = wanted.parent
    while parent is not None and parent in by_id and parent not in seen:
        seen.add(parent)
        lineage.append(by_id[parent])
        parent = by_id[parent].parent
    return ShowResult(
        backup=backup_info(wanted, names),
        lineage=tuple(backup_info(found, names) for found in lineage),
        lineage_end=None if parent in seen else parent,
        locked_until=_locked_until(repository, wanted),
    )


def _locked_until(repository: Repository, backup: Backup) -> float | None:
    try:
        return repository.locked_until(backup)
    except (DamagedError, WrongKeyError, StoreError) as exc:
        # All else is known, and worth telling.
        _log.warning("until when it is locked can't be told: %s", exc)
        return None
