"""Back up a sparse disk with scattered data, restore it, and measure what each verb takes.

The disk is a file in memory behind `nbdkit file`: in each GiB some grains hold 4 KiB of data, and each backup
finds more of them. Each verb is a process of its own. In the end the restored disk is compared with the
disk. Prints the seconds and the most memory of each process as JSON; ends with 1 when one took more than
256 MiB, or failed, or a byte differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nbdpull.model.grain import GRAIN, SEGMENT, segment_count
from nbdpull.repo.repository import Repository

_LIMIT_MIB = 256
_BLOCK = 4096
_PIECE = 1 << 20


def scatter(disk: Path, size: int, frames: int, rng: random.Random) -> None:
    """Write to so many random grains of each GiB."""
    with disk.open("r+b") as file:
        for index in range(segment_count(size)):
            for grain in rng.sample(range(SEGMENT // GRAIN), frames):
                file.seek(index * SEGMENT + grain * GRAIN + rng.randrange(GRAIN // _BLOCK) * _BLOCK)
                file.write(rng.randbytes(_BLOCK))


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data: offset and end."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # none behind this
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def differences(one: Path, other: Path, size: int) -> int:
    """How many pieces of two sparse files differ."""
    found = 0
    with one.open("rb") as first, other.open("rb") as second:
        fds = first.fileno(), second.fileno()
        for mine, others in (fds, fds[::-1]):
            for start, end in extents(mine, size):
                for at in range(start, end, _PIECE):
                    length = min(_PIECE, end - at)
                    found += os.pread(mine, length, at) != os.pread(others, length, at)
    return found


def measured(*command: str) -> dict[str, object]:
    """Run a command; its exit code, seconds and most memory."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": process.returncode,
        "s": round(time.monotonic() - began, 1),
        "max_rss_mib": usage.ru_maxrss >> 10,
    }


def run(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """All verbs on one disk."""
    size = int(options.tib * (1 << 40)) // SEGMENT * SEGMENT
    found: dict[str, object] = {"size": size, "seed": options.seed}
    location, disk, socket = str(folder / "repo"), folder / "disk", folder / "s"
    Repository.create(location)
    disk.touch()
    os.truncate(disk, size)
    nbdpull = str(Path(".venv/bin/nbdpull").absolute())
    rng = random.Random(options.seed)  # noqa: S311
    server = subprocess.Popen(["nbdkit", "-f", "-r", "-U", socket, "file", disk])
    try:
        while not socket.exists():
            time.sleep(0.1)
        source = f"vda=nbd+unix:///?socket={socket}"
        for number in range(1, options.backups + 1):
            scatter(disk, size, options.frames, rng)
            found[f"backup {number}"] = measured(
                nbdpull, "backup", source, "--vm", "big", "-r", location, "-q"
            )
    finally:
        server.terminate()
        server.wait()
    files = [path for path in Path(location).rglob("*") if path.is_file()]
    found["data_bytes"] = disk.stat().st_blocks * 512
    found["stored_bytes"] = sum(path.stat().st_size for path in files)
    found["list"] = measured(nbdpull, "list", "-r", location)
    for level in ("list", "sample", "full"):
        found[f"verify {level}"] = measured(nbdpull, "verify", "-r", location, "-l", level, "-q")
    target = folder / "restored"
    target.mkdir()
    found["restore"] = measured(
        nbdpull, "restore", "latest", "-r", location, "--to", str(target), "-q"
    )
    found["differences"] = differences(disk, target / "vda.raw", size)
    return found


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/memory", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tib", type=float, default=16.0, help="size of the disk (16)")
    parser.add_argument("--frames", type=int, default=2, help="in each GiB and backup (2)")
    parser.add_argument("--backups", type=int, default=2, help="how many (2)")
    parser.add_argument(
        "--folder",
        default="/dev/shm",  # noqa: S108
        help="where it all lies: a file system that has files so large (/dev/shm)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = run(Path(folder), options)
    print(json.dumps(found, indent=2))
    runs = [one for one in found.values() if isinstance(one, dict)]
    good = all(one["exit_code"] == 0 and one["max_rss_mib"] < _LIMIT_MIB for one in runs)
    return 0 if good and not found["differences"] else 1


if __name__ == "__main__":
    sys.exit(main())
