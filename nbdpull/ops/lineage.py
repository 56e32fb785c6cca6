"""What the repository knows of a VM's chain: which base each disk can be counted from, and what it is called."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from nbdpull.errors import DamagedError, RepositoryError, UsageError, WrongKeyError
from nbdpull.model.chain import Base, Decision, choose, choose_told
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.results import Level
from nbdpull.ops.heal import lost_segments
from nbdpull.ops.threads import run_all, worker_count
from nbdpull.repo.repository import Backup, DiskReader, Repository
from nbdpull.source.base import Disk, Known, KnownCheckpoint, KnownDisk, Recall
from nbdpull.source.names import chain_id

__all__ = ["Chain", "backup_level", "known_checkpoints", "known_disks", "parent_of"]

_TRIED = 3
"""Earlier backups that are tried when their manifests are damaged."""


class Chain:
    """What the repository knows of one VM's chain."""

    def __init__(
        self, repository: Repository, vm: str, chain: str, *, sees_changes_only: bool
    ) -> None:
        self.repository = repository
        self.vm = vm
        self.chain = chain
        self.sees_changes_only = sees_changes_only
        self.id = chain_id(repository.id, vm, chain)
        self._ever = repository.backups(forgotten=True)
        self._all: dict[str, Backup] = {
            found.id: found for found in self._ever if found.forgotten is None
        }
        self._manifests: dict[str, Manifest] = {}
        self.backups = sorted(
            (
                found
                for found in self._all.values()
                if found.vm == vm
                and found.chain == chain
                and found.complete
                and found.level is not Level.COPY
            ),
            key=lambda found: found.time,
            reverse=True,
        )

    def committed(self, chain: str, backup: str) -> bool:
        """Whether a checkpoint may belong to a durable backup: another chain's always may."""
        return chain != self.id or (backup in self._all and self._all[backup].complete)

    def knows(self, backup: str) -> bool:
        """Whether the repository has anything of that backup, also when it is forgotten or incomplete."""
        return any(found.id == backup for found in self._ever)

    def summaries(self, disk: str) -> list[Summary]:
        """This disk's part of each backup, newest first."""
        return [
            summary for found in self.backups for summary in found.disks if summary.disk == disk
        ]

    def unreadable(self, disk: str) -> Callable[[Base], str | None]:
        """A check of what a base stored: `choose` asks it before it builds on one."""
        by_backup = {summary.backup: summary for summary in self.summaries(disk)}

        def check(base: Base) -> str | None:
            try:
                manifest = self.repository.manifest(by_backup[BackupId(base.backup)])
                missing = self.repository.missing(manifest)
            except (DamagedError, RepositoryError, WrongKeyError) as exc:
                return str(exc)
            if missing:
                return f"the repository misses {missing[0]}, which it refers to"
            if self.sees_changes_only:
                seen = "and --guest-first shows only changes"
                if lost_segments(self.repository.damage.lost(), manifest):
                    return f"frames that it refers to are damaged, {seen}"
                if (problem := _unreadable_map(self.repository.reader(manifest))) is not None:
                    return f"{problem}, {seen}"
            self._manifests[f"{disk}/{base.backup}"] = manifest
            return None

        return check

    def manifest(self, disk: str, base: Base) -> Manifest:
        """The manifest of a base that passed `unreadable`."""
        return self._manifests[f"{disk}/{base.backup}"]

    def doubt(self, disk: str, *, fulls: bool) -> Callable[[Base], str | None]:
        """A check whether there may have been a later backup than a base: `choose_told` asks it.

        Whoever keeps the changes counts them from the last backup, whatever became of it here.

        Args:
            disk: its name.
            fulls: only later fulls count.
        """
        by_backup = {summary.backup: summary for summary in self.summaries(disk)}

        def check(base: Base) -> str | None:
            own = by_backup[BackupId(base.backup)]
            if own.time > time.time():
                return "its time is still to come, so clocks were set, and which is the last can't be told"
            later = (self._later(own, other, fulls=fulls) for other in self._ever)
            return next(filter(None, later), None) or self._vanished_later(own)

        return check

    def _later(self, own: Summary, other: Backup, *, fulls: bool) -> str | None:
        """Why another backup may be later than this disk's newest one."""
        if (
            (other.vm, other.chain) != (self.vm, self.chain)
            or other.id == own.backup
            or other.level is Level.COPY
        ):
            return None
        there = [one for one in other.disks if one.disk == own.disk]
        if fulls and there and there[0].disk_level is not Level.FULL:
            return None
        after = other.time >= own.time or (not fulls and other.parent == own.backup)
        if after and other.forgotten is not None:
            return f"backup {other.id} is later, and is forgotten"
        if after and not other.complete:
            return f"backup {other.id} is later, and is incomplete"
        if after or (there and other.stored > self._all[own.backup].stored):
            return f"backup {other.id} was stored later, by clocks that don't agree"
        return None

    def _vanished_later(self, own: Summary) -> str | None:
        """Why there may have been a later backup of which not even the time is known."""
        for one in self.repository.vanished(self.vm, own.disk):
            if one.damaged:
                return f"manifest {one.key} can't be read, and may be of a later one"
            # The disk's own session, where it was committed again, began while it was made.
            if one.began > own.time + own.duration_s:
                return "a later backup of the disk was forgotten and is gone"
        return None

    def choose(
        self, disk: Disk, wanted: Level | None, since: str | None
    ) -> tuple[Decision, Manifest | None]:
        """The level and the parent of one disk.

        Raises:
            UsageError: changes would be counted from another backup than `since`.
        """
        history = [
            Base(
                backup=summary.backup,
                level=summary.disk_level,
                size=summary.size,
                checkpoint=summary.checkpoint,
            )
            for summary in self.summaries(disk.name)
        ]
        if disk.told is not None:
            fulls = wanted is Level.DIFFERENTIAL
            newest = self.backups[0].id if self.backups else None
            decision = choose_told(
                wanted,
                disk.told,
                size=disk.size,
                newest=newest,
                history=history,
                doubt=(lambda _base: None) if since else self.doubt(disk.name, fulls=fulls),
                unreadable=self.unreadable(disk.name),
            )
            last = [one.backup for one in history if not fulls or one.level is Level.FULL][:1]
            if since is not None and not any(backup.startswith(since) for backup in last):
                raise UsageError(
                    f"disk '{disk.name}' can't be read since backup {since}: the chain's last"
                    f" {'full' if fulls else 'backup'} of it is {last[0] if last else 'none'}; make a"
                    " bitmap that counts from there, or leave --bitmap and --since out"
                )
        else:
            decision = choose(
                wanted,
                size=disk.size,
                bitmaps=disk.bitmaps,
                history=history,
                unreadable=self.unreadable(disk.name),
            )
        parent = self.manifest(disk.name, decision.base) if decision.base else None
        return decision, parent

    def like(self, disk: Disk, base: Backup | None) -> Manifest | None:
        """An earlier backup of the disk to compare a full with.

        Of this chain where there is one, else of another, else the disk of that name in `base`.
        """
        if not self.repository.reuses:
            return None
        candidates = [
            ((found.vm == self.vm, found.chain == self.chain, found.time), summary)
            for found in self._all.values()
            if (found.vm == self.vm and found.complete)
            or (base is not None and found.id == base.id)
            for summary in found.disks
            if (summary.disk, summary.size) == (disk.name, disk.size)
        ]
        for _, summary in sorted(candidates, key=lambda one: one[0], reverse=True)[:_TRIED]:
            try:
                return self.repository.manifest(summary)
            except (DamagedError, WrongKeyError):
                continue
        return None

    def machine(self) -> Summary | None:
        """The newest machine's state of this chain."""
        return next((found.machine for found in self.backups if found.machine is not None), None)

    def full_checkpoint(self, disk: str) -> str | None:
        """The bitmap that a differential of this disk would be counted from."""
        for summary in self.summaries(disk):
            if summary.disk_level is Level.FULL:
                return summary.checkpoint
        return None


def _unreadable_map(reader: DiskReader) -> str | None:
    """What is wrong with the first map of a backup that can't be read, or None."""
    left = iter([index for index, ref in enumerate(reader.manifest.segments) if ref is not None])
    lock = threading.Lock()
    problems: list[str] = []

    def work() -> None:
        while not problems:
            with lock:
                index = next(left, None)
            if index is None:
                return
            try:
                reader.segment(index)
            except DamagedError as exc:
                problems.append(str(exc))

    # Many readers: in an object store each map is a request.
    run_all([work] * worker_count(), threading.Event())
    return problems[0] if problems else None


def backup_level(decisions: Iterable[Decision]) -> Level:
    """A backup is called by what its disks were read as: full only when all were."""
    levels = {decision.level for decision in decisions}
    return next((level for level in levels if level is not Level.FULL), Level.FULL)


def known_disks(repository: Repository, vm: str | None) -> Known:
    """What the repository's backups, of one VM or all, know of checkpoints that are found."""
    by_checkpoint: dict[str, list[KnownDisk]] = {}
    for summary in repository.summaries():
        if summary.checkpoint is not None and vm in {None, summary.vm}:
            disk = KnownDisk(vm=summary.vm, disk=summary.disk, size=summary.size)
            by_checkpoint.setdefault(summary.checkpoint, []).append(disk)
    return lambda names: [disk for name in names for disk in by_checkpoint.get(name, ())]


def known_checkpoints(repository: Repository, vm: str | None) -> Recall:
    """What the repository's backups, of `vm` where it is given, know of checkpoints that were lost."""

    def recall(name: str) -> list[KnownCheckpoint]:
        found: dict[str, list[Summary]] = {}
        for summary in repository.summaries():
            if summary.checkpoint is not None and summary.vm == (vm or name):
                found.setdefault(summary.checkpoint, []).append(summary)
        known = [
            KnownCheckpoint(
                name=checkpoint,
                time=summaries[0].time,
                disks=tuple(summary.disk for summary in summaries),
                full=any(summary.disk_level is Level.FULL for summary in summaries),
            )
            for checkpoint, summaries in found.items()
        ]
        return sorted(known, key=lambda one: one.time, reverse=True)

    return recall


def parent_of(decisions: Iterable[Decision], chain: Chain) -> BackupId | None:
    """The newest of the backups that the disks are counted from."""
    bases = {decision.base.backup for decision in decisions if decision.base is not None}
    return next((found.id for found in chain.backups if found.id in bases), None)
