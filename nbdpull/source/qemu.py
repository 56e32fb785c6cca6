"""A running QEMU, or a qemu-storage-daemon, reached through its QMP monitor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from nbdpull.errors import PointInTimeLostError
from nbdpull.model.results import Finding
from nbdpull.nbdio.connection import is_unix, socket_of, unix_uri, with_export, with_socket
from nbdpull.nbdio.tls import with_tls
from nbdpull.source.base import (
    Committed,
    DiskPlan,
    OnLost,
    PointInTime,
    RunInfo,
    Swept,
    select_disks,
)
from nbdpull.source.checkup import examine
from nbdpull.source.disks import QemuDisk, check_iothreads, find_disks
from nbdpull.source.fleecing import QemuOptions, QemuPlan, QemuPointInTime, freeze
from nbdpull.source.leftovers import sweep
from nbdpull.source.lifeline import Lifeline
from nbdpull.source.machine import describe
from nbdpull.source.names import RunNames
from nbdpull.source.place import HERE, Place, RunFolder
from nbdpull.source.presence import check_present
from nbdpull.source.qmp import Monitor
from nbdpull.source.whole import finished, whole

__all__ = ["QemuSource", "vm_name"]


async def vm_name(monitor: Monitor) -> tuple[str, str | None]:
    """What QEMU calls itself, and a warning where that is not unique.

    A VM without ``-name`` goes by its UUID, a qemu-storage-daemon by its kind.
    """
    if monitor.storage_daemon:
        return (
            "qemu-storage-daemon",
            "a qemu-storage-daemon has no name; give one with --vm to tell it from others",
        )
    named = await monitor.execute("query-name")
    if named.get("name"):
        return str(named["name"]), None
    uuid = str((await monitor.execute("query-uuid"))["UUID"])
    if set(uuid) <= {"0", "-"}:
        return (
            uuid,
            "the VM has neither a name nor a UUID; give one with --vm to tell it from others",
        )
    return uuid, None


class QemuSource:
    """See `Source`. Its disks are `QemuDisk`."""

    def __init__(self, monitor: Monitor, options: QemuOptions, place: Place = HERE) -> None:
        """Read a QEMU.

        Args:
            monitor: its monitor.
            options: how.
            place: the host that it runs on.
        """
        self._monitor = monitor
        self._place = place
        self._options = options
        self._disks: dict[str, QemuDisk] = {}
        self._rundirs: list[RunFolder] = []
        self._lifelines: list[Lifeline] = []

    async def vm_name(self) -> tuple[str, str | None]:
        """See `Source.vm_name`."""
        return await vm_name(self._monitor)

    async def sweep(self, committed: Committed, *, force: bool = False) -> Swept:
        """See `Source.sweep`."""
        return await sweep(
            self._monitor,
            place=self._place,
            scratch=self._options.scratch,
            committed=committed,
            force=force,
        )

    async def disks(self, *, include: Sequence[str], exclude: Sequence[str]) -> Sequence[QemuDisk]:
        """See `Source.disks`."""
        await check_present(self._monitor)
        disks, skipped = await find_disks(self._monitor)
        wanted = select_disks(disks, skipped, include=include, exclude=exclude)
        chosen = [disk for disk in disks if disk.name in wanted]
        check_iothreads(chosen, self._monitor.version, force=self._options.force)
        self._disks = {disk.name: disk for disk in chosen}
        return chosen

    async def machine(self) -> tuple[str, bytes] | None:
        """See `Source.machine`: what QMP tells, as JSON."""
        if self._monitor.storage_daemon:
            return None
        text = json.dumps(await describe(self._monitor), indent=1, sort_keys=True) + "\n"
        return "qemu.json", text.encode("utf-8", "replace")

    async def examine(self) -> Sequence[Finding]:
        """See `Source.examine`."""
        return await examine(self._monitor, self._options, self._place)

    @asynccontextmanager
    async def freeze(
        self, info: RunInfo, plans: Sequence[DiskPlan], on_lost: OnLost
    ) -> AsyncIterator[PointInTime]:
        """See `Source.freeze`."""
        monitor = self._monitor
        owner = None
        if monitor.peer_uid is not None and monitor.peer_gid is not None:
            owner = (monitor.peer_uid, monitor.peer_gid)
        server = self._options.nbd_address is None

        def create() -> RunFolder:
            made = self._place.create(
                self._options.scratch,
                info.run,
                source=monitor.address.there,
                chain=info.chain,
                owner=owner,
                sizes=[plan.disk.size for plan in plans],
            )
            # Noted in the thread: what it made is removed also when this was cancelled meanwhile.
            self._rundirs.append(made)
            return made

        rundir = await whole(create)
        life = await self._place.reach(rundir.life)
        lifeline = Lifeline(monitor, RunNames(info.run).life(info.chain, server=server))
        self._lifelines.append(lifeline)
        await finished(lifeline.tie(rundir.life, life))
        nbd_socket = await self._place.reach(rundir.socket) if server else ""
        nbd_address = await self._reach_server()
        qemu_plans = [
            QemuPlan(disk=self._disks[plan.disk.name], base=plan.base, checkpoint=plan.checkpoint)
            for plan in plans
        ]

        def released(gone: bool) -> None:  # noqa: FBT001 - a callback's one argument
            # QEMU may still write to scratch that it was not seen to let go; 'cleanup' finds the folder.
            if not gone:
                rundir.keep()

        def uri_of(export: str) -> str:
            tls = self._options.tls
            if nbd_address is None:
                return unix_uri(nbd_socket, export)
            return with_export(nbd_address if tls is None else with_tls(nbd_address, tls), export)

        try:
            async with freeze(
                monitor,
                RunNames(info.run),
                qemu_plans,
                rundir,
                options=self._options,
                uri_of=uri_of,
                on_lost=on_lost,
                on_released=released,
            ) as frozen:
                watcher = asyncio.create_task(self._watch(frozen), name="host")
                try:
                    yield frozen
                finally:
                    watcher.cancel()
        finally:
            await whole(rundir.remove_scratch)

    async def _reach_server(self) -> str | None:
        """The address of a server that QEMU runs already, as it is reached from here."""
        address = self._options.nbd_address
        if address is None or not is_unix(address):
            return address
        path = socket_of(address)
        return with_socket(address, await self._place.reach(path))

    async def _watch(self, frozen: QemuPointInTime) -> None:
        frozen.lose(PointInTimeLostError(str(await self._place.lost())))

    async def close(self) -> None:
        """Let the run's lifeline, folder and lock go.

        Not at the end of `freeze`: as long as its checkpoints are neither confirmed nor discarded, the run
        lives, and nobody may sweep it.
        """
        await finished(self._close())

    async def _close(self) -> None:
        for lifeline in self._lifelines:
            await lifeline.cut()
        for rundir in self._rundirs:
            await asyncio.to_thread(rundir.close)
