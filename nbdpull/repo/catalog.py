"""Manifests grouped into backups.

A backup has one manifest for each disk, and each names all of them (`Summary.siblings`). Repacking or
undoing commits the same backup again, under new sessions: then there are two such sets of manifests, and
one of them is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nbdpull.errors import DamagedError, WrongKeyError
from nbdpull.model.ids import BackupId, DiskId
from nbdpull.model.manifest import Summary
from nbdpull.model.results import Level

__all__ = ["Backup", "Entry", "Unreadable", "Vanished", "check_readable", "group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A manifest in a listing.

    Attributes:
        stored: when the store took it in, by its own clock.
        forgotten: when it was forgotten, by the store's clock, or None.
    """

    summary: Summary
    stored: float
    forgotten: float | None = None

    @property
    def pin(self) -> str:
        """What names it in pins and marks."""
        return f"{self.summary.disk_id}/{self.summary.session}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A manifest that is there, not forgotten, and can't be read: of which backup it is can't be told.

    Attributes:
        key: its key.
        error: why. With a `WrongKeyError` it may be whole.
    """

    key: str
    error: DamagedError | WrongKeyError

    @property
    def began(self) -> float:
        """See `Vanished.began`."""
        return _began(self.key)


@dataclass(frozen=True, slots=True)
class Vanished:
    """A manifest of which only the name is known.

    Attributes:
        key: its key.
        damaged: it is there and can't be read; else a collector deleted it, or is about to.
    """

    key: str
    damaged: bool

    @property
    def began(self) -> float:
        """When its session began, by the clock of the host that wrote it; seconds since the Unix epoch."""
        return _began(self.key)


def _began(key: str) -> float:
    return int(key.rpartition("/")[2][:12], 16) / 1000


def check_readable(unreadable: Sequence[Unreadable], why: str, then: str = "") -> None:
    """Raise what is wrong with one of these, if there are any: `why` says what it stands in the way of.

    Raises:
        DamagedError, WrongKeyError: there are any; the second before the first.
    """
    if not unreadable:
        return
    first = min(unreadable, key=lambda one: isinstance(one.error, DamagedError))
    more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
    message = f"{why}: {first.error}{more}{then}"
    if isinstance(first.error, WrongKeyError):
        raise WrongKeyError(message) from first.error
    raise DamagedError(message, key=first.key) from first.error


@dataclass(frozen=True, slots=True)
class Backup:
    """The manifests of one backup.

    Attributes:
        disks: the summary of each disk that is there, by disk name.
        missing: disk ids whose manifest is not there; a backup with any is not complete.
        stored: when the store took in the last of its manifests; for one that was committed again, of
            the first ones.
        forgotten: when it was forgotten (both by the store's clock), or None.
        protected: nothing forgets it.
        superseded: manifests (`Entry.pin`) of the same backup that are not shown because these are.
    """

    id: BackupId
    disks: tuple[Summary, ...]
    missing: tuple[DiskId, ...]
    stored: float = 0.0
    forgotten: float | None = None
    protected: bool = False
    superseded: tuple[Entry, ...] = ()

    @property
    def real_disks(self) -> tuple[Summary, ...]:
        """`disks` without the machine's state."""
        return tuple(one for one in self.disks if one.machine is None)

    @property
    def machine(self) -> Summary | None:
        """The machine's state, where one was kept."""
        return next((one for one in self.disks if one.machine is not None), None)

    @property
    def complete(self) -> bool:
        """Whether every disk of the backup is there."""
        return not self.missing

    @property
    def pins(self) -> tuple[str, ...]:
        """What names its manifests in pins and marks."""
        return tuple(f"{summary.disk_id}/{summary.session}" for summary in self.disks)

    @property
    def all_pins(self) -> tuple[str, ...]:
        """The same, and what names those that are not shown because these are."""
        return self.pins + tuple(entry.pin for entry in self.superseded)

    @property
    def vm(self) -> str:
        """The VM's name."""
        return self.disks[0].vm

    @property
    def chain(self) -> str:
        """The chain's name."""
        return self.disks[0].chain

    @property
    def level(self) -> Level:
        """The backup's level."""
        return self.disks[0].level

    @property
    def parent(self) -> BackupId | None:
        """The backup that changes were counted from."""
        return self.disks[0].parent

    @property
    def time(self) -> float:
        """Start of the point in time."""
        return self.disks[0].time

    @property
    def duration_s(self) -> float:
        """From the freeze to the commit."""
        return self.disks[0].duration_s

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags."""
        return self.disks[0].tags


def group(entries: Iterable[Entry], *, protected: frozenset[str] = frozenset()) -> list[Backup]:
    """The backups that these manifests make up, oldest first, forgotten ones too."""
    grouped: dict[BackupId, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.summary.backup, []).append(entry)
    found = [_backup(name, members, name in protected) for name, members in grouped.items()]
    return sorted(found, key=lambda backup: (backup.time, backup.id))


def _backup(name: BackupId, entries: Sequence[Entry], protected: bool) -> Backup:  # noqa: FBT001
    sets: dict[frozenset[tuple[DiskId, str]], list[Entry]] = {}
    for entry in entries:
        sets.setdefault(frozenset(entry.summary.siblings), []).append(entry)
    built = [_set(name, members, protected) for members in sets.values()]
    # One that was committed again only in part counts as not there, if another one is whole.
    chosen = max(
        built,
        key=lambda one: (one.complete, one.forgotten is None, len(one.disks), one.pins),
    )
    shown = set(chosen.pins)
    rest = tuple(entry for entry in entries if entry.pin not in shown)
    return Backup(
        name,
        chosen.disks,
        chosen.missing,
        chosen.stored,
        chosen.forgotten,
        protected,
        rest,
    )


def _set(name: BackupId, entries: Sequence[Entry], protected: bool) -> Backup:  # noqa: FBT001
    ordered = sorted(entries, key=lambda entry: entry.summary.disk)
    there = {(entry.summary.disk_id, entry.summary.session) for entry in ordered}
    wanted = {pair for entry in ordered for pair in entry.summary.siblings}
    missing = tuple(sorted(disk for disk, _ in wanted - there))
    # Forgetting may have been killed between two disks: the backup is forgotten all the same, and can
    # be brought back as long as the last mark allows it.
    times = [entry.forgotten for entry in ordered if entry.forgotten is not None]
    return Backup(
        name,
        tuple(entry.summary for entry in ordered),
        missing,
        max(
            entry.stored if entry.summary.stored is None else entry.summary.stored
            for entry in ordered
        ),
        max(times, default=None),
        protected,
    )
