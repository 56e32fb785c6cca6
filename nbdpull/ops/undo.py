"""undo: bring a forgotten backup back, as long as no collector has ended its undo window.

The backup is committed again under new sessions that pin the old manifests. Taking the marks away instead
would race with a collector that read them a moment ago; this way the usual rule decides: either the
collector sees the sessions and spares what they need, or they see its tombstones and say that it is late.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdpull.errors import RepositoryError
from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import UndoResult
from nbdpull.model.results import ProgressCallback
from nbdpull.ops.recommit import Recommit
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Backup, ParentGoneError, Repository

__all__ = ["UndoOptions", "undo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoOptions:
    """Which backups.

    Attributes:
        backups: ids or unique prefixes.
        vm: only look among the backups of this VM; None for any.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    backups: tuple[str, ...]
    vm: str | None = None
    keys: KeySource | None = None


async def undo(
    options: UndoOptions,
    *,
    progress: ProgressCallback | None = None,  # noqa: ARG001 - every verb takes one
) -> UndoResult:
    """Bring forgotten backups back; one that is not forgotten is left as it is.

    Raises:
        BackupNotFoundError: no such backup: it never was, or is deleted.
        RepositoryError: a collector is deleting it, or it lacks a disk.
    """
    return await call(_undo, options)


def _undo(options: UndoOptions) -> UndoResult:
    repository = Repository.open(options.repository, write=True, keys=options.keys)
    found = {
        backup.id: backup
        for backup in (
            repository.find(name, vm=options.vm, forgotten=True) for name in options.backups
        )
    }
    for backup in found.values():
        if not backup.complete:
            raise RepositoryError(
                f"backup {backup.id} can't be brought back: it lacks a disk, or is being deleted"
            )
    restored = [backup for backup in found.values() if backup.forgotten is not None]
    for backup in restored:
        _bring_back(repository, backup)
    return UndoResult(
        restored=tuple(backup.id for backup in restored),
        unchanged=tuple(name for name, backup in found.items() if backup.forgotten is None),
    )


def _bring_back(repository: Repository, backup: Backup) -> None:
    try:
        again = Recommit(repository, backup, role="undo")
    except ParentGoneError as exc:
        raise RepositoryError(
            f"backup {backup.id} can't be brought back: its undo window has ended and it is being deleted"
        ) from exc
    try:
        again.commit()
    except BaseException:
        again.abandon()
        raise
