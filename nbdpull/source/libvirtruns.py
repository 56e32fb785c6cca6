"""The runs of a domain of libvirt: their folders, and which of them the backup job is of."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from nbdpull.errors import SourceError
from nbdpull.source.base import RunInfo
from nbdpull.source.domainxml import DomainDefinition, job_socket
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.rundir import FoundRun, RunDir, find_run, find_runs
from nbdpull.source.whole import whole

__all__ = ["label", "make_rundir", "runs_of"]

_SOCKET: Final = "nbd.sock"


def label(domain: LibvirtDomain) -> str:
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


async def runs_of(
    domain: LibvirtDomain, scratch: str | None
) -> list[tuple[str, FoundRun | None, str | None]]:
    """Runs that left something: id, folder, and the socket of the backup job where that is theirs.

    A job is a run's when its socket is in a folder of a run's name, which this user or root made, or which
    is no more. A folder of that name that somebody else made is somebody else's run.
    """
    folders = await asyncio.to_thread(lambda: list(find_runs(scratch)))
    mine = label(domain)
    runs: dict[str, tuple[FoundRun | None, str | None]] = {
        folder.path.name.removeprefix("nbdpull-"): (folder, None)
        for folder in folders
        if folder.source == mine
    }
    job = await whole(domain.job)
    socket = None if job is None else job_socket(job)
    if socket is not None and Path(socket).name == _SOCKET:
        path = Path(socket).parent
        run = _run_of(path)
        found, there = await asyncio.to_thread(lambda: (find_run(path), os.path.lexists(path)))
        if run is not None and (found is not None or not there):
            runs[run] = (found, socket)
    return [(run, *runs[run]) for run in sorted(runs)]


def make_rundir(
    domain: LibvirtDomain, definition: DomainDefinition, info: RunInfo, scratch: str | None
) -> RunDir:
    """Make the folder of a run, which QEMU may use.

    Raises:
        SourceError: this user may not give it to QEMU.
        UsageError: it can't be made there.
    """
    owner = definition.owner
    if owner is not None and os.geteuid() not in {0, owner[0]}:
        raise SourceError(
            f"the QEMU of domain '{domain.name}' runs as user {owner[0]}, which can't use a folder"
            f" of user {os.geteuid()}; run nbdpull as root, or as that user"
        )
    return RunDir.create(
        scratch,
        info.run,
        source=label(domain),
        chain=info.chain,
        owner=owner,
    )
