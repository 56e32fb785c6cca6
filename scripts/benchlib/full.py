"""Full backups: nbdpull, the limit of the machine, and each peer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.benchlib.domain import Domain
from scripts.benchlib.measure import Usage, folder_size, measure, measured_work, run, warm
from scripts.benchlib.rows import Bound, Pair, Results, Side
from scripts.benchlib.setting import NBDPULL, Setting, backup, decrypting, fresh_repository, say
from scripts.benchlib.testdisk import sample

__all__ = ["cores", "full", "profile_line", "served"]

_MIB = 1 << 20


class _Full:
    def __init__(self, setting: Setting, domain: Domain) -> None:
        self.setting = setting
        self.domain = domain
        self.socket = setting.folder / "serve"
        self.result: dict[str, Any] = {}
        self.encrypted_result: dict[str, Any] = {}
        self.repository = setting.folder / "repository"

    # -- ours --------------------------------------------------------------------------------------

    def ours(self) -> Usage:
        self.repository = fresh_repository(self.setting, "repository")
        usage, self.result = backup(
            self.domain.uri, self.repository, "copy", server=self.domain.pid
        )
        return usage

    def encrypted(self) -> Usage:
        key = self.setting.folder / "key"
        repository = fresh_repository(self.setting, "encrypted", key=key)
        usage, self.encrypted_result = backup(
            self.domain.uri, repository, "copy", server=self.domain.pid, key=key
        )
        return usage

    def check_encrypted(self) -> None:
        self.check_ours(self.setting.folder / "encrypted", decrypting())

    def check_ours(self, repository: Path | None = None, before: Sequence[str] = ()) -> None:
        target = self.setting.fresh("restored")
        source = repository or self.repository
        run([*before, NBDPULL, "restore", "latest", "-r", source, "--to", target, "-q"])
        (image,) = target.glob("*.raw")
        self.setting.same(image, "raw")
        shutil.rmtree(target)

    # -- peers -------------------------------------------------------------------------------------

    def virtnbdbackup(self) -> Usage:
        target = self.setting.fresh("virtnbdbackup")
        usage, _ = measure(
            [
                *("virtnbdbackup", "-d", self.domain.name, "-l", "copy", "-z", "-n"),
                *("-o", target, "-S", self.setting.folder),
            ],
            server=self.domain.pid,
        )
        return replace(usage, stored=folder_size(target))

    def check_virtnbdbackup(self) -> None:
        target = self.setting.fresh("restored")
        source = self.setting.folder / "virtnbdbackup"
        run(["virtnbdrestore", "-i", source, "-o", target, "-n", "-L", "/dev/null"])
        (image,) = [path for path in target.iterdir() if path.suffix != ".xml"]
        self.setting.same(image, "qcow2")
        shutil.rmtree(target)

    def convert(self) -> Usage:
        target = self.setting.fresh("convert") / "disk.qcow2"
        usage, _ = measure(
            [
                *(
                    "qemu-img",
                    "convert",
                    "-U",
                    "-c",
                    "-o",
                    "compression_type=zstd",
                    "-m",
                    "16",
                    "-W",
                ),
                *("-f", "qcow2", "-O", "qcow2", self.domain.disk, target),
            ]
        )
        return replace(usage, stored=folder_size(target))

    def push(self, *, compress: bool) -> Usage:
        target = self.setting.fresh("push") / "disk.qcow2"
        usage = measured_work(
            lambda: self.domain.push(target, compress=compress), server=self.domain.pid
        )
        return replace(usage, stored=folder_size(target))

    def pipe(self, command: str, target: Path) -> Usage:
        """A program that takes the disk's bytes on standard input, zeroes and holes included."""
        line = f"nbdcopy '{self.nbd}' - | {command}"
        usage, _ = measure(["bash", "-o", "pipefail", "-c", line])
        return replace(usage, stored=folder_size(target), read=self.setting.size)

    def zstd(self) -> Usage:
        target = self.setting.fresh("zstd") / "disk.zst"
        return self.pipe(f"zstd -q -1 -T{cores()} -o '{target}'", target)

    def restic(self) -> Usage:
        target = self.setting.fresh("restic")
        os.environ["RESTIC_PASSWORD"] = "bench"  # noqa: S105 - of a repository that lives seconds
        run(["restic", "-q", "init", "-r", target])
        return self.pipe(
            f"restic -q -r '{target}' --no-cache backup --stdin --stdin-filename disk", target
        )

    def borg(self) -> Usage:
        target = self.setting.fresh("borg")
        os.environ["BORG_BASE_DIR"] = str(self.setting.folder / "borg-home")
        os.environ["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
        run(["borg", "init", "-e", "none", target])
        return self.pipe(f"borg create -C zstd,1 '{target}::a' -", target)

    def piped_back(self, command: str) -> None:
        """Check that a program gives back what it was piped."""
        line = f"{command} | cmp - '{self.setting.raw}'"
        run(["bash", "-o", "pipefail", "-c", line])

    # -- the limit ---------------------------------------------------------------------------------

    def limit(self, server: int) -> Usage:
        """What the cores need at least: compressing alone, and moving the bytes alone."""
        copied, _ = measure(["nbdcopy", "--connections=4", self.nbd, "null:"], server=server)
        packed = subprocess.run(
            ["zstd", "-b1", "-i2", f"-B{_MIB}", self.setting.folder / "sample"],
            capture_output=True,
            text=True,
            check=True,
        )
        # "1#sample : 536870912 -> 203161234 (x2.643), 512.3 MB/s, 1500.1 MB/s": the last line counts.
        rates = re.findall(r"([0-9.]+) MB/s", packed.stdout + packed.stderr)
        used = int(self.result["disks"][0]["read_bytes"])
        moving_s = copied.client_cpu_s + (copied.server_cpu_s or 0.0)
        packing_s = used / (float(rates[-2]) * 1e6)
        return Usage(wall_s=(packing_s + moving_s) / cores(), client_cpu_s=packing_s + moving_s)

    def copy(self, server: int) -> Usage:
        """Moving the bytes to nowhere."""
        usage, _ = measure(["nbdcopy", "--connections=4", self.nbd, "null:"], server=server)
        return replace(usage, read=self.setting.size)

    @property
    def nbd(self) -> str:
        """The disk's export for programs that only know NBD."""
        return f"nbd+unix:///?socket={self.socket}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def full(setting: Setting, results: Results) -> None:
    """Measure full backups."""
    disk = setting.folder / "vm.qcow2"
    shutil.copyfile(setting.disk, disk)
    sample(setting.raw, setting.folder / "sample", min(setting.size // 8, 512 << 20))
    with Domain("bench", disk, setting.folder / "domain") as domain:
        work = _Full(setting, domain)
        with served(disk, work.socket) as server:
            _pairs(setting, work, server, results)
    disk.unlink()


def _pairs(setting: Setting, work: _Full, server: int, results: Results) -> None:
    warm(work.domain.disk)
    work.ours()  # makes `result`, and loads every library once
    work.check_ours()
    pairs: list[Pair] = []

    def pair(
        key: str,
        peer: str,
        run_peer: Callable[[], Usage],
        *,
        least: float | None = None,
        rounds: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> Pair:
        say(f"full: nbdpull and {peer}")
        own, theirs = setting.alternate(work.ours, run_peer, rounds=rounds)
        work.check_ours()
        if check is not None:
            check()
        made = Pair(
            key=key,
            what="full backup",
            ours=Side("nbdpull", own),
            peer=Side(peer, theirs),
            least=least,
        )
        pairs.append(made)
        say(f"full: {peer} takes {made.ratio:.2f} times as long")
        return made

    folder = setting.folder
    pair("full-limit", f"limit of {cores()} cores", lambda: work.limit(server), least=0.85)
    plain = pair(
        "full-push",
        "QEMU push, not compressed (as qmpbackup)",
        lambda: work.push(compress=False),
        least=1.0,
        check=lambda: setting.same(folder / "push" / "disk.qcow2", "qcow2"),
    )
    pair(
        "full-convert",
        "qemu-img convert, zstd, -m16 -W",
        work.convert,
        least=3.0,
        check=lambda: setting.same(folder / "convert" / "disk.qcow2", "qcow2"),
    )
    if not setting.quick:
        pair(
            "full-virtnbdbackup",
            "virtnbdbackup 1.9.15, lz4",
            work.virtnbdbackup,
            least=3.0,
            check=work.check_virtnbdbackup,
        )
        slow = min(2, setting.rounds)
        pair(
            "full-push-compress",
            "QEMU push, compressed (as qmpbackup --compress)",
            lambda: work.push(compress=True),
            least=8.0,
            rounds=slow,
            check=lambda: setting.same(folder / "push" / "disk.qcow2", "qcow2"),
        )
        archive = folder / "zstd" / "disk.zst"
        pair(
            "full-pipe",
            "nbdcopy \\| zstd -1, all cores",
            work.zstd,
            rounds=slow,
            check=lambda: work.piped_back(f"zstd -dc '{archive}'"),
        )
        pair(
            "full-restic",
            "nbdcopy \\| restic (no encryption off switch)",
            work.restic,
            rounds=slow,
            check=lambda: work.piped_back(
                f"restic -q -r '{folder / 'restic'}' --no-cache dump latest disk"
            ),
        )
        pair(
            "full-borg",
            "nbdcopy \\| borg, zstd 1, not encrypted",
            work.borg,
            rounds=slow,
            check=lambda: work.piped_back(f"borg extract --stdout '{folder / 'borg'}::a'"),
        )
    say("full: with encryption and without")
    own, plain_again = setting.alternate(work.encrypted, work.ours)
    work.check_encrypted()
    encrypted = Pair(
        key="full-encrypted",
        what="full backup, encrypted",
        ours=Side("nbdpull, encrypted", own),
        peer=Side("nbdpull, not encrypted", plain_again),
        least=0.95,
    )
    pairs.append(encrypted)
    say(f"full: without encryption it takes {encrypted.ratio:.2f} times as long")
    pair("full-copy", "nbdcopy to nowhere (no backup)", lambda: work.copy(server))
    results.pairs["full"] = pairs
    half = _ratio(plain, lambda usage: usage.stored)
    peak = max(run.rss or 0 for made in pairs for run in made.ours.runs)
    results.bounds["full"] = [
        Bound(
            key="full-stored",
            what="full backup, bytes stored against the uncompressed push",
            limit=0.5,
            shown_limit="less than half",
            value=half,
            shown=f"{half:.2f}",
        ),
        Bound(
            key="full-rss",
            what="full backup, peak RSS",
            limit=128 << 20,
            shown_limit="128 MiB at most",
            value=peak,
            shown=f"{peak / _MIB:.0f} MiB",
        ),
    ]
    results.tables["profile-full"] = profile_line("full", work.result)
    results.tables["profile-encrypted"] = profile_line("full, encrypted", work.encrypted_result)
    for name in (
        "push",
        "convert",
        "virtnbdbackup",
        "zstd",
        "restic",
        "borg",
        "repository",
        "encrypted",
    ):
        shutil.rmtree(folder / name, ignore_errors=True)


def _ratio(pair: Pair, of: Callable[[Usage], float | None]) -> float:
    ours, peer = pair.ours.median(of), pair.peer.median(of)
    if ours is None or not peer:
        raise RuntimeError(f"{pair.key}: not measured")
    return ours / peer


def profile_line(what: str, result: dict[str, Any]) -> str:
    """Where the time of a backup went, by its own account: a row of a table."""
    profile = result.get("profile")
    if profile is None:
        return ""
    parts = ("source_s", "hash_s", "compress_s", "encrypt_s", "store_s")
    cells = " | ".join(f"{profile[name]:.2f}" for name in parts)
    return (
        f"| {what} | {result['duration_s']:.2f} | {profile['workers']} | {cells} |"
        f" {profile['requests']:,} |"
    )


@contextmanager
def served(disk: Path, socket: Path, *more: str) -> Iterator[int]:
    """A read-only qemu-nbd of a disk that a VM has open as well; its pid."""
    socket.unlink(missing_ok=True)
    options = f"driver=qcow2,force-share=on,file.driver=file,file.filename={disk}"
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *("qemu-nbd", "--read-only", "--persistent", "--shared=16", f"--socket={socket}"),
            *(*more, "--image-opts", options),
        ]
    )
    try:
        deadline = time.monotonic() + 20
        while not socket.is_socket():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"qemu-nbd of {disk} did not start")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)
