"""What every kind of source offers: disks with their bitmaps, and points in time of them.

    open_source(uris) -> Source -> disks(), sweep()
                           |
                        freeze(plans) -> PointInTime -> NBD exports, until the context ends
                                             |
                              confirm() when the backup is durable, discard() when it failed

Nothing that an earlier backup relies on goes away before `confirm`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from nbdpull.errors import PointInTimeLostError, SourceError, UsageError
from nbdpull.model.chain import BitmapState
from nbdpull.model.results import GuestCost, Quiesced
from nbdpull.source.journal import Journal
from nbdpull.source.unfinished import Unfinished

if TYPE_CHECKING:
    from nbdpull.model.outcomes import Finding

__all__ = [
    "GRANULARITY",
    "READ_CONNECTIONS",
    "CannotGoOnError",
    "Committed",
    "Disk",
    "DiskPlan",
    "HostLostError",
    "Known",
    "KnownCheckpoint",
    "KnownDisk",
    "LiveRun",
    "OnLost",
    "PointInTime",
    "Recall",
    "RecordedPointInTime",
    "Resumable",
    "RunInfo",
    "ServedDisk",
    "Skipped",
    "Source",
    "Swept",
    "select_disks",
]

GRANULARITY: Final = 65536
"""Of every bitmap that we make, in bytes: a grain of the repository, and a cluster of qcow2."""

READ_CONNECTIONS: Final = 2
"""For each reader, to a server that is there for this run alone: the server fills both, each up to what is safe
in flight, while the reader compresses. QEMU accepts 100 in all (`nbd-server-start`, CVE-2024-7409)."""

Committed = Callable[[str, str], bool]
"""Told a chain's id and a backup's id, whether that backup may be durable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDisk:
    """A disk of an earlier backup.

    Attributes:
        vm, disk: their names.
        size: bytes.
    """

    vm: str
    disk: str
    size: int


Known = Callable[[Collection[str]], Sequence[KnownDisk]]
"""Told the names of bitmaps that were found together, which disks of earlier backups have checkpoints
of these names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCheckpoint:
    """A checkpoint of an earlier backup.

    Attributes:
        name: of the bitmaps.
        time: seconds since 1970.
        disks: of the VM, those that have the bitmap.
        full: whether some disk was read in full then.
    """

    name: str
    time: float
    disks: tuple[str, ...]
    full: bool


Recall = Callable[[str], Sequence[KnownCheckpoint]]
"""Told what the source calls its VM, the checkpoints of the VM's earlier backups, newest first."""

OnLost = Callable[[PointInTimeLostError], None]
"""Called in the event loop when a point in time breaks while it is in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk that can be backed up.

    Attributes:
        name: what the user calls it.
        size: bytes.
        bitmaps: its dirty bitmaps, by name.
        records: whether a checkpoint can be kept on it.
        told: meta context of a bitmap of somebody else's, who says that it holds what changed since the
            chain's last backup (for a differential: its last full); None where bitmaps tell by themselves.
        shares_checkpoint: whether a backup's checkpoint has one name on all its disks.
        allocated: bytes that its image takes on the host, where that is known.
    """

    name: str
    size: int
    bitmaps: Mapping[str, BitmapState] = field(default_factory=dict)
    records: bool = True
    told: str | None = None
    shares_checkpoint: bool = False
    allocated: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A drive that is no disk to back up, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What to freeze of one disk, one of those that the same source told.

    Attributes:
        base: name of the bitmap that changes are counted from, or the disk's `told`; None reads the
            whole disk.
        checkpoint: name of the bitmap to start recording with; None for a copy.
    """

    disk: Disk
    base: str | None
    checkpoint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedDisk:
    """One disk of a point in time as NBD clients reach it.

    Attributes:
        uri: of its export.
        context: meta context of what changed, None when the whole disk is to be read.
        whole: whether what did not change can be read too.
        granularity: bytes of the smallest change that `context` can tell.
        overwritten: which ranges of [start, end) may have been overwritten since the point in time, asked after
            their block status; None where nobody writes.
        trims: whether what is trimmed leaves the scratch, and can't be read any more.
        near: whether `overwritten` can be asked for the whole disk, often: its scratch is on this host.
        again: whether a connection that is lost may be made again: a network lies between, and what the export's name
            stands for is this point in time alone.
        connections: that each reader may open at a time; more than 1 only to a server that is there for this run.
    """

    disk: Disk
    uri: str
    context: str | None
    whole: bool = True
    granularity: int = GRANULARITY
    overwritten: Callable[[int, int], Sequence[tuple[int, int]]] | None = None
    trims: bool = False
    near: bool = False
    again: bool = False
    connections: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """A run that is under way, or may be: its things were left alone.

    Attributes:
        chain, pid: of what and as whom; None where that can't be seen from here.
    """

    run: str
    chain: str | None
    pid: int | None

    @property
    def who(self) -> str:
        """The process, in words."""
        if self.pid is None:
            return "a process that can't be seen from here (another container, user or host?)"
        return f"process {self.pid}"


@dataclass(slots=True, kw_only=True)
class Swept:
    """What a sweep removed and what it left, a line each, and the runs that still live."""

    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    live: list[LiveRun] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The backup that a point in time is made for.

    Attributes:
        run: 8 hex digits, in the names of all that is made for it.
        chain: 12 hex digits, the chain's id.
    """

    run: str
    chain: str


class PointInTime(Protocol):
    """A frozen view of disks.

    Attributes:
        disks: in the order of the plans.
        lost: set once, with the reason, when the view can't be read any more.
        cost: what it cost the guest, known when the view has ended; None where there is no guest.
        quiesced: what the guest's agent froze for it, None when it was not asked to.
    """

    disks: tuple[ServedDisk, ...]
    lost: PointInTimeLostError | None
    cost: GuestCost | None
    quiesced: Quiesced | None

    async def why_lost(self) -> PointInTimeLostError | None:
        """After a read failed: whether that is because the view broke, and why."""

    async def confirm(self, obsolete: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The backup is durable: keep its checkpoints, drop what nothing is counted from any more.

        Args:
            obsolete: names of bitmaps, by disk name.

        Returns:
            What the user should know, such as what could not be removed; none of it harms the backup.
        """

    async def discard(self) -> tuple[str, ...]:
        """The backup failed: drop its checkpoints. The older ones have recorded all along."""


@runtime_checkable
class RecordedPointInTime(PointInTime, Protocol):
    """A point in time that another process can go on at, should this one die."""

    async def keep_record(self, record: Unfinished, machine: bytes | None) -> Journal | None:
        """Leave on record what another process needs; returns where to note what is read, None for nowhere.

        What is the source's own business is filled in. `machine` is an archive of files that are as old as the disks.
        """

    def note_lie(self, disk: str, lie: str) -> None:
        """Put on record what the audit found of a disk's bitmap; blocks, in any thread.

        Raises:
            SourceError: that can't be, and somebody could go on without knowing.
        """

    async def journal(self, backup: str) -> Journal | None:
        """Of a point in time that is gone on at, what was read before, and where to note what is."""


class Source(Protocol):
    """An open source of disks: one VM, in whatever way it is reached."""

    async def vm_name(self) -> tuple[str, str | None]:
        """What the VM is called, and a warning where that is not unique.

        Raises:
            UsageError: nothing tells.
        """

    async def sweep(self, committed: Committed, *, force: bool = False) -> Swept:
        """Remove what runs that are no more left; see `nbdpull.source.leftovers`.

        Args:
            committed: its checkpoint stays although its run never confirmed it, a sound base.
            force: take away runs that still live, too.
        """

    async def disks(self, *, include: Sequence[str], exclude: Sequence[str]) -> Sequence[Disk]:
        """The disks to back up.

        Raises:
            UsageError: a name that no disk has, or nothing left.
            SourceError: a disk can't be backed up without danger.
        """

    async def machine(self) -> tuple[str, bytes] | None:
        """A file that says how the VM is configured, by name and content; None where nobody can be asked."""

    async def examine(self) -> Sequence[Finding]:
        """What a backup would stumble over here."""

    def freeze(
        self, info: RunInfo, plans: Sequence[DiskPlan], on_lost: OnLost
    ) -> AbstractAsyncContextManager[PointInTime]:
        """Freeze the disks of all plans at one moment and serve them; the context's end releases them.

        When making it fails nothing of it is left, the bitmaps included. When the body fails only the
        frozen view is ended: the caller decides about the bitmaps with `confirm` or `discard`, which
        work as long as the source is open.
        """


@runtime_checkable
class Resumable(Source, Protocol):
    """A source that may still hold the point in time of a run that died."""

    async def unfinished(self, chain: str) -> Unfinished | None:
        """The dead run of a chain that can be gone on with, as far as is seen yet; None where none died.

        Raises:
            CannotGoOnError: there is one, and its point in time is lost.
        """

    async def kept_files(self, record: Unfinished) -> bytes | None:
        """The archive of files that the run was to keep with its backup; None for none.

        Raises:
            CannotGoOnError: it is lost.
        """

    async def sweep_others(self, committed: Committed, spared: Unfinished) -> Swept:
        """As `sweep`, and leave that run alone."""

    def resume(
        self, record: Unfinished, plans: Sequence[DiskPlan], on_lost: OnLost
    ) -> AbstractAsyncContextManager[RecordedPointInTime]:
        """As `freeze`, at the point in time of that run.

        Raises:
            CannotGoOnError: it can't be. Either nothing was touched, or nothing of it is left.
        """

    async def end_runs(self) -> None:
        """Let go of every run of this process, as when the source is closed; it stays open."""


class HostLostError(PointInTimeLostError):
    """The host that QEMU runs on can't be reached any more; QEMU may hold the point in time."""


class CannotGoOnError(SourceError):
    """A run that died can't be gone on with; the message is why, after 'because'.

    Attributes:
        record: what it left, where that can be believed all the same.
    """

    def __init__(self, message: str, record: Unfinished | None = None) -> None:
        super().__init__(message)
        self.record = record


def select_disks(
    disks: Sequence[Disk],
    skipped: Sequence[Skipped],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
) -> frozenset[str]:
    """Names of the disks that the user wants.

    Raises:
        UsageError: a name that no disk has, or nothing left.
    """
    known = {disk.name for disk in disks}
    passed = {entry.name: entry.reason for entry in skipped}
    for name in (*include, *exclude):
        if name in known or (name in passed and name in exclude):
            continue
        if name in passed:
            raise UsageError(f"drive '{name}' can't be backed up: {passed[name]}")
        there = ", ".join(sorted(known)) or "none"
        raise UsageError(f"the VM has no disk '{name}'; it has: {there}")
    chosen = frozenset(name for name in known if (not include or name in include))
    chosen -= set(exclude)
    if not chosen:
        detail = "; ".join(f"{entry.name}: {entry.reason}" for entry in skipped)
        raise UsageError(f"no disk to back up{f' ({detail})' if detail else ''}")
    return chosen
