"""backup: one atomic point in time of a running VM's disks, into the repository.

The order of the steps is the promise. Nothing that an earlier backup relies on is taken away in QEMU
before this one is durable:

    sweep what a dead run of ours left -> choose a base for each disk -> freeze -> pull -> release
    -> seal (packs durable) -> commit (manifests durable) -> confirm (old bitmaps go)

A failure before the commit drops this run's own bitmaps and nothing else: the older ones have recorded
all along, so the next backup has everything.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbdpull.errors import (
    DamagedError,
    Error,
    InUseError,
    PointInTimeLostError,
    RepositoryError,
    SourceError,
    UsageError,
    WrongKeyError,
)
from nbdpull.model.chain import Base, Decision, choose, choose_told, obsolete
from nbdpull.model.ids import BackupId
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.results import (
    BackupResult,
    DiskInfo,
    GuestCost,
    Level,
    Progress,
    ProgressCallback,
    ProgressKind,
    Quiesced,
)
from nbdpull.nbdio.connection import Cancelled
from nbdpull.nbdio.tls import Tls, look_at_tls
from nbdpull.ops.heal import Healer, lost_segments
from nbdpull.ops.pull import DiskPull, pull
from nbdpull.ops.pulltimes import PullTimes
from nbdpull.ops.reusing import Reusing
from nbdpull.ops.threads import call
from nbdpull.repo.repository import DiskReader, Repository, Session
from nbdpull.source.base import Disk, DiskPlan, Known, KnownDisk, PointInTime, RunInfo, Source
from nbdpull.source.fleecing import GUEST_DELAY_S, QemuOptions
from nbdpull.source.names import chain_id, checkpoint_name, checkpoint_parts
from nbdpull.source.open import check_source, open_source
from nbdpull.version import __version__

if TYPE_CHECKING:
    from nbdpull.repo.repository import Backup

__all__ = [
    "AUDIT",
    "GUEST_DELAY_S",
    "BackupOptions",
    "Chain",
    "backup",
    "backup_level",
    "parent_of",
]


_TRIED = 3
"""Earlier backups that are tried when their manifests are damaged."""


AUDIT = 4
"""Frames: a few milliseconds a disk; 30 incrementals find a bitmap that misses 2 % of the disk with 90 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupOptions:
    """What to back up, where to, and how.

    Attributes:
        source: URIs: one monitor, or the images of one VM; see docs/sources.md.
        repository: its location.
        level: None is incremental where the chain allows it, else full.
        vm: what to call the VM; None asks QEMU for its name, else its UUID.
        include, exclude: names of disks; an empty `include` is all.
        chain: lineage to go on with. Chains don't disturb each other.
        guest_first: a scratch error ends the backup instead of pausing the guest (mode C).
        nbd_address: URI of the NBD server that this QEMU runs already.
        scratch: folder for scratch images; None for the system's temporary one.
        force: also back up disks whose iothread makes a disconnect dangerous.
        compression_level: of zstd, 1 to 19.
        rate: most bytes to read in a second; None for no limit.
        max_guest_delay_s: with `guest_first`, longest wait of a guest's write for the scratch.
        tls: folder of certificates, or file of shared keys, for NBD over TCP.
        bitmaps: of NBD exports, ``[NAME=]CONTEXT``: what changed since the chain's last backup (for a
            differential: last full), by whoever made them.
        since: id, or its beginning, of the backup that `bitmaps` count from; any other is refused.
        quiesce: the guest's agent freezes its file systems at the point in time.
        agent: the agent's socket; None asks QEMU for it.
        audit: of each incremental disk, how many frames that the bitmap calls clean are looked at.
        tags: words to find it by, for `forget --keep-tag`.
        keys: what opens an encrypted repository; None looks in the environment.
        base: a backup, of any VM, whose frames are not stored again.
        digest_cache: folder of what is known of all backups' frames; None for none.
    """

    source: tuple[str, ...]
    repository: str
    level: Level | None = None
    vm: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    chain: str = "default"
    guest_first: bool = False
    nbd_address: str | None = None
    scratch: str | None = None
    force: bool = False
    compression_level: int = 1
    rate: int | None = None
    max_guest_delay_s: int = GUEST_DELAY_S
    audit: int = AUDIT
    bitmaps: tuple[str, ...] = ()
    tls: str | None = None
    since: str | None = None
    quiesce: bool = False
    agent: str | None = None
    tags: tuple[str, ...] = ()
    keys: KeySource | None = None
    base: str | None = None
    digest_cache: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """One disk and what is to be done with it.

    Attributes:
        like: an earlier backup that a disk which is read in full is compared with.
    """

    disk: Disk
    decision: Decision
    parent: Manifest | None
    like: Manifest | None
    checkpoint: str | None


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
        self._all: dict[str, Backup] = {found.id: found for found in repository.backups()}
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
                missing = self.repository.reader(manifest).missing_packs(copies=False)
            except (DamagedError, RepositoryError, WrongKeyError) as exc:
                return str(exc)
            if missing:
                return f"the repository misses {missing[0]}, which it refers to"
            if self.sees_changes_only and lost_segments(self.repository.damage.lost(), manifest):
                return "frames that it refers to are damaged, and --guest-first shows only changes"
            self._manifests[f"{disk}/{base.backup}"] = manifest
            return None

        return check

    def manifest(self, disk: str, base: Base) -> Manifest:
        """The manifest of a base that passed `unreadable`."""
        return self._manifests[f"{disk}/{base.backup}"]

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
            newest = self.backups[0].id if self.backups else None
            decision = choose_told(
                wanted,
                disk.told,
                size=disk.size,
                newest=newest,
                history=history,
                unreadable=self.unreadable(disk.name),
            )
            fulls = wanted is Level.DIFFERENTIAL
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

    def full_checkpoint(self, disk: str) -> str | None:
        """The bitmap that a differential of this disk would be counted from."""
        for summary in self.summaries(disk):
            if summary.disk_level is Level.FULL:
                return summary.checkpoint
        return None


def backup_level(decisions: Iterable[Decision]) -> Level:
    """A backup is called by what its disks were read as: full only when all were."""
    levels = {decision.level for decision in decisions}
    return next((level for level in levels if level is not Level.FULL), Level.FULL)


def _tls(options: BackupOptions) -> Tls | None:
    if options.tls is None:
        return None
    ours = options.source[0].startswith("qmp") and options.nbd_address is None
    return look_at_tls(options.tls, server=ours)


def known_disks(repository: Repository, vm: str | None) -> Known:
    """What the repository's backups, of one VM or all, know of checkpoints that are found."""
    by_checkpoint: dict[str, list[KnownDisk]] = {}
    for summary in repository.summaries():
        if summary.checkpoint is not None and vm in {None, summary.vm}:
            disk = KnownDisk(vm=summary.vm, disk=summary.disk, size=summary.size)
            by_checkpoint.setdefault(summary.checkpoint, []).append(disk)
    return lambda names: [disk for name in names for disk in by_checkpoint.get(name, ())]


def parent_of(decisions: Iterable[Decision], chain: Chain) -> BackupId | None:
    """The newest of the backups that the disks are counted from."""
    bases = {decision.base.backup for decision in decisions if decision.base is not None}
    return next((found.id for found in chain.backups if found.id in bases), None)


async def _recover(
    source: Source, options: BackupOptions, chain: Chain, say: Callable[[str], None]
) -> None:
    """Clear away what a dead run left, and refuse to run beside a live one of the same chain."""
    swept = await source.sweep(chain.committed)
    for line in swept.removed:
        say(f"removed what an earlier run left: {line}")
    for live in swept.live:
        if live.chain == chain.id:
            raise InUseError(
                f"chain '{options.chain}' is being backed up by process {live.pid} right now; wait for"
                " it, or end it and run 'nbdpull cleanup'"
            )


async def backup(
    options: BackupOptions, *, progress: ProgressCallback | None = None
) -> BackupResult:
    """Back up a running VM's disks at one point in time.

    Returns:
        The committed, durable backup.

    Raises:
        UsageError: the options can't be; nothing was touched.
        InUseError: the monitor, or this chain, is in use.
        RepositoryNotFoundError: no repository there.
        SourceError, RepositoryError: the backup failed, and costs nothing but its own work.
    """
    qemu = QemuOptions(
        guest_first=options.guest_first,
        nbd_address=options.nbd_address,
        scratch=options.scratch,
        force=options.force,
        quiesce=options.quiesce,
        agent=options.agent,
        max_guest_delay_s=options.max_guest_delay_s,
        bitmaps=options.bitmaps,
        tls=_tls(options),
    )
    check_source(options.source, qemu)
    if options.since is not None and not options.bitmaps:
        raise UsageError("--since is about the changes that --bitmap tells; give both, or neither")
    repository = await call(Repository.open, options.repository, write=True, keys=options.keys)
    await call(repository.check_original)

    def say(text: str) -> None:
        if progress is not None:
            progress(Progress(kind=ProgressKind.MESSAGE, verb="backup", text=text))

    known = await call(known_disks, repository, options.vm)
    async with open_source(options.source, qemu, known=known) as source, AsyncExitStack() as stack:
        vm = options.vm
        if vm is None:
            vm, warning = await source.vm_name()
            if warning is not None:
                say(warning)
        chain = await call(
            Chain, repository, vm, options.chain, sees_changes_only=options.guest_first
        )
        reuse = await call(
            Reusing.open,
            repository,
            base=options.base,
            digest_cache=options.digest_cache,
            say=say,
        )
        stack.callback(reuse.close)
        await _recover(source, options, chain, say)
        disks = await source.disks(include=options.include, exclude=options.exclude)
        backup_id = BackupId(secrets.token_hex(8))
        chosen = []
        for disk in disks:
            decision, parent = await call(chain.choose, disk, options.level, options.since)
            like = await call(chain.like, disk, reuse.base) if parent is None else None
            if like is not None:
                reason = (
                    f"{decision.reason}; what backup {like.summary.backup} has is not stored again"
                )
                decision = replace(decision, reason=reason)
            checkpoint = None
            if decision.level is not Level.COPY and disk.records:
                checkpoint = checkpoint_name(chain.id, backup_id)
            chosen.append(
                _Chosen(
                    disk=disk, decision=decision, parent=parent, like=like, checkpoint=checkpoint
                )
            )
            say(f"disk {disk.name}: {decision.level}, {decision.reason}")
        run = _Run(options, source, repository, chain, backup_id, chosen, progress, reuse)
        return await run.go()


def _count_from(one: _Chosen) -> str | None:
    """What tells the changes of a disk; None reads all of it."""
    if one.decision.base is None:
        return None
    return one.disk.told or one.decision.base.checkpoint


class _Run:
    """One backup from the frozen view to the confirmed checkpoint."""

    def __init__(
        self,
        options: BackupOptions,
        source: Source,
        repository: Repository,
        chain: Chain,
        backup_id: BackupId,
        chosen: Sequence[_Chosen],
        progress: ProgressCallback | None,
        reuse: Reusing,
    ) -> None:
        self.options = options
        self.reuse = reuse
        self.source = source
        self.repository = repository
        self.chain = chain
        self.vm = chain.vm
        self.backup_id = backup_id
        self.chosen = list(chosen)
        self.progress = progress
        self.level = backup_level(one.decision for one in chosen)
        self.times = PullTimes(0)
        self.sessions: list[Session] = []
        self.manifests: list[Manifest] = []
        self._stop: Callable[[], None] = lambda: None

    async def go(self) -> BackupResult:
        plans = [
            DiskPlan(
                disk=one.disk,
                base=_count_from(one),
                checkpoint=one.checkpoint,
            )
            for one in self.chosen
        ]
        frozen: PointInTime | None = None
        try:
            began = time.time()
            clock = time.monotonic()
            info = RunInfo(run=self.backup_id[:8], chain=self.chain.id)
            async with self.source.freeze(info, plans, lambda _reason: self._stop()) as frozen:
                pulls = await call(self._begin, frozen)
                await self._pull(frozen, pulls)
            lies = self._heed_audit(pulls)
            await call(self._seal, pulls)
            duration_s = time.monotonic() - clock
            summaries = await call(self._commit, pulls, began, duration_s)
        except BaseException:
            if frozen is not None:
                await self._give_up(frozen)
            raise
        warnings = await frozen.confirm(self._obsolete())
        await call(self.reuse.learn, self.repository, self.manifests)
        return self._result(
            summaries, began, duration_s, frozen.cost, frozen.quiesced, (*lies, *warnings)
        )

    def _begin(self, frozen: PointInTime) -> list[DiskPull]:
        pulls = []
        for one, served in zip(self.chosen, frozen.disks, strict=True):
            session = self.repository.begin(
                vm=self.vm,
                disk=one.disk.name,
                parent=one.parent,
                like=one.like,
                base=self.reuse.index,
                cache=self.reuse.cache,
                compression_level=self.options.compression_level,
            )
            self.sessions.append(session)
            reader: DiskReader | None = None
            if one.parent is not None:
                reader = self.repository.reader(one.parent)
            pulls.append(
                DiskPull(
                    name=one.disk.name,
                    size=one.disk.size,
                    uri=served.uri,
                    context=served.context,
                    granularity=served.granularity,
                    overwritten=served.overwritten,
                    parent=reader,
                    session=session,
                    audit=self.options.audit if served.whole else 0,
                    healer=Healer(self.repository, session, reader, size=one.disk.size),
                )
            )
        return pulls

    async def _pull(self, frozen: PointInTime, pulls: Sequence[DiskPull]) -> None:
        def started(stop: Callable[[], None]) -> None:
            self._stop = stop
            if frozen.lost is not None:
                stop()

        try:
            self.times = await pull(
                pulls, rate=self.options.rate, progress=self.progress, on_start=started
            )
        except (Cancelled, SourceError) as exc:
            if (lost := await frozen.why_lost()) is not None:
                raise lost from exc
            if isinstance(exc, Cancelled):
                raise PointInTimeLostError("the pull was stopped") from exc
            raise
        if frozen.lost is not None:
            raise frozen.lost

    def _heed_audit(self, pulls: Sequence[DiskPull]) -> list[str]:
        """Make fulls of the disks whose bitmap was found to lie; returns a warning for each."""
        warnings = []
        for number, (one, done) in enumerate(zip(self.chosen, pulls, strict=True)):
            for lie in done.lie:
                reason = f"its changed-block tracking can't be trusted: {lie}"
                decision = Decision(level=Level.FULL, reason=reason)
                self.chosen[number] = replace(one, decision=decision)
                warnings.append(
                    f"disk '{one.disk.name}' was read in full: {reason}; its earlier incrementals of this"
                    " chain may miss writes"
                )
        self.level = backup_level(one.decision for one in self.chosen)
        return warnings

    def _seal(self, pulls: Sequence[DiskPull]) -> None:
        for session in self.sessions:
            session.seal()
        for one in pulls:
            if one.healer is not None and (count := one.healer.record()):
                self._say(f"disk {one.name}: {count} damaged frames of older backups are healed")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(Progress(kind=ProgressKind.MESSAGE, verb="backup", text=text))

    def _commit(self, pulls: Sequence[DiskPull], began: float, duration_s: float) -> list[Summary]:
        siblings = tuple((session.disk_id, session.id) for session in self.sessions)
        parent = parent_of((one.decision for one in self.chosen), self.chain)
        summaries = []
        for one, done, session in zip(self.chosen, pulls, self.sessions, strict=True):
            full_checkpoint = None
            if one.decision.level is Level.FULL:
                full_checkpoint = one.checkpoint
            elif one.decision.level is not Level.COPY:
                full_checkpoint = self.chain.full_checkpoint(one.disk.name)
            summaries.append(
                Summary(
                    backup=self.backup_id,
                    vm=self.vm,
                    chain=self.options.chain,
                    level=self.level,
                    parent=parent,
                    time=began,
                    duration_s=duration_s,
                    disk=one.disk.name,
                    disk_id=session.disk_id,
                    session=session.id,
                    size=one.disk.size,
                    disk_level=one.decision.level,
                    reason=one.decision.reason,
                    checkpoint=one.checkpoint,
                    full_checkpoint=full_checkpoint,
                    changed_bytes=done.counts.changed,
                    read_bytes=done.counts.read,
                    stored_bytes=session.stored_bytes,
                    reused_bytes=session.reused_bytes,
                    siblings=siblings,
                    tool=f"nbdpull {__version__}",
                    tags=self.options.tags,
                )
            )
        self.manifests = [
            session.commit(summary)
            for session, summary in zip(self.sessions, summaries, strict=True)
        ]
        return summaries

    async def _give_up(self, frozen: PointInTime) -> None:
        """After a failure: drop what only this run would have used."""
        if await call(self._is_committed):
            # Ended between the commit and its confirmation: the backup counts all the same.
            await frozen.confirm(self._obsolete())
            return
        for session in self.sessions:
            await call(session.abandon)
        await frozen.discard()

    def _is_committed(self) -> bool:
        """Whether the repository has the backup, although an error came after the last commit call."""
        try:
            return any(
                found.id == self.backup_id and found.complete for found in self.repository.backups()
            )
        except Error:
            # It can't be asked. A checkpoint too many does no harm, one too few may cost a full.
            return True

    def _obsolete(self) -> dict[str, tuple[str, ...]]:
        """The chain's bitmaps that nothing is counted from any more, by disk name."""
        doomed = {}
        for one in self.chosen:
            if one.checkpoint is None:
                continue  # a copy leaves the chain as it is
            owned = [
                name
                for name in one.disk.bitmaps
                if (parts := checkpoint_parts(name)) is not None and parts[0] == self.chain.id
            ]
            full = one.checkpoint
            if one.decision.level is not Level.FULL:
                full = self.chain.full_checkpoint(one.disk.name) or one.checkpoint
            if full in one.disk.bitmaps and one.disk.bitmaps[full].inconsistent:
                full = one.checkpoint
            doomed[one.disk.name] = obsolete(owned, newest=one.checkpoint, full=full)
        return doomed

    def _result(
        self,
        summaries: Sequence[Summary],
        began: float,
        duration_s: float,
        cost: GuestCost | None,
        quiesced: Quiesced | None,
        warnings: tuple[str, ...],
    ) -> BackupResult:
        return BackupResult(
            backup=self.backup_id,
            vm=self.vm,
            chain=self.options.chain,
            level=self.level,
            parent=summaries[0].parent,
            time=began,
            duration_s=duration_s,
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
            cost=cost,
            quiesced=quiesced,
            profile=self.times.profile(self.sessions),
            warnings=warnings,
        )
