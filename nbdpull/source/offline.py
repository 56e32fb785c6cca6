"""The images of a VM that is shut down.

Nothing writes, so no scratch is needed: a lock on each image keeps VMs from starting meanwhile, and a
``qemu-nbd`` that can only read serves it. What is recorded is as with a running VM, so that a chain goes on
whether the VM runs or not:

    add np-<run>-exp (disabled: this run is not confirmed) and the new checkpoint to each image
      -> lock all images -> check that nothing was written since -> serve -> pull -> unlock
      -> when the backup is durable, remove np-<run>-exp and the checkpoints that have served

A run that is killed leaves these two bitmaps at most. The next run removes them, and so does QEMU's own
(`leftovers`) when the VM was started meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdpull.errors import Error, PointInTimeLostError, SourceError, UsageError
from nbdpull.model.outcomes import Finding, FindingKind
from nbdpull.model.results import GuestCost, Quiesced
from nbdpull.source.address import ImageAddress
from nbdpull.source.base import (
    READ_CONNECTIONS,
    Committed,
    Disk,
    DiskPlan,
    Known,
    KnownDisk,
    LiveRun,
    OnLost,
    PointInTime,
    RunInfo,
    ServedDisk,
    Swept,
    select_disks,
)
from nbdpull.source.images import (
    Image,
    ImageLock,
    ImageServer,
    add_bitmap,
    look,
    remove_bitmap,
)
from nbdpull.source.names import RunNames, checkpoint_parts, run_of
from nbdpull.source.rundir import FoundRun, RunDir, find_runs
from nbdpull.source.whole import whole

__all__ = ["OfflineSource"]

log = logging.getLogger(__name__)

_QCOW2_MAGIC: Final = b"QFI\xfb"
_NAMED: Final = {".qcow2": "qcow2", ".raw": "raw"} | {
    f".{name}": name for name in ("vmdk", "vdi", "vhdx", "qed")
}


def _format_of(address: ImageAddress) -> str:
    """The image's format, by what the user says or by its file's name.

    Never by its content: a guest that writes a qcow2 header to its raw disk could name any file of the
    host as its backing file, and would find that file in its next restore.
    """
    if address.format is not None:
        return address.format
    named = _NAMED.get(Path(address.path).suffix)
    if named is not None:
        return named
    try:
        with open(address.path, "rb") as file:  # noqa: PTH123 - a block device, too
            magic = file.read(4)
    except OSError as exc:
        raise SourceError(f"can't open image '{address.path}': {exc.strerror}") from exc
    if magic == _QCOW2_MAGIC:
        raise UsageError(
            f"image '{address.path}' looks like qcow2, but its name does not say so, and a guest can"
            f" write the same to a raw disk; write 'disk+qcow2:{address.path}' or"
            f" 'disk+raw:{address.path}'"
        )
    return "raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ImageDisk(Disk):
    image: Image


class OfflineSource:
    """See `Source`. Its disks are images that no QEMU has open.

    Args:
        images: of one VM.
        scratch: folder for the run's folder; None for the system's temporary one.
        known: what the repository knows of bitmaps that are found.
    """

    def __init__(
        self, images: Sequence[ImageAddress], *, scratch: str | None, known: Known
    ) -> None:
        self._addresses = images
        self._scratch = scratch
        self._known = known
        self._found: list[tuple[ImageAddress, Image, Sequence[KnownDisk]]] = []
        self._disks: dict[str, _ImageDisk] = {}
        self._rundirs: list[RunDir] = []

    async def _look(self) -> Sequence[tuple[ImageAddress, Image, Sequence[KnownDisk]]]:
        if not self._found:
            for address in self._addresses:
                image = await whole(look, address.path, _format_of(address))
                known = [disk for disk in self._known(image.bitmaps) if disk.size == image.size]
                self._found.append((address, image, known))
        return self._found

    async def vm_name(self) -> tuple[str, str | None]:
        """See `Source.vm_name`: told by checkpoints in the images, else by a lone image's name."""
        found = await self._look()
        names = {disk.vm for _, _, known in found for disk in known}
        if len(names) == 1:
            return names.pop(), None
        if names:
            raise UsageError(
                f"the images have checkpoints of several VMs ({', '.join(sorted(names))}); say with --vm"
                " which one they are"
            )
        if len(found) > 1:
            raise UsageError(
                f"{len(found)} images are given and none has a checkpoint of this repository; name the"
                " VM with --vm"
            )
        name = Path(found[0][0].path).stem
        return name, f"the VM is called '{name}' after its image; name it with --vm"

    async def disks(
        self, *, include: Sequence[str], exclude: Sequence[str]
    ) -> Sequence[_ImageDisk]:
        """See `Source.disks`."""
        disks = [
            _ImageDisk(
                name=address.name or _name(address, known),
                size=image.size,
                bitmaps=image.bitmaps,
                records=image.records,
                image=image,
            )
            for address, image, known in await self._look()
        ]
        names = [disk.name for disk in disks]
        for disk in disks:
            if names.count(disk.name) > 1:
                paths = ", ".join(one.image.path for one in disks if one.name == disk.name)
                raise UsageError(
                    f"images {paths} would all be disk '{disk.name}'; name them, as in"
                    f" disk:NAME={disk.image.path}"
                )
        wanted = select_disks(disks, (), include=include, exclude=exclude)
        chosen = [disk for disk in disks if disk.name in wanted]
        self._disks = {disk.name: disk for disk in chosen}
        return chosen

    async def machine(self) -> tuple[str, bytes] | None:
        """See `Source.machine`."""
        return None

    async def examine(self) -> Sequence[Finding]:
        """See `Source.examine`."""
        findings = []
        for _, image, _ in await self._look():
            lost = [name for name, state in image.bitmaps.items() if state.inconsistent]
            kind, text = FindingKind.OK, f"{image.size} bytes, {image.format}, keeps dirty bitmaps"
            if lost:
                kind = FindingKind.WARNING
                text = f"its bitmaps {', '.join(lost)} are inconsistent, because QEMU was killed"
            elif not image.records:
                kind = FindingKind.WARNING
                text = (
                    f"is {image.format}, which keeps no dirty bitmaps: it is read in full each time"
                )
            findings.append(Finding(kind=kind, subject=f"image {image.path}", text=text))
        return findings

    async def sweep(self, committed: Committed, *, force: bool = False) -> Swept:
        """See `Source.sweep`."""
        swept = Swept()
        folders = await asyncio.to_thread(lambda: list(find_runs(self._scratch)))
        ours = {
            run.path.name.removeprefix("nbdpull-"): run
            for run in folders
            if run.source is not None and run.source.startswith("disk:")
        }
        found = await self._look()
        marked = {run for _, image, _ in found for name in image.bitmaps if (run := run_of(name))}
        for run in sorted(marked | set(ours)):
            folder = ours.get(run)
            if folder is not None and folder.alive and not force:
                if run in marked or _shares(folder, found):
                    swept.live.append(LiveRun(run=run, chain=folder.chain, pid=folder.pid))
                    swept.kept.append(
                        f"run {run}: process {folder.pid} still works on it (end it first, or use"
                        " --force)"
                    )
                continue
            await self._sweep_run(run, committed, swept)
            if folder is not None:
                await asyncio.to_thread(folder.remove)
                swept.removed.append(f"folder of run {run}")
        if swept.removed:
            self._found = []  # look again
        return swept

    async def _sweep_run(self, run: str, committed: Committed, swept: Swept) -> None:
        for _, image, _ in await self._look():
            markers = [name for name in image.bitmaps if run_of(name) == run]
            if not markers:
                continue
            pending = [
                name
                for name in image.bitmaps
                if (parts := checkpoint_parts(name)) is not None
                and parts[1].startswith(run)
                and not committed(*parts)
            ]
            # The marker last: as long as it is there, a clean-up that is killed is done again.
            for name in (*pending, *markers):
                await whole(remove_bitmap, image.path, name)
                swept.removed.append(f"bitmap {name} of {image.path}")

    @asynccontextmanager
    async def freeze(
        self,
        info: RunInfo,
        plans: Sequence[DiskPlan],
        on_lost: OnLost,  # noqa: ARG002 - nothing but our own qemu-nbd can end it
    ) -> AsyncIterator[PointInTime]:
        """See `Source.freeze`."""
        # Not in a thread: what a cancelled call had made there, nobody would remove.
        rundir = RunDir.create(
            self._scratch,
            info.run,
            source="disk:" + "|".join(disk.image.path for disk in self._disks.values()),
            chain=info.chain,
            owner=None,
        )
        self._rundirs.append(rundir)
        frozen = _OfflinePointInTime(RunNames(info.run), plans, self._disks)
        async with AsyncExitStack() as stack:
            try:
                await frozen.record()
                await frozen.serve(stack, rundir)
            except BaseException:
                await stack.aclose()
                for line in await frozen.discard():
                    log.debug("%s", line)
                raise
            yield frozen

    async def close(self) -> None:
        """Let the run's folder and lock go: until its checkpoints are confirmed the run lives."""
        for rundir in self._rundirs:
            await asyncio.to_thread(rundir.close)


def _name(address: ImageAddress, known: Sequence[KnownDisk]) -> str:
    """What to call the disk: as in the backup that left a checkpoint in it, else after its file."""
    stem = Path(address.path).stem
    names = {disk.disk for disk in known}
    if len(names) <= 1 or stem in names:
        return stem if stem in names else next(iter(names), stem)
    raise UsageError(
        f"image '{address.path}' may be any of the disks {', '.join(sorted(names))} of this VM, which"
        f" have one size; say which, as in disk:{min(names)}={address.path}"
    )


def _shares(folder: FoundRun, found: Sequence[tuple[ImageAddress, Image, object]]) -> bool:
    """Whether a run works on one of these images."""
    paths = set((folder.source or "").removeprefix("disk:").split("|"))
    return any(image.path in paths for _, image, _ in found)


class _OfflinePointInTime:
    """See `PointInTime`."""

    def __init__(
        self, names: RunNames, plans: Sequence[DiskPlan], disks: Mapping[str, _ImageDisk]
    ) -> None:
        self._plans = [(plan, disks[plan.disk.name]) for plan in plans]
        self._marker = names.bitmap
        self._made: list[tuple[str, str]] = []
        self._stats: dict[str, tuple[int, int]] = {}
        self.disks: tuple[ServedDisk, ...] = ()
        self.lost: PointInTimeLostError | None = None
        self.cost: GuestCost | None = None
        self.quiesced: Quiesced | None = None

    async def why_lost(self) -> PointInTimeLostError | None:
        """See `PointInTime.why_lost`."""
        return None

    async def record(self) -> None:
        """Add each image's new checkpoint, and the mark that it is not confirmed."""
        for plan, disk in self._plans:
            path = disk.image.path
            if plan.checkpoint is not None and disk.records:
                for name, recording in ((self._marker, False), (plan.checkpoint, True)):
                    self._made.append((path, name))
                    await whole(add_bitmap, path, name, recording=recording)
            self._stats[path] = _stamp(path)

    async def serve(self, stack: AsyncExitStack, rundir: RunDir) -> None:
        """Lock all images and serve them until the stack unwinds.

        Raises:
            InUseError: a VM was started.
            SourceError: an image was written to since the checkpoints were added.
        """
        for _, disk in self._plans:
            # Not in a thread: what a cancelled call had locked there, nobody would let go.
            stack.callback(ImageLock(disk.image.path).close)
        # All are locked now: what is seen from here on is one point in time.
        served = []
        for index, (plan, disk) in enumerate(self._plans):
            path = disk.image.path
            now = await whole(look, path, disk.image.format)
            if self._stats[path] != _stamp(path) or not _unchanged(disk.image, now, plan):
                raise SourceError(
                    f"image '{path}' was changed while the backup began; if its VM was started, back it"
                    " up through its monitor (qmp:), else try again"
                )
            server = ImageServer(disk.image, rundir.path / f"nbd{index}", bitmap=plan.base)
            stack.push_async_callback(whole, server.close)
            await whole(server.start)
            context = None if plan.base is None else f"qemu:dirty-bitmap:{plan.base}"
            served.append(
                ServedDisk(
                    disk=plan.disk, uri=server.uri, context=context, connections=READ_CONNECTIONS
                )
            )
        self.disks = tuple(served)

    async def _remove(self, doomed: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        problems = []
        for path, name in doomed:
            try:
                await whole(remove_bitmap, path, name)
            except Error as exc:
                problems.append(f"bitmap '{name}' stays in '{path}': {exc}")
        return tuple(problems)

    async def confirm(self, obsolete: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """See `PointInTime.confirm`."""
        doomed = [(path, name) for path, name in self._made if name == self._marker]
        for plan, disk in self._plans:
            doomed += [(disk.image.path, name) for name in obsolete.get(plan.disk.name, ())]
        return await self._remove(doomed)

    async def discard(self) -> tuple[str, ...]:
        """See `PointInTime.discard`."""
        # The checkpoint before the mark that it is not confirmed.
        return await self._remove(self._made[::-1])


def _stamp(path: str) -> tuple[int, int]:
    state = os.stat(path)  # noqa: PTH116 - of a path that is a string everywhere here
    return state.st_mtime_ns, state.st_size


def _unchanged(before: Image, now: Image, plan: DiskPlan) -> bool:
    return now.size == before.size and (
        plan.base is None or now.bitmaps.get(plan.base) == before.bitmaps.get(plan.base)
    )
