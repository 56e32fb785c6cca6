"""Rounds of trouble for a real Linux guest, each with a backup that must restore exactly.

A round does some of: random writes, zeroes and trims; growing a disk; plugging one in and out; an external snapshot,
and its commit; a client that is killed or cancelled; QEMU killed, quit or shut down and started again. Then
it makes a backup, of a random level, in one of two chains, in either mode, of the VM running, halted or
shut down, and restores it:

    halted, shut down   every disk is compared with its image by qemu-img compare
    running             both file systems are checked against the guest's own numbered records

A backup may go on at the point in time of a client that was killed. Then it must be what the disks were at that moment:
half of the clients that are killed take theirs while the guest is halted, and the disks are noted.

At the end every backup that was compared is restored once more, and must hash to the same.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nbdpull
from nbdpull import Level
from nbdpull.source.rundir import find_runs
from tests.support.disk import MIB, Disk, compare, create_disk, to_raw
from tests.support.linuxguest import LinuxGuest, check_filesystem, create_ext4_disk
from tests.support.process import run
from tests.support.tools import QemuTools
from tests.support.vm import QmpError

__all__ = ["Torture"]

_LEVELS = ("auto", Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL, Level.COPY)
_GRAIN = 65536
_PATIENCE_S = 900.0
"""A campaign runs when nothing else wants the machine: its guest may take minutes to boot."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Torture:
    """One campaign.

    Attributes:
        folder: where everything is kept; a few hundred MiB.
        seed: decides every choice (not the guest's own timing).
        done: how often each thing was done.
    """

    folder: Path
    tools: QemuTools
    seed: int
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.repository = self.folder / "repo"
        self.scratch = self.folder / "s"
        self.scratch.mkdir()
        nbdpull.init(self.repository)
        disks = [
            create_ext4_disk(self.folder, name, size=48 * MIB, tools=self.tools)
            for name in ("vda", "vdb")
        ]
        disks.append(
            create_disk(self.folder, "slow", size=24 * MIB, tools=self.tools, throttled=True)
        )
        self.guest = LinuxGuest(disks, tools=self.tools, name="torture")
        self.overlay: tuple[Path, str] | None = None  # on disk 'extra': its image and node
        self.compared: dict[str, dict[str, str]] = {}
        self.plugged = 0
        # Of killed clients: what each backup's disks were, as far as that is known, and how to go on with the last.
        self.begun: dict[str, dict[str, str]] = {}
        self.again: dict[str, Any] = {}

    def run(self, rounds: int, *, seconds: float = float("inf")) -> int:
        """All rounds, or as many as fit into the time; returns how many.

        Raises:
            AssertionError: a backup did not restore exactly, or something was left in QEMU.
        """
        end = time.monotonic() + seconds
        number = 0
        with self.guest:
            self.guest.wait_synced(2, timeout_s=_PATIENCE_S)
            while number < rounds and time.monotonic() < end:
                try:
                    self._round()
                except BaseException as exc:
                    exc.add_note(f"seed {self.seed}, round {number}; so far {dict(self.done)}")
                    raise
                number += 1
        for backup, wanted in self.compared.items():
            for name, path in self._restore(backup).items():
                assert _sha256(path) == wanted[name], f"{backup}: disk {name} changed afterwards"
            shutil.rmtree(self.folder / backup)
        self.done["restored again"] += len(self.compared)
        return number

    def _round(self) -> None:
        troubles = (
            *[self._write] * 5,
            self._grow,
            self._plug,
            self._unplug,
            self._snapshot,
            self._kill_client,
            self._cancel_client,
            self._kill_qemu,
            self._quit_qemu,
        )
        for trouble in self.rng.sample(troubles, self.rng.randint(1, 3)):
            trouble()
        kind = self.rng.choice((self._back_up_running, self._back_up_halted, self._back_up_off))
        kind()

    # -- trouble -----------------------------------------------------------------------------------

    def _mine(self) -> list[Disk]:
        """Disks that the Linux guest does not use: we are their guest."""
        return [disk for disk in self.guest.disks if disk.name not in {"vda", "vdb"}]

    def _write(self) -> None:
        for disk in self._mine():
            for _ in range(self.rng.randint(1, 4)):
                length = self.rng.choice((512, 4096, _GRAIN, 3 * _GRAIN, MIB))
                start = self.rng.randrange(0, disk.size - length, 512)
                command = self.rng.choice(
                    (
                        f"write -q -P {self.rng.randint(1, 255)} {start} {length}",
                        f"write -q -z {start} {length}",
                        f"write -q -z -u {start} {length}",
                        f"discard -q {start} {length}",
                    )
                )
                self.guest.qemu_io(disk.name, command)
        self.done["writes"] += 1

    def _grow(self) -> None:
        disks = self._mine()
        disk = self.rng.choice(disks)
        if self.overlay is not None and disk.name == "extra":
            return
        bigger = replace(disk, size=disk.size + self.rng.choice((512, MIB, 5 * _GRAIN)))
        # Through the filter on top, if there is one: only then it knows the new size too.
        try:
            self.guest.qmp("block_resize", node_name=disk.top, size=bigger.size)
        except QmpError as exc:
            # After a crash, until the next backup has removed what the crash made of the bitmaps; and
            # while what a killed client left stands on the disk.
            if "inconsistent" not in str(exc) and "np-" not in str(exc):
                raise
            self.done["resize refused"] += 1
            return
        self._replace(bigger)
        self.guest.qemu_io(disk.name, f"write -q -P 7 {bigger.size - 512} 512")
        self.done["resized"] += 1

    def _replace(self, disk: Disk) -> None:
        disks = self.guest._disks
        disks[[one.name for one in disks].index(disk.name)] = disk

    def _plug(self) -> None:
        if any(disk.name == "extra" for disk in self.guest.disks):
            return
        form = self.rng.choice(("qcow2", "qcow2", "raw"))
        self.plugged += 1
        folder = self.folder / f"plugged-{self.plugged}"
        folder.mkdir()
        disk = create_disk(folder, "extra", size=16 * MIB, format=form, tools=self.tools)
        self.guest.hot_add(disk)
        self.done["plugged in"] += 1

    def _unplug(self) -> None:
        """Unplug the plugged disk; the next one of its name is another disk."""
        if not any(disk.name == "extra" for disk in self.guest.disks):
            return
        self._commit()
        # What a killed client left stands on its node.
        nbdpull.cleanup(self.guest.uri, scratch=self.scratch)
        self.guest.hot_remove("extra")
        shutil.rmtree(self.folder / f"plugged-{self.plugged}")
        self.done["unplugged"] += 1

    def _snapshot(self) -> None:
        """Take an external snapshot of the plugged disk, or commit the one there is."""
        disk = next((one for one in self._mine() if one.name == "extra"), None)
        if disk is None or disk.format != "qcow2":
            return
        if self.overlay is not None:
            self._commit()
            return
        path = disk.path.with_name(f"overlay-{self.done['snapshot taken']}.qcow2")
        run([self.tools.qemu_img, "create", "-q", "-f", "qcow2", path, str(disk.size)])
        node = f"over-{self.done['snapshot taken']}"
        file = {"driver": "file", "filename": str(path), "discard": "unmap"}
        self.guest.qmp(
            "blockdev-add", driver="qcow2", node_name=node, file=file, backing=None, discard="unmap"
        )
        self.guest.qmp("blockdev-snapshot", node=disk.node, overlay=node)
        self.overlay = (path, node)
        self.done["snapshot taken"] += 1

    def _commit(self) -> None:
        if self.overlay is None:
            return
        # What a killed client left stands on the overlay, and QEMU commits only what nothing stands on.
        nbdpull.cleanup(self.guest.uri, scratch=self.scratch)
        path, node = self.overlay
        since = len(self.guest.events)
        self.guest.qmp("block-commit", job_id="commit", device=node)
        self.guest.wait_event("BLOCK_JOB_READY", since=since)
        deadline = time.monotonic() + 60
        while True:
            jobs = [job for job in self.guest.qmp("query-jobs") if job["id"] == "commit"]
            if not jobs:
                break
            if jobs[0]["status"] == "ready":
                self.guest.qmp("job-complete", id="commit")
            assert time.monotonic() < deadline, jobs
            time.sleep(0.05)
        self.guest.qmp("blockdev-del", node_name=node)
        path.unlink()
        self.overlay = None
        self.done["snapshot committed"] += 1

    @contextmanager
    def _client(self) -> Iterator[subprocess.Popen[bytes]]:
        chosen: dict[str, Any] = {
            "chain": self.rng.choice("ab"),
            "level": self.rng.choice(("auto", "full")),
            "guest_first": self.rng.random() < 0.5,
            "trim_scratch": self.rng.random() < 0.3,
        }
        command = [sys.executable, "-m", "nbdpull", "backup", self.guest.uri]
        command += ["-r", str(self.repository), "--chain", chosen["chain"], "--rate", "8M"]
        command += ["--scratch", str(self.scratch), "-l", chosen["level"]]
        command += ["--guest-first"] if chosen["guest_first"] else []
        command += ["--trim-scratch"] if chosen["trim_scratch"] else []
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as client:
            yield client
            client.wait(60)
        self.again = chosen

    def _end_client(self, number: signal.Signals) -> None:
        with self._client() as client:
            time.sleep(self.rng.uniform(0.1, 2.0))
            client.send_signal(number)

    def _kill_client(self) -> None:
        if self.rng.random() < 0.5:
            self._end_client(signal.SIGKILL)
        else:
            self._kill_noted_client()
        self.done["client killed"] += 1
        if self.rng.random() < 0.3:
            nbdpull.cleanup(self.guest.uri, scratch=self.scratch)
            self._check_clean()

    def _kill_noted_client(self) -> None:
        """Kill a client that took its point in time while nothing was written."""
        with self._client() as client:
            with self.guest.halted():
                while (record := self._record()) is None and client.poll() is None:
                    time.sleep(0.01)
                if record is not None:
                    self.begun[record] = self._hashes()
            time.sleep(self.rng.uniform(0.0, 2.0))
            client.send_signal(signal.SIGKILL)

    def _record(self) -> str | None:
        """The backup that is under way, once its point in time stands."""
        for found in find_runs(str(self.scratch)):
            with suppress(ValueError):
                if found.alive:
                    return found.record().backup
        return None

    def _hashes(self) -> dict[str, str]:
        """Of what each disk holds, which nothing writes to now."""
        hashes = {}
        for disk in self.guest.disks:
            image, form = self._image(disk)
            flat = self.folder / "hashed.flat"
            run([self.tools.qemu_img, "convert", "-U", "-f", form, "-O", "raw", image, flat])
            hashes[disk.name] = _sha256(flat)
            flat.unlink()
        return hashes

    def _cancel_client(self) -> None:
        # A client that is cancelled before it has looked round leaves what a killed one had left.
        before = set(self._leftovers())
        self._end_client(signal.SIGINT)
        left = self._leftovers()
        assert before.issuperset(left), (before, left)
        self.done["client cancelled"] += 1

    def _leftovers(self) -> list[str]:
        left = self.guest.leftovers()
        return [name for names in left.values() for name in names if name.startswith("np-")]

    def _check_clean(self) -> None:
        ours = self._leftovers()
        assert ours == [], ours

    def _start_again(self) -> None:
        before = self.guest.synced
        self.guest.restart()
        self.guest.wait_synced(before + 1, timeout_s=_PATIENCE_S)

    def _kill_qemu(self) -> None:
        self._commit()
        self.guest.kill()
        self._start_again()
        self.done["QEMU killed"] += 1

    def _quit_qemu(self) -> None:
        self._commit()
        self.guest.quit()
        self._start_again()
        self.done["QEMU quit"] += 1

    # -- backups -----------------------------------------------------------------------------------

    def _restore(self, backup: str) -> dict[str, Path]:
        done = nbdpull.restore(self.repository, backup, self.folder / backup)
        return {disk.name: Path(disk.target) for disk in done.disks}

    def _options(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "level": self.rng.choice(_LEVELS),
            "chain": self.rng.choice("ab"),
            "trim_scratch": self.guest.running and self.rng.random() < 0.5,
            "guest_first": self.guest.running and self.rng.random() < 0.5,
        }
        if self.guest.running and self.rng.random() < 0.7:
            chosen |= self.again
        return chosen | {"scratch": self.scratch}

    def _count(self, result: nbdpull.BackupResult, kind: str) -> None:
        self.done[f"backups {kind}"] += 1
        for disk in result.disks:
            self.done[f"disks {disk.level}"] += 1

    def _check_resumed(self, result: nbdpull.BackupResult) -> None:
        """What went on at the point in time of a killed client must be what the disks were then."""
        restored = self._restore(result.backup)
        first, second = (check_filesystem(restored[name], self.folder) for name in ("vda", "vdb"))
        assert 0 <= first.records - second.records <= 1, (first, second)
        wanted = self.begun.get(result.backup)
        if wanted is not None:
            assert {name: _sha256(path) for name, path in restored.items()} == wanted
            self.compared[result.backup] = wanted
            self.done["gone on with, compared"] += 1
        shutil.rmtree(self.folder / result.backup)
        self._count(result, "gone on with")

    def _back_up_running(self) -> None:
        before = self.guest.synced
        result = nbdpull.backup(self.guest.uri, self.repository, **self._options())
        self._check_clean()
        if result.resumed:
            self._check_resumed(result)
            return
        self.guest.wait_synced(self.guest.synced + 1, timeout_s=_PATIENCE_S)
        restored = self._restore(result.backup)
        first, second = (check_filesystem(restored[name], self.folder) for name in ("vda", "vdb"))
        assert 0 <= first.records - second.records <= 1, (first, second)
        assert second.records >= before, (second, before)
        shutil.rmtree(self.folder / result.backup)
        self._count(result, "running")

    def _back_up_halted(self) -> None:
        with self.guest.halted():
            result = nbdpull.backup(self.guest.uri, self.repository, **self._options())
            if not result.resumed:
                self._compare(result)
        self._check_clean()
        if result.resumed:
            self._check_resumed(result)
            return
        self._count(result, "halted")

    def _back_up_off(self) -> None:
        self._commit()
        self.guest.quit()
        images = [f"disk:{disk.name}={disk.path}" for disk in self.guest.disks]
        result = nbdpull.backup(images, self.repository, vm="torture", **self._options())
        self._compare(result)
        self._start_again()
        self._count(result, "shut down")

    def _compare(self, result: nbdpull.BackupResult) -> None:
        """Every restored disk with its image, which nothing writes to now."""
        if self.guest.running:
            self.guest.pause()  # flushes, also when it is paused already
        restored = self._restore(result.backup)
        assert set(restored) == {disk.name for disk in self.guest.disks}
        hashes = {}
        for disk in self.guest.disks:
            image, form = self._image(disk)
            compare(restored[disk.name], image, other_format=form, tools=self.tools)
            hashes[disk.name] = _sha256(restored[disk.name])
        self.compared[result.backup] = hashes
        shutil.rmtree(self.folder / result.backup)

    def _image(self, disk: Disk) -> tuple[Path, str]:
        """What holds the disk's content now, and in which format."""
        if disk.name == "extra" and self.overlay is not None:
            return self._flat_overlay(disk), "raw"
        return disk.path, disk.format

    def _flat_overlay(self, disk: Disk) -> Path:
        """What the overlay reads as: it does not name its backing file itself."""
        assert self.overlay is not None
        path, _ = self.overlay
        flat = path.with_suffix(".flat")
        chained = path.with_suffix(".chained")
        shutil.copy(path, chained)
        rebase = ["-f", "qcow2", "-F", "qcow2", "-b", str(disk.path), str(chained)]
        run([self.tools.qemu_img, "rebase", "-u", *rebase])
        to_raw(chained, flat, tools=self.tools)
        chained.unlink()
        return flat
