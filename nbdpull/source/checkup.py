"""What would go wrong in a backup of a QEMU, asked before it does.

Nothing is changed in QEMU but one thing, for a moment: a scratch image is opened and closed again, because
only QEMU itself can tell whether it can (users, containers, AppArmor and SELinux all have a word in it).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence

from nbdpull.errors import CommandError, Error
from nbdpull.model.outcomes import Finding, FindingKind
from nbdpull.source.base import Swept
from nbdpull.source.disks import IOTHREADS_SAFE, QemuDisk, find_disks
from nbdpull.source.fleecing import QemuOptions
from nbdpull.source.leftovers import sweep_dry
from nbdpull.source.names import RunNames, checkpoint_parts, run_of
from nbdpull.source.place import HERE, Place
from nbdpull.source.presence import why_absent
from nbdpull.source.qmp import Monitor
from nbdpull.source.whole import whole

__all__ = ["examine"]

_BEST = (10, 0, 0)
_ROOM_SHARE = 10
_JOB_FILTERS = frozenset({"copy-before-write", "mirror_top", "commit_top"})


def _ok(subject: str, text: str) -> Finding:
    return Finding(kind=FindingKind.OK, subject=subject, text=text)


def _warning(subject: str, text: str) -> Finding:
    return Finding(kind=FindingKind.WARNING, subject=subject, text=text)


def _problem(subject: str, text: str) -> Finding:
    return Finding(kind=FindingKind.PROBLEM, subject=subject, text=text)


async def examine(monitor: Monitor, options: QemuOptions, place: Place = HERE) -> list[Finding]:
    """Look at everything that a backup with these options would rest on."""
    disks, skipped = await find_disks(monitor)
    findings = [*_version(monitor), await _guest(monitor)]
    findings += [
        _ok(f"drive {entry.name}", f"is not backed up: {entry.reason}") for entry in skipped
    ]
    if not disks:
        findings.append(_problem("disks", "there is none to back up"))
    for disk in disks:
        findings += _disk(disk, monitor, options)
    findings += await _server(monitor, options)
    findings += _leftovers(await sweep_dry(monitor, place=place, scratch=options.scratch))
    findings += await _scratch(monitor, options, disks, place)
    return findings


def _version(monitor: Monitor) -> Iterator[Finding]:
    version = ".".join(map(str, monitor.version))
    if monitor.version < _BEST:
        yield _warning("QEMU", f"is {version}, which works; 10.0 or later is recommended")
    else:
        yield _ok("QEMU", f"is {version}")


async def _guest(monitor: Monitor) -> Finding:
    if monitor.storage_daemon:
        return _ok("guest", "there is none: this is a qemu-storage-daemon")
    absent = await why_absent(monitor)
    if absent is not None:
        return _problem("guest", str(absent))
    status = (await monitor.execute("query-status"))["status"]
    if status in {"io-error", "internal-error", "guest-panicked"}:
        return _problem("guest", f"is in state '{status}': mend that first")
    return _ok("guest", f"is {status}")


def _disk(disk: QemuDisk, monitor: Monitor, options: QemuOptions) -> Iterator[Finding]:
    subject = f"disk {disk.name}"
    troubles = 0
    if disk.iothread is not None and monitor.version < IOTHREADS_SAFE:
        troubles += 1
        yield _problem(
            subject,
            f"runs in iothread {disk.iothread}, and this QEMU aborts when an NBD client of such a disk"
            " disconnects: upgrade to 9.0 or later, take the iothread away, or exclude the disk",
        )
    if options.guest_first and disk.qom_path is None:
        troubles += 1
        yield _problem(subject, "has no guest device, which --guest-first needs")
    if options.guest_first and disk.top_driver in _JOB_FILTERS:
        troubles += 1
        yield _problem(subject, f"is under another job ({disk.top_driver}): wait for that to end")
    if not disk.persistent:
        troubles += 1
        yield _warning(
            subject,
            f"is {disk.driver}, which keeps no dirty bitmaps: after each restart of QEMU it is read in"
            " full once (a qcow2 with data_file and data_file_raw=on keeps them)",
        )
    for name, state in disk.bitmaps.items():
        ours = checkpoint_parts(name) is not None
        if state.inconsistent:
            troubles += 1
            yield _warning(
                subject,
                f"its bitmap '{name}' is inconsistent, because QEMU was killed: "
                + (
                    "the next backup reads the disk in full"
                    if ours
                    else "its owner has to remove it"
                ),
            )
    if not troubles:
        yield _ok(subject, f"{disk.size} bytes, {disk.driver}, keeps dirty bitmaps")


async def _server(monitor: Monitor, options: QemuOptions) -> Iterator[Finding]:
    exports = await monitor.execute("query-block-exports")
    foreign = [
        entry["id"] for entry in exports if entry["type"] == "nbd" and not run_of(entry["id"])
    ]
    if foreign and options.nbd_address is None:
        return iter(
            [
                _problem(
                    "NBD server",
                    f"this QEMU serves {', '.join(foreign)} already, and can run one server only: name its"
                    " address with --nbd-address",
                )
            ]
        )
    return iter([_ok("NBD server", "is free" if not foreign else f"is {options.nbd_address}")])


def _leftovers(found: Swept) -> Iterator[Finding]:
    for live in found.live:
        yield _warning("other runs", f"{live.who} backs this VM up right now, for run {live.run}")
    if found.removed:
        yield _warning(
            "other runs",
            f"a run that is dead left {', '.join(found.removed)}: its chain's next backup goes on with it, or removes"
            " it, as 'nbdpull cleanup' does; until then the VM can't be migrated",
        )
    if not found.live and not found.removed:
        yield _ok("other runs", "none, and nothing is left of earlier ones")


async def _scratch(
    monitor: Monitor, options: QemuOptions, disks: Sequence[QemuDisk], place: Place
) -> list[Finding]:
    """Make a run's folder and let QEMU open an image in it."""
    run = secrets.token_hex(4)
    size = max((disk.size for disk in disks), default=1 << 20)
    owner = None
    if monitor.peer_uid is not None and monitor.peer_gid is not None:
        owner = (monitor.peer_uid, monitor.peer_gid)
    try:
        rundir = await whole(
            place.create,
            options.scratch,
            run,
            source=monitor.address.there,
            chain="",
            owner=owner,
            sizes=[size],
        )
    except Error as exc:
        return [_problem("scratch", str(exc))]
    folder = rundir.path.parent
    try:
        free, _ = await asyncio.to_thread(rundir.room)
        node = RunNames(run).scratch(0)
        path = await asyncio.to_thread(rundir.make_scratch, 0, size)
        await monitor.execute(
            "blockdev-add", {"driver": "file", "node-name": node, "filename": path}
        )
        await monitor.execute("blockdev-del", {"node-name": node})
    except CommandError as exc:
        return [
            _problem(
                "scratch",
                f"QEMU can't open an image in {folder} ({exc.description}): it may run as another user, in"
                " a container, or confined; choose a folder that both can use with --scratch",
            )
        ]
    except Error as exc:
        return [_problem("scratch", str(exc))]
    finally:
        await whole(rundir.close)
    total = sum(disk.size for disk in disks)
    if free * _ROOM_SHARE < total:
        return [
            _warning(
                "scratch",
                f"{folder} has {free} bytes free, and the disks have {total}: a guest that overwrites more"
                " than that during a backup ends it; choose a folder with more room with --scratch",
            )
        ]
    return [_ok("scratch", f"{folder} has {free} bytes free, and QEMU can write there")]
