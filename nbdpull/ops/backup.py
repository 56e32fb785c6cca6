"""backup: a running VM's disks, all at one point in time, into the repository.

What is asked for is looked at before anything is touched; then one `Run` makes the backup (`ops.backuprun`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Final

from nbdpull.errors import UsageError
from nbdpull.model.archive import File
from nbdpull.model.ids import BackupId
from nbdpull.model.results import (
    BackupResult,
    Progress,
    ProgressCallback,
    ProgressKind,
)
from nbdpull.nbdio.tls import Tls, look_at_tls
from nbdpull.ops.backupoptions import AUDIT, BackupOptions
from nbdpull.ops.backuprun import Run, UnseenRunError, recover
from nbdpull.ops.disknames import check_names
from nbdpull.ops.lineage import Chain, known_checkpoints, known_disks
from nbdpull.ops.machinestate import read_definitions
from nbdpull.ops.reconnecting import reconnecting
from nbdpull.ops.resuming import RESUME_WITHIN_S
from nbdpull.ops.reusing import Reusing
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Repository
from nbdpull.source.address import MonitorAddress, SourceAddress
from nbdpull.source.base import Known
from nbdpull.source.fleecing import GUEST_DELAY_S, QemuOptions
from nbdpull.source.open import check_source, open_source

__all__ = [
    "AUDIT",
    "GUEST_DELAY_S",
    "RESUME_WITHIN_S",
    "BackupOptions",
    "backup",
]


def _tls(options: BackupOptions) -> Tls | None:
    if options.tls is None:
        return None
    ours = options.source[0].startswith("qmp") and options.nbd_address is None
    return look_at_tls(options.tls, server=ours)


def _open(options: BackupOptions) -> Repository:
    """The repository, once backups may be added to it."""
    repository = Repository.open(options.repository, write=True, keys=options.keys)
    repository.check_original()
    return repository


def _look_up(
    options: BackupOptions, repository: Repository, vm: str, say: Callable[[str], None]
) -> tuple[Chain, Reusing]:
    """What the repository has of the chain, and what is shared with other backups."""
    chain = Chain(repository, vm, options.chain, sees_changes_only=options.guest_first)
    reuse = Reusing.open(repository, base=options.base, digest_cache=options.digest_cache, say=say)
    return chain, reuse


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
        trim_scratch=options.trim_scratch,
        force=options.force,
        quiesce=options.quiesce,
        agent=options.agent,
        max_guest_delay_s=options.max_guest_delay_s,
        bitmaps=options.bitmaps,
        tls=_tls(options),
    )
    address = check_source(options.source, qemu)
    if options.since is not None and not options.bitmaps:
        raise UsageError("--since is about the changes that --bitmap tells; give both, or neither")
    definitions: Sequence[File] = ()
    if options.keeps_machine:
        definitions = await call(read_definitions, options.definitions, options.tpm_state)
    check_names("chain", [options.chain])
    check_names("tag", options.tags)
    check_names("VM", [options.vm])

    async def attempt() -> BackupResult:
        # Anew for each: a store's calls are given up together with the attempt that made them.
        repository = await call(_open, options)
        given_up = time.monotonic() + _DYING_S
        while True:
            try:
                return await _attempt(options, qemu, address, definitions, repository, progress)
            except UnseenRunError:
                if time.monotonic() >= given_up:
                    raise
            # From the beginning: if it lives it may have committed meanwhile.
            await asyncio.sleep(_LOOK_S)

    # A new point in time would be another backup than the one that was asked for.
    return await (reconnecting(attempt) if options.resume_within_s > 0 else attempt())


_DYING_S: Final = 10.0
"""How long a run that seems to live elsewhere may be one that was killed just now: until its host, or sshd, has
closed its connection to QEMU."""
_LOOK_S: Final = 0.5


async def _attempt(
    options: BackupOptions,
    qemu: QemuOptions,
    address: SourceAddress,
    definitions: Sequence[File],
    repository: Repository,
    progress: ProgressCallback | None,
) -> BackupResult:
    def say(text: str) -> None:
        if progress is not None:
            progress(Progress(kind=ProgressKind.MESSAGE, verb="backup", text=text))

    known: Known = lambda _names: ()  # noqa: E731 - a VM that runs tells what its disks are called
    if not isinstance(address, MonitorAddress):
        known = await call(known_disks, repository, options.vm)
    recall = known_checkpoints(repository, options.vm)
    async with (
        open_source(options.source, qemu, known=known, recall=recall) as source,
        AsyncExitStack() as stack,
    ):
        vm = options.vm
        if vm is None:
            vm, warning = await source.vm_name()
            if warning is not None:
                say(warning)
            check_names("VM", [vm])
        chain, reuse = await call(_look_up, options, repository, vm, say)
        stack.callback(reuse.close)
        run = Run(options, source, repository, chain, progress, reuse)
        run.definitions = definitions
        if (done := await run.go_on()) is not None:
            return done
        await recover(source, options, chain, say)
        await run.choose(BackupId(os.urandom(8).hex()), options.level, run.lies)
        if options.keeps_machine:
            run.described = await source.machine()
        return await run.go()
