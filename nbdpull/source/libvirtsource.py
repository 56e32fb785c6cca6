"""A domain of libvirt: its disks, its checkpoints and its backup job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from nbdpull.errors import Error, InUseError, LibvirtError
from nbdpull.model.chain import BitmapState
from nbdpull.model.outcomes import Finding
from nbdpull.source.base import (
    GRANULARITY,
    CannotGoOnError,
    Committed,
    Disk,
    DiskPlan,
    LiveRun,
    OnLost,
    PointInTime,
    Recall,
    RunInfo,
    Swept,
    select_disks,
)
from nbdpull.source.disks import refuse_iothread
from nbdpull.source.domainxml import (
    DomainDefinition,
    DomainDisk,
    parse_domain,
    sound_disks,
)
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.libvirtcheckpoints import Checkpoints, remove_checkpoint
from nbdpull.source.libvirtjob import (
    LibvirtPointInTime,
    end_job,
    freeze,
    resume,
)
from nbdpull.source.libvirtruns import label, make_rundir, runs_of
from nbdpull.source.libvirttakeover import check_whole, find_unfinished
from nbdpull.source.names import checkpoint_parts
from nbdpull.source.recalling import recall_checkpoints
from nbdpull.source.recorder import kept_files
from nbdpull.source.rundir import FoundRun, RunDir
from nbdpull.source.unfinished import Unfinished
from nbdpull.source.whole import whole

__all__ = ["DomainSource"]


class DomainSource:
    """See `Source`: a domain that runs.

    Args:
        domain: it.
        options: scratch, force and quiesce count.
        recall: which checkpoints the repository has of the VM, for those that libvirt lost.
    """

    def __init__(self, domain: LibvirtDomain, options: QemuOptions, recall: Recall) -> None:
        self._domain = domain
        self._options = options
        self._recall = recall
        self._definition: DomainDefinition | None = None
        self._sound: dict[str, Mapping[str, int]] = {}
        self._rundirs: list[RunDir] = []
        self._unfinished: FoundRun | None = None

    async def vm_name(self) -> tuple[str, str | None]:
        """See `Source.vm_name`."""
        return self._domain.name, None

    async def _define(self) -> DomainDefinition:
        if self._definition is None:
            self._definition = parse_domain(await whole(self._domain.xml))
        return self._definition

    # -- leftovers ---------------------------------------------------------------------------------

    async def sweep(self, committed: Committed, *, force: bool = False) -> Swept:
        """See `Source.sweep`."""
        return await self._sweep(committed, force=force, spare=None)

    async def sweep_others(self, committed: Committed, spared: Unfinished) -> Swept:
        """See `Resumable.sweep_others`."""
        return await self._sweep(committed, force=False, spare=spared.run)

    async def _sweep(self, committed: Committed, *, force: bool, spare: str | None) -> Swept:
        swept = Swept()
        for run, folder, socket in await runs_of(self._domain, self._options.scratch):
            if run == spare:
                continue
            if folder is not None and folder.alive and not force:
                swept.live.append(LiveRun(run=run, chain=folder.chain, pid=folder.pid))
                swept.kept.append(
                    f"run {run}: {swept.live[-1].who} still works on it (end it first, or use --force)"
                )
                continue
            waits = False
            if socket is not None and folder is not None and await whole(folder.full):
                # Not a guest that waits for room on its own disk: see decision 0082.
                waits = await whole(self._domain.paused_by_error)
            if socket is not None and await end_job(self._domain, socket):
                swept.removed.append(f"backup job of run {run}")
            await self._remove_pending(run, committed, swept)
            if folder is not None:
                await asyncio.to_thread(folder.remove)
                swept.removed.append(f"scratch folder of run {run}")
            if waits:
                # With the job gone the write that found no room succeeds.
                what = f"pause of the guest, which found no room in the scratch of run {run}"
                try:
                    await whole(self._domain.resume)
                    swept.removed.append(what)
                except Error as exc:
                    swept.kept.append(f"{what}: {exc}")
        return swept

    async def _remove_pending(self, run: str, committed: Committed, swept: Swept) -> None:
        targets = [disk.target for disk in (await self._define()).disks]
        for name in await whole(self._domain.checkpoints):
            parts = checkpoint_parts(name)
            if parts is None or not parts[1].startswith(run) or committed(*parts):
                continue
            try:
                await whole(remove_checkpoint, self._domain, name, targets)
                swept.removed.append(f"checkpoint {name}")
            except Error as exc:
                swept.kept.append(f"checkpoint {name}: {exc}")

    # -- going on ----------------------------------------------------------------------------------

    async def unfinished(self, chain: str) -> Unfinished | None:
        """See `Resumable.unfinished`."""
        runs = [
            (run, folder, socket)
            for run, folder, socket in await runs_of(self._domain, self._options.scratch)
            if folder is not None and folder.chain == chain
        ]
        self._unfinished = runs[0][1] if runs else None
        return await find_unfinished(runs, chain, quiesced=self._options.quiesce)

    async def kept_files(self, record: Unfinished) -> bytes | None:
        """See `Resumable.kept_files`."""
        return await kept_files(self._unfinished, record)

    # -- disks -------------------------------------------------------------------------------------

    async def disks(self, *, include: Sequence[str], exclude: Sequence[str]) -> Sequence[Disk]:
        """See `Source.disks`."""
        definition = await self._define()
        wanted = select_disks(
            [Disk(name=disk.target, size=0) for disk in definition.disks],
            definition.skipped,
            include=include,
            exclude=exclude,
        )
        chosen = [disk for disk in definition.disks if disk.target in wanted]
        await self._check_iothreads(chosen)
        self._sound = await self._look_at_checkpoints()
        targets = [disk.target for disk in definition.disks if disk.format == "qcow2"]
        lost = self._recall(self._domain.name)
        if await whole(recall_checkpoints, self._domain, lost, self._sound, targets):
            self._sound = await self._look_at_checkpoints()
        return [await self._disk(disk) for disk in chosen]

    async def _look_at_checkpoints(self) -> dict[str, Mapping[str, int]]:
        """Of each checkpoint of ours, what changed since on each disk whose bitmap is sound."""
        disks = (await self._define()).disks
        return {
            name: sound_disks(await whole(self._domain.checkpoint_xml, name), disks)
            for name in await whole(self._domain.checkpoints)
            if checkpoint_parts(name) is not None
        }

    async def _disk(self, disk: DomainDisk) -> Disk:
        size, allocated = await whole(self._domain.block_size, disk.target)
        bitmaps = {
            name: BitmapState(
                name=name,
                granularity=GRANULARITY,
                count=sound[disk.target],
                recording=True,
                busy=False,
                persistent=True,
            )
            for name, sound in self._sound.items()
            if disk.target in sound
        }
        return Disk(
            name=disk.target,
            size=size,
            bitmaps=bitmaps,
            records=disk.format == "qcow2",
            shares_checkpoint=True,
            allocated=allocated,
        )

    async def _check_iothreads(self, disks: Sequence[DomainDisk]) -> None:
        if self._options.force or not any(disk.iothread for disk in disks):
            return
        version = await whole(self._domain.version)
        for disk in disks:
            refuse_iothread(disk.target, disk.iothread, version)

    async def machine(self) -> tuple[str, bytes] | None:
        """See `Source.machine`: the domain's XML, which libvirt gives without passwords."""
        return "domain.xml", (await whole(self._domain.xml)).encode()

    async def examine(self) -> Sequence[Finding]:
        """See `Source.examine`."""
        from nbdpull.source.libvirtcheckup import examine  # noqa: PLC0415 - no backup asks for it

        return await examine(self._domain, await self._define(), self._options.scratch)

    # -- the point in time -------------------------------------------------------------------------

    @asynccontextmanager
    async def freeze(
        self, info: RunInfo, plans: Sequence[DiskPlan], on_lost: OnLost
    ) -> AsyncIterator[PointInTime]:
        """See `Source.freeze`."""
        # Not in a thread: what a cancelled call had made there, nobody would remove.
        rundir = make_rundir(self._domain, await self._define(), info, self._options.scratch)
        self._rundirs.append(rundir)
        try:
            async with freeze(
                self._domain,
                plans,
                rundir,
                await self._checkpoints(info.chain),
                on_lost,
                quiesce=self._options.quiesce,
                on_released=partial(_released, rundir),
            ) as frozen:
                yield frozen
        finally:
            await whole(rundir.remove_scratch)

    async def _checkpoints(self, chain: str) -> Checkpoints:
        definition = await self._define()
        return Checkpoints(
            targets=[disk.target for disk in definition.disks]
            + [one.name for one in definition.skipped],
            sound=self._sound,
            chain=chain,
        )

    @asynccontextmanager
    async def resume(
        self, record: Unfinished, plans: Sequence[DiskPlan], on_lost: OnLost
    ) -> AsyncIterator[LibvirtPointInTime]:
        """See `Resumable.resume`."""
        folder = self._unfinished
        if folder is None:
            raise CannotGoOnError("its scratch folder was not looked for")
        checkpoints = await self._checkpoints(record.chain)
        taken: list[RunDir] = []
        holding = False
        try:
            # Noted in the thread: it is let go also when this was cancelled meanwhile.
            await whole(lambda: taken.append(self._take_over(record, folder.path)))
            rundir = taken[0]
            await check_whole(self._domain, plans, rundir, self._sound)
            resuming = resume(
                self._domain,
                plans,
                rundir,
                checkpoints,
                on_lost,
                record=record,
                on_released=partial(_released, rundir),
            )
            async with resuming as frozen:
                self._rundirs.append(rundir)
                holding = True
                yield frozen
        except BaseException as exc:
            if not holding:
                for one in taken:
                    await whole(one.leave)
                # Of libvirt, or of a domain that is busy: that passes, and the run is not to be swept for it.
                if isinstance(exc, Error) and not isinstance(exc, (LibvirtError, InUseError)):
                    raise CannotGoOnError(str(exc)) from exc
            raise
        finally:
            if holding:
                await whole(taken[0].remove_scratch)

    def _take_over(self, record: Unfinished, path: Path) -> RunDir:
        try:
            return RunDir.take_over(path, source=label(self._domain), chain=record.chain)
        except InUseError as exc:
            raise CannotGoOnError(str(exc)) from exc

    async def end_runs(self) -> None:
        """See `Resumable.end_runs`: until its checkpoints are confirmed a run lives."""
        while self._rundirs:
            await whole(self._rundirs.pop().close)

    async def close(self) -> None:
        """Let the runs' folders and the connection go."""
        await self.end_runs()
        await whole(self._domain.close)


def _released(rundir: RunDir, gone: bool) -> None:  # noqa: FBT001 - a callback's one argument
    # QEMU may still use what it was not seen to let go; 'cleanup' finds the folder.
    if not gone:
        rundir.keep()
