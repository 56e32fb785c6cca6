"""The command line of scripts/bench."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nbdpull.units import parse_size
from scripts.benchlib.domain import private_libvirtd
from scripts.benchlib.full import full
from scripts.benchlib.guest import guest
from scripts.benchlib.incremental import incremental
from scripts.benchlib.measure import run
from scripts.benchlib.quick import compare
from scripts.benchlib.report import machine, page, targets
from scripts.benchlib.restore import restore
from scripts.benchlib.rows import Results
from scripts.benchlib.setting import Lock, Setting, say
from scripts.benchlib.sparse import scale, status
from scripts.benchlib.start import start
from scripts.benchlib.stores import stores
from scripts.benchlib.testdisk import build

_PACKAGES = (
    *("borgbackup", "libnbd-bin", "libvirt-clients", "libvirt-daemon-system", "python3-libvirt"),
    *("python3-lz4", "qemu-utils", "restic", "time", "virtnbdbackup", "zstd"),
)
_GROUPS = {
    "start": start,
    "status": status,
    "full": full,
    "incremental": incremental,
    "restore": restore,
    "s3": stores,
    "scale": scale,
    "guest": guest,
}
_QUICK = ("start", "status", "full", "restore")
_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "performance.md"
_FIGURES = _ROOT / "docs" / "performance.json"
_QUICK_FIGURES = Path(__file__).with_name("quick.json")


def _install() -> None:
    missing = [
        package
        for package in _PACKAGES
        if subprocess.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Status}", package],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        != "installed"
    ]
    if not missing:
        return
    say(f"installing what is compared with: {' '.join(missing)}")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    run(["apt-get", "-o", "DPkg::Lock::Timeout=300", "update"])
    # Installing libvirtd must not start the system's own: ours is private.
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
        policy.chmod(0o755)
    try:
        install = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y"]
        run([*install, "--no-install-recommends", *missing])
    finally:
        if made:
            policy.unlink()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("--size", type=parse_size, default=4 << 30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Measure, and write down."""
    # So that the VM, libvirtd and the folders go when it is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = _options()
    wanted = [name for name in options.only.split(",") if name] or list(
        _QUICK if options.quick else _GROUPS
    )
    unknown = set(wanted) - set(_GROUPS)
    if unknown:
        print(f"bench: there is no group {', '.join(unknown)}; see --help", file=sys.stderr)
        return 2
    _install()
    size = (1 << 30) if options.quick else options.size
    say("the test disk")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbdpull" / "bench"
    disk = build(cache, size)
    folder = Path(tempfile.mkdtemp(prefix="nbdpull-bench-", dir=options.folder))
    results = Results() if options.quick else Results.load(_FIGURES)
    head = machine(folder)
    try:
        raw = folder / "disk.raw"
        run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, raw])
        setting = Setting(
            folder=folder,
            disk=disk,
            raw=raw,
            size=size,
            rounds=2 if options.quick else options.rounds,
            lock=Lock(options.lock),
            quick=options.quick,
        )
        with private_libvirtd(folder / "libvirt"):
            for name in wanted:
                began = time.monotonic()
                try:
                    _GROUPS[name](setting, results)
                finally:
                    setting.lock.release()
                results.times[name] = time.strftime("%Y-%m-%d", time.gmtime())
                if not options.quick:
                    # At once: what a long run has measured is not lost with it.
                    results.save(_FIGURES)
                    page(_PAGE, results, head)
                say(f"{name} took {time.monotonic() - began:.0f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(targets(results))
    if options.quick:
        return compare(results, _QUICK_FIGURES, record=options.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
