"""SOURCE, the first argument of a backup, becomes an open source: one kind for each URI scheme."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdpull.source.address import parse_source
from nbdpull.source.base import Source
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.qemu import QemuSource
from nbdpull.source.qmp import open_monitor

__all__ = ["check_source", "open_source"]


def check_source(uri: str) -> None:
    """Look at a source's URI before anything is touched.

    Raises:
        UsageError: it can't be.
    """
    parse_source(uri)


@asynccontextmanager
async def open_source(uri: str, qemu: QemuOptions) -> AsyncIterator[Source]:
    """Connect to whatever `uri` names, as long as the context lasts.

    Raises:
        UsageError: no such kind of source.
        InUseError, SourceError: it can't be reached.
    """
    address = parse_source(uri)
    async with open_monitor(address) as monitor:
        source = QemuSource(monitor, qemu)
        try:
            yield source
        finally:
            await source.close()
