"""A domain of libvirt that does not run: its images."""

from __future__ import annotations

import asyncio

from nbdpull.errors import SourceError, UsageError
from nbdpull.source.address import ImageAddress
from nbdpull.source.base import Committed, Known, Swept
from nbdpull.source.domainxml import parse_domain
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.libvirtruns import label
from nbdpull.source.offline import OfflineSource
from nbdpull.source.rundir import find_runs
from nbdpull.source.whole import whole

__all__ = ["ShutDownDomain"]


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
            if folder.source == label(self._domain) and not folder.alive:
                await asyncio.to_thread(folder.remove)
                swept.removed.append(f"scratch folder {folder.path}")
        return swept

    async def close(self) -> None:
        """See `OfflineSource.close`."""
        await super().close()
        await whole(self._domain.close)
