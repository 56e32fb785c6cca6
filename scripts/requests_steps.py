"""What scripts/requests counts: one function a step, so that another verb is one more."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
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

    def nbdpull(self, verb: str, *arguments: str | Path) -> Any:
        """Run a verb and return its result."""
        return json.loads(run([NBDPULL, verb, *arguments, "-r", self.repo, "--json"]).stdout)

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


STEPS: tuple[Callable[[Run], None], ...] = (
    init,
    full,
    incremental,
    unchanged,
    listing,
    verify,
    restore,
)

PER_TIB = {full, incremental, verify, restore}
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
            table.add_row(step.__name__, *count(front, step, test))
    out = Console(highlight=False, width=120)
    out.print(
        f"{options.mib} MiB that don't compress, seed {options.seed}; in brackets for each TiB\n"
    )
    out.print(table)
    return 0


def count(front: Proxy, step: Callable[[Run], None], test: Run) -> list[str]:
    """Do a step; returns its row."""
    front.exchanges.clear()
    step(test)
    seen: list[Exchange] = list(front.exchanges)
    calls: Counter[str] = front.calls()
    if unknown := calls.keys() - set(CALLS):
        raise SystemExit(f"requests of an unknown kind: {unknown}")
    if failed := [one for one in seen if one.status >= 500]:
        raise SystemExit(f"{len(failed)} requests failed, so the counts say nothing: {failed[0]}")
    scale = TIB / (test.data_mib * MIB)
    cells = [str(calls[call]) for call in CALLS]
    if step in PER_TIB:
        cells = [f"{calls[call]} ({calls[call] * scale:,.0f})" for call in CALLS]
    totals = (sum(one.sent for one in seen), sum(one.received for one in seen))
    return [*cells, *(f"{total / MIB:.2f}" for total in totals)]


if __name__ == "__main__":
    sys.exit(main())
