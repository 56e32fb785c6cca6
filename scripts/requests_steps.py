"""What scripts/requests counts: one function a step, so that another verb is one more."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support.disk import Disk, create_disk
from tests.support.process import run
from tests.support.proxy import Exchange, Proxy, proxy
from tests.support.stores import seaweedfs

MIB = 1 << 20
TIB = 1 << 40
CALLS = ("PUT", "GET", "HEAD", "LIST", "DELETE")
WITHIN_S = 4 * 3600.0
NBDPULL = Path(sys.executable).with_name("nbdpull")


@dataclass(slots=True)
class Run:
    """What the steps share.

    Attributes:
        taken: ids of the backups, oldest first.
    """

    folder: Path
    disk: Disk
    repo: str
    rng: random.Random
    data_mib: int
    taken: list[str] = field(default_factory=list)

    @property
    def replica(self) -> str:
        """Where the backups are copied to."""
        return f"{self.repo}-replica"

    def nbdpull(self, verb: str, *arguments: str | Path, repo: str | None = None) -> Any:
        """Run a verb and return its result."""
        where = ["-r", repo or self.repo]
        argv = [NBDPULL, verb, *arguments, *where, "--json"]
        return json.loads(run(argv, timeout_s=WITHIN_S).stdout)

    def copy(self) -> None:
        """Copy all backups into the replica."""
        run([NBDPULL, "copy", self.repo, self.replica], timeout_s=WITHIN_S)

    def backup(self) -> int:
        """Back up; returns the bytes that the source called changed."""
        done = self.nbdpull("backup", f"disk:vda={self.disk.path}", "--scratch", self.folder)
        self.taken.append(done["backup"])
        return int(done["disks"][0]["changed_bytes"])

    def write(self, at_mib: int, size: int) -> None:
        """Overwrite a piece of the image with bytes that don't compress."""
        noise = self.folder / "noise"
        noise.write_bytes(self.rng.randbytes(size))
        run(["qemu-io", "-f", "qcow2", "-c", f"write -s {noise} {at_mib}M {size}", self.disk.path])


def init(test: Run) -> None:
    """A new repository, with the trial listing of 1,100 objects."""
    test.nbdpull("init")


def replica(test: Run) -> None:
    """A new replica of what is empty yet, with the same trial."""
    test.copy()


def full(test: Run) -> None:
    """The first backup."""
    for at in range(0, test.data_mib, 64):
        test.write(at, min(64, test.data_mib - at) * MIB)
    test.backup()


def incremental(test: Run) -> None:
    """64 KiB changed in every 16 MiB."""
    for at in range(0, test.data_mib, 16):
        test.write(at, 64 << 10)
    test.backup()


def unchanged(test: Run) -> None:
    """Nothing changed."""
    test.backup()


def listing(test: Run) -> None:
    """`list` of three backups."""
    test.nbdpull("list")


def verify(test: Run) -> None:
    """Every frame of every backup."""
    test.nbdpull("verify")


def restore(test: Run) -> None:
    """The whole disk, of the last backup."""
    test.nbdpull("restore", test.taken[-1], "--to", test.folder / "restored")


def copy(test: Run) -> None:
    """All three backups into the replica; what is read and what is written."""
    test.copy()


def copied(test: Run) -> None:
    """The same again, with nothing left to copy."""
    test.copy()


def forget(test: Run) -> None:
    """The newest backup."""
    test.nbdpull("forget", test.taken[-1])


def collect(test: Run) -> None:
    """`gc` where everything else is still needed."""
    test.nbdpull("gc", "--undo-window", "0s")


def collect_all(test: Run) -> None:
    """`forget` and `gc` of all backups of the replica."""
    test.nbdpull("forget", *test.taken, repo=test.replica)
    test.nbdpull("gc", "--undo-window", "0s", repo=test.replica)


STEPS: tuple[Callable[[Run], None], ...] = (
    init,
    replica,
    full,
    incremental,
    unchanged,
    listing,
    verify,
    restore,
    copy,
    copied,
    forget,
    collect,
    collect_all,
)

PER_TIB = {full, incremental, verify, restore, copy, collect_all}
"""Steps that cost more when there is more data."""


def main() -> int:
    """Run all steps and print the tables."""
    parser = argparse.ArgumentParser(prog="scripts/requests")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    table = Table(box=None, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for column in (*CALLS, "sent MiB", "received MiB"):
        table.add_column(column, justify="right")
    with (
        tempfile.TemporaryDirectory(prefix="nbdpull-requests-") as name,
        seaweedfs() as server,
        proxy(server.endpoint) as front,
    ):
        os.environ.update(server.env)
        os.environ["AWS_ENDPOINT_URL"] = front.endpoint
        folder = Path(name)
        rng = random.Random(options.seed)  # noqa: S311 - test data
        disk = create_disk(folder, "vda", size=options.mib * MIB)
        repo = f"s3://{server.bucket()}/requests"
        test = Run(folder, disk, repo, rng, options.mib)
        for step in STEPS:
            for cells in count(front, step, test):
                table.add_row(*cells)
    out = Console(highlight=False, width=120)
    out.print(
        f"{options.mib} MiB that don't compress, seed {options.seed}; in brackets for each TiB\n"
    )
    out.print(table)
    return 0


def count(front: Proxy, step: Callable[[Run], None], test: Run) -> list[list[str]]:
    """Do a step; returns its row, or one for each repository where two are at work."""
    front.exchanges.clear()
    step(test)
    seen: list[Exchange] = list(front.exchanges)
    if failed := [one for one in seen if one.status >= 500]:
        raise SystemExit(f"{len(failed)} requests failed, so the counts say nothing: {failed[0]}")
    scale = TIB / (test.data_mib * MIB) if step in PER_TIB else None
    if step not in {copy, copied, replica}:
        return [row(step.__name__, seen, scale)]
    sides: dict[bool, list[Exchange]] = {False: [], True: []}
    for one in seen:
        sides[one.key.startswith("requests-replica")].append(one)
    return [
        row(f"{step.__name__}, {name}", sides[to], scale)
        for name, to in (("from", False), ("to", True))
    ]


def row(name: str, seen: Sequence[Exchange], scale: float | None) -> list[str]:
    """The cells of one row."""
    calls = Counter(one.call for one in seen)
    if unknown := calls.keys() - set(CALLS):
        raise SystemExit(f"requests of an unknown kind: {unknown}")
    cells = [str(calls[call]) for call in CALLS]
    if scale is not None:
        cells = [f"{calls[call]} ({calls[call] * scale:,.0f})" for call in CALLS]
    totals = (sum(one.sent for one in seen), sum(one.received for one in seen))
    return [name, *cells, *(f"{total / MIB:.2f}" for total in totals)]


if __name__ == "__main__":
    sys.exit(main())
