"""Schedules of faults: backups are written and read while a store fails at random."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from nbdpull.errors import RepositoryError, StoreError
from nbdpull.model.grain import GRAIN
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest
from nbdpull.repo.cloud import parse_cloud
from nbdpull.repo.objects import ObjectStore
from nbdpull.repo.patience import Patience
from nbdpull.repo.repository import Repository
from tests.repo.helpers import Changes, backup, grain, restore
from tests.support.proxy import Fault, Proxy, Request

__all__ = ["IMPATIENT", "Outcome", "run_schedule"]

IMPATIENT = Patience(
    connect_s=2.0, small_s=0.7, bulk_s=2.0, retry_s=4.0, first_s=2.0, pause_s=0.01, pause_max_s=0.1
)
_GRAINS = 24


@dataclass(slots=True)
class Outcome:
    """What became of the backups of one schedule."""

    committed: int = 0
    failed: int = 0
    faults: int = 0


def run_schedule(
    location: str, front: Proxy, env: Mapping[str, str], seed: int, *, backups: int = 4
) -> Outcome:
    """Write backups one on the other while requests fail, then read them all from the store itself.

    Every backup that was acknowledged must restore to the byte; one that was not may be there, and
    then must restore to the byte, too.

    Raises:
        AssertionError: one does not.
    """
    rng = random.Random(seed)
    lock = threading.Lock()
    outcome = Outcome()
    share = rng.choice([0.02, 0.1, 0.3])
    # A bit that flips in a listing or an error is nothing that a client can see.
    kinds = [fault for fault in Fault if fault is not Fault.FLIP]

    def plan(request: Request) -> Fault | None:
        with lock:
            flip = "list-type" not in request.query and "/d/" in request.path and rng.random() < 0.1
            if rng.random() >= share:
                return None
            outcome.faults += 1
            return Fault.FLIP if flip else rng.choice(kinds)

    repository = Repository.open(location, write=True)
    repository._store = ObjectStore(
        parse_cloud(location, {**env, "AWS_ENDPOINT_URL": front.endpoint}), patience=IMPATIENT
    )
    size = _GRAINS * GRAIN
    disk = bytearray(size)
    parent: Manifest | None = None
    wrote: dict[BackupId, bytes] = {}
    acknowledged: set[BackupId] = set()
    for number in range(backups):
        changes: dict[int, bytes | None] = {
            at: grain(rng.randrange(1 << 30)) if rng.random() < 0.8 else None
            for at in rng.sample(range(_GRAINS), 6 if parent else _GRAINS)
        }
        new = bytearray(disk)
        _apply(new, changes)
        own = BackupId(f"{seed:08x}{number:08x}")
        wrote[own] = bytes(new)
        front.plan = plan
        try:
            parent = backup(repository, size, changes, parent, backup=own, time=float(number))
        except (StoreError, RepositoryError):
            outcome.failed += 1
            if parent is None:
                continue
        else:
            outcome.committed += 1
            acknowledged.add(own)
            disk = new
        finally:
            front.plan = lambda _request: None
    _check(location, wrote, acknowledged)
    return outcome


def _apply(disk: bytearray, changes: Changes) -> None:
    for at, raw in changes.items():
        disk[at * GRAIN : (at + 1) * GRAIN] = raw or bytes(GRAIN)


def _check(location: str, wrote: Mapping[BackupId, bytes], acknowledged: set[BackupId]) -> None:
    """Read everything back from the store itself."""
    found = {summary.backup: summary for summary in Repository.open(location).summaries()}
    assert acknowledged <= found.keys(), f"lost: {acknowledged - found.keys()}"
    repository = Repository.open(location)
    for own, summary in found.items():
        content = restore(repository.reader(repository.manifest(summary)))
        assert content == wrote[own], f"backup {own} is not what was written"
