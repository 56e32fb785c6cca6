"""What scripts/demo shows, step by step; any claim that does not hold ends it with an error."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support.disk import Disk, compare
from tests.support.linuxguest import (
    Filesystem,
    LinuxGuest,
    check_filesystem,
    create_ext4_disk,
)
from tests.support.process import run, spawn, stop
from tests.support.stores import seaweedfs
from tests.support.tools import QEMU_10, QEMU_72, QemuTools
from tests.support.vm import pid_alive

MIB = 1 << 20
DISK_SIZE = 768 * MIB
CONTENT = 256 * MIB
# A record may be in a backup before the host has heard of it: the guest's words need some time
# through an emulated serial port on a busy machine.
CONSOLE_DELAY_S = 0.25
NBDPULL = Path(sys.executable).with_name("nbdpull")

PROOF = f"""
Proved for each backup, on the restored images:
- Each disk holds records 1, 2, 3 ... up to the number above, no gap, every checksum right.
- None is missing: the guest had said that record 'said' is durable on both disks before QEMU froze
  the point in time (by QEMU's own clock), and neither disk ends before it.
- None is too new: neither disk holds a record later than the guest can have written by then. (Its
  words may take {CONSOLE_DELAY_S} s to reach the host; that much is allowed for.)
- Both disks are from one moment: each record goes to A, then to B, so A is ahead by one at most.
- The file systems are sound: on a copy, e2fsck -p did what every boot does after a power failure,
  replayed the journal, and then e2fsck -fn found nothing to repair.
And for the last one, made with the guest paused: qemu-img compare finds every byte identical."""

out = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """Something that the demo claims does not hold."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One backup, and what the guest had said when its point in time was made.

    Attributes:
        result: what `nbdpull backup --json` printed.
        synced: records that the guest had said are durable before the point in time.
        latest: no record after this one can have been written at the point in time.
    """

    title: str
    result: dict[str, Any]
    synced: int
    latest: int


def main() -> int:
    """Run all steps and return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--qemu", choices=["7.2", "10"], default="7.2")
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()
    # SIGTERM then leaves through the same clean-up as an error.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    with work_folder(keep=options.keep) as folder:
        try:
            with object_store() if options.s3 else nullcontext(str(folder / "repo")) as repo:
                steps(folder, repo, QEMU_72 if options.qemu == "7.2" else QEMU_10)
        except (DemoError, AssertionError, TimeoutError, ConnectionError) as error:
            out.print(f"\n[bold red]FAILED:[/] {error}", markup=True)
            return 1
    out.print(f"\nAll of it held. {time.monotonic() - started:.0f} s.")
    return 0


@contextmanager
def work_folder(*, keep: bool) -> Iterator[Path]:
    """A temporary folder, removed at the end unless `keep`."""
    folder = Path(tempfile.mkdtemp(prefix="nbdpull-demo-"))
    try:
        yield folder
    finally:
        if keep:
            out.print(f"Kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def object_store() -> Iterator[str]:
    """A location in a SeaweedFS that runs meanwhile; the environment says how to get in."""
    head("An S3 server")
    with seaweedfs() as server:
        os.environ.update(server.env)
        bucket = server.bucket()
        out.print(f"SeaweedFS at {server.endpoint}, with an empty bucket '{bucket}'.")
        yield f"s3://{bucket}/demo"
        listed = server.client.request("GET", f"/{bucket}", "list-type=2&prefix=demo%2Fd%2F")
        out.print(f"\nThe bucket holds {listed.body.count(b'<Key>')} packs.")


def steps(folder: Path, repo: str, tools: QemuTools) -> None:
    """Everything, in order."""
    head("A Linux guest with two ext4 disks")
    disks = [make_disk(folder, name, tools) for name in ("vda", "vdb")]
    with LinuxGuest(disks, tools=tools, name="demo") as guest:
        first = guest.wait_synced(10)
        out.print(
            f"QEMU {tools.id.removeprefix('qemu-')}, two disks of {size(DISK_SIZE)}; it appends "
            f"numbered records to both, syncs each one, and writes, removes and trims files.\n"
            f"Booted; record {first} is durable on both disks."
        )
        head("Backups while it writes")
        nbdpull("init", "-r", repo)
        taken = [back_up(guest, repo, "full", "full")]
        go_on(guest)
        taken.append(back_up(guest, repo, "incremental", "incremental"))
        go_on(guest)
        taken.append(back_up(guest, repo, "differential", "differential"))
        head("A backup that is killed")
        kill_one(guest, repo)
        taken.append(back_up(guest, repo, "incremental", "incremental after kill"))
        head("A last one with the guest paused, to compare every byte")
        go_on(guest)
        with guest.halted():
            taken.append(back_up(guest, repo, "incremental", "incremental, paused"))
            truth = guest.copy_disks(folder / "truth")
        check_clean(guest)
        guest.wait_synced(guest.synced + 5)
        out.print(f"The guest ran through all of it and is at record {guest.synced}.")
    head("The repository")
    show("list", "-r", repo)
    show("verify", "-r", repo)
    head("Restore every backup, and prove it")
    table = Table(box=None, pad_edge=False)
    for column in ("backup", "level"):
        table.add_column(column, no_wrap=True)
    for column in ("changed", "stored", "record A", "record B", "said"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, backup in enumerate(taken):
        restored = folder / f"restored-{number}"
        nbdpull("restore", backup.result["backup"], "-r", repo, "--to", restored)
        first_disk, second_disk = prove(backup, restored, folder)
        if backup is taken[-1]:
            for name, path in truth.items():
                compare(restored / f"{name}.raw", path, tools=tools)
        table.add_row(
            backup.result["backup"][:8],
            backup.title,
            size(total(backup, "changed_bytes")),
            size(total(backup, "stored_bytes")),
            str(first_disk.records),
            str(second_disk.records),
            str(backup.synced),
        )
    head("Summary")
    out.print(table)
    out.print(PROOF)


def make_disk(folder: Path, name: str, tools: QemuTools) -> Disk:
    """A disk whose file system holds some data from the start: half of it compresses well."""
    content = folder / f"content-{name}"
    content.mkdir()
    for number in range(8):
        with (content / f"data{number}").open("wb") as file:
            if number % 2:
                file.write(os.urandom(CONTENT // 8))
            else:
                file.write(b"".join(b"%015d\n" % n for n in range(CONTENT // 8 // 16)))
    disk = create_ext4_disk(folder, name, size=DISK_SIZE, content=content, tools=tools)
    shutil.rmtree(content)
    return disk


def back_up(guest: LinuxGuest, repo: str, level: str, title: str) -> Taken:
    """Make one backup and note what the guest had said at its point in time."""
    guest.qmp("query-status")
    since = len(guest.events)
    text = nbdpull("backup", guest.uri, "-r", repo, "-l", level, "--json")
    result: dict[str, Any] = json.loads(text)
    guest.qmp("query-status")
    # The backup jobs that hold the point in time are made in one transaction: QEMU's own clock
    # in their events brackets it.
    moments = [
        event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        for event in guest.events[since:]
        if event["event"] == "JOB_STATUS_CHANGE"
        and event["data"]["status"] in {"created", "running"}
    ]
    if not moments:
        raise DemoError("QEMU told of no backup job, so the point in time is unknown")
    time.sleep(CONSOLE_DELAY_S)
    latest = guest.synced_at(max(moments) + CONSOLE_DELAY_S) + 1
    backup = Taken(title, result, guest.synced_at(min(moments)), latest)
    if result["level"] != level:
        raise DemoError(f"asked for level {level}, got {result['level']}: {result['disks']}")
    out.print(
        f"  {result['level']} {result['backup']}: {size(total(backup, 'changed_bytes'))} changed, "
        f"{size(total(backup, 'read_bytes'))} read, {size(total(backup, 'stored_bytes'))} stored "
        f"in {result['duration_s']:.1f} s; the guest had said {backup.synced}"
    )
    return backup


def kill_one(guest: LinuxGuest, repo: str) -> None:
    """Kill a backup with SIGKILL while bytes flow, and clean up after it."""
    arguments = ["backup", guest.uri, "-r", repo, "-l", "full", "--progress", "json"]
    command("nbdpull", *arguments, after=" &")
    log = guest.folder / "killed"
    process = spawn([NBDPULL, *arguments], stdout=PIPE, log=log)
    try:
        done = wait_for_bytes(process.pid, log)
        process.kill()
    finally:
        stop(process)
    before = guest.synced
    left = guest.leftovers()
    out.print(
        f"  killed with SIGKILL after {size(done)}; it leaves in QEMU: jobs {left['jobs']}, "
        f"exports {left['exports']}, {len(left['nodes'])} nodes"
    )
    if not any(left.values()):
        raise DemoError("the backup was over before it was killed")
    guest.wait_synced(before + 20, timeout_s=30)
    out.print(f"  the guest goes on: record {before}, now {guest.synced}")
    nbdpull("cleanup", guest.uri)
    check_clean(guest)
    out.print("  nothing of it is left in QEMU")


def wait_for_bytes(pid: int, log: Path) -> int:
    """Wait for a progress event that says bytes were read, and return how many."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True) if log.exists() else []:
            if line.startswith("{") and line.endswith("\n"):
                event = json.loads(line)
                if event.get("disk") and event.get("done", 0) > 0:
                    return int(event["done"])
        if not pid_alive(pid):
            raise DemoError(f"the backup ended before it was killed: {log.read_text()}")
        time.sleep(0.005)
    raise DemoError(f"no byte flowed within 60 s: {log.read_text()}")


def prove(backup: Taken, restored: Path, scratch: Path) -> tuple[Filesystem, Filesystem]:
    """Check both restored disks against each other and against what the guest had said."""
    first = check_filesystem(restored / "vda.raw", scratch)
    second = check_filesystem(restored / "vdb.raw", scratch)
    if not 0 <= first.records - second.records <= 1:
        raise DemoError(f"{backup.title}: the disks are from different moments: {first}, {second}")
    if second.records < backup.synced:
        raise DemoError(
            f"{backup.title}: record {backup.synced} was durable before the point in time, "
            f"but disk B ends with {second.records}"
        )
    if first.records > backup.latest:
        raise DemoError(
            f"{backup.title}: disk A holds record {first.records}, which was written after the "
            f"point in time ({backup.latest} at most)"
        )
    return first, second


def check_clean(guest: LinuxGuest) -> None:
    """Check that QEMU holds nothing but the guest's own disks."""
    left = guest.leftovers()
    if any(left.values()):
        raise DemoError(f"left in QEMU: {left}")


def go_on(guest: LinuxGuest) -> None:
    """Let the guest write for a while."""
    guest.wait_synced(guest.synced + 60)


def nbdpull(*arguments: str | Path) -> str:
    """Run the command line and return its standard output."""
    command("nbdpull", *arguments)
    return run([NBDPULL, *arguments]).stdout


def show(*arguments: str | Path) -> None:
    """Run the command line and show what it prints."""
    out.print(nbdpull(*arguments).rstrip(), markup=False)


def command(*words: str | Path, after: str = "") -> None:
    """Show a command line."""
    line = " ".join(map(str, words))
    out.print(f"$ {line}{after}", markup=False, style="bold")


def head(text: str) -> None:
    """Show a heading."""
    out.print(f"\n== {text}", markup=False, style="bold cyan")


def total(backup: Taken, field: str) -> int:
    """Sum of a field over the backup's disks."""
    return sum(disk[field] for disk in backup.result["disks"])


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / MIB:.0f} MiB" if count >= 10 * MIB else f"{count / 1024:.0f} KiB"


if __name__ == "__main__":
    sys.exit(main())
