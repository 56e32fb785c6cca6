"""One backup, from the choice of a base for each disk to the confirmed checkpoint.

The order of the steps is the promise. Nothing that an earlier backup relies on is taken away in QEMU
before this one is durable:

    sweep what a dead run of ours left -> choose a base for each disk -> freeze -> pull -> release
    -> seal (packs durable) -> commit (manifests durable) -> confirm (old bitmaps go)

A failure before the commit drops this run's own bitmaps and nothing else: the older ones have recorded
all along, so the next backup has everything.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial

from nbdpull.errors import (
    Error,
    InUseError,
    LibvirtError,
    MonitorError,
    PointInTimeLostError,
    SourceError,
    UsageError,
)
from nbdpull.model.archive import File, pack_files, unpack_files
from nbdpull.model.chain import Decision
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import BackupId
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
from nbdpull.nbdio.errors import Cancelled
from nbdpull.ops.backupoptions import BackupOptions
from nbdpull.ops.choice import Chosen, choose, count_from, distrust, obsolete_bitmaps
from nbdpull.ops.heal import Healer
from nbdpull.ops.kept import Kept
from nbdpull.ops.lineage import Chain, backup_level, parent_of
from nbdpull.ops.machinestate import (
    TPM,
    MachinePart,
    collect_files,
)
from nbdpull.ops.pull import DiskPull, pull
from nbdpull.ops.pulltimes import PullTimes
from nbdpull.ops.resuming import check_files, check_same, find_unfinished
from nbdpull.ops.reusing import Reusing
from nbdpull.ops.threads import call, store_deadline, wait_for_stores_again
from nbdpull.ops.waiting import Waiting
from nbdpull.repo.calls import abandoned_calls
from nbdpull.repo.repository import DiskReader, ParentGoneError, Repository, Session
from nbdpull.source.base import (
    CannotGoOnError,
    DiskPlan,
    HostLostError,
    PointInTime,
    RecordedPointInTime,
    Resumable,
    RunInfo,
    Source,
)
from nbdpull.source.journal import Journal
from nbdpull.source.unfinished import Unfinished, UnfinishedDisk
from nbdpull.units import format_size
from nbdpull.version import __version__

__all__ = ["Run", "UnseenRunError", "recover"]

log = logging.getLogger(__name__)


class UnseenRunError(InUseError):
    """A run of the same chain seems to live, by its connection to QEMU alone."""


_ASK_S = 10.0
"""How long a repository is asked whether a backup that was interrupted is there."""


async def recover(
    source: Source,
    options: BackupOptions,
    chain: Chain,
    say: Callable[[str], None],
    spared: Unfinished | None = None,
) -> None:
    """Clear away what dead runs left.

    Raises:
        InUseError: a run of the same chain lives.
        UnseenRunError: one seems to.
    """
    if spared is not None and isinstance(source, Resumable):
        swept = await source.sweep_others(chain.committed, spared)
    else:
        swept = await source.sweep(chain.committed)
    for line in swept.removed:
        say(f"removed what an earlier run left: {line}")
    for live in swept.live:
        if live.chain == chain.id:
            error = InUseError if live.pid is not None else UnseenRunError
            raise error(
                f"chain '{options.chain}' is being backed up by {live.who} right now; wait for"
                " it, or end it and run 'nbdpull cleanup'"
            )


@asynccontextmanager
async def _while_it_lasts(frozen: PointInTime) -> AsyncIterator[None]:
    """Whatever is done at a point in time: that it was lost is why it failed, and is a failure of its own."""
    try:
        yield
    except (Cancelled, SourceError) as exc:
        if (lost := await frozen.why_lost()) is not None:
            raise lost from exc
        if isinstance(exc, Cancelled):
            raise PointInTimeLostError("the pull was stopped") from exc
        raise
    _check_not_lost(frozen)


def _check_not_lost(frozen: PointInTime) -> None:
    if frozen.lost is not None:
        raise frozen.lost


class Run:
    """One backup from the frozen view to the confirmed checkpoint."""

    def __init__(
        self,
        options: BackupOptions,
        source: Source,
        repository: Repository,
        chain: Chain,
        progress: ProgressCallback | None,
        reuse: Reusing,
    ) -> None:
        self.options = options
        self.reuse = reuse
        self.source = source
        self.repository = repository
        self.chain = chain
        self.vm = chain.vm
        self.backup_id = BackupId("")
        self.chosen: list[Chosen] = []
        self.progress = progress
        self.level = Level.FULL
        self.times = PullTimes(0)
        self.sessions: list[Session] = []
        self.described: tuple[str, bytes] | None = None
        self.definitions: Sequence[File] = ()
        self.kept_files: Sequence[File] = ()
        self.lies: dict[str, str] = {}
        self.machine: MachinePart | None = None
        self.record: Unfinished | None = None
        self.journal: Journal | None = None
        self.committing = False
        self.manifests: list[Manifest] = []
        self._deadline = store_deadline()
        self._stop: Callable[[], None] = self._give_up_store

    async def choose(
        self, backup_id: BackupId, level: Level | None, distrusted: Mapping[str, str]
    ) -> None:
        """See `nbdpull.ops.choice.choose`."""
        self.chosen = await choose(
            self.source,
            self.chain,
            self.options,
            base=self.reuse.base,
            backup=backup_id,
            level=level,
            distrusted=distrusted,
        )
        self.backup_id = backup_id
        self.level = backup_level(one.decision for one in self.chosen)

    def _say_chosen(self) -> None:
        for one in self.chosen:
            self._say(f"disk {one.disk.name}: {one.decision.level}, {one.decision.reason}")

    def _disks(self) -> tuple[UnfinishedDisk, ...]:
        """What is done, as it is left on record."""
        return tuple(
            UnfinishedDisk(
                name=one.disk.name,
                size=one.disk.size,
                level=one.decision.level,
                base=count_from(one),
                checkpoint=one.checkpoint,
                lie=self.lies.get(one.disk.name),
            )
            for one in self.chosen
        )

    async def go_on(self) -> BackupResult | None:
        """The backup at the point in time of a run that died; None where a new one is to be taken."""
        try:
            record = await find_unfinished(
                self.source,
                self.chain,
                level=self.options.level,
                within_s=self.options.resume_within_s,
            )
            if record is None:
                return None
            self._remember(record)
            distrusted = {one.name: one.lie for one in record.disks if one.base is None and one.lie}
            try:
                await self.choose(BackupId(record.backup), record.asked, distrusted)
            except (MonitorError, LibvirtError):
                raise  # it passes, and the run is not to be swept for it
            except (SourceError, UsageError) as exc:
                # Told again, if it is so without that run, too.
                raise CannotGoOnError(str(exc)) from exc
            check_same(record, self._disks())
            self.kept_files = await self._files_of(record)
            # Numbered in QEMU's names as they were then.
            order = [told.name for told in record.disks]
            self.chosen.sort(key=lambda one: order.index(one.disk.name))
            await recover(self.source, self.options, self.chain, self._say, record)
            begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.time))
            self._say(
                f"goes on with the backup of {begun} that process {record.pid} did not finish"
            )
            return await self.go(record)
        except CannotGoOnError as exc:
            if exc.record is not None:
                self._remember(exc.record)
            self._say(f"a backup that did not come to its end can't be gone on with: {exc}")
        except (MonitorError, HostLostError):
            raise  # QEMU can't be reached: there is nothing to begin again with
        except SourceError as exc:
            if self.committing or self.record is None:
                raise
            self._say(f"the earlier backup's point in time can't be read any more: {exc}")
        await self._begin_again()
        return None

    def _remember(self, record: Unfinished) -> None:
        """Keep in mind what its audit found: what changes were counted from is there still, and is chosen again."""
        if not self.chain.backups or self.chain.backups[0].time < record.time:
            self.lies = {one.name: one.lie for one in record.disks if one.lie is not None}

    async def _files_of(self, record: Unfinished) -> Sequence[File]:
        """The files that it was to keep with its backup, which are those that are asked for now."""
        if self.options.keeps_machine:
            self.described = await self.source.machine()
        now = [name for name, _ in self.definitions]
        now += [] if self.described is None else [self.described[0]]
        now += [] if self.options.tpm_state is None else [TPM]
        raw = None
        if isinstance(self.source, Resumable):
            raw = await self.source.kept_files(record)
        try:
            then = () if raw is None else unpack_files(raw)
        except FormatError as exc:
            raise CannotGoOnError(str(exc)) from exc
        check_files([name for name, _ in then], now)
        return then

    async def _begin_again(self) -> None:
        """Forget the try to go on, once nothing of it is in use any more."""
        if isinstance(self.source, Resumable):
            await self.source.end_runs()
        wait_for_stores_again(self._deadline)
        self.record = None
        self.journal = None
        self.machine = None
        self.kept_files = ()
        self.described = None
        self.sessions.clear()
        self._stop = self._give_up_store

    def _give_up_store(self) -> None:
        self._deadline.set_in(0)

    def _freeze(
        self, record: Unfinished | None, plans: Sequence[DiskPlan]
    ) -> AbstractAsyncContextManager[PointInTime]:
        def lost(_reason: PointInTimeLostError) -> None:
            self._stop()

        if record is not None and isinstance(self.source, Resumable):
            return self.source.resume(record, plans, lost)
        info = RunInfo(run=self.backup_id[:8], chain=self.chain.id)
        return self.source.freeze(info, plans, lost)

    async def go(self, record: Unfinished | None = None) -> BackupResult:
        """Make the backup, at the point in time of `record` where there is one."""
        self._say_chosen()
        plans = [
            DiskPlan(
                disk=one.disk,
                base=count_from(one),
                checkpoint=one.checkpoint,
            )
            for one in self.chosen
        ]
        frozen: PointInTime | None = None
        try:
            began = time.time() if record is None else record.time
            clock = time.monotonic() - max(0.0, time.time() - began)
            async with self._freeze(record, plans) as frozen:
                self.record = record
                async with _while_it_lasts(frozen):
                    # Before anything else: it can't be frozen, and is to be as old as the disks.
                    files: Sequence[File] = self.kept_files
                    if self.options.keeps_machine and record is None:
                        files = await call(self._collect)
                    await self._keep_record(frozen, began, files)
                    if files:
                        await call(self._keep_machine, files)
                    pulls = await call(self._begin, frozen)
                    await self._pull(frozen, pulls)
            # Perhaps it was seen when it was to be ended: somebody had done so before, maybe before the last read.
            _check_not_lost(frozen)
            lies = self._heed_audit(pulls)
            await call(self._seal, pulls)
            duration_s = time.monotonic() - clock
            summaries = await call(self._commit, pulls, began, duration_s)
        except BaseException:
            if frozen is not None:
                await self._give_up(frozen)
            raise
        warnings = await frozen.confirm(obsolete_bitmaps(self.chosen, self.chain))
        if self.reuse.cache is not None:
            await call(self.reuse.learn, self.repository, self.manifests)
        return self._result(
            summaries, began, duration_s, frozen.cost, frozen.quiesced, (*lies, *warnings)
        )

    async def _keep_record(self, frozen: PointInTime, began: float, files: Sequence[File]) -> None:
        """From here on another process can go on, should this one die."""
        if not isinstance(frozen, RecordedPointInTime):
            return
        if self.record is not None:
            self.journal = await frozen.journal(self.backup_id)
            return
        record = Unfinished(
            backup=self.backup_id,
            chain=self.chain.id,
            time=began,
            pid=os.getpid(),
            asked=self.options.level,
            disks=self._disks(),
        )
        archive = await call(pack_files, files) if files else None
        self.journal = await frozen.keep_record(record, archive)

    def _collect(self) -> Sequence[File]:
        return collect_files(self.definitions, self.options.tpm_state, self.described)

    def _keep_machine(self, files: Sequence[File]) -> None:
        before = self.chain.machine()
        self.machine = MachinePart(self.repository, vm=self.vm, files=files, before=before)

    def _begin(self, frozen: PointInTime) -> list[DiskPull]:
        pulls = []
        for number, served in enumerate(frozen.disks):
            context = served.context
            try:
                session = self._begin_session(self.chosen[number])
            except ParentGoneError as exc:
                if not served.whole:
                    raise
                self._read_in_full(number, str(exc))
                context = None
                session = self._begin_session(self.chosen[number])
            one = self.chosen[number]
            self.sessions.append(session)
            journal = None
            if self.journal is not None:
                journal = self.journal.disk(number, one.disk.size)
            if journal is not None and self.record is not None:
                self._say(
                    f"disk {one.disk.name}: {format_size(journal.nbytes)} of"
                    f" {format_size(one.disk.size)} were read already"
                )
            elif session.adopted.packs:
                self._say(
                    f"disk {one.disk.name}: a backup that did not come to its end stored"
                    f" {format_size(session.adopted.nbytes)}; what of it is still the same is not stored again"
                )
            waiting = None
            if journal is not None and served.trims:
                waiting = Waiting(journal, session)
            reader: DiskReader | None = None
            if one.parent is not None:
                reader = self.repository.reader(one.parent)
            pulls.append(
                DiskPull(
                    name=one.disk.name,
                    size=one.disk.size,
                    uri=served.uri,
                    context=context,
                    granularity=served.granularity,
                    overwritten=served.overwritten,
                    trims=served.trims,
                    waiting=waiting,
                    lie=self._known_lie(one),
                    on_lie=partial(self._note_lie, frozen, one.disk.name),
                    near=served.near,
                    connections=served.connections,
                    parent=reader,
                    session=session,
                    audit=self.options.audit if served.whole else None,
                    healer=Healer(self.repository, session, reader, size=one.disk.size),
                    journal=journal,
                    kept=Kept() if served.again else None,
                )
            )
        return pulls

    def _known_lie(self, one: Chosen) -> list[str]:
        """What the audit found of a disk that is read in full for it."""
        lie = self.lies.get(one.disk.name)
        return [] if lie is None or one.decision.level is Level.COPY else [lie]

    def _note_lie(self, frozen: PointInTime, disk: str, lie: str) -> None:
        """Remember what the audit found, whatever becomes of this try, and of this process."""
        self.lies[disk] = lie
        if isinstance(frozen, RecordedPointInTime):
            frozen.note_lie(disk, lie)

    def _begin_session(self, one: Chosen) -> Session:
        return self.repository.begin(
            vm=self.vm,
            disk=one.disk.name,
            parent=one.parent,
            like=one.like,
            base=self.reuse.index,
            cache=self.reuse.cache,
            compression_level=self.options.compression_level,
        )

    def _read_in_full(self, number: int, reason: str) -> None:
        """Do without the parent that is gone: the point in time holds the whole disk."""
        one = self.chosen[number]
        decision = Decision(level=Level.FULL, reason=reason)
        self.chosen[number] = replace(one, decision=decision, parent=None)
        self.level = backup_level(one.decision for one in self.chosen)
        self._say(f"disk {one.disk.name}: {decision.level}, {reason}")

    async def _pull(self, frozen: PointInTime, pulls: Sequence[DiskPull]) -> None:
        def started(stop: Callable[[], None]) -> None:
            self._stop = stop
            if frozen.lost is not None:
                stop()

        self.times = await pull(
            pulls, rate=self.options.rate, progress=self.progress, on_start=started
        )

    def _heed_audit(self, pulls: Sequence[DiskPull]) -> list[str]:
        """Make fulls of the disks whose bitmap was found to lie; returns a warning for each."""
        warnings = []
        for number, (one, done) in enumerate(zip(self.chosen, pulls, strict=True)):
            for lie in done.lie:
                reason = distrust(lie)
                decision = Decision(level=Level.FULL, reason=reason)
                self.chosen[number] = replace(one, decision=decision)
                warnings.append(
                    f"disk '{one.disk.name}' was read in full: {reason}; its earlier incrementals of this"
                    " chain may miss writes"
                )
        self.level = backup_level(one.decision for one in self.chosen)
        return warnings

    def _seal(self, pulls: Sequence[DiskPull]) -> None:
        for session in self._all_sessions():
            session.seal()
        for one in pulls:
            if one.healer is not None and (count := one.healer.record()):
                self._say(f"disk {one.name}: {count} damaged frames of older backups are healed")

    def _all_sessions(self) -> Sequence[Session]:
        return [*self.sessions, *([] if self.machine is None else [self.machine.session])]

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress(Progress(kind=ProgressKind.MESSAGE, verb="backup", text=text))

    def _commit(self, pulls: Sequence[DiskPull], began: float, duration_s: float) -> list[Summary]:
        siblings = tuple((session.disk_id, session.id) for session in self._all_sessions())
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
        self.committing = True
        if self.machine is not None:
            self.machine.commit(summaries[0])
        self.manifests = [
            session.commit(summary)
            for session, summary in zip(self.sessions, summaries, strict=True)
        ]
        return summaries

    async def _give_up(self, frozen: PointInTime) -> None:
        """After a failure: drop what only this run would have used."""
        committed = await call(self._is_committed) if self.committing else False
        if committed:
            # Ended between the commit and its confirmation: the backup counts all the same.
            await frozen.confirm(obsolete_bitmaps(self.chosen, self.chain))
            return
        for session in self._all_sessions():
            await call(session.abandon)
        if committed is None:
            # Nothing is touched: the next run finds the exported bitmap, asks again, and decides.
            log.warning(
                "whether backup %s was committed can't be told now; its bitmaps stay in QEMU until the"
                " next backup, or 'nbdpull cleanup' with the repository, decides",
                self.backup_id,
            )
            return
        await frozen.discard()

    def _is_committed(self) -> bool | None:
        """Whether the repository has the backup, although an error came; None when that can't be told."""
        self._deadline.set_in(_ASK_S)
        try:
            if any(
                found.id == self.backup_id and found.complete for found in self.repository.backups()
            ):
                return True
        except (Error, Cancelled):
            return None
        # What was given up may be carried out later.
        return None if abandoned_calls() else False

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
            resumed=self.record is not None,
            warnings=warnings,
        )
