"""Every error nbdpull raises on purpose, each with the exit code the command line ends with.

    Error                        1   anything below that has no code of its own
    |- UsageError                2   the caller asked for something that can't be
    |- InUseError               11   somebody else holds it now: try again later
    |  |- MonitorInUseError     11   another client holds the QMP monitor
    |- RepositoryNotFoundError  10
    |- RepositoryError           1
    |  |- UnsupportedFormatError 1   written by a newer nbdpull
    |  |- DamagedError           1   stored bytes are not what was written
    |  |- BackupNotFoundError    1
    |  |- StoreError             1   the storage below the repository failed
    |- WrongKeyError            12
    |- SourceError               1   the VM's side: QMP, NBD, its disks
    |  |- MonitorError           1   QMP can't be reached or broke
    |  |- CommandError           1   QEMU refused one command
    |  |- LibvirtError           1   libvirt can't be reached, or refused one call
    |  |- PointInTimeLostError   1   the frozen view ended while being read
    |  |  |- ScratchFullError   13   because the room for what the guest overwrites ran out
    |  |- NbdError               1   an NBD connection failed
    |- TargetError               1   where a restore writes to

A message is one lowercase line: what, which, expected, got, what to do. Fields that a program
would want are attributes. Bugs are not in this tree.
"""

from __future__ import annotations

__all__ = [
    "BackupNotFoundError",
    "CommandError",
    "DamagedError",
    "Error",
    "InUseError",
    "LibvirtError",
    "MonitorError",
    "MonitorInUseError",
    "NbdError",
    "PointInTimeLostError",
    "RepositoryError",
    "RepositoryNotFoundError",
    "ScratchFullError",
    "SourceError",
    "StoreError",
    "TargetError",
    "UnsupportedFormatError",
    "UsageError",
    "WrongKeyError",
]


class Error(Exception):
    """Anything that nbdpull expected could go wrong and did."""

    exit_code = 1


class UsageError(Error):
    """The caller asked for something that can't be; nothing was touched."""

    exit_code = 2


class InUseError(Error):
    """Another process holds what is needed; trying again later may work."""

    exit_code = 11


class MonitorInUseError(InUseError):
    """Another client holds the QMP monitor, which serves one client at a time."""


class RepositoryNotFoundError(Error):
    """There is no repository at that location."""

    exit_code = 10


class WrongKeyError(Error):
    """The key or passphrase does not open the repository."""

    exit_code = 12


class RepositoryError(Error):
    """The repository can't do what was asked."""


class UnsupportedFormatError(RepositoryError):
    """The repository needs a feature that this version does not know."""


class DamagedError(RepositoryError):
    """Stored bytes are missing, cut, or not the bytes that were written.

    Attributes:
        key: the object in the repository.
        offset: first byte of the damaged frame in that object, or None for the whole object.
    """

    def __init__(self, message: str, *, key: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.offset = offset


class BackupNotFoundError(RepositoryError):
    """No committed backup, or more than one, fits that name."""


class StoreError(RepositoryError):
    """The storage below the repository refused or failed."""


class SourceError(Error):
    """The VM's side can't be read: QMP, NBD or one of its disks."""


class MonitorError(SourceError):
    """The QMP monitor can't be reached, or broke off."""


class CommandError(SourceError):
    """QEMU refused a QMP command.

    Attributes:
        command: its name.
        error_class: QEMU's error class, nearly always ``GenericError``.
        description: QEMU's own words.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused '{command}': {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class LibvirtError(SourceError):
    """Libvirt can't be reached, or refused one call.

    Attributes:
        code: of libvirt's ``virErrorNumber``.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class PointInTimeLostError(SourceError):
    """The frozen view of a disk ended while it was being read (scratch full, job cancelled)."""


class ScratchFullError(PointInTimeLostError):
    """The room for what the guest overwrites ran out: the backup ended, the guest went on."""

    exit_code = 13


class NbdError(SourceError):
    """An NBD connection could not be made, or failed."""


class TargetError(Error):
    """The place that a restore writes to refused or failed."""
