"""copy: backups into a replica of their repository, in any other store."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from nbdpull.errors import RepositoryError
from nbdpull.model.keysource import KeySource
from nbdpull.model.results import CopyResult, Progress, ProgressCallback, ProgressKind
from nbdpull.nbdio.connection import Cancelled
from nbdpull.ops.threads import in_thread
from nbdpull.repo.repository import Repository

__all__ = ["CopyOptions", "copy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """What to copy.

    Attributes:
        source: where the backups are.
        target: the replica; it is made where there is nothing.
        backups: ids, unique prefixes or ``latest``; empty for all complete ones.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    source: str
    target: str
    backups: tuple[str, ...] = ()
    keys: KeySource | None = None


async def copy(options: CopyOptions, *, progress: ProgressCallback | None = None) -> CopyResult:
    """Copy backups verbatim; what is there already is not copied again.

    Raises:
        UsageError: the target holds something else.
        RepositoryNotFoundError: there is no source.
        BackupNotFoundError: no such backup.
        RepositoryError: the target is another repository, or a backup is incomplete.
        DamagedError: an object is not what was written; nothing wrong was copied.
        InUseError: a collection runs on the target.
    """
    return await in_thread(lambda cancel: _copy(options, progress, cancel))


def _copy(
    options: CopyOptions, progress: ProgressCallback | None, cancel: threading.Event
) -> CopyResult:
    def check() -> None:
        if cancel.is_set():
            raise Cancelled

    def say(text: str) -> None:
        if progress is not None:
            progress(Progress(kind=ProgressKind.MESSAGE, verb="copy", text=text))

    began = time.monotonic()
    source = Repository.open(options.source, keys=options.keys)
    if options.backups:
        found = {one.id: one for one in (source.find(name) for name in options.backups)}
        backups = sorted(found.values(), key=lambda one: (one.time, one.id))
    else:
        backups = [one for one in source.backups() if one.complete]
    copier = source.copier(options.target, check=check)
    copied, present, forgotten = [], [], []
    copier.begin()
    for backup in backups:
        if not backup.complete:
            raise RepositoryError(
                f"backup {backup.id} is incomplete, {len(backup.missing)} of its disks were never"
                " committed; only whole backups are copied"
            )
        manifests = [source.manifest(summary) for summary in backup.disks]
        if copier.forgotten(manifests):
            forgotten.append(backup.id)
            say(f"backup {backup.id}: left out, it was forgotten in the replica")
        elif copier.copy(manifests):
            copied.append(backup.id)
            say(f"backup {backup.id}: copied")
        else:
            present.append(backup.id)
    return CopyResult(
        source=source.location,
        target=options.target,
        copied=tuple(copied),
        present=tuple(present),
        forgotten=tuple(forgotten),
        objects=copier.counts.objects,
        written_bytes=copier.counts.written_bytes,
        duration_s=time.monotonic() - began,
    )
