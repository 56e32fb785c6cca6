"""Disks of many TiB: the block status alone, and what an incremental costs as the disk grows."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.benchlib.full import served
from scripts.benchlib.measure import measure, memory_peak, run
from scripts.benchlib.rows import Bound, Results
from scripts.benchlib.setting import Setting, backup, fresh_repository, say
from scripts.benchlib.testdisk import sparse_with_bitmap
from tests.support.disk import Disk
from tests.support.vm import StorageDaemon

__all__ = ["scale", "status"]

_TIB = 1 << 40
_MIB = 1 << 20
_TMPFS = "/dev/shm"  # noqa: S108 - nbdpull makes a folder of its own in it


def status(setting: Setting, results: Results) -> None:
    """Measure the plan of an incremental of 16 TiB with a million dirty extents."""
    disk = sparse_with_bitmap(setting.folder / "sparse.qcow2", 16 * _TIB, 1 << 20)
    socket = setting.folder / "serve"
    with served(disk.path, socket, "-B", disk.bitmap) as server, setting.alone():
        line = [sys.executable, "-m", "scripts.benchlib.planner"]
        line += [f"nbd+unix:///?socket={socket}", f"qemu:dirty-bitmap:{disk.bitmap}"]
        runs = [measure(line, server=server) for _ in range(setting.rounds)]
    disk.path.unlink()
    counted = json.loads(runs[0][1])
    if counted["extents"] != disk.extents:
        raise RuntimeError(f"counted {counted['extents']} extents, made {disk.extents}")
    walls = sorted(usage.wall_s for usage, _ in runs)
    middle = walls[len(walls) // 2]
    peak = max(usage.rss or 0 for usage, _ in runs)
    say(f"status: {middle:.2f} s, {counted}")
    results.bounds["status"] = [
        Bound(
            key="status",
            what=f"block status of 16 TiB with {disk.extents:,} scattered dirty extents"
            f" ({counted['requests']:,} requests)",
            limit=5.0,
            shown_limit="5 s at most",
            value=middle,
            shown=f"{middle:.2f} s ({walls[0]:.2f} to {walls[-1]:.2f}), of which the server's"
            f" CPU {min(usage.server_cpu_s or 0.0 for usage, _ in runs):.2f} s",
        ),
        Bound(
            key="status-rss",
            what="the same, peak RSS",
            limit=256 << 20,
            shown_limit="256 MiB at most",
            value=peak,
            shown=f"{peak / _MIB:.0f} MiB",
        ),
    ]


@contextmanager
def _daemon(path: Path, size: int) -> Iterator[StorageDaemon]:
    run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)])
    with StorageDaemon([Disk(name="vda", path=path, size=size)], nbd_server=True) as daemon:
        yield daemon


def scale(setting: Setting, results: Results) -> None:
    """Measure a full of nothing and an incremental of 1 GiB on disks of 1, 4 and 16 TiB."""
    rows = []
    for tib in (1, 4, 16):
        path = setting.folder / "sparse.qcow2"
        with _daemon(path, tib * _TIB) as daemon:
            repository = fresh_repository(setting, "repository")
            # ext4 has no files of 16 TiB, and the scratch image is one, though sparse: tmpfs has.
            more = ("--nbd-address", daemon.nbd_address, "--scratch", _TMPFS)
            pid = daemon.process.pid
            with setting.alone():
                full, _ = backup(daemon.uri, repository, "full", server=pid, more=more)
            _write_scattered(daemon, tib * _TIB)
            with setting.alone():
                usage, result = backup(daemon.uri, repository, "inc", server=pid, more=more)
                again, _ = backup(daemon.uri, repository, "inc", server=pid, more=more)
            if result["disks"][0]["changed_bytes"] != 1 << 30:
                raise RuntimeError(f"changed: {result['disks'][0]['changed_bytes']}")
            rows.append(
                f"| {tib} TiB | {full.wall_s:.2f} s | {usage.wall_s:.2f} s | {_mib(usage.rss)} |"
                f" {_mib(usage.read)} | {_mib(usage.stored)} | {_mib(memory_peak(pid))} |"
                f" {again.wall_s:.2f} s | {again.stored or 0:,} |"
            )
            say(f"scale: {rows[-1]}")
        path.unlink()
        shutil.rmtree(repository)
    results.tables["scale"] = "\n".join(
        [
            (
                "| disk | first full (of nothing) | incremental of 1 GiB | its peak RSS | read | stored |"
                " peak RSS of the server | the next, nothing changed | bytes it stored |"
            ),
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / _MIB:,.0f} MiB"


def _write_scattered(daemon: StorageDaemon, size: int) -> None:
    """1 GiB in 1,024 pieces of 1 MiB all over the disk, of bytes that compress to half."""
    step = size // 1024
    pattern = daemon.folder / "pattern"
    block = bytearray(_MIB)
    with Path("/dev/urandom").open("rb") as source:
        for at in range(0, _MIB, 4096):
            block[at : at + 2048] = source.read(2048)
    pattern.write_bytes(block)
    commands = [f"write -q -s {pattern} {number * step} {_MIB}" for number in range(1024)]
    line = [part for command in commands for part in ("-c", command)]
    run([daemon.tools.qemu_io, "-f", "raw", *line, daemon.guest_uri("vda")])
