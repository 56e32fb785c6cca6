"""Restores to a raw file, and into qcow2 through NBD."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scripts.benchlib.domain import Domain
from scripts.benchlib.full import served
from scripts.benchlib.measure import Usage, measure, run, warm
from scripts.benchlib.rows import Bound, Pair, Results, Side
from scripts.benchlib.setting import NBDPULL, Setting, backup, fresh_repository, say

__all__ = ["restore"]


class _Restore:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.repository = setting.folder / "repository"
        self.peer = setting.folder / "virtnbdbackup"
        self.packed = setting.folder / "packed.qcow2"

    def prepare(self) -> None:
        """The same disk in each program's form."""
        disk = self.setting.folder / "vm.qcow2"
        shutil.copyfile(self.setting.disk, disk)
        with Domain("bench", disk, self.setting.folder / "domain") as domain:
            fresh_repository(self.setting, "repository")
            backup(domain.uri, self.repository, "copy", server=None)
            if not self.setting.quick:
                self.setting.fresh("virtnbdbackup")
                run(
                    [
                        *("virtnbdbackup", "-d", domain.name, "-l", "copy", "-z", "-n"),
                        *("-o", self.peer, "-S", self.setting.folder),
                    ]
                )
        disk.unlink()
        options = ["-c", "-o", "compression_type=zstd", "-m", "8", "-W"]
        run(["qemu-img", "convert", *options, "-O", "qcow2", self.setting.disk, self.packed])

    # -- to files ----------------------------------------------------------------------------------

    def ours(self) -> Usage:
        target = self.setting.fresh("restored")
        line: list[str | Path] = [
            NBDPULL,
            "restore",
            "latest",
            "-r",
            self.repository,
            "-q",
            "--json",
            "--to",
            target,
        ]
        usage, text = measure(line)
        return replace(usage, stored=int(json.loads(text)["disks"][0]["written_bytes"]))

    def convert(self) -> Usage:
        target = self.setting.fresh("converted") / "disk.raw"
        usage, _ = measure(
            ["qemu-img", "convert", "-m", "16", "-W", "-O", "raw", self.packed, target]
        )
        return usage

    def virtnbdrestore(self) -> Usage:
        target = self.setting.fresh("converted")
        line: list[str | Path] = [
            "virtnbdrestore",
            "-i",
            self.peer,
            "-o",
            target,
            "-n",
            "-L",
            "/dev/null",
        ]
        return measure(line)[0]

    def same(self, name: str, of: str) -> None:
        """Check what was restored into a folder."""
        paths = (self.setting.folder / name).iterdir()
        (image,) = [path for path in paths if path.suffix != ".xml"]
        self.setting.same(image, of)

    # -- into qcow2 through NBD --------------------------------------------------------------------

    def into_export(self, write: Callable[[str], list[str | Path]], name: str) -> Usage:
        """Fill a new qcow2 through a qemu-nbd, until it is durable."""
        target = self.setting.fresh(name) / "disk.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", target, str(self.setting.size)])
        socket = self.setting.folder / "write"
        socket.unlink(missing_ok=True)
        server = subprocess.Popen(
            [
                *(
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    "--",
                    "qemu-nbd",
                    "-f",
                    "qcow2",
                    "--persistent",
                ),
                *("--shared=16", "--discard=unmap", f"--socket={socket}", target),
            ]
        )
        try:
            while not socket.is_socket():
                time.sleep(0.02)
            return measure(write(f"nbd+unix:///?socket={socket}"), server=server.pid)[0]
        finally:
            server.terminate()
            server.wait(60)

    def ours_into_export(self) -> Usage:
        return self.into_export(
            lambda uri: [NBDPULL, "restore", "latest", "-r", self.repository, "-q", "--to", uri],
            "restored",
        )

    def nbdcopy_into_export(self, source: str) -> Usage:
        return self.into_export(lambda uri: ["nbdcopy", "--flush", source, uri], "converted")


def restore(setting: Setting, results: Results) -> None:
    """Measure restores."""
    work = _Restore(setting)
    with setting.alone():
        work.prepare()
    for folder in (work.repository, work.peer):
        for path in folder.rglob("*"):
            if path.is_file():
                warm(path)
    warm(work.packed)
    pairs = []

    def pair(
        key: str,
        what: str,
        peer: str,
        sides: tuple[Callable[[], Usage], Callable[[], Usage]],
        *,
        least: float,
        formats: tuple[str, str],
    ) -> Pair:
        say(f"restore: nbdpull and {peer}")
        own, theirs = setting.alternate(*sides)
        work.same("restored", formats[0])
        work.same("converted", formats[1])
        made = Pair(
            key=key, what=what, ours=Side("nbdpull", own), peer=Side(peer, theirs), least=least
        )
        say(f"restore: {peer} takes {made.ratio:.2f} times as long")
        pairs.append(made)
        return made

    raw = "restore to a raw file"
    pair(
        "restore-convert",
        raw,
        "qemu-img convert from zstd qcow2, -m16 -W",
        (work.ours, work.convert),
        least=2.0,
        formats=("raw", "raw"),
    )
    if not setting.quick:
        pair(
            "restore-virtnbdrestore",
            raw,
            "virtnbdrestore 1.9.15 (to qcow2)",
            (work.ours, work.virtnbdrestore),
            least=6.0,
            formats=("raw", "qcow2"),
        )
    with served(setting.disk, setting.folder / "serve"):
        source = f"nbd+unix:///?socket={setting.folder / 'serve'}"
        pair(
            "restore-nbd",
            "restore into qcow2 through NBD",
            "nbdcopy from the uncompressed disk",
            (work.ours_into_export, lambda: work.nbdcopy_into_export(source)),
            least=0.9,
            formats=("qcow2", "qcow2"),
        )
    results.pairs["restore"] = pairs
    peak = max(run.rss or 0 for made in pairs for run in made.ours.runs)
    results.bounds["restore"] = [
        Bound(
            key="restore-rss",
            what="restore, peak RSS",
            limit=128 << 20,
            shown_limit="128 MiB at most",
            value=peak,
            shown=f"{peak / (1 << 20):.0f} MiB",
        )
    ]
    for name in ("repository", "virtnbdbackup", "restored", "converted"):
        shutil.rmtree(setting.folder / name, ignore_errors=True)
    work.packed.unlink()
