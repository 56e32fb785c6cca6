#!/usr/bin/env python3
"""Measure what encryption costs a full backup: the same frames put with it and without, in turn.

    .venv/bin/python scripts/bench_encryption.py [--size MIB] [--rounds N] [--threads N] [--folder FOLDER] [FILE]

FILE is a disk image, or anything like one; without it the bytes are made: a mix of text that packs, of
program code, and of what does not pack. Frames are put by threads as a pull does, at compression level 1, into
a repository below FOLDER (default: /dev/shm, so that no disk is measured). Each round does both, and who begins
changes. The figures are of each round, and the medians of their ratios: of speed, which other load disturbs, and
of processor time, which it hardly does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdpull.model.crypto import Kdf, KdfName
from nbdpull.model.grain import FRAME_MAX
from nbdpull.repo.repository import Repository

CHEAP = Kdf(KdfName.ARGON2ID, memory_kib=8, passes=1, lanes=1)


def made(size: int) -> bytes:
    """Bytes that pack to about 0.4, as file systems with programs and data do."""
    rng = random.Random(1)  # noqa: S311 - test data
    code = b"".join(
        path.read_bytes() for path in itertools.islice(Path(os.__file__).parent.rglob("*.py"), 400)
    )
    binary = Path(sys.executable).resolve().read_bytes()
    out = bytearray()
    while len(out) < size:
        source = rng.choice((code, binary, binary, b""))
        length = rng.randrange(64 << 10, 1 << 20)
        if source:
            at = rng.randrange(max(1, len(source) - length))
            out += source[at : at + length]
        else:
            out += rng.randbytes(length // 2)
    return bytes(out[:size])


def put_all(
    folder: Path, data: memoryview, threads: int, *, encrypted: bool
) -> tuple[float, float, int]:
    """Seconds that it takes, seconds of processor time, and bytes stored."""
    root = folder / ("encrypted" if encrypted else "plain")
    repository = Repository.create(str(root), password=b"x" if encrypted else None, kdf=CHEAP)
    session = repository.begin(vm="vm", disk="vda", parent=None)
    frames = iter(range(0, len(data), FRAME_MAX))

    def work() -> None:
        buffer = bytearray(FRAME_MAX)
        for at in frames:
            frame = memoryview(buffer)[: len(data[at : at + FRAME_MAX])]
            frame[:] = data[at : at + FRAME_MAX]
            session.put(frame)

    began, began_cpu = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    session.seal()
    took, took_cpu = time.monotonic() - began, time.process_time() - began_cpu
    shutil.rmtree(root)
    return took, took_cpu, session.stored_bytes


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2 * len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))  # noqa: S108
    options = parser.parse_args()
    size = options.size << 20
    if options.file is None:
        raw = made(size)
    else:
        with options.file.open("rb") as file:
            raw = file.read(size)
    data = memoryview(raw)
    ratios: list[float] = []
    cpu_ratios: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number in range(options.rounds):
            speed: dict[bool, float] = {}
            cpu: dict[bool, float] = {}
            stored = 0
            for encrypted in (False, True) if number % 2 else (True, False):
                took, cpu[encrypted], stored = put_all(
                    Path(folder), data, options.threads, encrypted=encrypted
                )
                speed[encrypted] = len(data) / took / 1e6
            ratios.append(speed[True] / speed[False])
            cpu_ratios.append(cpu[False] / cpu[True])
            print(
                f"plain {speed[False]:7.1f} MB/s {cpu[False]:6.2f} s   encrypted {speed[True]:7.1f} MB/s"
                f" {cpu[True]:6.2f} s   ratio {ratios[-1]:.3f}, of processor time {cpu_ratios[-1]:.3f}"
                f"   packs to {stored / len(data):.3f}"
            )
    print(
        f"{len(data) >> 20} MiB, {options.threads} threads: median ratio {statistics.median(ratios):.3f},"
        f" of processor time {statistics.median(cpu_ratios):.3f}"
    )


if __name__ == "__main__":
    main()
