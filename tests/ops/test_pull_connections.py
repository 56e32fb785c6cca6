"""A pull whose readers have several connections each."""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdpull.ops.pull import DiskPull, pull
from nbdpull.repo.repository import Repository
from tests.ops.pulling import MIB, content, served, summary_of, write

SIZE = 24 * MIB + 512


@pytest.mark.parametrize("connections", [1, 2, 3])
def test_disks_are_read_to_the_byte(tmp_path: Path, connections: int) -> None:
    """Frames of every length, at every place, of three disks at once: readers go from one to another."""
    Repository.create(str(tmp_path / "repo"))
    repository = Repository.open(str(tmp_path / "repo"), write=True)
    rng = random.Random(connections)
    raws, pulls = [], []
    with ExitStack() as stack:
        for number in range(3):
            pieces = {
                rng.randrange(SIZE - 3 * MIB): rng.randbytes(rng.randrange(1, 3 * MIB))
                for _ in range(8)
            }
            raw = write(tmp_path / f"{number}.raw", pieces, size=SIZE)
            session = repository.begin(vm="vm1", disk=f"vd{number}", parent=None)
            pulls.append(
                DiskPull(
                    name=f"vd{number}",
                    size=SIZE,
                    uri=stack.enter_context(served(raw)),
                    context=None,
                    parent=None,
                    session=session,
                    connections=connections,
                )
            )
            raws.append(raw)
        asyncio.run(pull(pulls))
    for raw, one in zip(raws, pulls, strict=True):
        one.session.seal()
        manifest = one.session.commit(summary_of(one.session, SIZE, vm="vm1", disk=one.name))
        assert content(repository, manifest) == raw.read_bytes()
