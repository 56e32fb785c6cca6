"""A backup as it is told, and what a verb tells while it runs.

Times are seconds since the Unix epoch, durations are seconds, sizes are bytes. What the other verbs return is in
`nbdpull.model.outcomes`: a backup need not load it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = [
    "BackupInfo",
    "BackupProfile",
    "BackupResult",
    "DiskInfo",
    "GuestCost",
    "Level",
    "Progress",
    "ProgressCallback",
    "ProgressKind",
    "Quiesced",
]


class Level(StrEnum):
    """What was read from a disk, or is to be read."""

    FULL = "full"
    """Everything that is not known to be zero."""
    INCREMENTAL = "incremental"
    """What changed since the last backup of the chain."""
    DIFFERENTIAL = "differential"
    """What changed since the last backup of the chain that read the disk in full."""
    COPY = "copy"
    """Everything, outside every chain: no checkpoint is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskInfo:
    """One disk in one backup.

    Attributes:
        level: what was read from this disk; a disk without a usable bitmap is read in full
            although the backup is incremental.
        reason: why this level, for people.
        changed_bytes: bytes that the source called changed (a full: the whole disk).
        read_bytes: bytes read over NBD.
        stored_bytes: bytes added to the repository.
        reused_bytes: bytes read that the repository had already: not stored again.
    """

    name: str
    size: int
    level: Level
    reason: str
    changed_bytes: int
    read_bytes: int
    stored_bytes: int
    reused_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupInfo:
    """One backup as the repository knows it.

    Attributes:
        parent: the backup whose checkpoint the changes were counted from, or None.
        time: start of the point in time.
        complete: False when the manifest of one of its disks is not there.
        missing: disks (by name where known, else by id) whose manifest is not there.
        forgotten: it is hidden, and deleted by a collector when its undo window is over.
        protected: nothing forgets it.
        machine: files of the machine's state that are kept with it, as (name, bytes).
    """

    backup: str
    vm: str
    chain: str
    level: Level
    parent: str | None
    time: float
    duration_s: float
    disks: tuple[DiskInfo, ...]
    complete: bool = True
    missing: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    forgotten: bool = False
    protected: bool = False
    machine: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestCost:
    """What a backup cost the guest.

    Attributes:
        frozen_s: from the point in time to the end of the frozen view: as long, each first write to a
            block waits for the block's old content to be copied out.
        pause_s: how long the guest was stopped.
        copied_bytes: old content that was copied out before the guest overwrote it.
        scratch_peak_bytes: most room that the scratch images took at once.
    """

    frozen_s: float
    pause_s: float
    copied_bytes: int
    scratch_peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiesced:
    """What the guest's agent froze for the point in time.

    Attributes:
        filesystems: how many.
        mountpoints: what was mounted, where the agent tells it.
        frozen_s: from the command to freeze to the thaw.
    """

    filesystems: int
    mountpoints: tuple[str, ...]
    frozen_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupProfile:
    """Where the time of a backup went, in seconds of all its worker threads together.

    Where `source_s` is most of it, the VM's storage is what bounds the backup; where it is
    `compress_s`, the cores are; where it is `store_s`, the repository's storage is.

    Attributes:
        workers: threads that each read, hash, compress and store; two for each core.
        status_s: waited for block status: what changed, and what is zero. Beside the workers.
        idle_s: workers had nothing to do, because block status was not there yet.
        source_s: waited for the disks' bytes.
        hash_s: took digests.
        compress_s: compressed.
        encrypt_s: encrypted.
        store_s: wrote to the repository, and waited for it.
        requests: NBD requests, of all disks.
    """

    workers: int
    status_s: float
    idle_s: float
    source_s: float
    hash_s: float
    compress_s: float
    encrypt_s: float
    store_s: float
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupResult:
    """A committed backup.

    Attributes:
        profile: where its time went.
        cost: what it cost the guest; None where there was none to disturb.
        quiesced: what the guest's agent froze, None when it was not asked to.
        resumed: it went on at the point in time of a run that had died: `time` is that one, and the disks'
            bytes are what was left to read and to store.
        warnings: things that went wrong without harming it.
    """

    backup: str
    vm: str
    chain: str
    level: Level
    parent: str | None
    time: float
    duration_s: float
    disks: tuple[DiskInfo, ...]
    profile: BackupProfile
    cost: GuestCost | None = None
    quiesced: Quiesced | None = None
    resumed: bool = False
    warnings: tuple[str, ...] = ()


class ProgressKind(StrEnum):
    """What a `Progress` tells."""

    MESSAGE = "message"
    """A milestone, in `text`."""
    DISK_START = "disk-start"
    """A disk begins; `total` bytes are to be looked at."""
    DISK = "disk"
    """A disk went on to `done` of `total`."""
    DISK_END = "disk-end"
    """A disk is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One thing that happened in a running verb.

    `done` and `total` are bytes of the disk (for `verify`: of stored frames).
    """

    kind: ProgressKind
    verb: str
    disk: str | None = None
    done: int = 0
    total: int = 0
    text: str = ""
    fields: dict[str, str | int | float] = field(default_factory=dict)


ProgressCallback = Callable[[Progress], None]
"""Called from worker threads, at most a few times a second for each disk; it must be quick and must not raise."""
