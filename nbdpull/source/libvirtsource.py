"""A domain of libvirt: its disks, its checkpoints and its backup job."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from nbdpull.errors import Error, SourceError, UsageError
from nbdpull.model.chain import BitmapState
from nbdpull.model.outcomes import Finding, FindingKind
from nbdpull.source.address import ImageAddress
from nbdpull.source.base import (
    GRANULARITY,
    Committed,
    Disk,
    DiskPlan,
    Known,
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
    job_socket,
    parse_domain,
    sound_disks,
)
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.libvirtjob import Checkpoints, end_job, freeze, remove_checkpoint
from nbdpull.source.names import checkpoint_parts
from nbdpull.source.offline import OfflineSource
from nbdpull.source.recalling import recall_checkpoints
from nbdpull.source.rundir import FoundRun, RunDir, find_run, find_runs
from nbdpull.source.whole import whole

__all__ = ["DomainSource", "ShutDownDomain"]

_SOCKET: Final = "nbd.sock"
_LEAST: Final = 64 << 20


def _label(domain: LibvirtDomain) -> str:
    """What a run's folder says of its source: whichever way the domain was named."""
    return f"libvirt:{domain.uuid}"


def _run_of(folder: Path) -> str | None:
    name = folder.name.removeprefix("nbdpull-")
    ours = (
        folder.name.startswith("nbdpull-")
        and len(name) == 8
        and set(name) <= set("0123456789abcdef")
    )
    return name if ours else None


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
        swept = Swept()
        for run, folder, socket in await self._runs():
            if folder is not None and folder.alive and not force:
                swept.live.append(LiveRun(run=run, chain=folder.chain, pid=folder.pid))
                swept.kept.append(
                    f"run {run}: {swept.live[-1].who} still works on it (end it first, or use --force)"
                )
                continue
            if socket is not None and await end_job(self._domain, socket):
                swept.removed.append(f"backup job of run {run}")
            await self._remove_pending(run, committed, swept)
            if folder is not None:
                await asyncio.to_thread(folder.remove)
                swept.removed.append(f"scratch folder of run {run}")
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

    async def _runs(self) -> list[tuple[str, FoundRun | None, str | None]]:
        """Runs that left something: id, folder, and the socket of the backup job where that is theirs.

        A job is a run's when its socket is in a folder of a run's name, which this user or root made, or which
        is no more. A folder of that name that somebody else made is somebody else's run.
        """
        folders = await asyncio.to_thread(lambda: list(find_runs(self._options.scratch)))
        label = _label(self._domain)
        runs: dict[str, tuple[FoundRun | None, str | None]] = {
            folder.path.name.removeprefix("nbdpull-"): (folder, None)
            for folder in folders
            if folder.source == label
        }
        job = await whole(self._domain.job)
        socket = None if job is None else job_socket(job)
        if socket is not None and Path(socket).name == _SOCKET:
            path = Path(socket).parent
            run = _run_of(path)
            found, there = await asyncio.to_thread(lambda: (find_run(path), os.path.lexists(path)))
            if run is not None and (found is not None or not there):
                runs[run] = (found, socket)
        return [(run, *runs[run]) for run in sorted(runs)]

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

    # -- doctor ------------------------------------------------------------------------------------

    async def examine(self) -> Sequence[Finding]:
        """See `Source.examine`."""
        findings = []

        def add(kind: FindingKind, subject: str, text: str) -> None:
            findings.append(Finding(kind=kind, subject=subject, text=text))

        definition = await self._define()
        add(FindingKind.OK, "domain", f"{self._domain.name} runs, at {self._domain.address}")
        if await whole(self._domain.paused_by_error):
            add(FindingKind.PROBLEM, "guest", "is paused by a write that failed: mend that first")
        for skip in definition.skipped:
            add(FindingKind.OK, f"drive {skip.name}", f"is not backed up: {skip.reason}")
        if not definition.disks:
            add(FindingKind.PROBLEM, "disks", "there is none to back up")
        for disk in definition.disks:
            try:
                await self._check_iothreads_of(disk)
            except SourceError as exc:
                add(FindingKind.PROBLEM, f"disk {disk.target}", str(exc))
                continue
            if disk.format == "qcow2":
                add(FindingKind.OK, f"disk {disk.target}", "is qcow2, keeps checkpoints")
            else:
                text = f"is {disk.format}, on which libvirt keeps no checkpoints: read in full each time"
                add(FindingKind.WARNING, f"disk {disk.target}", text)
        findings += await self._examine_jobs()
        findings += await self._examine_scratch(definition)
        return findings

    async def _check_iothreads_of(self, disk: DomainDisk) -> None:
        if disk.iothread is not None:
            refuse_iothread(disk.target, disk.iothread, await whole(self._domain.version))

    async def _examine_jobs(self) -> list[Finding]:
        findings = []
        runs = await self._runs()
        for run, folder, _ in runs:
            text = f"run {run} is dead: the next backup removes what it left, and so does 'nbdpull cleanup'"
            if folder is not None and folder.alive:
                text = f"process {folder.pid} backs this domain up right now, for run {run}"
            findings.append(Finding(kind=FindingKind.WARNING, subject="other runs", text=text))
        job = await whole(self._domain.job)
        if job is not None and not any(socket for _, _, socket in runs):
            text = "another tool's backup job runs, and libvirt allows one a domain: wait for it"
            findings.append(Finding(kind=FindingKind.PROBLEM, subject="backup job", text=text))
        if not findings:
            text = "none, and nothing is left of earlier ones"
            findings.append(Finding(kind=FindingKind.OK, subject="other runs", text=text))
        return findings

    async def _examine_scratch(self, definition: DomainDefinition) -> list[Finding]:
        try:
            rundir = self._make_rundir(RunInfo(run=os.urandom(4).hex(), chain=""), definition)
        except Error as exc:
            return [Finding(kind=FindingKind.PROBLEM, subject="scratch", text=str(exc))]
        try:
            free, _ = rundir.room()
        finally:
            rundir.close()
        text = f"{rundir.path.parent} has {free} bytes free; whether QEMU may use it, only a backup shows"
        kind = FindingKind.OK if free >= _LEAST else FindingKind.WARNING
        return [Finding(kind=kind, subject="scratch", text=text)]

    # -- the point in time -------------------------------------------------------------------------

    def _make_rundir(self, info: RunInfo, definition: DomainDefinition) -> RunDir:
        owner = definition.owner
        if owner is not None and os.geteuid() not in {0, owner[0]}:
            raise SourceError(
                f"the QEMU of domain '{self._domain.name}' runs as user {owner[0]}, which can't use a folder"
                f" of user {os.geteuid()}; run nbdpull as root, or as that user"
            )
        return RunDir.create(
            self._options.scratch,
            info.run,
            source=_label(self._domain),
            chain=info.chain,
            owner=owner,
        )

    @asynccontextmanager
    async def freeze(
        self, info: RunInfo, plans: Sequence[DiskPlan], on_lost: OnLost
    ) -> AsyncIterator[PointInTime]:
        """See `Source.freeze`."""
        definition = await self._define()
        # Not in a thread: what a cancelled call had made there, nobody would remove.
        rundir = self._make_rundir(info, definition)
        self._rundirs.append(rundir)
        checkpoints = Checkpoints(
            targets=[disk.target for disk in definition.disks]
            + [one.name for one in definition.skipped],
            sound=self._sound,
            chain=info.chain,
        )

        def released(gone: bool) -> None:  # noqa: FBT001 - a callback's one argument
            # QEMU may still use what it was not seen to let go; 'cleanup' finds the folder.
            if not gone:
                rundir.keep()

        try:
            async with freeze(
                self._domain,
                plans,
                rundir,
                checkpoints,
                on_lost,
                quiesce=self._options.quiesce,
                on_released=released,
            ) as frozen:
                yield frozen
        finally:
            await whole(rundir.remove_scratch)

    async def close(self) -> None:
        """Let the runs' folders and the connection go: until its checkpoints are confirmed a run lives."""
        for rundir in self._rundirs:
            await whole(rundir.close)
        await whole(self._domain.close)


class ShutDownDomain(OfflineSource):
    """See `Source`: a domain that does not run. Its images are backed up as with ``disk:``.

    Checkpoints that are made in the images meanwhile are told to libvirt when it runs again.
    """

    def __init__(self, domain: LibvirtDomain, options: QemuOptions, known: Known) -> None:
        """Find its images.

        Raises:
            UsageError: what is asked for needs a domain that runs.
            SourceError: a disk is no file or block device of this machine.
        """
        if options.quiesce:
            raise UsageError(
                f"domain '{domain.name}' does not run, so --quiesce has nothing to freeze; leave it out"
            )
        images = []
        for disk in parse_domain(domain.xml()).disks:
            if disk.path is None:
                raise SourceError(
                    f"domain '{domain.name}' does not run, and its disk '{disk.target}' is no file or device"
                    " of this machine; start it to back it up"
                )
            images.append(ImageAddress(path=disk.path, format=disk.format, name=disk.target))
        if not images:
            raise UsageError(f"domain '{domain.name}' has no disk to back up")
        super().__init__(images, scratch=options.scratch, known=known)
        self._domain = domain
        self._runs_in = options.scratch

    async def vm_name(self) -> tuple[str, str | None]:
        """See `Source.vm_name`."""
        return self._domain.name, None

    async def sweep(self, committed: Committed, *, force: bool = False) -> Swept:
        """See `Source.sweep`; a job has ended with its QEMU, and only its folder can be left."""
        swept = await super().sweep(committed, force=force)
        for folder in await asyncio.to_thread(lambda: list(find_runs(self._runs_in))):
            if folder.source == _label(self._domain) and not folder.alive:
                await asyncio.to_thread(folder.remove)
                swept.removed.append(f"scratch folder {folder.path}")
        return swept

    async def close(self) -> None:
        """See `OfflineSource.close`."""
        await super().close()
        await whole(self._domain.close)
