"""cleanup: remove from a source what a killed backup left there, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import CleanupResult
from nbdpull.model.results import ProgressCallback
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Repository
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.open import check_source, open_source

__all__ = ["CleanupOptions", "cleanup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupOptions:
    """What to clean.

    Attributes:
        source: URIs, see docs/sources.md.
        repository: when given, checkpoints of backups that are durable there are kept although their run
            died before it could say so; else they go, and the next backup reads more.
        scratch: where runs keep their folders; None for the system's temporary folder.
        force: also take away what a live (or stopped) run still uses.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    source: tuple[str, ...]
    repository: str | None = None
    scratch: str | None = None
    force: bool = False
    keys: KeySource | None = None


async def cleanup(
    options: CleanupOptions,
    *,
    progress: ProgressCallback | None = None,  # noqa: ARG001 - every verb takes one
) -> CleanupResult:
    """Remove dead runs' exports, jobs, nodes, bitmaps, scratch and NBD server; a second call does nothing.

    Raises:
        InUseError, SourceError: the source can't be asked.
        RepositoryNotFoundError: `repository` was given and is none.
    """
    qemu = QemuOptions(scratch=options.scratch)
    check_source(options.source, qemu)
    durable: frozenset[str] = frozenset()
    if options.repository is not None:
        repository = await call(Repository.open, options.repository, keys=options.keys)
        backups = await call(repository.backups)
        durable = frozenset(found.id for found in backups if found.complete)
    async with open_source(options.source, qemu) as source:
        swept = await source.sweep(lambda _chain, backup: backup in durable, force=options.force)
    return CleanupResult(removed=tuple(swept.removed), kept=tuple(swept.kept))
