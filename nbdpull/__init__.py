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

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from nbdpull.version import __version__

if TYPE_CHECKING:
    from nbdpull import aio as aio
    from nbdpull.api import (
        Cancel,
        backup,
        cancellable,
        cleanup,
        copy,
        doctor,
        estimate,
        forget,
        gc,
        init,
        key_add,
        key_export,
        key_import,
        key_list,
        key_remove,
        key_rotate,
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
        LibvirtError,
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
    from nbdpull.model.keysource import KeySource
    from nbdpull.model.outcomes import (
        CleanupResult,
        CopyResult,
        Damage,
        DiskEstimate,
        DoctorResult,
        EstimateResult,
        Finding,
        FindingKind,
        ForgetResult,
        Forgotten,
        GcResult,
        InitResult,
        KeyExport,
        KeyInfo,
        ProtectResult,
        RepackResult,
        RestoredDisk,
        RestoreResult,
        ShowResult,
        UndoResult,
        VerifyLevel,
        VerifyResult,
    )
    from nbdpull.model.results import (
        BackupInfo,
        BackupProfile,
        BackupResult,
        DiskInfo,
        GuestCost,
        Level,
        Progress,
        ProgressCallback,
        ProgressKind,
        Quiesced,
    )
    from nbdpull.model.retention import Policy

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
    "copy",
    "gc",
    "repack",
    "key_list",
    "key_add",
    "key_remove",
    "key_rotate",
    "key_export",
    "key_import",
    "estimate",
    "doctor",
    "cancellable",
    "Cancel",
    # what goes in and comes out
    "KeySource",
    "Level",
    "Progress",
    "ProgressCallback",
    "ProgressKind",
    "BackupInfo",
    "BackupProfile",
    "BackupResult",
    "CleanupResult",
    "Damage",
    "DiskEstimate",
    "DiskInfo",
    "ForgetResult",
    "Forgotten",
    "CopyResult",
    "GcResult",
    "DoctorResult",
    "EstimateResult",
    "Finding",
    "FindingKind",
    "GuestCost",
    "InitResult",
    "Policy",
    "ProtectResult",
    "RepackResult",
    "KeyInfo",
    "KeyExport",
    "Quiesced",
    "RestoreResult",
    "RestoredDisk",
    "ShowResult",
    "UndoResult",
    "VerifyLevel",
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
    "LibvirtError",
    "PointInTimeLostError",
    "ScratchFullError",
    "NbdError",
    "TargetError",
    "__version__",
]

_PLACES: Final = (
    "nbdpull.errors",
    "nbdpull.api",
    "nbdpull.model.results",
    "nbdpull.model.keysource",
    "nbdpull.model.outcomes",
    "nbdpull.model.retention",
)
"""Where the public names are; none is loaded before one of its names, or of a later place, is asked for."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # else every name would be one

    def __getattr__(name: str) -> object:
        """A public name, from the first place that has it (PEP 562)."""
        if name == "aio":
            return importlib.import_module("nbdpull.aio")
        if name in __all__:
            for place in _PLACES:
                module = importlib.import_module(place)
                if name in module.__all__:
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module 'nbdpull' has no attribute '{name}'", name=name)
