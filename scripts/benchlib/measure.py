"""Running one side of a comparison, and what it took."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Usage",
    "folder_size",
    "measure",
    "measured_work",
    "memory_peak",
    "quiet",
    "run",
    "settled",
    "warm",
]

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one run took; None where it can't be told.

    Attributes:
        client_cpu_s: user and system time of the program and its children.
        server_cpu_s: the same of the QEMU that served the disk, meanwhile, and of a store that was written to.
        rss: the largest resident set of any one process of the program, in bytes.
        read: bytes that it read from the disk.
        stored: bytes of what it made.
        requests: NBD requests.
    """

    wall_s: float
    client_cpu_s: float = 0.0
    server_cpu_s: float | None = None
    rss: int | None = None
    read: int | None = None
    stored: int | None = None
    requests: int | None = None

    def to_json(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


def run(argv: Sequence[str | Path], *, timeout_s: float = 1200.0) -> str:
    """Run a command that is not measured; its standard output.

    Raises:
        RuntimeError: it failed; what it said is in the message.
    """
    done = subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        line = " ".join(map(str, argv))
        raise RuntimeError(f"{line} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def quiet() -> None:
    """Let what the run before left in the page cache reach the disk first."""
    os.sync()


def settled(image: Path) -> Path:
    """The image, once nobody writes to it any more: virtnbdrestore ends before its qemu-nbd does."""
    for _ in range(300):
        if not subprocess.run(
            ["qemu-img", "info", image], capture_output=True, check=False
        ).returncode:
            return image
        time.sleep(0.1)
    raise RuntimeError(f"{image} is still being written to")


def warm(path: Path) -> None:
    """Have a file in the page cache, for both sides alike."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def _cpu(server: int | Sequence[int] | None) -> float | None:
    if server is None:
        return None
    return sum(_cpu_of(pid) for pid in ([server] if isinstance(server, int) else server))


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory_peak(pid: int) -> int:
    """The largest resident set of a running process so far, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def folder_size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(found.stat().st_size for found in path.rglob("*") if found.is_file())


def measure(
    argv: Sequence[str | Path],
    *,
    server: int | Sequence[int] | None = None,
    ok: Sequence[int] = (0,),
) -> tuple[Usage, str]:
    """Run a command and tell what it took, and its standard output.

    Raises:
        RuntimeError: it ended with another code than one of `ok`.
    """
    # A child begins with the resident set of whoever forked it, and keeps that as its peak: so it is
    # forked by the small time(1).
    with tempfile.NamedTemporaryFile() as report, tempfile.TemporaryFile() as out:
        line = ["time", "-q", "-f", "%U %S %M", "-o", report.name, "--", *map(str, argv)]
        before = _cpu(server)
        began = time.perf_counter()
        process = subprocess.Popen(line, stdout=out, stderr=subprocess.PIPE)
        _, errors = process.communicate()
        wall_s = time.perf_counter() - began
        after = _cpu(server)
        out.seek(0)
        text = out.read().decode(errors="replace")
        if process.returncode not in ok:
            said = errors.decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}: {said}{text}")
        user, system, kib = Path(report.name).read_text(encoding="ascii").split()
    usage = Usage(
        wall_s=wall_s,
        client_cpu_s=float(user) + float(system),
        rss=int(kib) << 10,
        server_cpu_s=None if before is None or after is None else after - before,
    )
    return usage, text


def measured_work(work: Callable[[], None], *, server: int) -> Usage:
    """What work took that the server does by itself."""
    before = _cpu(server) or 0.0
    began = time.perf_counter()
    work()
    wall_s = time.perf_counter() - began
    return Usage(wall_s=wall_s, server_cpu_s=(_cpu(server) or 0.0) - before)
