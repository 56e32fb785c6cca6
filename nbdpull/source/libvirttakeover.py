"""Whether libvirt still holds the point in time of a run that died, all of it; see `takeover` for QEMU's own.

The job is libvirt's, lives in QEMU, and ends as a whole: when one disk of it fails, when somebody ends it, when
QEMU ends. So that it is there, at the run's socket and with the run's scratch images, says that it holds what
it held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from nbdpull.source.base import CannotGoOnError, DiskPlan
from nbdpull.source.domainxml import BackupDisk, job_disks, job_socket
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.libvirtjob import SERVER, jobs_of
from nbdpull.source.rundir import FoundRun, RunDir
from nbdpull.source.unfinished import Unfinished
from nbdpull.source.whole import whole

__all__ = ["check_whole", "find_unfinished"]


async def find_unfinished(
    runs: Sequence[tuple[str, FoundRun, str | None]], chain: str, *, quiesced: bool
) -> Unfinished | None:
    """The record of the one dead run of a chain; None when no run of it died here.

    Args:
        runs: of the chain: id, folder, and the socket of the backup job where that is theirs.
        chain: its id.
        quiesced: the guest's agent is to freeze its file systems.

    Raises:
        CannotGoOnError: there is one, and nobody can go on with it.
    """
    if not runs or any(folder.alive for _, folder, _ in runs):
        return None
    if len(runs) > 1:
        raise CannotGoOnError(f"{len(runs)} runs of the chain died")
    [(run, folder, socket)] = runs
    try:
        record = await asyncio.to_thread(folder.record)
    except ValueError as exc:
        raise CannotGoOnError(str(exc)) from exc
    if (record.run, record.chain, record.server) != (run, chain, SERVER):
        raise CannotGoOnError("its record is of another run")
    if socket is None:
        raise CannotGoOnError("its backup job is gone", record)
    if quiesced and record.quiesced is None:
        raise CannotGoOnError(
            "its point in time is not quiesced, and --quiesce is asked for", record
        )
    return record


async def check_whole(
    domain: LibvirtDomain,
    plans: Sequence[DiskPlan],
    rundir: RunDir,
    sound: Mapping[str, Collection[str]],
) -> None:
    """See that the job of a run is as it was made.

    Args:
        domain: that runs.
        plans: what would be asked for now, in the order of the record.
        rundir: the run's folder.
        sound: by the name of each checkpoint, the targets whose bitmap is sound.

    Raises:
        CannotGoOnError: it is not, or a checkpoint of it does not record.
        LibvirtError: libvirt can't be asked.
    """
    if await whole(domain.paused_by_error):
        # Perhaps for the very scratch.
        raise CannotGoOnError("the guest is paused by a write that failed")
    job = await whole(domain.job)
    if job is None or job_socket(job) != rundir.socket:
        raise CannotGoOnError("its backup job is gone")
    if _by_target(job_disks(job)) != _by_target(jobs_of(plans, rundir.path)):
        raise CannotGoOnError("its backup job is not as it was made")
    for plan in plans:
        if plan.checkpoint is not None and plan.disk.name not in sound.get(plan.checkpoint, ()):
            raise CannotGoOnError(f"the checkpoint of disk '{plan.disk.name}' does not record")


def _by_target(disks: Sequence[BackupDisk]) -> Mapping[str, BackupDisk]:
    return {disk.target: disk for disk in disks}
