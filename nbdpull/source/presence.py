"""Whether the VM is in this QEMU, and stays: a migration moves it to another one that has the same images.

source       running ......... finish-migrate  postmigrate
`query-migrate`: active           the images are the other QEMU's now
destination  inmigrate .......................  running
"""

from __future__ import annotations

from typing import Final

from nbdpull.errors import InUseError, SourceError
from nbdpull.source.qmp import Monitor

__all__ = ["check_present", "why_absent"]

_AWAY: Final = {
    "inmigrate": "waits for a VM that is migrated to it",
    "finish-migrate": "hands its VM over to another QEMU",
    "postmigrate": "has handed its VM over to another QEMU",
}
"""Run states (QAPI RunState) in which another QEMU writes to the images, or is about to."""

_OVER: Final = frozenset({"none", "completed", "failed", "cancelled"})
"""Of a migration (QAPI MigrationStatus)."""


async def why_absent(monitor: Monitor) -> SourceError | InUseError | None:
    """Why no backup can be made of this QEMU now; None where one can."""
    if monitor.storage_daemon:
        return None
    running, migrating = await monitor.ask("query-status", "query-migrate")
    status = running["status"]
    if status in _AWAY:
        return SourceError(
            f"the VM is not here: this QEMU {_AWAY[status]} (state '{status}'); back up the QEMU that the VM"
            " runs in"
        )
    migration = migrating.get("status", "none")
    if migration not in _OVER:
        return InUseError(
            f"the VM is being migrated (state '{migration}'), which a backup would make fail; wait for its end,"
            " then back up the QEMU that it went to"
        )
    return None


async def check_present(monitor: Monitor) -> None:
    """Refuse a QEMU whose VM is, or is about to be, another one's.

    QEMU 7.2 lets the one that a VM has left be backed up: what it shows is stale, since the other one writes
    to the images.

    Raises:
        SourceError: the VM is not here.
        InUseError: it is being migrated.
    """
    absent = await why_absent(monitor)
    if absent is not None:
        raise absent
