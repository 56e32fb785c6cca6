"""What the verbs other than backup return.

Times are seconds since the Unix epoch, durations are seconds, sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nbdpull.model.results import BackupInfo, Level

__all__ = [
    "CleanupResult",
    "CopyResult",
    "Damage",
    "DiskEstimate",
    "DoctorResult",
    "EstimateResult",
    "Finding",
    "FindingKind",
    "ForgetResult",
    "Forgotten",
    "GcResult",
    "InitResult",
    "KeyExport",
    "KeyInfo",
    "ProtectResult",
    "RepackResult",
    "RestoreResult",
    "RestoredDisk",
    "ShowResult",
    "UndoResult",
    "VerifyLevel",
    "VerifyResult",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskEstimate:
    """What a backup would read of one disk.

    Attributes:
        changed_bytes: what its bitmap holds now; of a full what the image's data takes. None where that is
            not known before the backup.
    """

    name: str
    size: int
    level: Level
    reason: str
    changed_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateResult:
    """What a backup would be now."""

    vm: str
    chain: str
    level: Level
    parent: str | None
    disks: tuple[DiskEstimate, ...]


class FindingKind(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """A backup works, with a cost or a risk that one should know."""
    PROBLEM = "problem"
    """A backup would fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that `doctor` looked at; `text` says what was found, and what to do."""

    kind: FindingKind
    subject: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorResult:
    """What `doctor` found; `ok` when nothing of it would make a backup fail."""

    ok: bool
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredDisk:
    """One disk that was restored.

    Attributes:
        target: path or URI it was written to, ``-`` for standard output.
        written_bytes: data written; what reads as zero is not counted.
        lost: ranges of bytes, end exclusive, that could not be read and are zeroes now (`salvage`); sorted.
    """

    name: str
    size: int
    target: str
    written_bytes: int
    lost: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    """A finished restore: every byte was verified before it was written.

    Attributes:
        machine: paths of the files of the machine's state.
        warnings: what could not be restored (`salvage`).
    """

    backup: str
    vm: str
    duration_s: float
    disks: tuple[RestoredDisk, ...]
    machine: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that `verify` found wrong.

    Attributes:
        key: the object in the repository.
        problem: what is wrong with it, expected and got.
        backup, disk: what can't be restored because of it; None where that is not known.
        ranges: the disk's lost byte ranges, as (start, end), joined and sorted.
    """

    key: str
    problem: str
    backup: str | None = None
    disk: str | None = None
    ranges: tuple[tuple[int, int], ...] = ()


class VerifyLevel(StrEnum):
    """How much `verify` reads."""

    LIST = "list"
    """Manifests and indexes; of packs only whether they are there with their size."""
    SAMPLE = "sample"
    """Also the maps, and a random share of the frames."""
    FULL = "full"
    """Everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What `verify` read, and what it found.

    Attributes:
        healed: damaged frames that were read from a copy which a later backup stored: nothing is lost.
        recorded: rows of damage that were added to the repository, for the next backup to heal.
        share, seed: of a sample; the same ones choose the same frames again.
    """

    ok: bool
    backups: tuple[str, ...]
    frames: int
    read_bytes: int
    damaged: tuple[Damage, ...]
    duration_s: float
    level: VerifyLevel = VerifyLevel.FULL
    healed: int = 0
    recorded: int = 0
    share: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowResult:
    """One backup and what it descends from.

    Attributes:
        lineage: the backup's ancestors by `BackupInfo.parent`, nearest first: what changes were
            counted from. None of them is needed to restore it.
        lineage_end: the parent of the last of them when the repository does not have it (any more),
            else None.
        locked_until: none of the objects that a restore needs can be deleted before, seconds since the
            Unix epoch; None where the repository has no locks, or it can't be told.
    """

    backup: BackupInfo
    lineage: tuple[BackupInfo, ...]
    lineage_end: str | None = None
    locked_until: float | None = None

    @property
    def size(self) -> int:
        """Bytes of all disks."""
        return sum(disk.size for disk in self.backup.disks)

    @property
    def changed_bytes(self) -> int:
        """Bytes that the source called changed."""
        return sum(disk.changed_bytes for disk in self.backup.disks)

    @property
    def read_bytes(self) -> int:
        """Bytes read over NBD."""
        return sum(disk.read_bytes for disk in self.backup.disks)

    @property
    def stored_bytes(self) -> int:
        """Bytes added to the repository."""
        return sum(disk.stored_bytes for disk in self.backup.disks)

    @property
    def reused_bytes(self) -> int:
        """Bytes read that the repository had already."""
        return sum(disk.reused_bytes for disk in self.backup.disks)

    @property
    def compression(self) -> float | None:
        """Bytes read for each byte stored, or None when nothing was stored.

        Zeroes and data that the repository had already are read and not stored, so this is more than
        the compressor's own ratio.
        """
        return self.read_bytes / self.stored_bytes if self.stored_bytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class InitResult:
    """A new repository. `warnings` are what its store can't be trusted with."""

    repository: str
    id: str
    encrypted: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """A key slot: a password that opens an encrypted repository.

    Attributes:
        key: its id.
        time: when it was made.
        generation: of the keys that it opens, counted from 1; the older ones are opened too.
        newest: whether these are the keys that backups are sealed to now.
        kdf: what its password goes through.
        label: for people.
    """

    key: str
    time: float
    generation: int
    newest: bool
    kdf: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyExport:
    """A key in a file.

    Attributes:
        file: where it is.
        writer: it only adds backups; else it is a recovery key, which opens everything.
        generation: of the newest keys in it.
    """

    repository: str
    file: str
    writer: bool
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupResult:
    """What `cleanup` removed from QEMU, a line each, and what it left and why."""

    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """A backup that `forget` looked at.

    Attributes:
        time: start of the point in time, by the writer's clock.
        stored_time: when the store took it in, by its own clock: what the policy judges by.
        reasons: why it is kept, or dropped.
    """

    backup: str
    vm: str
    chain: str
    level: Level
    time: float
    stored_time: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetResult:
    """What `forget` kept and dropped, or would.

    Attributes:
        kept: empty when backups were named.
        damaged: keys of damaged manifests that were named.
    """

    kept: tuple[Forgotten, ...] = ()
    dropped: tuple[Forgotten, ...] = ()
    damaged: tuple[str, ...] = ()
    dry_run: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectResult:
    """Backups that are protected now, or no longer."""

    backups: tuple[str, ...]
    protected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoResult:
    """Backups that came back, and those that were not forgotten."""

    restored: tuple[str, ...]
    unchanged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyResult:
    """What a copy brought into a replica.

    Attributes:
        copied: backups of which anything had to be written.
        present: backups that were there whole already.
        forgotten: backups that were left out, because they were forgotten in the replica.
        warnings: what the user should know: named backups that were not copied, and what the replica is not.
        objects, written_bytes: what was written.
    """

    source: str
    target: str
    copied: tuple[str, ...]
    present: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    objects: int = 0
    written_bytes: int = 0
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GcResult:
    """What a collection deleted, or would delete.

    Attributes:
        packs, indexes, manifests: objects of these kinds.
        others: intents of ended sessions, and marks.
        freed_bytes: of all of them.
        revoked: sessions that were idle for a day and can't be committed any more.
        live: sessions that may still be committed, whose objects were spared.
        refused: keys that the store did not let us delete (locked, or not allowed).
        unlock: when the first lock of these ends, seconds since the Unix epoch, or None.
    """

    packs: int
    indexes: int
    manifests: int
    others: int
    freed_bytes: int
    revoked: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    unlock: float | None = None
    dry_run: bool = False
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackResult:
    """What `repack` rewrote, or would.

    Attributes:
        backups: that were committed again; their old packs go with the next collections.
        read_bytes, stored_bytes: frames read from sparse packs, and what was stored instead.
        sparse_packs, sparse_bytes: packs that nothing needs any more once the old manifests are gone.
    """

    backups: tuple[str, ...]
    sparse_packs: int
    sparse_bytes: int
    read_bytes: int
    stored_bytes: int
    dry_run: bool = False
    duration_s: float = 0.0
