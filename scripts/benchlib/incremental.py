"""Incremental backups of a scattered 2 % change."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.benchlib.domain import Domain
from scripts.benchlib.full import profile_line
from scripts.benchlib.measure import Usage, folder_size, measure, run, settled
from scripts.benchlib.rows import Bound, Pair, Results, Side
from scripts.benchlib.setting import NBDPULL, Setting, backup, fresh_repository, say
from scripts.benchlib.testdisk import scattered_offsets

__all__ = ["incremental"]

_GRAIN = 64 << 10
_PERCENT = 2.0


class _Incremental:
    def __init__(self, setting: Setting, domain: Domain) -> None:
        self.setting = setting
        self.domain = domain
        self.repository = setting.folder / "repository"
        self.peer = setting.folder / "virtnbdbackup"
        self.changed = 0
        self.result: dict[str, Any] = {}

    def change(self, number: int) -> None:
        """Overwrite 2 % of the disk, in grains all over it."""
        offsets = scattered_offsets(self.setting.size, _PERCENT, number)
        self.changed = len(offsets) * _GRAIN
        self.domain.write(
            [f"write -P {1 + (number + at // _GRAIN) % 251} {at} 64k" for at in offsets]
        )
        self.domain.write(["flush"])

    def ours(self) -> Usage:
        usage, self.result = backup(self.domain.uri, self.repository, "inc", server=self.domain.pid)
        return usage

    def virtnbdbackup(self, level: str = "inc") -> Usage:
        before = folder_size(self.peer)
        usage, _ = measure(
            [
                *("virtnbdbackup", "-d", self.domain.name, "-l", level, "-z", "-n"),
                *("-o", self.peer, "-S", self.setting.folder),
            ],
            server=self.domain.pid,
        )
        return replace(usage, stored=folder_size(self.peer) - before)

    def check(self) -> None:
        """Both sides' last backup is the disk as it is now."""
        lines: tuple[tuple[str, list[str | Path]], ...] = (
            ("raw", [NBDPULL, "restore", "latest", "-r", self.repository, "-q", "--to"]),
            ("qcow2", ["virtnbdrestore", "-i", self.peer, "-n", "-L", "/dev/null", "-o"]),
        )
        for name, line in lines:
            target = self.setting.fresh("restored")
            run([*line, target])
            (image,) = [path for path in target.iterdir() if path.suffix != ".xml"]
            run(["qemu-img", "compare", "-U", "-f", name, settled(image), self.domain.disk])
            shutil.rmtree(target)


def incremental(setting: Setting, results: Results) -> None:
    """Measure incremental backups."""
    disk = setting.folder / "vm.qcow2"
    shutil.copyfile(setting.disk, disk)
    with Domain("bench", disk, setting.folder / "domain") as domain:
        work = _Incremental(setting, domain)
        fresh_repository(setting, "repository")
        setting.fresh("virtnbdbackup")
        with setting.alone():
            backup(domain.uri, work.repository, "full", server=None)
            work.virtnbdbackup("full")
        say("incremental: nbdpull and virtnbdbackup")
        own, theirs = setting.alternate(work.ours, work.virtnbdbackup, between=work.change)
        work.check()
    Path(disk).unlink()
    for name in ("repository", "virtnbdbackup"):
        shutil.rmtree(setting.folder / name)
    pair = Pair(
        key="incremental-virtnbdbackup",
        what="incremental, 2 % in scattered 64 KiB",
        ours=Side("nbdpull", own),
        peer=Side("virtnbdbackup 1.9.15, lz4", theirs),
        least=5.0,
    )
    say(f"incremental: virtnbdbackup takes {pair.ratio:.2f} times as long")
    results.pairs["incremental"] = [pair]
    share = max((run.read or 0) / work.changed for run in own)
    peak = max(run.rss or 0 for run in own)
    results.bounds["incremental"] = [
        Bound(
            key="incremental-read",
            what="incremental, bytes read against bytes changed",
            limit=1.05,
            shown_limit="1.05 at most",
            value=share,
            shown=f"{share:.3f}",
        ),
        Bound(
            key="incremental-rss",
            what="incremental, peak RSS",
            limit=128 << 20,
            shown_limit="128 MiB at most",
            value=peak,
            shown=f"{peak / (1 << 20):.0f} MiB",
        ),
    ]
    results.tables["profile-incremental"] = profile_line("incremental", work.result)
