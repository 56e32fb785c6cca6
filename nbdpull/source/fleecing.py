"""A point in time of all chosen disks, frozen in QEMU and served over NBD.

Default ("mode B"), atomic in one transaction, the guest is not paused:

    guest -> np-cbw (the backup job's filter) -> disk
                |  copies what is about to be overwritten
                v
             np-scr (raw scratch file)          np-acc (snapshot-access) reads scratch, else disk
                                                   |
                                                NBD export + dirty bitmap of what changed

Guest first ("mode C"): the filter is a node of its own with `on-cbw-error=break-snapshot`, put under
the device with `qom-set drive` while the guest is paused for some milliseconds. When the scratch fails,
the point in time breaks and the guest goes on; in the default mode QEMU would pause the guest.

What is made is undone in the opposite order, each step tolerating that it was half made. The bitmaps
outlive the frozen view: `confirm` or `discard` ends them once it is known whether the backup is durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from blake3 import blake3

from nbdpull.errors import (
    CommandError,
    Error,
    MonitorError,
    PointInTimeLostError,
    SourceError,
)
from nbdpull.model.results import GuestCost, Quiesced
from nbdpull.nbdio.connection import is_unix, with_export
from nbdpull.nbdio.tls import Tls, with_tls
from nbdpull.source.base import GRANULARITY, READ_CONNECTIONS, DiskPlan, OnLost, ServedDisk
from nbdpull.source.disks import QemuDisk
from nbdpull.source.journal import Journal
from nbdpull.source.loopback import LOOPBACK, start_at, start_on_loopback
from nbdpull.source.names import RunNames
from nbdpull.source.noroom import NoRoom
from nbdpull.source.place import RunFolder
from nbdpull.source.presence import check_present
from nbdpull.source.qmp import Monitor
from nbdpull.source.quiesce import find_agent, quiesced
from nbdpull.source.recorder import Recorded, Recorder
from nbdpull.source.scratch import Overwritten, ScratchGuard
from nbdpull.source.unfinished import Unfinished
from nbdpull.source.whole import finished, whole

if TYPE_CHECKING:
    from nbdpull.source.scratchelsewhere import OverwrittenElsewhere

__all__ = [
    "GUEST_DELAY_S",
    "QemuOptions",
    "QemuPlan",
    "QemuPointInTime",
    "freeze",
    "resume",
    "server_of",
]

log = logging.getLogger(__name__)

GUEST_DELAY_S: Final = 45
"""Seconds; longer than the time-outs of most storage, shorter than those of most guests (Linux: 120)."""

_GONE_S: Final = 30.0
_TRANSACTION_S: Final = 300.0
"""It waits for all writes that are on their way: a guest's storage may stall for minutes."""
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuOptions:
    """How to freeze a point in time in a QEMU, and what is known of other sources.

    Attributes:
        guest_first: a scratch error ends the backup instead of pausing the guest (mode C).
        nbd_address: URI of the NBD server that this QEMU runs already; None starts one. With `tls` an ``nbds://``
            server is started there when QEMU runs none.
        scratch: folder for scratch images; None for the system's temporary one.
        trim_scratch: what is not read any more may be given back, see `ServedDisk.trims`.
        force: also disks whose iothread makes a disconnect dangerous.
        quiesce: the guest's agent freezes its file systems at the point in time.
        agent: the agent's socket; None asks QEMU for it.
        max_guest_delay_s: with `guest_first`, how long a guest's write may wait for the scratch before the
            backup is given up instead.
        tls: certificates or shared keys: QEMU serves on TCP of this machine, with TLS, instead of on a unix
            socket; and NBD addresses of others are reached with them.
        bitmaps: of NBD exports, ``[NAME=]CONTEXT``: what changed, by whoever made the exports.
    """

    guest_first: bool = False
    quiesce: bool = False
    agent: str | None = None
    max_guest_delay_s: int = GUEST_DELAY_S
    nbd_address: str | None = None
    scratch: str | None = None
    trim_scratch: bool = False
    force: bool = False
    bitmaps: tuple[str, ...] = ()
    tls: Tls | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuPlan(DiskPlan):
    """A plan for a disk of this QEMU."""

    disk: QemuDisk


class QemuPointInTime(Recorded):
    """See `PointInTime`. Made by `freeze` and `resume`."""

    def __init__(
        self,
        monitor: Monitor,
        names: RunNames,
        plans: Sequence[QemuPlan],
        rundir: RunFolder,
        options: QemuOptions,
        on_lost: OnLost,
    ) -> None:
        self._monitor = monitor
        self._names = names
        self._plans = tuple(plans)
        self._rundir = rundir
        self._on_lost = on_lost
        self._options = options
        self._guard = ScratchGuard(rundir, self._lose)
        self._no_room = NoRoom(self._guard, monitor, self._lose)
        self._began = 0.0
        self._pause_s = 0.0
        self._copied: int | None = None
        self._stack = contextlib.AsyncExitStack()
        self._scratch: list[str] = []
        self._port: int | None = None
        self._found_exports: frozenset[str] = frozenset()
        self._listens = False
        self._recorder = Recorder(rundir)
        self._released = False
        self._monitor_lost = False
        self._failed = False
        self.disks: tuple[ServedDisk, ...] = ()
        self.lost: PointInTimeLostError | None = None
        self.cost: GuestCost | None = None
        self.quiesced: Quiesced | None = None

    # -- making it ---------------------------------------------------------------------------------

    async def _undo(self, what: str, step: Callable[[], Awaitable[object]]) -> None:
        """Run one step of the teardown: the next ones must run whatever becomes of it."""
        if self._monitor_lost:
            return
        try:
            await step()
        except MonitorError as exc:
            # One line, not one a step: without the monitor nothing more can be done.
            self._monitor_lost = True
            log.warning(
                "can't take the frozen view down (the chain's next backup goes on at it, or takes it down, as"
                " 'nbdpull cleanup' does): %s",
                exc,
            )
        except Error as exc:
            self._failed = True
            log.warning("%s: %s", what, exc)

    def _push(self, what: str, step: Callable[[], Awaitable[object]]) -> None:
        self._stack.push_async_callback(self._undo, what, step)

    def _push_delete(self, node: str) -> None:
        self._push(f"removing node {node}", partial(self._delete_node, node))

    def _push_stop(self) -> None:
        self._push("stopping the NBD server", lambda: self._monitor.execute("nbd-server-stop"))

    def _push_give_back(self, plan: QemuPlan) -> None:
        self._push(
            f"giving '{plan.disk.name}' its node back",
            lambda: self._set_drive(plan, plan.disk.top),
        )

    async def _set_drive(self, plan: QemuPlan, node: str) -> None:
        await self._monitor.execute(
            "qom-set", {"path": plan.disk.qom_path, "property": "drive", "value": node}
        )

    async def _delete_node(self, node: str) -> None:
        try:
            await self._monitor.execute("blockdev-del", {"node-name": node})
        except CommandError as exc:
            if not _is_absent(exc):
                raise

    def _bitmap_actions(self) -> list[dict[str, Any]]:
        actions: list[dict[str, Any]] = []
        for plan in self._plans:
            node = plan.disk.node
            # Every disk gets the exported bitmap, also one that is read in full: while it is there
            # the run is unconfirmed, which is how `cleanup` tells a pending checkpoint.
            add = {"node": node, "name": self._names.bitmap, "granularity": GRANULARITY}
            actions.append({"type": "block-dirty-bitmap-add", "data": add | {"disabled": True}})
            if plan.base is not None:
                merge = {"node": node, "target": self._names.bitmap, "bitmaps": [plan.base]}
                actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
            if plan.checkpoint is not None:
                record = {"node": node, "name": plan.checkpoint, "granularity": GRANULARITY}
                actions.append(
                    {
                        "type": "block-dirty-bitmap-add",
                        "data": record | {"persistent": plan.disk.persistent},
                    }
                )
        return actions

    async def _add_scratch(self) -> None:
        for index, plan in enumerate(self._plans):
            path = await asyncio.to_thread(self._rundir.make_scratch, index, plan.disk.size)
            self._scratch.append(path)
            node = self._names.scratch(index)
            add = {"driver": "file", "node-name": node, "filename": path, "discard": "unmap"}
            # What undoes a command is noted before it is sent: QEMU carries it out although its reply may
            # come too late, or never.
            self._push_delete(node)
            try:
                await self._monitor.execute("blockdev-add", add)
            except CommandError as exc:
                if "Permission denied" not in exc.description:
                    raise
                uid = self._monitor.peer_uid
                user = "" if uid is None else f", which runs as user {uid},"
                raise SourceError(
                    f"QEMU{user} may not open the scratch image {path}; run nbdpull as the user that"
                    " QEMU runs as, or as root (AppArmor or SELinux may forbid it, too: then choose a"
                    " folder that QEMU may use with --scratch)"
                ) from exc

    async def _build(self, uri_of: Callable[[str], str]) -> None:
        await self._add_scratch()
        await self._freeze()
        # From here on a migration can't complete, because of what was just made: one that was quicker shows.
        await check_present(self._monitor)
        await self._serve(uri_of)

    async def _freeze(self) -> None:
        step = self._freeze_guest_first if self._options.guest_first else self._freeze_by_job
        if not self._options.quiesce:
            await step()
            return
        agent = self._options.agent or await find_agent(self._monitor)
        async with quiesced(agent) as guest:
            await step()
        self.quiesced = guest.result

    async def _freeze_by_job(self) -> None:
        """Mode B: backup jobs and bitmaps of all disks in one transaction.

        The jobs come first: each keeps its disk drained until the transaction's end, so that no write can
        fall between a disk's bitmaps and its view, also where the disk runs in an iothread.
        """
        actions: list[dict[str, Any]] = []
        for index, plan in enumerate(self._plans):
            job = {
                "job-id": self._names.job(index),
                "device": plan.disk.node,
                "target": self._names.scratch(index),
                "sync": "none",
                "filter-node-name": self._names.filter(index),
            }
            actions.append({"type": "blockdev-backup", "data": job})
        actions += self._bitmap_actions()
        self._began = asyncio.get_running_loop().time()
        for index in range(len(self._plans)):
            job_id = self._names.job(index)
            self._push(f"ending job {job_id}", partial(self._end_job, job_id))
        await self._monitor.execute("transaction", {"actions": actions}, timeout_s=_TRANSACTION_S)
        await self._add_access()

    async def _freeze_guest_first(self) -> None:
        """Mode C: the guest is stopped while filters are put under its devices."""
        for plan in self._plans:
            if plan.disk.qom_path is None:
                raise SourceError(
                    f"disk '{plan.disk.name}' has no guest device; --guest-first needs one, back up"
                    " without it"
                )
            if plan.disk.top_driver in {"copy-before-write", "mirror_top", "commit_top"}:
                # On 7.2 QEMU aborts when the lower job ends first.
                raise SourceError(
                    f"disk '{plan.disk.name}' is under another job ({plan.disk.top_driver});"
                    " --guest-first can't stand on it: wait for that job, or back up without it"
                )
        running = bool((await self._monitor.execute("query-status"))["running"])
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        try:
            if running:
                await asyncio.to_thread(self._rundir.mark_paused, paused=True)
                await self._monitor.execute("stop")
            await self._monitor.execute("transaction", {"actions": self._bitmap_actions()})
            for index, plan in enumerate(self._plans):
                await self._insert_filter(index, plan)
            await self._add_access()
        finally:
            if running:
                # Whatever happened above, also a cancellation: the guest goes on.
                await asyncio.shield(self._monitor.execute("cont"))
                self._pause_s = loop.time() - self._began
                await asyncio.to_thread(self._rundir.mark_paused, paused=False)

    async def _insert_filter(self, index: int, plan: QemuPlan) -> None:
        node = self._names.filter(index)
        options: dict[str, Any] = {
            "driver": "copy-before-write",
            "node-name": node,
            "file": plan.disk.top,
            "target": self._names.scratch(index),
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": self._options.max_guest_delay_s,
        }
        if plan.base is not None:
            # Only what will be read is copied out.
            options["bitmap"] = {"node": plan.disk.node, "name": self._names.bitmap}
        self._push_delete(node)
        await self._monitor.execute("blockdev-add", options)
        self._push_give_back(plan)
        await self._set_drive(plan, node)

    async def _add_access(self) -> None:
        for index in range(len(self._plans)):
            node = self._names.access(index)
            self._push_delete(node)
            await self._monitor.execute(
                "blockdev-add",
                {
                    "driver": "snapshot-access",
                    "node-name": node,
                    "file": self._names.filter(index),
                    "discard": "unmap",
                },
            )

    async def _serve(self, uri_of: Callable[[str], str]) -> None:
        tls = self._options.tls
        if self._options.nbd_address is None and tls is not None:
            address = await self._start_tls_server(tls)
            uri_of = partial(with_export, address)
        elif self._options.nbd_address is not None:
            await self._start_at_address(self._options.nbd_address, tls)
        else:
            path = self._rundir.socket
            try:
                await self._monitor.execute(
                    "nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}}
                )
            except CommandError as exc:
                if "already running" in exc.description:
                    raise SourceError(
                        "this QEMU has an NBD server already; name its address with --nbd-address"
                        " (nbd+unix:///?socket=PATH or nbd://HOST:PORT), or end it with"
                        " nbd-server-stop if nobody uses it"
                    ) from exc
                raise
            self._push_stop()
        for index, plan in enumerate(self._plans):
            export = self._names.export(index)
            arguments: dict[str, Any] = {
                "type": "nbd",
                "id": export,
                "node-name": self._names.access(index),
                "name": export,
                # Only to be trimmed: snapshot-access takes no write.
                "writable": self._options.trim_scratch,
            }
            if plan.base is not None:
                arguments["bitmaps"] = [{"node": plan.disk.node, "name": self._names.bitmap}]
            self._push(f"removing export {export}", partial(self._end_export, export))
            try:
                await self._monitor.execute("block-export-add", arguments)
            except CommandError as exc:
                if "server not running" in exc.description:
                    raise SourceError(
                        f"this QEMU has no NBD server at {self._options.nbd_address}; start one with"
                        " nbd-server-start, or leave --nbd-address out and nbdpull starts its own"
                    ) from exc
                raise
            await self._add_served(index, plan, uri_of)

    async def _add_served(self, index: int, plan: QemuPlan, uri_of: Callable[[str], str]) -> None:
        context = None if plan.base is None else f"qemu:dirty-bitmap:{self._names.bitmap}"
        overwritten = await self._look_at_scratch(index, uri_of)
        self._stack.callback(overwritten.close)
        served = ServedDisk(
            disk=plan.disk,
            uri=uri_of(self._names.export(index)),
            context=context,
            whole=context is None or not self._options.guest_first,
            overwritten=overwritten,
            trims=self._options.trim_scratch,
            near=self._rundir.here,
            again=self._over_network and not self._options.trim_scratch,
            connections=READ_CONNECTIONS if self._options.nbd_address is None else 1,
        )
        self.disks = (*self.disks, served)

    @property
    def _over_network(self) -> bool:
        """Whether connections to its exports can be lost although QEMU holds them."""
        address = self._options.nbd_address
        if address is None:
            return self._options.tls is not None or not self._rundir.here
        return not is_unix(address) or not self._rundir.here

    async def _look_at_scratch(
        self, index: int, uri_of: Callable[[str], str]
    ) -> Overwritten | OverwrittenElsewhere:
        """What tells which blocks are in a scratch image: its file, or where that can't be opened an export."""
        export = self._names.scratch_export(index)
        there = export in self._found_exports
        if there or not self._rundir.here:
            self._push(f"removing export {export}", partial(self._end_export, export))
        if self._rundir.here:
            return Overwritten(self._scratch[index])
        from nbdpull.source.scratchelsewhere import OverwrittenElsewhere  # noqa: PLC0415 - seldom needed

        if there:
            return OverwrittenElsewhere(uri_of(export))
        await self._monitor.execute(
            "block-export-add",
            {"type": "nbd", "id": export, "node-name": self._names.scratch(index), "name": export},
        )
        return OverwrittenElsewhere(uri_of(export))

    async def _start_tls_server(self, tls: Tls) -> str:
        """Start QEMU's NBD server on loopback with TLS, and return its address."""
        creds = await self._add_creds(tls)
        await asyncio.to_thread(self._rundir.mark_server)
        self._port = await start_on_loopback(self._monitor, creds)
        self._push_stop()
        return _on_loopback(self._port, tls)

    async def _start_at_address(self, address: str, tls: Tls | None) -> None:
        """Start QEMU's NBD server where the user says, if it has TLS, and QEMU runs none."""
        if tls is None or is_unix(address) or not tls.serves():
            return
        creds = await self._add_creds(tls)
        try:
            await start_at(self._monitor, address, creds)
        except CommandError as exc:
            if "already running" not in exc.description:
                raise
            return
        self._listens = True
        await asyncio.to_thread(self._rundir.mark_server)
        self._push_stop()

    async def _add_creds(self, tls: Tls) -> str:
        creds = self._names.tls
        self._push("removing its TLS files", partial(self._delete_object, creds))
        await self._monitor.execute(
            "object-add",
            {
                "qom-type": "tls-creds-x509" if tls.user is None else "tls-creds-psk",
                "id": creds,
                "dir": tls.folder,
                "endpoint": "server",
                **({"verify-peer": True} if tls.user is None else {}),
            },
        )
        return creds

    async def _delete_object(self, name: str) -> None:
        try:
            await self._monitor.execute("object-del", {"id": name})
        except CommandError as exc:
            if not _is_absent(exc):
                raise

    # -- going on with it ---------------------------------------------------------------------------

    async def keep_record(self, record: Unfinished, machine: bytes | None) -> Journal | None:
        """See `Resumable`."""
        record = replace(
            record,
            guest_first=self._options.guest_first,
            trims=self._options.trim_scratch,
            server=server_of(self._options),
            port=self._port,
            listens=self._listens,
            pause_s=self._pause_s,
            quiesced=self.quiesced,
        )
        return await self._recorder.keep(record, machine)

    async def _attach(self, uri_of: Callable[[str], str], record: Unfinished) -> None:
        """Take what a run made as this one's own, in the order in which it was made."""
        age_s = max(0.0, time.time() - record.time)
        self._began = asyncio.get_running_loop().time() - age_s
        self._recorder = Recorder(self._rundir, record)
        self._pause_s = record.pause_s
        self.quiesced = record.quiesced
        for index in range(len(self._plans)):
            self._scratch.append(str(self._rundir.path / f"disk{index}.raw"))
            self._push_delete(self._names.scratch(index))
        for index, plan in enumerate(self._plans):
            if self._options.guest_first:
                self._push_delete(self._names.filter(index))
                self._push_give_back(plan)
            else:
                job_id = self._names.job(index)
                self._push(f"ending job {job_id}", partial(self._end_job, job_id))
        for index in range(len(self._plans)):
            self._push_delete(self._names.access(index))
        if self._options.nbd_address is None:
            tls = self._options.tls
            if tls is not None and record.port is not None:
                self._port = record.port
                creds = self._names.tls
                self._push("removing its TLS files", partial(self._delete_object, creds))
                uri_of = partial(with_export, _on_loopback(record.port, tls))
            self._push_stop()
        elif self._options.tls is not None:
            self._listens = record.listens
            self._push("removing its TLS files", partial(self._delete_object, self._names.tls))
            if self._listens:
                # Its exports are there: the server was never ended since.
                self._push_stop()
        # A run over ssh has one of each scratch image, too.
        found = await self._monitor.execute("query-block-exports")
        self._found_exports = frozenset(entry["id"] for entry in found)
        for index, plan in enumerate(self._plans):
            export = self._names.export(index)
            self._push(f"removing export {export}", partial(self._end_export, export))
            await self._add_served(index, plan, uri_of)

    # -- watching it -------------------------------------------------------------------------------

    def lose(self, reason: PointInTimeLostError) -> None:
        """Note that it can't be read any more, unless that is known already."""
        self._lose(reason)

    def _lose(self, reason: PointInTimeLostError) -> None:
        if self.lost is None and not self._released:
            self.lost = reason
            self._on_lost(reason)

    async def why_lost(self) -> PointInTimeLostError | None:
        """See `PointInTime.why_lost`."""
        if self.lost is None:
            # Guest first, a scratch that is full breaks the view at once, and no event tells of it.
            full = None
            with contextlib.suppress(SourceError):
                full = await asyncio.to_thread(self._guard.check)
            if full is not None:
                self._lose(full)
        return self.lost

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        jobs = {self._names.job(index) for index in range(len(self._plans))}
        if name == "JOB_STATUS_CHANGE" and data.get("id") in jobs:
            if data.get("status") in {"aborting", "concluded", "null"}:
                self._lose(
                    PointInTimeLostError(
                        f"QEMU ended backup job {data['id']} before its disk was read"
                    )
                )
        elif name == "BLOCK_IO_ERROR" and data.get("nospace"):
            self._no_room.tell(data)
        elif name == "BLOCK_EXPORT_DELETED" and str(data.get("id", "")).startswith(
            f"np-{self._names.run}-"
        ):
            self._lose(
                PointInTimeLostError(
                    f"somebody removed export {data['id']} before its disk was read"
                )
            )

    async def _count_copied(self) -> None:
        """Note how much the filters have copied, as long as they are there."""
        with contextlib.suppress(MonitorError, CommandError):
            jobs = {self._names.job(index) for index in range(len(self._plans))}
            found = await self._monitor.execute("query-jobs")
            done = [job["current-progress"] for job in found if job["id"] in jobs]
            # Filters without a job (guest first) don't tell; nothing leaves their scratch, so it does.
            self._copied = sum(done) if done else None

    # -- ending it ---------------------------------------------------------------------------------

    async def _until_gone(self, what: str, query: str, key: str, value: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _GONE_S
        while any(entry[key] == value for entry in await self._monitor.execute(query)):
            if loop.time() > deadline:
                raise SourceError(f"{what} '{value}' is still there after {_GONE_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def _end_export(self, export: str) -> None:
        try:
            await self._monitor.execute("block-export-del", {"id": export, "mode": "hard"})
        except CommandError as exc:
            if _is_absent(exc):
                return
            raise
        await self._until_gone("export", "query-block-exports", "id", export)

    async def _end_job(self, job: str) -> None:
        with contextlib.suppress(CommandError):  # it may have ended by itself
            await self._monitor.execute("job-cancel", {"id": job})
        await self._until_gone("job", "query-jobs", "id", job)

    @property
    def gone(self) -> bool:
        """Whether QEMU holds nothing of it any more, as far as is known."""
        return not self._monitor_lost and not self._failed

    async def release(self) -> None:
        """End the frozen view: afterwards the guest's writes cost nothing any more.

        Every NBD connection must be closed before, or QEMU could hang in it. A second call does
        nothing. The bitmaps stay: see `confirm` and `discard`.
        """
        if self._released:
            return
        self._released = True
        await finished(self._take_down())

    async def _take_down(self) -> None:
        if not self._monitor_lost:
            await self._count_copied()
        with contextlib.suppress(OSError, SourceError):  # only its peak is wanted
            await asyncio.to_thread(self._guard.check)
        self._stack.push_async_callback(self._recorder.close)
        await self._stack.aclose()
        await self._no_room.settle(connected=not self._monitor_lost)
        peak = self._guard.peak
        self.cost = GuestCost(
            frozen_s=asyncio.get_running_loop().time() - self._began,
            pause_s=self._pause_s + self._no_room.pause_s,
            copied_bytes=peak if self._copied is None else self._copied,
            scratch_peak_bytes=peak,
        )

    async def _remove_bitmap(self, node: str, name: str) -> None:
        await self._monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})

    async def _remove_bitmaps(self, doomed: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        return await finished(self._try_to_remove(doomed))

    async def _try_to_remove(self, doomed: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        problems = []
        for node, name in doomed:
            if self._monitor_lost:
                problems.append(f"bitmap '{name}' may still be on node '{node}'")
                continue
            try:
                await self._remove_bitmap(node, name)
            except Error as exc:
                self._monitor_lost = isinstance(exc, MonitorError)
                problems.append(f"bitmap '{name}' stays on node '{node}': {exc}")
        return tuple(problems)

    async def confirm(self, obsolete: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The backup is durable: keep its checkpoints, drop what nothing is counted from any more.

        Args:
            obsolete: names of bitmaps, by disk name.

        Returns:
            What the user should know: what could not be removed, which does no harm but takes memory in
            QEMU, and whether the guest was paused for a reason of its own.
        """
        doomed = [(plan.disk.node, self._names.bitmap) for plan in self._plans]
        for plan in self._plans:
            doomed += [(plan.disk.node, name) for name in obsolete.get(plan.disk.name, ())]
        return (*self._no_room.notes, *await self._remove_bitmaps(doomed))

    async def discard(self) -> tuple[str, ...]:
        """The backup failed: drop its checkpoints. The older ones have recorded all along."""
        doomed = [(plan.disk.node, self._names.bitmap) for plan in self._plans]
        doomed += [
            (plan.disk.node, plan.checkpoint) for plan in self._plans if plan.checkpoint is not None
        ]
        return await self._remove_bitmaps(doomed)


def server_of(options: QemuOptions) -> str:
    """A digest of how exports are reached: who goes on with them must reach them in the same way."""
    told = f"{options.nbd_address}\n{options.tls is not None}"
    return blake3(told.encode("utf-8", "surrogateescape")).hexdigest()


def _on_loopback(port: int, tls: Tls) -> str:
    return with_tls(f"nbds://{LOOPBACK}:{port}", tls)


def _is_absent(exc: CommandError) -> bool:
    """Whether QEMU refused because there is no such thing: it was never made."""
    return any(words in exc.description for words in ("Failed to find", "Cannot find", "not found"))


@contextlib.asynccontextmanager
async def freeze(
    monitor: Monitor,
    names: RunNames,
    plans: Sequence[QemuPlan],
    rundir: RunFolder,
    *,
    options: QemuOptions,
    uri_of: Callable[[str], str],
    on_lost: OnLost,
    on_released: Callable[[bool], None],
) -> AsyncIterator[QemuPointInTime]:
    """Freeze all disks at one moment and serve them; the context's end releases them.

    Args:
        monitor: of the QEMU.
        names: of what this run makes there.
        plans: the disks, and what of each.
        rundir: where scratch images and the NBD socket go.
        options: in which way.
        uri_of: the URI of an export, by its name.
        on_lost: called in the event loop when the view breaks while it is in use.
        on_released: told at the end whether QEMU holds nothing of it any more.

    When making it fails nothing of it is left, the bitmaps included. When the body fails only the
    frozen view is ended: the caller decides about the bitmaps.

    Raises:
        CommandError, SourceError: QEMU refused a step.
    """
    # In a thread, because it looks at the room there is.
    frozen = await whole(QemuPointInTime, monitor, names, plans, rundir, options, on_lost)
    async with _held(frozen, monitor, lambda: frozen._build(uri_of), on_released):  # noqa: SLF001
        yield frozen


@contextlib.asynccontextmanager
async def resume(  # noqa: PLR0913 - as `freeze`, and what the dead one left
    monitor: Monitor,
    names: RunNames,
    plans: Sequence[QemuPlan],
    rundir: RunFolder,
    *,
    options: QemuOptions,
    uri_of: Callable[[str], str],
    on_lost: OnLost,
    on_released: Callable[[bool], None],
    record: Unfinished,
    check: Callable[[], Awaitable[object]],
) -> AsyncIterator[QemuPointInTime]:
    """Go on at the point in time of a run that died: as `freeze`, with what that one made.

    `record` is what it left. `check` raises where not all of it is there, and is called when whatever happens
    from then on is told; then nothing was touched.
    """
    frozen = await whole(QemuPointInTime, monitor, names, plans, rundir, options, on_lost)
    unsubscribe = monitor.on_event(frozen._on_event)  # noqa: SLF001
    try:
        await check()
        await check_present(monitor)
    finally:
        # The next one listens before it does anything else.
        unsubscribe()
    attach = partial(frozen._attach, uri_of, record)  # noqa: SLF001
    async with _held(frozen, monitor, attach, on_released):
        yield frozen


@contextlib.asynccontextmanager
async def _held(
    frozen: QemuPointInTime,
    monitor: Monitor,
    make: Callable[[], Awaitable[None]],
    on_released: Callable[[bool], None],
) -> AsyncIterator[None]:
    unsubscribe = monitor.on_event(frozen._on_event)  # noqa: SLF001
    watcher = None
    try:
        try:
            # To its end, also when cancelled: what QEMU was told to make must be known to be removed.
            await finished(make())
        except BaseException:
            try:
                await frozen.release()
            finally:
                on_released(frozen.gone)
            for line in await frozen.discard():
                log.debug("%s", line)
            raise
        watcher = asyncio.create_task(frozen._guard.watch(), name="scratch-space")  # noqa: SLF001
        try:
            yield
        finally:
            watcher.cancel()
            try:
                await frozen.release()
            finally:
                on_released(frozen.gone)
    finally:
        unsubscribe()
