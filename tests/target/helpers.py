"""What several tests of targets share."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdpull.target.base import Target

GRAIN = 64 * 1024
MIB = 1024 * 1024


def wait_for_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until `process` listens on the unix socket `path`."""
    deadline = time.monotonic() + 10
    while not _listens(path):
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody, hopefully `process`, listens on the TCP port; without a connection to it."""
    deadline = time.monotonic() + 10
    while f":{port:04X} 00000000:0000 0A" not in Path("/proc/net/tcp").read_text(encoding="ascii"):
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)


def _listens(path: Path) -> bool:
    """The file is there before anybody listens; /proc/net/unix has 0x10000 (SO_ACCEPTCON) for who does."""
    table = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in table)


def random_bytes(size: int, seed: int = 0) -> bytes:
    """The same for the same seed, and without a zero block in it."""
    return random.Random(seed).randbytes(size)


def names(folder: Path) -> list[str]:
    """The folder's files, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def disk_bytes(size: int, seed: int = 1) -> bytes:
    """A disk with data, zero ranges of many lengths, and zeroes inside data."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        length = rng.choice([512, 4096, 40000, GRAIN, 3 * GRAIN, MIB])
        out += bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    del out[size:]
    return bytes(out)


def pieces(disk: bytes) -> Iterator[tuple[int, int, bool]]:
    """(start, end, zero) as a restore gives them: whole grains, data of at most 1 MiB."""
    position = 0
    while position < len(disk):
        end = position
        while end < len(disk) and not any(disk[end : end + GRAIN]):
            end += GRAIN
        if end > position:
            end = min(end, len(disk))
            yield position, end, True
            position = end
            continue
        while end < len(disk) and end - position < MIB and any(disk[end : end + GRAIN]):
            end += GRAIN
        end = min(end, len(disk))
        yield position, end, False
        position = end


def fill(target: Target, disk: bytes, *, threads: int = 4) -> None:
    """Write the whole disk with several threads, in order of their start."""

    def put(piece: tuple[int, int, bool]) -> None:
        start, end, zero = piece
        if zero:
            target.zero(start, end - start)
        else:
            target.write(start, disk[start:end])

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(put, piece) for piece in pieces(disk)]:
            done.result()
    target.finish()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def same(raw: Path, qcow2: Path) -> bool:
    """Whether QEMU reads the same out of both, and finds nothing wrong with the qcow2 file."""
    compare = ["qemu-img", "compare", "-q", "-U", "-f", "raw", "-F", "qcow2", str(raw), str(qcow2)]
    subprocess.run(["qemu-img", "check", "-q", "-U", "-f", "qcow2", str(qcow2)], check=True)
    return subprocess.run(compare, check=False).returncode == 0
