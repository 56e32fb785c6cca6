"""A point in time of a domain's disks, frozen by libvirt's backup job in pull mode.

    guest -> the backup job's filter -> disk <-. backing
                  |  copies what is about to   |
                  v  be overwritten            |
              scratch (qcow2) -----------------'
                  |
              NBD export vda, with the bitmap backup-vda of what changed since a checkpoint

libvirt does it in one transaction of QEMU, which also begins to record the new checkpoint. What it shows is a
qcow2 image over the disk, so a block that was copied is read from the scratch, and its status tells what it was.
The job goes when the data is read; the checkpoints outlive it, until `confirm` or `discard`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from blake3 import blake3

from nbdpull.errors import (
    Error,
    InUseError,
    LibvirtError,
    PointInTimeLostError,
    ScratchFullError,
    SourceError,
)
from nbdpull.model.results import GuestCost, Quiesced
from nbdpull.nbdio.connection import unix_uri
from nbdpull.source.base import DiskPlan, OnLost, ServedDisk
from nbdpull.source.domainxml import (
    BackupDisk,
    backup_xml,
    checkpoint_xml,
    exported_bitmap,
    job_socket,
)
from nbdpull.source.journal import Journal
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.libvirtcheckpoints import Checkpoints
from nbdpull.source.quiesce import quiesced
from nbdpull.source.recorder import Recorded, Recorder
from nbdpull.source.rundir import RunDir
from nbdpull.source.scratch import ScratchGuard
from nbdpull.source.unfinished import Unfinished
from nbdpull.source.whole import finished, whole

__all__ = [
    "SERVER",
    "LibvirtPointInTime",
    "end_job",
    "freeze",
    "jobs_of",
    "resume",
]

log = logging.getLogger(__name__)

SERVER: Final = blake3(b"libvirt").hexdigest()
"""In a run's record: there is one way only in which a job's exports are reached."""

_GRANULARITY: Final = 512
"""QEMU's smallest for a bitmap: libvirt leaves it to QEMU, which takes the image's cluster size."""
_GONE_S: Final = 30.0
_POLL_S: Final = 0.05
_LOOK_S: Final = 0.5
_ENDING_S: Final = 3.0


def jobs_of(plans: Sequence[DiskPlan], folder: Path) -> list[BackupDisk]:
    """What a run asks libvirt for, with its scratch images in `folder`."""
    return [
        BackupDisk(
            target=plan.disk.name,
            scratch=str(folder / f"disk{index}.qcow2"),
            incremental=plan.base,
        )
        for index, plan in enumerate(plans)
    ]


async def end_job(domain: LibvirtDomain, socket: str) -> bool:
    """End the backup job that serves at `socket`, if it is there, and wait until it is gone.

    Another tool's job is left alone. Every NBD connection must be closed before.

    Returns:
        Whether there was one.

    Raises:
        LibvirtError: libvirt can't be asked.
        SourceError: it does not end.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _GONE_S
    told = False
    while True:
        job = await whole(domain.job)
        if job is None or job_socket(job) != socket:
            return told
        if not told:
            await whole(domain.abort_job)
            told = True
        if loop.time() > deadline:
            raise SourceError(
                f"libvirt's backup job of domain '{domain.name}' is still there after {_GONE_S:g} s"
            )
        await asyncio.sleep(_POLL_S)


class LibvirtPointInTime(Recorded):
    """See `PointInTime`. Made by `freeze` and `resume`."""

    def __init__(
        self,
        domain: LibvirtDomain,
        plans: Sequence[DiskPlan],
        rundir: RunDir,
        checkpoints: Checkpoints,
        on_lost: OnLost,
    ) -> None:
        self._domain = domain
        self._plans = tuple(plans)
        self._rundir = rundir
        self._checkpoints = checkpoints
        self._on_lost = on_lost
        self._guard = ScratchGuard(rundir, self._lose)
        self._recorder = Recorder(rundir)
        self._began = 0.0
        self._pause_s = 0.0
        self._stuck = False
        self._released = False
        self.gone = True
        self.disks: tuple[ServedDisk, ...] = ()
        self.lost: PointInTimeLostError | None = None
        self.cost: GuestCost | None = None
        self.quiesced: Quiesced | None = None

    # -- making it ---------------------------------------------------------------------------------

    @property
    def _recorded(self) -> dict[str, list[str]]:
        """Targets by the new checkpoint that they are to have; there is one at most."""
        recorded: dict[str, list[str]] = {}
        for plan in self._plans:
            if plan.checkpoint is not None:
                recorded.setdefault(plan.checkpoint, []).append(plan.disk.name)
        return recorded

    async def begin(self, *, quiesce: bool) -> None:
        """Freeze and serve.

        Raises:
            InUseError: the domain has a job.
            SourceError: libvirt or QEMU refused.
        """
        await self._check_free()
        # Before a backup of ours that is not its doing.
        self._stuck = await whole(self._domain.paused_by_error)
        if not quiesce:
            await self._begin()
            return
        async with quiesced(str(self._domain.address)) as guest:
            await self._begin()
        self.quiesced = guest.result

    async def _check_free(self) -> None:
        """See that the domain has no job, for which libvirt would wait half a minute."""
        name = self._domain.name
        job = await whole(self._domain.job)
        if job is not None:
            raise InUseError(
                f"domain '{name}' is being backed up already (at {job_socket(job) or 'no socket'}), and"
                " libvirt allows one backup job a domain; wait for it, or end it with 'virsh domjobabort"
                f" {name}' if its owner is gone"
            )
        if await whole(self._domain.other_job):
            raise InUseError(
                f"domain '{name}' is busy with another job of libvirt; wait for it, see 'virsh"
                f" domjobinfo {name}'"
            )

    async def _begin(self) -> None:
        chosen = {plan.disk.name for plan in self._plans}
        backup = backup_xml(
            self._rundir.socket,
            jobs_of(self._plans, self._rundir.path),
            [target for target in self._checkpoints.targets if target not in chosen],
        )
        checkpoint = None
        for name, targets in self._recorded.items():
            others = [one for one in self._checkpoints.targets if one not in targets]
            checkpoint = checkpoint_xml(name, targets, others)
        self._began = asyncio.get_running_loop().time()
        self.gone = False
        try:
            await whole(self._domain.begin, backup, checkpoint)
        except LibvirtError as exc:
            if "Permission denied" not in str(exc):
                raise
            raise SourceError(
                f"{exc}: QEMU may not make its socket or its scratch in {self._rundir.path.parent};"
                " AppArmor or SELinux may forbid it, or a folder above it: choose another one with"
                " --scratch, see docs/sources.md"
            ) from exc
        self._serve()

    def _serve(self) -> None:
        self.disks = tuple(
            ServedDisk(
                disk=plan.disk,
                uri=unix_uri(self._rundir.socket, plan.disk.name),
                context=None
                if plan.base is None
                else f"qemu:dirty-bitmap:{exported_bitmap(plan.disk.name)}",
                granularity=_GRANULARITY,
            )
            for plan in self._plans
        )

    def attach(self, record: Unfinished) -> None:
        """Take the job of a run that died as this one's own."""
        self._began = asyncio.get_running_loop().time() - max(0.0, time.time() - record.time)
        self._recorder = Recorder(self._rundir, record)
        self._pause_s = record.pause_s
        self.quiesced = record.quiesced
        self.gone = False
        self._serve()

    async def keep_record(self, record: Unfinished, machine: bytes | None) -> Journal | None:
        """See `RecordedPointInTime.keep_record`."""
        record = replace(record, server=SERVER, quiesced=self.quiesced)
        return await self._recorder.keep(record, machine)

    # -- watching it -------------------------------------------------------------------------------

    def _lose(self, reason: PointInTimeLostError) -> None:
        if self.lost is None and not self._released:
            self.lost = reason
            self._on_lost(reason)

    async def why_lost(self) -> PointInTimeLostError | None:
        """See `PointInTime.why_lost`."""
        # A job that somebody ends has no exports any more some time before libvirt calls it ended.
        deadline = asyncio.get_running_loop().time() + _ENDING_S
        while self.lost is None and asyncio.get_running_loop().time() < deadline:
            await self._look()
            await asyncio.sleep(_POLL_S)
        return self.lost

    async def _look(self) -> None:
        full = None
        with contextlib.suppress(OSError):  # the job is looked at below, too
            full = await asyncio.to_thread(self._guard.check)
        if full is not None:
            self._lose(full)
            return
        with contextlib.suppress(Error):  # libvirtd may be away; the data comes from QEMU
            stuck = not self._stuck and await whole(self._domain.paused_by_error)
            if stuck and self._guard.pressed:
                self._lose(self._guard.full("QEMU found none for a write"))
                await self._resume()
                return
            job = await whole(self._domain.job)
            if job is None or job_socket(job) != self._rundir.socket:
                self._lose(self._ended())

    def _ended(self) -> PointInTimeLostError:
        return PointInTimeLostError(
            f"the backup job of domain '{self._domain.name}' ended before its disks were read: somebody ended it,"
            " or the domain"
        )

    async def watch(self) -> None:
        """Look now and then until the view is lost."""
        while self.lost is None:
            await self._look()
            await asyncio.sleep(_LOOK_S)

    async def _resume(self) -> None:
        """Let a guest go on that QEMU paused because the scratch was full."""
        begin = asyncio.get_running_loop().time()
        with contextlib.suppress(Error):
            if not self._stuck and await whole(self._domain.paused_by_error):
                await whole(self._domain.resume)
                self._pause_s += asyncio.get_running_loop().time() - begin

    # -- ending it ---------------------------------------------------------------------------------

    async def release(self) -> None:
        """End the job: afterwards the guest's writes cost nothing any more. A second call does nothing."""
        if not self._released:
            self._released = True
            await finished(self._take_down())

    async def _take_down(self) -> None:
        copied = None
        with contextlib.suppress(OSError):  # only its peak is wanted
            await asyncio.to_thread(self._guard.check)
        try:
            with contextlib.suppress(LibvirtError):  # only a figure
                copied = await whole(self._domain.copied)
            # QEMU's answer to that came after whatever it had to tell of its jobs, which libvirt heeds meanwhile.
            await asyncio.sleep(_POLL_S)
            if not await end_job(self._domain, self._rundir.socket) and self.lost is None:
                self.lost = self._ended()
            self.gone = True
        except Error as exc:
            log.warning(
                "can't take the frozen view down (the chain's next backup goes on at it, or takes it down, as"
                " 'nbdpull cleanup' does): %s",
                exc,
            )
        if isinstance(self.lost, ScratchFullError):
            # With the job gone the write that found no room succeeds.
            await self._resume()
        await self._recorder.close()
        self.cost = GuestCost(
            frozen_s=asyncio.get_running_loop().time() - self._began,
            pause_s=self._pause_s,
            copied_bytes=self._guard.peak if copied is None else copied,
            scratch_peak_bytes=self._guard.peak,
        )

    async def confirm(self, obsolete: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """See `PointInTime.confirm`."""
        return await self._checkpoints.remove(self._domain, self._checkpoints.doomed(obsolete))

    async def discard(self) -> tuple[str, ...]:
        """See `PointInTime.discard`."""
        return await self._checkpoints.remove(self._domain, self._recorded)


@contextlib.asynccontextmanager
async def freeze(
    domain: LibvirtDomain,
    plans: Sequence[DiskPlan],
    rundir: RunDir,
    checkpoints: Checkpoints,
    on_lost: OnLost,
    *,
    quiesce: bool,
    on_released: Callable[[bool], None],
) -> AsyncIterator[LibvirtPointInTime]:
    """Freeze all disks at one moment and serve them; the context's end releases them.

    When making it fails nothing of it is left. When the body fails only the frozen view is ended: the
    caller decides about the checkpoints.
    """
    frozen = LibvirtPointInTime(domain, plans, rundir, checkpoints, on_lost)
    try:
        # To its end, also when cancelled: what libvirt was told to make must be known to be removed.
        await finished(frozen.begin(quiesce=quiesce))
    except BaseException:
        if not frozen.gone:
            try:
                await frozen.release()
            finally:
                on_released(frozen.gone)
            for line in await frozen.discard():
                log.debug("%s", line)
        raise
    async with _watched(frozen, on_released):
        yield frozen


@contextlib.asynccontextmanager
async def resume(
    domain: LibvirtDomain,
    plans: Sequence[DiskPlan],
    rundir: RunDir,
    checkpoints: Checkpoints,
    on_lost: OnLost,
    *,
    record: Unfinished,
    on_released: Callable[[bool], None],
) -> AsyncIterator[LibvirtPointInTime]:
    """Go on at the point in time of a run that died: as `freeze`, with the job that was seen to be its."""
    frozen = LibvirtPointInTime(domain, plans, rundir, checkpoints, on_lost)
    frozen.attach(record)
    async with _watched(frozen, on_released):
        yield frozen


@contextlib.asynccontextmanager
async def _watched(
    frozen: LibvirtPointInTime, on_released: Callable[[bool], None]
) -> AsyncIterator[None]:
    guard, job = frozen._guard.watch(), frozen.watch()  # noqa: SLF001
    watchers = [asyncio.create_task(guard, name="scratch-space")]
    watchers.append(asyncio.create_task(job, name="libvirt-job"))
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()
        try:
            await frozen.release()
        finally:
            on_released(frozen.gone)
        await asyncio.wait(watchers)
