"""protect, unprotect: keep backups from being forgotten, or no longer."""

from __future__ import annotations

from dataclasses import dataclass

from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import ProtectResult
from nbdpull.model.results import ProgressCallback
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Repository

__all__ = ["ProtectOptions", "protect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectOptions:
    """Which backups.

    Attributes:
        backups: ids, unique prefixes, or ``latest``.
        vm: only look among the backups of this VM; None for any.
        protect: False takes the protection away.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    backups: tuple[str, ...]
    vm: str | None = None
    protect: bool = True
    keys: KeySource | None = None


async def protect(
    options: ProtectOptions,
    *,
    progress: ProgressCallback | None = None,  # noqa: ARG001 - every verb takes one
) -> ProtectResult:
    """Protect backups, or take the protection away; one that is as wanted already is fine.

    Raises:
        BackupNotFoundError: no such backup, or it is forgotten.
        RepositoryError: it was forgotten at the same moment.
    """
    return await call(_protect, options)


def _protect(options: ProtectOptions) -> ProtectResult:
    repository = Repository.open(options.repository, write=True, keys=options.keys)
    # A forgotten one that is protected (both at the same moment) may be let go.
    found = [
        repository.find(name, vm=options.vm, forgotten=not options.protect)
        for name in options.backups
    ]
    for backup in found:
        if options.protect:
            repository.protect(backup)
        else:
            repository.unprotect(backup)
    return ProtectResult(
        backups=tuple(dict.fromkeys(backup.id for backup in found)), protected=options.protect
    )
