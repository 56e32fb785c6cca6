"""A running QEMU, or a qemu-storage-daemon, reached through its QMP monitor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nbdpull.errors import Error, InUseError, MonitorError, SourceError
from nbdpull.nbdio.connection import is_unix, socket_of, unix_uri, with_export, with_socket
from nbdpull.nbdio.tls import with_tls
from nbdpull.source.base import (
    CannotGoOnError,
    Committed,
    DiskPlan,
    HostLostError,
    OnLost,
    PointInTime,
    RunInfo,
    Swept,
    select_disks,
)
from nbdpull.source.disks import QemuDisk, check_iothreads, find_disks
from nbdpull.source.fleecing import (
    QemuOptions,
    QemuPlan,
    QemuPointInTime,
    freeze,
    resume,
    server_of,
)
from nbdpull.source.leftovers import sweep
from nbdpull.source.lifeline import Lifeline
from nbdpull.source.names import RunNames
from nbdpull.source.place import HERE, Place, RunFolder
from nbdpull.source.presence import check_present
from nbdpull.source.qmp import Monitor
from nbdpull.source.recorder import kept_files
from nbdpull.source.rundir import FoundRun
from nbdpull.source.takeover import check_whole, find_unfinished
from nbdpull.source.unfinished import Unfinished
from nbdpull.source.whole import finished, whole

if TYPE_CHECKING:
    from nbdpull.model.outcomes import Finding

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
        self._unfinished: FoundRun | None = None

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

    async def unfinished(self, chain: str) -> Unfinished | None:
        """See `Resumable.unfinished`."""
        found = await find_unfinished(
            self._monitor, chain, place=self._place, scratch=self._options.scratch
        )
        if found is None:
            return None
        self._unfinished, record = found
        if record.trims is not self._options.trim_scratch:
            raise CannotGoOnError("only one of the two is with --trim-scratch", record)
        if record.trims and self._place is not HERE:
            raise CannotGoOnError("what it trimmed is not gone on with over ssh", record)
        if record.guest_first is not self._options.guest_first:
            raise CannotGoOnError("only one of the two is with --guest-first", record)
        if record.server != server_of(self._options):
            raise CannotGoOnError(
                "its exports are reached in another way (--nbd-address, --tls)", record
            )
        if self._options.quiesce and record.quiesced is None:
            raise CannotGoOnError(
                "its point in time is not quiesced, and --quiesce is asked for", record
            )
        return record

    async def kept_files(self, record: Unfinished) -> bytes | None:
        """See `Resumable.kept_files`."""
        return await kept_files(self._unfinished, record)

    async def sweep_others(self, committed: Committed, spared: Unfinished) -> Swept:
        """See `Resumable.sweep_others`."""
        return await sweep(
            self._monitor,
            place=self._place,
            scratch=self._options.scratch,
            committed=committed,
            spare=spared.run,
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
        from nbdpull.source.machine import describe  # noqa: PLC0415 - seldom asked for

        text = json.dumps(await describe(self._monitor), indent=1, sort_keys=True) + "\n"
        return "qemu.json", text.encode("utf-8", "replace")

    async def examine(self) -> Sequence[Finding]:
        """See `Source.examine`."""
        from nbdpull.source.checkup import examine  # noqa: PLC0415 - no backup asks for it

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
        freezing = freeze(
            monitor,
            RunNames(info.run),
            [
                QemuPlan(
                    disk=self._disks[plan.disk.name], base=plan.base, checkpoint=plan.checkpoint
                )
                for plan in plans
            ],
            rundir,
            options=self._options,
            uri_of=await self._uris(rundir),
            on_lost=on_lost,
            on_released=partial(_released, rundir),
        )
        try:
            async with self._watched(freezing) as frozen:
                yield frozen
        finally:
            await whole(rundir.remove_scratch)

    @asynccontextmanager
    async def resume(
        self, record: Unfinished, plans: Sequence[DiskPlan], on_lost: OnLost
    ) -> AsyncIterator[QemuPointInTime]:
        """See `Resumable.resume`."""
        folder = self._unfinished
        if folder is None:
            raise CannotGoOnError("its scratch folder was not looked for")
        qemu_plans = await self._plans_of(record, plans, folder.path)
        rundir, lifeline = await self._take_over(record, folder.path)

        async def check() -> None:
            await self._plans_of(record, plans, folder.path)

        holding = False
        try:
            resuming = resume(
                self._monitor,
                RunNames(record.run),
                qemu_plans,
                rundir,
                options=self._options,
                uri_of=await self._uris(rundir),
                on_lost=on_lost,
                on_released=partial(_released, rundir),
                record=record,
                check=check,
            )
            async with self._watched(resuming) as frozen:
                holding = True
                yield frozen
        except BaseException as exc:
            if not holding:
                await self._let_go(rundir, lifeline)
                if isinstance(exc, Error) and not isinstance(exc, MonitorError):
                    raise CannotGoOnError(str(exc)) from exc
            raise
        finally:
            if holding:
                await whole(rundir.remove_scratch)

    async def _let_go(self, rundir: RunFolder, lifeline: Lifeline) -> None:
        """Leave a run that could not be gone on with as dead as it was found: it will be swept."""
        self._rundirs.remove(rundir)
        self._lifelines.remove(lifeline)
        await finished(lifeline.drop())
        await whole(rundir.leave)

    async def _plans_of(
        self, record: Unfinished, plans: Sequence[DiskPlan], folder: Path
    ) -> list[QemuPlan]:
        """The plans with the disks as they are now, once everything is seen to be as that run left it."""
        found = {disk.name: disk for disk in (await find_disks(self._monitor))[0]}
        now = [found.get(told.name) for told in record.disks]
        disks = [disk for disk in now if disk is not None]
        if len(disks) < len(now) or [disk.size for disk in disks] != [
            told.size for told in record.disks
        ]:
            raise CannotGoOnError("a disk is gone, or has another size now")
        whole_disks = await check_whole(self._monitor, record, disks, folder)
        return [
            QemuPlan(disk=disk, base=plan.base, checkpoint=plan.checkpoint)
            for disk, plan in zip(whole_disks, plans, strict=True)
        ]

    async def _take_over(self, record: Unfinished, path: Path) -> tuple[RunFolder, Lifeline]:
        """The folder and the lifeline of a run that died, as this process's own."""
        there = self._monitor.address.there

        taken: list[RunFolder] = []

        def take() -> None:
            taken.append(self._place.take_over(path, source=there, chain=record.chain))

        try:
            await whole(take)
        except (InUseError, SourceError) as exc:
            raise CannotGoOnError(str(exc)) from exc
        except BaseException:
            # Cancelled meanwhile: it stays as dead as it was.
            for one in taken:
                await whole(one.leave)
            raise
        rundir = taken[0]
        self._rundirs.append(rundir)
        name = RunNames(record.run).life(record.chain, server=self._options.nbd_address is None)
        lifeline = Lifeline(self._monitor, name)
        self._lifelines.append(lifeline)
        try:
            life = await self._place.reach(rundir.life)
            await finished(lifeline.tie_again(rundir.life, life))
        except BaseException as exc:
            await self._let_go(rundir, lifeline)
            if isinstance(exc, SourceError):
                raise CannotGoOnError(str(exc)) from exc
            raise
        return rundir, lifeline

    async def _uris(self, rundir: RunFolder) -> Callable[[str], str]:
        """How exports are reached."""
        server = self._options.nbd_address is None
        nbd_socket = await self._place.reach(rundir.socket) if server else ""
        nbd_address = await self._reach_server()
        tls = self._options.tls

        def uri_of(export: str) -> str:
            if nbd_address is None:
                return unix_uri(nbd_socket, export)
            return with_export(nbd_address if tls is None else with_tls(nbd_address, tls), export)

        return uri_of

    @asynccontextmanager
    async def _watched(
        self, making: AbstractAsyncContextManager[QemuPointInTime]
    ) -> AsyncIterator[QemuPointInTime]:
        async with making as frozen:
            watcher = asyncio.create_task(self._watch(frozen), name="host")
            try:
                yield frozen
            finally:
                watcher.cancel()

    async def _reach_server(self) -> str | None:
        """The address of a server that QEMU runs already, as it is reached from here."""
        address = self._options.nbd_address
        if address is None or not is_unix(address):
            return address
        path = socket_of(address)
        return with_socket(address, await self._place.reach(path))

    async def _watch(self, frozen: QemuPointInTime) -> None:
        lost = await self._place.lost()
        frozen.lose(
            HostLostError(
                f"{lost}; QEMU may hold the point in time still: the same backup, run again, then goes on at it"
            )
        )

    async def end_runs(self) -> None:
        """See `Resumable.end_runs`."""
        await self.close()

    async def close(self) -> None:
        """Let the run's lifeline, folder and lock go.

        Not at the end of `freeze`: as long as its checkpoints are neither confirmed nor discarded, the run
        lives, and nobody may sweep it.
        """
        await finished(self._close())

    async def _close(self) -> None:
        while self._lifelines:
            await self._lifelines.pop().cut()
        while self._rundirs:
            await asyncio.to_thread(self._rundirs.pop().close)


def _released(rundir: RunFolder, gone: bool) -> None:  # noqa: FBT001 - a callback's one argument
    # QEMU may still write to scratch that it was not seen to let go; 'cleanup' finds the folder.
    if not gone:
        rundir.keep()
