"""Whether QEMU still holds the point in time of a run that died, all of it.

Between a client's death and the next one QEMU went on as it does under a client that is slow. So what a
client would have been told meanwhile is looked up: each node, edge, job, export and bitmap must be as the
run made it. What can't be seen (guest first, whether the scratch failed) shows when it is read: QEMU then
refuses every read of the view, it never shows wrong data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nbdpull.model.chain import BitmapState
from nbdpull.source.base import GRANULARITY, CannotGoOnError
from nbdpull.source.disks import QemuDisk
from nbdpull.source.leftovers import runs_of_chain
from nbdpull.source.names import RunNames
from nbdpull.source.place import Place
from nbdpull.source.qmp import Monitor
from nbdpull.source.rundir import FoundRun
from nbdpull.source.unfinished import Unfinished, UnfinishedDisk

__all__ = ["check_whole", "find_unfinished"]

_UNABLE: Final = frozenset({"io-error", "internal-error"})
"""Run states in which a write of the guest failed: it may wait for the very scratch."""


async def find_unfinished(
    monitor: Monitor, chain: str, *, place: Place, scratch: str | None
) -> tuple[FoundRun, Unfinished] | None:
    """The folder and the record of the one dead run of a chain; None when no run of it died here.

    Raises:
        CannotGoOnError: there is one, and nobody can go on with it.
        MonitorError: the session broke.
    """
    alive, dead = await runs_of_chain(monitor, chain, place=place, scratch=scratch)
    if alive or not dead:
        return None
    if len(dead) > 1:
        raise CannotGoOnError(f"{len(dead)} runs of the chain died")
    run, folder = dead[0]
    if folder is None:
        raise CannotGoOnError("its scratch folder can't be seen from here")
    if folder.paused:
        raise CannotGoOnError("it died while it made its point in time")
    try:
        record = await asyncio.to_thread(folder.record)
    except ValueError as exc:
        raise CannotGoOnError(str(exc)) from exc
    if (record.run, record.chain) != (run, chain):
        raise CannotGoOnError("its record is of another run")
    return folder, record


@dataclass(frozen=True, slots=True)
class _Seen:
    """What QEMU has now."""

    nodes: Mapping[str, Mapping[str, Any]]
    children: Mapping[tuple[str, str], str]
    jobs: Mapping[str, Mapping[str, Any]]
    exports: Mapping[str, Mapping[str, Any]]

    @classmethod
    async def read(cls, monitor: Monitor) -> _Seen:
        nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
        graph = await monitor.execute("x-debug-query-block-graph")
        names = {
            entry["id"]: entry["name"]
            for entry in graph["nodes"]
            if entry["type"] == "block-driver"
        }
        return cls(
            nodes={entry["node-name"]: entry for entry in nodes},
            children={
                (names[edge["parent"]], edge["name"]): names[edge["child"]]
                for edge in graph["edges"]
                if edge["parent"] in names and edge["child"] in names
            },
            jobs={entry["id"]: entry for entry in await monitor.execute("query-jobs")},
            exports={entry["id"]: entry for entry in await monitor.execute("query-block-exports")},
        )

    def node(self, name: str, driver: str) -> Mapping[str, Any]:
        found = self.nodes.get(name)
        if found is None or found["drv"] != driver:
            raise CannotGoOnError(f"QEMU has its node {name} no more")
        return found

    def child(self, parent: str, role: str) -> str | None:
        return self.children.get((parent, role))


async def check_whole(
    monitor: Monitor, record: Unfinished, disks: Sequence[QemuDisk], folder: Path
) -> list[QemuDisk]:
    """The disks of a record, in its order, each with the node that its guest device stood on then.

    Args:
        monitor: of the QEMU.
        record: of the run.
        disks: as they are now, in the order of the record.
        folder: of the run, as QEMU names it.

    Raises:
        CannotGoOnError: something of the point in time is gone, or is not as it was made.
        MonitorError: the session broke.
    """
    if not monitor.storage_daemon:
        status = (await monitor.execute("query-status"))["status"]
        if status in _UNABLE:
            raise CannotGoOnError(f"the guest is in state '{status}'")
    seen = await _Seen.read(monitor)
    names = RunNames(record.run)
    return [
        _check_disk(seen, names, record, number, disk, folder) for number, disk in enumerate(disks)
    ]


def _check_disk(
    seen: _Seen,
    names: RunNames,
    record: Unfinished,
    number: int,
    disk: QemuDisk,
    folder: Path,
) -> QemuDisk:
    scratch, above, access = names.scratch(number), names.filter(number), names.access(number)
    image = Path(seen.node(scratch, "file")["image"]["filename"])
    if image != folder / f"disk{number}.raw":
        raise CannotGoOnError(f"its scratch image of disk '{disk.name}' is elsewhere")
    seen.node(above, "copy-before-write")
    seen.node(access, "snapshot-access")
    below = seen.child(above, "file")
    if seen.child(above, "target") != scratch or seen.child(access, "file") != above:
        raise CannotGoOnError(f"the filter of disk '{disk.name}' is not as it was made")
    job = seen.jobs.get(names.job(number))
    if record.guest_first:
        if job is not None or disk.top != above or below is None:
            raise CannotGoOnError(f"the filter of disk '{disk.name}' is not as it was made")
        disk = replace(disk, top=below, top_driver=str(seen.nodes[below]["drv"]))
    elif job is None or (job["type"], job["status"]) != ("backup", "running") or below != disk.node:
        raise CannotGoOnError(f"the backup job of disk '{disk.name}' runs no more")
    export = seen.exports.get(names.export(number))
    if export is None or export["node-name"] != access or export["shutting-down"]:
        raise CannotGoOnError(f"the export of disk '{disk.name}' is gone")
    # Only of a run that can't open the image itself.
    of_scratch = seen.exports.get(names.scratch_export(number))
    if of_scratch is not None and (
        of_scratch["node-name"] != scratch or of_scratch["shutting-down"]
    ):
        raise CannotGoOnError(f"the export of the scratch of disk '{disk.name}' is going")
    _check_bitmaps(names, disk, record.disks[number])
    return disk


def _check_bitmaps(names: RunNames, disk: QemuDisk, told: UnfinishedDisk) -> None:
    """The exported bitmap must stand still, the checkpoint must have recorded all along."""
    exported = disk.bitmaps.get(names.bitmap)
    if exported is None or exported.recording or not _sound(exported):
        raise CannotGoOnError(f"what changed on disk '{disk.name}' is known no more")
    if told.checkpoint is None:
        return
    state = disk.bitmaps.get(told.checkpoint)
    if (
        state is None
        or state.problem is not None
        or not _sound(state)
        or state.persistent != disk.persistent
    ):
        raise CannotGoOnError(f"the checkpoint of disk '{disk.name}' does not record")


def _sound(state: BitmapState) -> bool:
    return not state.inconsistent and state.granularity == GRANULARITY
