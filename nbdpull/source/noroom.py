"""A write of the guest that QEMU found no room for: in the scratch, which is ours, or on the VM's own disk.

    BLOCK_IO_ERROR, nospace --> the scratch was low    the backup ends, held room is let go, the guest goes on
                            `-> it had room            the guest waits for its owner, the backup goes on and warns

QEMU's event is the same for both, down to the node's name: it is that of the filter above them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from nbdpull.errors import CommandError, MonitorError, ScratchFullError, SourceError
from nbdpull.source.qmp import Monitor
from nbdpull.source.scratch import ScratchGuard

__all__ = ["NoRoom"]

log = logging.getLogger(__name__)


class NoRoom:
    """Judges what QEMU tells of one run's time.

    Attributes:
        notes: what the user should know of the VM's own disks, at most one line.
        pause_s: how long the guest was paused for the scratch.
    """

    def __init__(
        self, guard: ScratchGuard, monitor: Monitor, on_full: Callable[[ScratchFullError], None]
    ) -> None:
        self._guard = guard
        self._monitor = monitor
        self._on_full = on_full
        self._told: list[Mapping[str, Any]] = []
        self._task: asyncio.Task[None] | None = None
        self._resumed = False
        self.notes: list[str] = []
        self.pause_s = 0.0

    def tell(self, data: Mapping[str, Any]) -> None:
        """Take what an event says; called in the event loop."""
        self._told.append(data)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._judge(), name="no-room")

    async def _judge(self) -> None:
        while self._told:
            data = self._told[-1]
            self._told.clear()
            with contextlib.suppress(OSError, SourceError):
                # In a thread: where the scratch is on another host it takes a while.
                await asyncio.to_thread(self._guard.check)
            if not self._guard.pressed:
                self._note(data)
                continue
            # The guest is paused: the room that is let go lets its write succeed.
            self._on_full(await asyncio.to_thread(self._guard.full, "QEMU found none for a write"))
            if not self._resumed:
                self._resumed = True
                await self._resume()

    def _note(self, data: Mapping[str, Any]) -> None:
        if self.notes:
            return
        where = data.get("device") or data.get("node-name") or "a disk"
        self.notes.append(
            f"QEMU found no room for what the guest wrote to {where} itself during the backup (the scratch has"
            " room): the guest may be paused for it; make room and let it go on"
        )
        log.warning("%s", self.notes[0])

    async def settle(self, *, connected: bool) -> None:
        """At the end, with the backup jobs gone: let a guest go on that still waits for the scratch."""
        if self._task is not None:
            await self._task
        if connected and self._resumed:
            await self._resume()

    async def _resume(self) -> None:
        if self.notes:
            return  # what it waits for is not ours, and whoever runs it may not want it to try
        begin = asyncio.get_running_loop().time()
        with contextlib.suppress(MonitorError, CommandError):
            status = (await self._monitor.execute("query-status"))["status"]
            if status == "io-error":
                await self._monitor.execute("cont")
                self.pause_s += asyncio.get_running_loop().time() - begin
