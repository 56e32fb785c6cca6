"""Backup client for QEMU virtual machines: full, incremental and differential over NBD.

The verbs are blocking functions here and coroutines in `nbdpull.aio`::

    import nbdpull

    nbdpull.init("/backups")
    done = nbdpull.backup("qmp:/run/vm1.qmp", "/backups")
    print(done.backup, done.level, [disk.stored_bytes for disk in done.disks])
    nbdpull.restore("/backups", done.backup, "/tmp/restored")

Whatever can be expected to go wrong is an `nbdpull.Error`. Only the names in `__all__`, and
`nbdpull.aio`, are public.
"""

from nbdpull.api import (
    Cancel,
    backup,
    cancellable,
    cleanup,
    forget,
    gc,
    init,
    list_backups,
    protect,
    repack,
    restore,
    show,
    undo,
    unprotect,
    verify,
)
from nbdpull.errors import (
    BackupNotFoundError,
    CommandError,
    DamagedError,
    Error,
    InUseError,
    MonitorError,
    MonitorInUseError,
    NbdError,
    PointInTimeLostError,
    RepositoryError,
    RepositoryNotFoundError,
    ScratchFullError,
    SourceError,
    StoreError,
    TargetError,
    UnsupportedFormatError,
    UsageError,
    WrongKeyError,
)
from nbdpull.model.results import (
    BackupInfo,
    BackupResult,
    CleanupResult,
    Damage,
    DiskInfo,
    ForgetResult,
    Forgotten,
    GcResult,
    GuestCost,
    InitResult,
    Level,
    Progress,
    ProgressCallback,
    ProgressKind,
    ProtectResult,
    RepackResult,
    RestoredDisk,
    RestoreResult,
    ShowResult,
    UndoResult,
    VerifyResult,
)
from nbdpull.model.retention import Policy
from nbdpull.version import __version__

__all__ = [  # noqa: RUF022 - from most to least important
    "backup",
    "restore",
    "init",
    "list_backups",
    "show",
    "verify",
    "cleanup",
    "forget",
    "undo",
    "protect",
    "unprotect",
    "gc",
    "repack",
    "cancellable",
    "Cancel",
    # what goes in and comes out
    "Level",
    "Progress",
    "ProgressCallback",
    "ProgressKind",
    "BackupInfo",
    "BackupResult",
    "CleanupResult",
    "Damage",
    "DiskInfo",
    "ForgetResult",
    "Forgotten",
    "GcResult",
    "GuestCost",
    "InitResult",
    "Policy",
    "ProtectResult",
    "RepackResult",
    "RestoreResult",
    "RestoredDisk",
    "ShowResult",
    "UndoResult",
    "VerifyResult",
    # what can go wrong
    "Error",
    "UsageError",
    "InUseError",
    "MonitorInUseError",
    "RepositoryNotFoundError",
    "RepositoryError",
    "UnsupportedFormatError",
    "DamagedError",
    "BackupNotFoundError",
    "StoreError",
    "WrongKeyError",
    "SourceError",
    "MonitorError",
    "CommandError",
    "PointInTimeLostError",
    "ScratchFullError",
    "NbdError",
    "TargetError",
    "__version__",
]
