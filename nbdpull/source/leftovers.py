"""What a killed run leaves in QEMU, and its removal.

After the client is gone its exports, filters, jobs, nodes and bitmaps are all still there. They are
known by their names (`names`). Whether that run still lives QEMU tells by its `lifeline`, and its folder
(`rundir`) by a lock, where it can be seen: a stopped process holds both, so nothing is taken away under it.
A run lives if either says so, and what lives is left alone. Each step works whatever the steps
before it found, so a clean-up that is itself killed is simply run again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdpull.errors import CommandError
from nbdpull.source.base import Committed, LiveRun, Swept
from nbdpull.source.lifeline import Life, can_tell, lives
from nbdpull.source.names import RunNames, checkpoint_parts, run_of
from nbdpull.source.place import HERE, Place
from nbdpull.source.qmp import Monitor
from nbdpull.source.rundir import FoundRun

__all__ = ["runs_of_chain", "sweep", "sweep_dry"]

log = logging.getLogger(__name__)

_WAIT_S: Final = 30.0
_POLL_S: Final = 0.05


@dataclass(slots=True, kw_only=True)
class _Found:
    """Everything of ours in one QEMU."""

    exports: list[str]
    jobs: list[str]
    nodes: dict[str, Mapping[str, Any]]
    bitmaps: list[tuple[str, str]]  # (node, name), exported ones
    checkpoints: list[tuple[str, str]]  # (node, name), those of ours
    lives: Mapping[str, Life]
    nbd_exports: list[str]  # all there are, whoever made them

    @classmethod
    async def read(cls, monitor: Monitor) -> _Found:
        # Before and after all else: a run may end, and another begin, while this reads.
        lives_before = await lives(monitor)
        exports, nodes, jobs = await monitor.ask(
            "query-block-exports", ("query-named-block-nodes", {"flat": True}), "query-jobs"
        )
        bitmaps = [
            (node["node-name"], bitmap["name"])
            for node in nodes
            # A filter passes on the bitmaps of the node below it: list each with its own node only.
            if node["drv"] not in {"copy-before-write", "snapshot-access"}
            for bitmap in node.get("dirty-bitmaps", [])
            if bitmap.get("name")
        ]
        return cls(
            exports=[entry["id"] for entry in exports if run_of(entry["id"])],
            jobs=[entry["id"] for entry in jobs if run_of(entry["id"])],
            nodes={n["node-name"]: n for n in nodes if run_of(n["node-name"])},
            bitmaps=[pair for pair in bitmaps if run_of(pair[1])],
            checkpoints=[pair for pair in bitmaps if checkpoint_parts(pair[1])],
            lives={**lives_before, **await lives(monitor)},
            nbd_exports=[entry["id"] for entry in exports if entry["type"] == "nbd"],
        )

    def runs(self) -> set[str]:
        names = [*self.exports, *self.jobs, *self.nodes, *(name for _, name in self.bitmaps)]
        return {run for name in names if (run := run_of(name))} | set(self.lives)

    def chain(self, run: str) -> str | None:
        """The chain that a run backs up, as far as QEMU tells."""
        life = self.lives.get(run)
        return life.chain if life is not None else None

    def folder(self, run: str) -> Path | None:
        """The run's folder, told by where its scratch images are."""
        for name, node in self.nodes.items():
            if run_of(name) == run and node["drv"] == "file":
                return Path(node["image"]["filename"]).parent
        return None


async def sweep(
    monitor: Monitor,
    *,
    place: Place = HERE,
    scratch: str | None = None,
    force: bool = False,
    committed: Committed = lambda _chain, _backup: False,
    spare: str | None = None,
) -> Swept:
    """Remove what runs that are no more left in this QEMU.

    Args:
        monitor: of the QEMU to clean.
        place: the host that it runs on.
        scratch: where runs keep their folders when QEMU does not tell; None for the default place.
        force: take away runs that still live, too.
        committed: whether a checkpoint, by its chain's and its backup's id, belongs to a backup that is
            (or may be) durable: it is kept although its run never confirmed it, a sound base.
        spare: a run that somebody goes on with.

    Raises:
        MonitorError: the session broke; run it again.
    """
    swept = Swept()
    found = await _Found.read(monitor)
    runs = [one async for one in _runs(monitor, found, place, scratch) if one[0] != spare]
    lives_yet = {run: _live(monitor, found, run, folder) for run, folder in runs}
    spared = {spare, *(run for run, live in lives_yet.items() if live is not None and not force)}
    for run, folder in runs:
        live = lives_yet[run]
        if live is not None and not force:
            swept.live.append(live)
            swept.kept.append(
                f"run {run}: {live.who} still works on it (end it first, or use --force)"
            )
            continue
        sweeper = _Sweeper(
            monitor=monitor, run=run, found=found, folder=folder, swept=swept, spared=spared
        )
        await sweeper.go(committed)
    return swept


async def runs_of_chain(
    monitor: Monitor, chain: str, *, place: Place = HERE, scratch: str | None = None
) -> tuple[list[LiveRun], list[tuple[str, FoundRun | None]]]:
    """The runs of one chain in this QEMU: those that live, and those that died, with their folders."""
    found = await _Found.read(monitor)
    alive: list[LiveRun] = []
    dead: list[tuple[str, FoundRun | None]] = []
    async for run, folder in _runs(monitor, found, place, scratch):
        if chain != ((folder.chain if folder is not None else None) or found.chain(run)):
            continue
        live = _live(monitor, found, run, folder)
        if live is not None:
            alive.append(live)
        else:
            dead.append((run, folder))
    return alive, dead


async def sweep_dry(monitor: Monitor, *, place: Place = HERE, scratch: str | None = None) -> Swept:
    """What `sweep` would find: the dead runs by name in `removed`, and the live ones."""
    swept = Swept()
    found = await _Found.read(monitor)
    async for run, folder in _runs(monitor, found, place, scratch):
        live = _live(monitor, found, run, folder)
        if live is not None:
            swept.live.append(live)
        else:
            swept.removed.append(f"run {run}")
    return swept


def _live(monitor: Monitor, found: _Found, run: str, folder: FoundRun | None) -> LiveRun | None:
    """The run, unless it is sure that it is over."""
    life = found.lives.get(run)
    # A run without a lifeline is over, or has only its folder yet; in a QEMU that knows none, nothing
    # tells of a run whose folder is somewhere else.
    unknown = folder is None and not can_tell(monitor)
    if unknown or (life is not None and life.alive) or (folder is not None and folder.alive):
        return LiveRun(
            run=run,
            chain=(folder.chain if folder is not None else None) or found.chain(run),
            pid=folder.pid if folder is not None else None,
        )
    return None


async def _runs(
    monitor: Monitor, found: _Found, place: Place, scratch: str | None
) -> AsyncIterator[tuple[str, FoundRun | None]]:
    """All runs that left something in this QEMU, or a folder that names it."""
    folders = {
        run.path.name.removeprefix("nbdpull-"): run
        for run in await asyncio.to_thread(lambda: list(place.find_all(scratch)))
    }
    # A run may have come by another monitor of the same QEMU: then its things here tell.
    here = {name for name, run in folders.items() if run.source == monitor.address.there}
    for run in sorted(found.runs() | here):
        told = found.folder(run)
        seen = await asyncio.to_thread(place.find, told) if told else None
        yield run, seen or folders.get(run)


async def _try(monitor: Monitor, command: str, arguments: Mapping[str, object]) -> str | None:
    """Run a command; what QEMU said against it, or None."""
    try:
        await monitor.execute(command, arguments)
    except CommandError as exc:
        log.debug("%s", exc)
        return exc.description
    return None


async def _gone(monitor: Monitor, query: str, ids: Sequence[str]) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _WAIT_S
    while loop.time() < deadline:
        entries = await monitor.execute(query)
        left = [entry for entry in entries if entry["id"] in ids]
        if not left:
            return
        for entry in left:
            if entry.get("status") == "concluded":
                await _try(monitor, "job-dismiss", {"id": entry["id"]})
        await asyncio.sleep(_POLL_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sweeper:
    """The removal of one dead run."""

    monitor: Monitor
    run: str
    found: _Found
    folder: FoundRun | None
    swept: Swept
    spared: set[str | None]

    def mine(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if run_of(name) == self.run]

    async def remove(
        self, what: str, name: str, command: str, arguments: Mapping[str, object]
    ) -> None:
        problem = await _try(self.monitor, command, arguments)
        if problem is None:
            self.swept.removed.append(f"{what} {name}")
        else:
            self.swept.kept.append(f"{what} {name}: {problem}")

    async def go(self, committed: Committed) -> None:
        """Every step, in an order that matters: what stands on another thing goes first."""
        waits = await self._guest_waits()
        exports = self.mine(self.found.exports)
        for name in exports:
            await self.remove("export", name, "block-export-del", {"id": name, "mode": "hard"})
        await _gone(self.monitor, "query-block-exports", exports)
        await self._remove_nodes("snapshot-access")
        jobs = self.mine(self.found.jobs)
        for name in jobs:
            await self.remove("job", name, "job-cancel", {"id": name})
        await _gone(self.monitor, "query-jobs", jobs)
        for name in self.mine(self.found.nodes):
            if self.found.nodes[name]["drv"] == "copy-before-write":
                await _give_drive_back(self.monitor, name)
        await self._remove_nodes("copy-before-write")
        await self._remove_nodes("file")
        await self._remove_bitmaps(committed)
        await self._stop_server()
        if self.folder is not None:
            await asyncio.to_thread(self.folder.remove)
            self.swept.removed.append(f"scratch folder of run {self.run}")
        if waits:
            # With the filter gone the write that found no room succeeds.
            what = f"pause of the guest, which found no room in the scratch of run {self.run}"
            problem = await _try(self.monitor, "cont", {})
            if problem is None:
                self.swept.removed.append(what)
            else:
                self.swept.kept.append(f"{what}: {problem}")
        life = self.found.lives.get(self.run)
        if life is not None:
            # Last: while anything is left, it says that the run is over.
            await self.remove("lifeline", life.name, "chardev-remove", {"id": life.name})

    async def _guest_waits(self) -> bool:
        """Whether QEMU paused the guest because this run's scratch is full; one that the run itself paused goes on now.

        A guest that waits for room on its own disk is left as it is: see decision 0082.
        """
        if self.folder is None or self.monitor.storage_daemon:
            return False
        status = (await self.monitor.execute("query-status"))["status"]
        if status == "paused" and self.folder.paused:
            await self.monitor.execute("cont")
            self.swept.removed.append(f"pause of the guest by run {self.run}")
        return bool(status == "io-error") and await asyncio.to_thread(self.folder.full)

    async def _remove_nodes(self, driver: str) -> None:
        # Asked anew: a job takes its filter with it.
        nodes = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        for name in self.mine(node["node-name"] for node in nodes if node["drv"] == driver):
            await self.remove("node", name, "blockdev-del", {"node-name": name})

    async def _remove_bitmaps(self, committed: Committed) -> None:
        exported = [pair for pair in self.found.bitmaps if run_of(pair[1]) == self.run]
        for node, name in exported:
            await self._remove_bitmap("bitmap", node, name)
        if not exported:
            return
        # The run never came to drop its exported bitmap, so its checkpoint was not confirmed.
        for node, name in self.found.checkpoints:
            parts = checkpoint_parts(name)
            if parts is not None and parts[1].startswith(self.run) and not committed(*parts):
                await self._remove_bitmap("checkpoint", node, name)

    async def _remove_bitmap(self, what: str, node: str, name: str) -> None:
        arguments = {"node": node, "name": name}
        await self.remove(what, name, "block-dirty-bitmap-remove", arguments)

    async def _stop_server(self) -> None:
        life = self.found.lives.get(self.run)
        # With its exports there, the server that it was to start is the one that runs.
        said = life is not None and life.server and bool(self.mine(self.found.exports))
        if not said and (self.folder is None or not self.folder.server):
            return
        # Of nobody, or of a run that goes on.
        theirs = [
            name
            for name in self.found.nbd_exports
            if run_of(name) is None or run_of(name) in self.spared
        ]
        if not theirs:
            problem = await _try(self.monitor, "nbd-server-stop", {})
            if problem is None:
                self.swept.removed.append(f"NBD server of run {self.run}")
        creds = RunNames(self.run).tls
        if await _try(self.monitor, "object-del", {"id": creds}) is None:
            self.swept.removed.append(f"object {creds}")


async def _give_drive_back(monitor: Monitor, node: str) -> None:
    """Where a guest device stands on our filter, put it back on what is below the filter now."""
    graph = await monitor.execute("x-debug-query-block-graph")
    names = {entry["id"]: entry["name"] for entry in graph["nodes"]}
    below = next(
        (
            names[edge["child"]]
            for edge in graph["edges"]
            if names.get(edge["parent"]) == node and edge["name"] == "file"
        ),
        None,
    )
    for entry in await monitor.execute("query-block"):
        if entry.get("inserted", {}).get("node-name") == node and entry.get("qdev") and below:
            qdev = str(entry["qdev"])
            path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
            await _try(monitor, "qom-set", {"path": path, "property": "drive", "value": below})
