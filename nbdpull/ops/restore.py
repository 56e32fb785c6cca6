"""Restore: the disks of one backup into files, an export, a device or a stream."""
# What a raw file in a folder of ours does not need is loaded where it is used, libnbd for one.
# ruff: noqa: PLC0415

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from nbdpull.errors import DamagedError, RepositoryError, TargetError, UsageError
from nbdpull.model.keysource import KeySource
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.outcomes import RestoredDisk, RestoreResult
from nbdpull.model.results import ProgressCallback
from nbdpull.nbdio.tls import look_at_tls, with_tls
from nbdpull.ops.disknames import disk_names
from nbdpull.ops.lost import PARTIAL, record_lost
from nbdpull.ops.machinestate import read_machine
from nbdpull.ops.meter import Meter
from nbdpull.ops.push import FAR, NEAR, DiskPush, LostRanges, push
from nbdpull.ops.threads import in_thread, worker_count
from nbdpull.repo.location import is_far
from nbdpull.repo.repository import Backup, DiskReader, Repository
from nbdpull.target.base import Target
from nbdpull.target.filename import disk_file_name
from nbdpull.target.filewriter import pwrite_all
from nbdpull.target.partfile import PartFile, failed
from nbdpull.target.rawfile import RawFile

__all__ = ["RestoreOptions", "restore"]

_log = logging.getLogger(__name__)

_NBD_SCHEMES = {"nbd", "nbds", "nbd+unix", "nbds+unix"}
_LISTED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """What to restore, and where to.

    Attributes:
        repository: where the backups are.
        backup: its id, a unique prefix of it, or ``latest``.
        to: a folder, ``-`` for standard output, an NBD URI, or a block device.
        vm: only backups of this VM; None for any.
        disk: only this disk; None for all of the backup.
        format: of the files in a folder; everywhere else it is raw.
        force: replace existing files, write to a device in use, and take one disk out of an
            incomplete backup.
        salvage: leave out what is lost: it reads as zeroes, and the result tells which ranges that are.
        tls: folder of certificates, or file of shared keys, for an ``nbds://`` target.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    backup: str
    to: str
    vm: str | None = None
    disk: str | None = None
    format: Literal["raw", "qcow2"] = "raw"
    force: bool = False
    salvage: bool = False
    tls: str | None = None
    keys: KeySource | None = None


async def restore(
    options: RestoreOptions, *, progress: ProgressCallback | None = None
) -> RestoreResult:
    """Restore a backup: every byte is verified before it is written.

    Files have their final names only when they are whole and durable. When cancelled, or on an
    error, the file being written is removed; disks that were finished before stay.

    Raises:
        UsageError: the target can't take it (exists, too small, in use, only takes one disk).
        BackupNotFoundError: no such backup or disk.
        WrongKeyError: the key opens nothing, or is a writer's.
        DamagedError: part of a disk is lost, or packs are missing.
        RepositoryError: the backup is incomplete.
        TargetError: the target failed.
    """
    return await in_thread(lambda cancel: _restore(options, progress, cancel))


def _restore(
    options: RestoreOptions, progress: ProgressCallback | None, cancel: threading.Event
) -> RestoreResult:
    began = time.monotonic()
    repository = Repository.open(options.repository, keys=options.keys)
    repository.check_restorable()
    backup = repository.find(options.backup, vm=options.vm)
    chosen = _choose(repository, backup, options)
    wanted = _machine_of(options, backup)
    place = _place(options, chosen, cancel)
    manifests = [repository.manifest(summary) for summary in chosen]
    warnings: list[str] = []
    machine = None if wanted is None else _manifest_of(repository, wanted, options, warnings)
    if not options.salvage:
        _check_packs(repository, [*manifests, *([] if machine is None else [machine])], cancel)
    restored: list[RestoredDisk] = []
    for manifest in manifests:
        summary = manifest.summary
        meter = Meter(progress, verb="restore", disk=summary.disk, total=summary.size)
        meter.start()
        target = place(summary)
        reader = repository.reader(manifest)
        lost = LostRanges() if options.salvage else None
        try:
            if target.note:
                _log.info("%s", target.note)
                meter.message(target.note)
            disk = DiskPush(
                name=summary.disk,
                size=summary.size,
                reader=reader,
                target=target,
                meter=meter,
                together=FAR if is_far(options.repository) else NEAR,
                lost=lost,
            )
            written = push(disk, cancel=cancel)
            target.finish()
        except DamagedError as exc:
            # `cancel` is set by now: the workers were ended.
            record_lost(repository, reader, [exc.key], threading.Event())
            raise
        finally:
            target.abort()
        meter.end()
        _tell_indexes(reader)
        if lost is not None and lost.keys:
            record_lost(repository, reader, list(lost.keys), threading.Event())
        restored.append(
            RestoredDisk(
                name=summary.disk,
                size=summary.size,
                target=target.name,
                written_bytes=written,
                lost=() if lost is None else lost.ranges,
            )
        )
    return RestoreResult(
        backup=backup.id,
        vm=backup.vm,
        duration_s=time.monotonic() - began,
        disks=tuple(restored),
        machine=() if machine is None else _give_back(repository, machine, options, warnings),
        warnings=(*warnings, *filter(None, map(_told_lost, restored))),
    )


def _manifest_of(
    repository: Repository, machine: Summary, options: RestoreOptions, warnings: list[str]
) -> Manifest | None:
    try:
        return repository.manifest(machine)
    except DamagedError as exc:
        if not options.salvage:
            raise
        warnings.append(f"the machine's state is lost: {exc}")
        return None


def _told_lost(disk: RestoredDisk) -> str:
    if not disk.lost:
        return ""
    lost = sum(end - start for start, end in disk.lost)
    listed = ", ".join(f"{start}-{end}" for start, end in disk.lost[:_LISTED])
    more = f" and {len(disk.lost) - _LISTED} more ranges" if len(disk.lost) > _LISTED else ""
    return f"disk {disk.name}: {lost} bytes are lost, and zeroes in {disk.target}: bytes {listed}{more}"


def _tell_indexes(reader: DiskReader) -> None:
    """Warn of packs that no more than their own hashes vouched for."""
    for index in reader.partial:
        _log.warning("%s; %s", reader.rebuilt[index], PARTIAL)


def _machine_of(options: RestoreOptions, backup: Backup) -> Summary | None:
    """The machine's state where it is given back: into a folder, with all disks."""
    to = options.to
    single = to == "-" or "://" in to or Path(to).is_block_device()
    machine = None if single or options.disk is not None else backup.machine
    if (
        machine is not None
        and not options.force
        and os.path.lexists(folder := Path(to) / "machine")
    ):
        raise UsageError(
            f"'{folder}' exists; give --force to replace what is in it, or restore elsewhere"
        )
    return machine


def _give_back(
    repository: Repository, manifest: Manifest, options: RestoreOptions, warnings: list[str]
) -> tuple[str, ...]:
    """Write the files of a machine's state, whose names `model.archive` lets be nothing but plain ones."""
    reader = repository.reader(manifest)
    try:
        files = read_machine(reader)
    except DamagedError as exc:
        record_lost(repository, reader, [exc.key], threading.Event())
        if not options.salvage:
            raise
        warnings.append(f"the machine's state is lost: {exc}")
        return ()
    _tell_indexes(reader)
    written = []
    for name, raw in files:
        path = Path(options.to) / "machine" / name
        _make_folders(path.parent, Path(options.to))
        part = PartFile(path, force=options.force)
        try:
            pwrite_all(part.fd, memoryview(raw), 0)
            part.publish()
        except OSError as exc:
            raise failed("write", str(path), exc) from exc
        finally:
            part.remove()
        written.append(str(path))
    return tuple(written)


def _make_folders(folder: Path, top: Path) -> None:
    """Make folders below `top`; a link among them could lead anywhere."""
    if folder == top:
        return
    _make_folders(folder.parent, top)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise failed("create", str(folder), exc) from exc
    if folder.is_symlink():
        raise UsageError(f"'{folder}' is a link; remove it, or restore elsewhere")


def _choose(repository: Repository, backup: Backup, options: RestoreOptions) -> Sequence[Summary]:
    """The disks to restore."""
    chosen: Sequence[Summary] = backup.real_disks
    if options.disk is not None:
        chosen = tuple(summary for summary in backup.real_disks if summary.disk == options.disk)
        if not chosen:
            there = ", ".join(f"'{summary.disk}'" for summary in backup.disks)
            raise UsageError(
                f"backup {backup.id} has no disk '{options.disk}' (or it is missing); it has {there}"
            )
    if not backup.complete and not (options.disk is not None and options.force):
        missing = ", ".join(f"'{name}'" for name in disk_names(repository, backup.missing))
        raise RepositoryError(
            f"backup {backup.id} is incomplete: disk {missing} was never committed; restore another"
            " backup, or one disk of it with --disk NAME --force"
        )
    return chosen


def _check_packs(
    repository: Repository, manifests: Sequence[Manifest], cancel: threading.Event
) -> None:
    """Fail before anything is written when packs are known to be missing."""
    for manifest in manifests:
        reader = repository.reader(manifest)
        missing = reader.missing_packs()
        # What is cut may have lost nothing that this disk needs, or only its directory.
        if missing and record_lost(repository, reader, missing, cancel):
            listed = ", ".join(missing[:_LISTED])
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            raise DamagedError(
                f"disk '{manifest.summary.disk}' can't be restored: {len(missing)} of its packs are"
                f" missing or of the wrong size: {listed}{more}; 'nbdpull verify' tells what is lost",
                key=missing[0],
            )


def _place(
    options: RestoreOptions, chosen: Sequence[Summary], cancel: threading.Event
) -> Callable[[Summary], Target]:
    """How to open the target of a disk; what can be refused is refused here, before any is written."""
    to = options.to
    scheme = urlsplit(to).scheme if "://" in to else ""
    if scheme and scheme not in _NBD_SCHEMES:
        raise UsageError(
            f"can't restore to '{to}'; expected a folder, -, nbd://..., nbd+unix:///...?socket=... or"
            " a block device"
        )
    if options.tls is not None and not scheme:
        raise UsageError(f"--tls is about NBD exports, and the target is '{to}'; leave it out")
    single = to == "-" or bool(scheme) or Path(to).is_block_device()
    if not single:
        return _place_files(options, chosen, cancel)
    if options.format != "raw":
        raise UsageError(f"'{to}' takes the disk's bytes as they are; --format is for folders")
    if len(chosen) != 1:
        names = ", ".join(f"'{summary.disk}'" for summary in chosen)
        raise UsageError(
            f"'{to}' takes one disk and the backup has {len(chosen)}: {names}; choose one with --disk"
        )
    if to == "-":
        # The descriptor itself: nothing may lie in the buffer of `sys.stdout`, before or after.
        sys.stdout.flush()
        from nbdpull.target.stream import Stream

        return lambda _summary: Stream(1, cancel)
    if scheme:
        if options.tls is not None:
            to = with_tls(to, look_at_tls(options.tls, server=False))
        from nbdpull.target.export import Export

        return lambda summary: Export(to, summary.size, cancel=cancel, connections=worker_count())
    from nbdpull.target.blockdev import BlockDevice

    return lambda summary: BlockDevice(to, summary.size, force=options.force)


def _place_files(
    options: RestoreOptions, chosen: Sequence[Summary], cancel: threading.Event
) -> Callable[[Summary], Target]:
    folder = Path(options.to)
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"'{folder}' is not a folder; disks become files in one (--to FOLDER)")
        # /dev/shm and its like are folders of their own.
        if folder.absolute().parent == Path("/dev"):
            raise UsageError(f"there is no block device '{folder}'")
    paths = {
        summary.disk: folder / disk_file_name(summary.disk, options.format) for summary in chosen
    }
    if not options.force:
        there = [f"'{path}'" for path in paths.values() if path.is_symlink() or path.exists()]
        if there:
            exists, it = ("exists", "it") if len(there) == 1 else ("exist", "them")
            raise UsageError(
                f"{', '.join(there)} {exists}; give --force to replace {it}, or restore elsewhere"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        reason = exc.strerror or errno.errorcode.get(exc.errno or 0, "failed")
        raise TargetError(f"can't create the folder '{folder}': {reason}") from exc
    if options.format == "raw":
        return lambda summary: RawFile(paths[summary.disk], summary.size, force=options.force)
    from nbdpull.target.qcow2 import Qcow2File

    return lambda summary: Qcow2File(
        paths[summary.disk],
        summary.size,
        force=options.force,
        cancel=cancel,
        connections=worker_count(),
    )
