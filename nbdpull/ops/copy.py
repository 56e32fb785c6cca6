"""copy: backups into a replica of their repository, in any other store; or into one with other keys."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from nbdpull.errors import RepositoryError, UsageError
from nbdpull.model.config import Lock
from nbdpull.model.ids import BackupId
from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import CopyResult
from nbdpull.model.results import Progress, ProgressCallback, ProgressKind
from nbdpull.nbdio.errors import Cancelled
from nbdpull.ops.rekey import rekeying
from nbdpull.ops.threads import in_thread
from nbdpull.repo.catalog import Backup, check_readable
from nbdpull.repo.repository import Repository

__all__ = ["NEW", "CopyOptions", "copy"]

NEW = "NBDPULL_NEW"
"""What the variables with the target's keys begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """What to copy.

    Attributes:
        source: where the backups are.
        target: the replica, which is made where there is nothing; with `rekey` another repository.
        backups: ids, unique prefixes or ``latest``; empty for all complete ones.
        rekey: store what is copied anew, with the target's keys.
        lock: of what backups in the replica consist of, when it is made; None is none.
        keys: what opens an encrypted repository; None looks in the environment.
        target_keys: what opens the target, with `rekey`; None looks for NBDPULL_NEW_PASSWORD and so on.
    """

    source: str
    target: str
    backups: tuple[str, ...] = ()
    rekey: bool = False
    lock: Lock | None = None
    keys: KeySource | None = None
    target_keys: KeySource | None = None


async def copy(options: CopyOptions, *, progress: ProgressCallback | None = None) -> CopyResult:
    """Copy backups, verbatim or with other keys; what is there already is not copied again.

    Raises:
        UsageError: the target holds something else, or can't be rekeyed into.
        RepositoryNotFoundError: there is no source, or, with `rekey`, no target.
        BackupNotFoundError: no such backup.
        RepositoryError: the target is another repository, or a backup is incomplete.
        DamagedError: an object is not what was written; nothing wrong was copied.
        InUseError: a collection runs on the target.
    """
    return await in_thread(lambda cancel: _copy(options, progress, cancel))


@dataclass(slots=True)
class _Told:
    """What became of each backup."""

    progress: ProgressCallback | None
    copied: list[BackupId] = field(default_factory=list)
    present: list[BackupId] = field(default_factory=list)
    forgotten: list[BackupId] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, backup: BackupId, *, copied: bool) -> None:
        if copied:
            self.copied.append(backup)
            self._say(f"backup {backup}: copied")
        else:
            self.present.append(backup)

    def leave_out(self, backup: BackupId) -> None:
        self.forgotten.append(backup)
        self._say(f"backup {backup}: left out, it was forgotten in the target")

    def leave_out_incomplete(self, backup: Backup) -> None:
        self._say(f"backup {backup.id}: left out, {_incomplete(backup)}")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(Progress(kind=ProgressKind.MESSAGE, verb="copy", text=text))


def _copy(
    options: CopyOptions, progress: ProgressCallback | None, cancel: threading.Event
) -> CopyResult:
    def check() -> None:
        if cancel.is_set():
            raise Cancelled

    began = time.monotonic()
    if options.rekey and options.lock is not None:
        raise UsageError(
            "--lock is about a replica; the target of --rekey has the locks that 'init' gave it"
        )
    source = Repository.open(options.source, keys=options.keys)
    told = _Told(progress)
    copying = _rekey if options.rekey else _verbatim
    objects, written_bytes = copying(options, source, told, check)
    return CopyResult(
        source=source.location,
        target=options.target,
        copied=tuple(told.copied),
        present=tuple(told.present),
        forgotten=tuple(told.forgotten),
        warnings=(*told.warnings, *_named_and_left_out(options, told)),
        objects=objects,
        written_bytes=written_bytes,
        duration_s=time.monotonic() - began,
    )


def _named_and_left_out(options: CopyOptions, told: _Told) -> list[str]:
    if not options.backups:
        return []
    return [
        f"backup {one} was not copied: it was forgotten in {options.target}; 'nbdpull undo {one}' there brings"
        " it back, as long as no collection has deleted it"
        for one in told.forgotten
    ]


def _chosen(options: CopyOptions, source: Repository, told: _Told) -> Iterator[Backup]:
    """The backups to copy, oldest first.

    Raises:
        DamagedError, WrongKeyError: once all others were yielded, a manifest can't be read.
    """
    if not options.backups:
        found, unreadable = source.everything()
        for one in found:
            if one.forgotten is not None:
                continue
            if one.complete:
                yield one
            else:
                told.leave_out_incomplete(one)
        check_readable(unreadable, "all other backups are copied; what can't be read was not")
        return
    named = {one.id: one for one in (source.find(name) for name in options.backups)}
    for backup in sorted(named.values(), key=lambda one: (one.time, one.id)):
        if not backup.complete:
            raise RepositoryError(
                f"backup {backup.id}: {_incomplete(backup)}; only whole backups are copied"
            )
        yield backup


def _incomplete(backup: Backup) -> str:
    return f"it is incomplete: {len(backup.missing)} of its disks were never committed, or are lost"


def _verbatim(
    options: CopyOptions, source: Repository, told: _Told, check: Callable[[], None]
) -> tuple[int, int]:
    backups = _chosen(options, source, told)
    first = next(backups, None)  # a name that nothing fits makes no replica
    copier, replica = source.copier(options.target, lock=options.lock, check=check)
    told.warnings += copier.warnings
    copier.begin()
    found, damaged = replica.everything()
    there = {one.id: one for one in found}
    unreadable = {one.key: one.error for one in damaged}
    for backup in () if first is None else chain([first], backups):
        manifests = [source.manifest(summary) for summary in backup.disks]
        for pin in backup.pins:
            if (damage := unreadable.get(f"m/{pin}")) is not None:
                raise RepositoryError(f"in the replica {damage}; delete it there and copy again")
        old = there.get(backup.id)
        if (
            old is not None
            and old.complete
            and old.forgotten is None
            and copier.forgotten(manifests)
        ):
            told.add(backup.id, copied=False)  # it was brought back there, under other sessions
            continue
        if (old is not None and old.forgotten is not None) or copier.forgotten(manifests):
            told.leave_out(backup.id)
            continue
        told.add(backup.id, copied=copier.copy(manifests, stored=source.stored(backup)))
        if old is not None:
            # Repacked in the source since: what stood for it here is not needed any more.
            replica.forget_replaced(set(old.all_pins) - set(backup.pins))
    copier.finish()
    return copier.counts.objects, copier.counts.written_bytes


def _rekey(
    options: CopyOptions, source: Repository, told: _Told, check: Callable[[], None]
) -> tuple[int, int]:
    keys = options.target_keys or KeySource(variables=NEW)
    target = Repository.open(options.target, write=True, keys=keys)
    with rekeying(source, target, progress=told.progress, check=check) as run:
        for backup in _chosen(options, source, told):
            found = run.find(backup.id)
            if found is not None and found.forgotten is not None:
                told.leave_out(backup.id)
                continue
            if found is None:
                run.copy(backup)
            told.add(backup.id, copied=found is None)
        return run.objects, run.written_bytes
