"""What a backup of a domain of libvirt would stumble over: for `doctor`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from nbdpull.errors import Error, SourceError
from nbdpull.model.outcomes import Finding, FindingKind
from nbdpull.source.base import RunInfo
from nbdpull.source.disks import refuse_iothread
from nbdpull.source.domainxml import DomainDefinition, DomainDisk
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.libvirtruns import make_rundir, runs_of
from nbdpull.source.whole import whole

__all__ = ["examine"]

_LEAST: Final = 64 << 20


async def examine(
    domain: LibvirtDomain, definition: DomainDefinition, scratch: str | None
) -> Sequence[Finding]:
    """See `Source.examine`."""
    findings = []

    def add(kind: FindingKind, subject: str, text: str) -> None:
        findings.append(Finding(kind=kind, subject=subject, text=text))

    add(FindingKind.OK, "domain", f"{domain.name} runs, at {domain.address}")
    if await whole(domain.paused_by_error):
        add(FindingKind.PROBLEM, "guest", "is paused by a write that failed: mend that first")
    for skip in definition.skipped:
        add(FindingKind.OK, f"drive {skip.name}", f"is not backed up: {skip.reason}")
    if not definition.disks:
        add(FindingKind.PROBLEM, "disks", "there is none to back up")
    for disk in definition.disks:
        try:
            await _check_iothreads(domain, disk)
        except SourceError as exc:
            add(FindingKind.PROBLEM, f"disk {disk.target}", str(exc))
            continue
        if disk.format == "qcow2":
            add(FindingKind.OK, f"disk {disk.target}", "is qcow2, keeps checkpoints")
        else:
            text = (
                f"is {disk.format}, on which libvirt keeps no checkpoints: read in full each time"
            )
            add(FindingKind.WARNING, f"disk {disk.target}", text)
    findings += await _examine_jobs(domain, scratch)
    findings += await _examine_scratch(domain, definition, scratch)
    return findings


async def _check_iothreads(domain: LibvirtDomain, disk: DomainDisk) -> None:
    if disk.iothread is not None:
        refuse_iothread(disk.target, disk.iothread, await whole(domain.version))


async def _examine_jobs(domain: LibvirtDomain, scratch: str | None) -> list[Finding]:
    findings = []
    runs = await runs_of(domain, scratch)
    for run, folder, _ in runs:
        text = (
            f"run {run} is dead: its chain's next backup goes on with it, or removes what it left, as"
            " 'nbdpull cleanup' does"
        )
        if folder is not None and folder.alive:
            text = f"process {folder.pid} backs this domain up right now, for run {run}"
        findings.append(Finding(kind=FindingKind.WARNING, subject="other runs", text=text))
    job = await whole(domain.job)
    if job is not None and not any(socket for _, _, socket in runs):
        text = "another tool's backup job runs, and libvirt allows one a domain: wait for it"
        findings.append(Finding(kind=FindingKind.PROBLEM, subject="backup job", text=text))
    if not findings:
        text = "none, and nothing is left of earlier ones"
        findings.append(Finding(kind=FindingKind.OK, subject="other runs", text=text))
    return findings


async def _examine_scratch(
    domain: LibvirtDomain, definition: DomainDefinition, scratch: str | None
) -> list[Finding]:
    try:
        rundir = make_rundir(
            domain, definition, RunInfo(run=os.urandom(4).hex(), chain=""), scratch
        )
    except Error as exc:
        return [Finding(kind=FindingKind.PROBLEM, subject="scratch", text=str(exc))]
    try:
        free, _ = rundir.room()
    finally:
        rundir.close()
    text = (
        f"{rundir.path.parent} has {free} bytes free; whether QEMU may use it, only a backup shows"
    )
    kind = FindingKind.OK if free >= _LEAST else FindingKind.WARNING
    return [Finding(kind=kind, subject="scratch", text=text)]
