"""doctor: everything that would go wrong in a backup, before it does."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nbdpull.errors import Error, StoreError
from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import DiskEstimate, DoctorResult, Finding, FindingKind
from nbdpull.model.results import Level
from nbdpull.ops.estimate import EstimateOptions, estimate_open
from nbdpull.ops.lineage import known_disks
from nbdpull.ops.threads import call
from nbdpull.repo.local import LocalStore
from nbdpull.repo.location import open_store
from nbdpull.repo.repository import Repository
from nbdpull.source.base import Known, Source
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.open import check_source, open_source

__all__ = ["DoctorOptions", "doctor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """Of which backup; see `BackupOptions`. Without a repository only the source is looked at."""

    source: tuple[str, ...]
    repository: str | None = None
    vm: str | None = None
    chain: str = "default"
    guest_first: bool = False
    nbd_address: str | None = None
    scratch: str | None = None
    keys: KeySource | None = None


async def doctor(options: DoctorOptions) -> DoctorResult:
    """Look at the source, the scratch folder and the repository.

    What is wrong is a finding, also a source that can't be reached.

    Raises:
        UsageError: the options can't be.
    """
    findings: list[Finding] = []
    repository = None
    if options.repository is not None:
        try:
            repository = await call(_open, options)
            unreadable = await call(repository.unreadable)
        except Error as exc:
            findings.append(_problem("repository", exc))
        else:
            findings.append(
                Finding(
                    kind=FindingKind.OK, subject="repository", text=f"{options.repository} is open"
                )
            )
            findings += [
                Finding(kind=FindingKind.WARNING, subject="repository", text=str(one.error))
                for one in unreadable
            ]
    qemu = QemuOptions(
        guest_first=options.guest_first,
        nbd_address=options.nbd_address,
        scratch=options.scratch,
        force=True,
    )
    check_source(options.source, qemu)
    known: Known = lambda _names: ()  # noqa: E731 - of no repository
    if repository is not None:
        known = await call(known_disks, repository, options.vm)
    try:
        async with open_source(options.source, qemu, known=known) as source:
            findings += await source.examine()
            if repository is not None:
                findings += await _next_backup(source, repository, options)
    except Error as exc:
        findings.append(_problem("source", exc))
    return DoctorResult(
        ok=all(finding.kind is not FindingKind.PROBLEM for finding in findings),
        findings=tuple(findings),
    )


def _open(options: DoctorOptions) -> Repository:
    """The repository, as a backup opens it, and its folder if it is one."""
    location = options.repository or ""
    repository = Repository.open(location, write=True, keys=options.keys)
    repository.check_original()
    store = open_store(location)
    if isinstance(store, LocalStore) and not os.access(store.root, os.W_OK):
        raise StoreError(f"nothing can be written in {location}: it is read-only, or not yours")
    return repository


def _problem(subject: str, exc: Error) -> Finding:
    return Finding(kind=FindingKind.PROBLEM, subject=subject, text=str(exc))


async def _next_backup(
    source: Source, repository: Repository, options: DoctorOptions
) -> list[Finding]:
    try:
        estimated = await estimate_open(
            source,
            repository,
            EstimateOptions(
                source=options.source,
                repository=repository.location,
                vm=options.vm,
                chain=options.chain,
            ),
        )
    except Error as exc:
        return [_problem("next backup", exc)]
    return [
        Finding(
            kind=FindingKind.OK if disk.level is not Level.FULL else FindingKind.WARNING,
            subject="next backup",
            text=f"disk {disk.name}: {disk.level}, {_about(disk)}{disk.reason}",
        )
        for disk in estimated.disks
    ]


def _about(disk: DiskEstimate) -> str:
    return "" if disk.changed_bytes is None else f"about {disk.changed_bytes} bytes to read, "
