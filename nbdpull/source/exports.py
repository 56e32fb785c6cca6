"""NBD exports that somebody else made: a vendor's control plane, libvirt's pull backup, any NBD server.

What an export shows is the point in time, and nothing is made or removed there. Which ranges changed since
when only its maker knows: nbdpull believes it, see `Disk.told`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

from nbdpull.errors import NbdError, PointInTimeLostError, UsageError
from nbdpull.model.outcomes import Finding, FindingKind
from nbdpull.model.results import GuestCost, Quiesced
from nbdpull.nbdio.connection import Connection
from nbdpull.source.address import ExportAddress
from nbdpull.source.base import (
    Committed,
    Disk,
    DiskPlan,
    OnLost,
    PointInTime,
    RunInfo,
    ServedDisk,
    Swept,
    select_disks,
)
from nbdpull.source.whole import whole

__all__ = ["ExportSource"]

_GRANULARITY: Final = 512
"""QEMU's smallest for a dirty bitmap: nobody says what a foreign one has."""
_BLOCK_MAX: Final = 64 * 1024
"""The largest minimum block size of the NBD specification; reads begin at multiples of it."""


class ExportSource:
    """See `Source`.

    Args:
        exports: of one VM.
        contexts: by disk name, the meta context that is said to hold what changed.
    """

    def __init__(self, exports: Sequence[ExportAddress], contexts: Mapping[str, str]) -> None:
        self._exports = exports
        self._contexts = contexts

    async def vm_name(self) -> tuple[str, str | None]:
        """See `Source.vm_name`."""
        raise UsageError("an NBD export does not tell which VM it is of; name the VM with --vm")

    async def machine(self) -> tuple[str, bytes] | None:
        """See `Source.machine`."""
        return None

    async def examine(self) -> Sequence[Finding]:
        """See `Source.examine`."""
        findings = []
        for export in self._exports:
            size = await whole(_look, export.uri, self._contexts.get(export.name))
            text = f"{size} bytes at {export.uri}"
            findings.append(
                Finding(kind=FindingKind.OK, subject=f"export {export.name}", text=text)
            )
        return findings

    async def sweep(
        self,
        committed: Committed,  # noqa: ARG002 - nothing is ever left in an export
        *,
        force: bool = False,  # noqa: ARG002
    ) -> Swept:
        """See `Source.sweep`."""
        return Swept()

    async def disks(self, *, include: Sequence[str], exclude: Sequence[str]) -> Sequence[Disk]:
        """See `Source.disks`."""
        disks = [Disk(name=export.name, size=0) for export in self._exports]
        wanted = select_disks(disks, (), include=include, exclude=exclude)
        return [
            Disk(
                name=export.name,
                size=await whole(_look, export.uri, self._contexts.get(export.name)),
                records=False,
                told=self._contexts.get(export.name),
            )
            for export in self._exports
            if export.name in wanted
        ]

    @asynccontextmanager
    async def freeze(
        self,
        info: RunInfo,  # noqa: ARG002 - nothing is made that would have a name
        plans: Sequence[DiskPlan],
        on_lost: OnLost,  # noqa: ARG002 - what ends an export shows when it is read
    ) -> AsyncIterator[PointInTime]:
        """See `Source.freeze`."""
        uris = {export.name: export.uri for export in self._exports}
        yield _ExportedPointInTime(
            ServedDisk(
                disk=plan.disk,
                uri=uris[plan.disk.name],
                context=plan.base,
                granularity=_GRANULARITY,
            )
            for plan in plans
        )


def _look(uri: str, context: str | None) -> int:
    """The size of an export, once it is known that it can be read."""
    contexts = () if context is None else (context,)
    with Connection.open(uri, contexts=contexts) as connection:
        if connection.min_block > _BLOCK_MAX or _BLOCK_MAX % connection.min_block:
            raise NbdError(
                f"export {uri} wants blocks of at least {connection.min_block} bytes; the NBD"
                f" specification allows powers of 2 up to {_BLOCK_MAX}"
            )
        return connection.size


class _ExportedPointInTime:
    """See `PointInTime`."""

    def __init__(self, disks: Iterable[ServedDisk]) -> None:
        self.disks = tuple(disks)
        self.lost: PointInTimeLostError | None = None
        self.cost: GuestCost | None = None
        self.quiesced: Quiesced | None = None

    async def why_lost(self) -> PointInTimeLostError | None:
        """See `PointInTime.why_lost`."""
        return None

    async def confirm(self, obsolete: Mapping[str, Sequence[str]]) -> tuple[str, ...]:  # noqa: ARG002
        """See `PointInTime.confirm`: whoever made the exports removes them."""
        return ()

    async def discard(self) -> tuple[str, ...]:
        """See `PointInTime.discard`."""
        return ()
