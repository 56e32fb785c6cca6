"""Back up a sparse disk with scattered data, and measure what list, verify and restore take.

The restore goes to `nbdkit null`, which throws away what it is given. Prints the seconds and the most
memory of each verb's process; ends with 1 when one took more than 256 MiB, or failed.
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
from pathlib import Path

import numpy as np

from nbdpull.model.grain import GRAIN, SEGMENT, Kind, segment_count, segment_grains
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest
from nbdpull.model.segment import Interval, Segment
from nbdpull.repo.repository import Repository
from tests.repo.helpers import summary_for

_LIMIT_MIB = 256


def build(
    repository: Repository, size: int, frames: int, parent: Manifest | None, seed: int
) -> Manifest:
    """A backup with so many single grains of data at random places of each segment."""
    rng = random.Random(seed)  # noqa: S311
    session = repository.begin(vm="vm", disk="vda", parent=parent)
    reader = repository.reader(parent) if parent is not None else None
    for index in range(segment_count(size)):
        grains = segment_grains(size, index)
        places = sorted(rng.sample(range(grains - 1), frames))
        kinds = np.full(grains, Kind.CLEAN, dtype=np.uint8)
        kinds[places] = Kind.DATA
        rows = []
        for place in places:
            raw = f"{seed} {index} {place} ".encode() * 4096
            ref = session.put(raw[:GRAIN].ljust(GRAIN, b"."))
            rows.append(Interval(place, 1, ref.session, ref.seq, ref.offset, ref.clen, 0, 1))
        under = reader.segment(index) if reader is not None else Segment.empty()
        session.put_segment(index, under.overlay(kinds, rows))
    session.seal()
    summary = summary_for(session, size=size, backup=BackupId(f"{seed:016x}"), time=float(seed))
    return session.commit(summary)


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


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/memory", description=__doc__)
    parser.add_argument("--tib", type=float, default=16.0, help="size of the disk (16)")
    parser.add_argument("--frames", type=int, default=4, help="in each GiB and backup (4)")
    parser.add_argument("--backups", type=int, default=3, help="how many (3)")
    options = parser.parse_args()
    size = int(options.tib * (1 << 40)) // SEGMENT * SEGMENT
    found: dict[str, object] = {"size": size, "frames": options.frames * segment_count(size)}
    with tempfile.TemporaryDirectory() as folder:
        location = f"{folder}/repo"
        Repository.create(location)
        repository = Repository.open(location, write=True)
        manifest = None
        began = time.monotonic()
        for seed in range(1, options.backups + 1):
            manifest = build(repository, size, options.frames, manifest, seed)
        found["build_s"] = round(time.monotonic() - began, 1)
        stored = sum(path.stat().st_size for path in Path(location).rglob("*") if path.is_file())
        found["stored_bytes"] = stored
        nbdpull = [str(Path(".venv/bin/nbdpull").absolute())]
        for level in ("list", "sample", "full"):
            found[f"verify {level}"] = measured(
                *nbdpull, "verify", "-r", location, "-l", level, "-q"
            )
        found["list"] = measured(*nbdpull, "list", "-r", location)
        socket = f"{folder}/s"
        server = subprocess.Popen(
            ["nbdkit", "-f", "-U", socket, "--exit-with-parent", "null", f"size={size}"]
        )
        while not Path(socket).exists():
            time.sleep(0.1)
        target = f"nbd+unix:///?socket={socket}"
        restore = ["restore", "latest", "-r", location, "--to", target, "-q"]
        found["restore"] = measured(*nbdpull, *restore)
        server.terminate()
        server.wait()
    print(json.dumps(found, indent=2))
    runs = [one for one in found.values() if isinstance(one, dict)]
    good = all(one["exit_code"] == 0 and one["max_rss_mib"] < _LIMIT_MIB for one in runs)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
