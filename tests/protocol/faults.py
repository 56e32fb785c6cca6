"""Histories of a repository in an object store that fails: every result is right, or the error is loud.

One after the other, backups, restores, verifying, forgetting, undoing, repacking and collections go through
a proxy that lets requests fail by a plan. Then the store itself is looked at: what was acknowledged is
there and restores exactly, what was not is whole or not there, and the next runs succeed.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Self

from nbdpull.errors import Error
from nbdpull.model.results import Level
from nbdpull.repo import alive
from nbdpull.repo.cloud import parse_cloud
from nbdpull.repo.objects import ObjectStore
from nbdpull.repo.patience import PATIENCE, Patience
from tests.protocol.world import World
from tests.support.proxy import Fault, Past, Proxy, Request
from tests.support.stores import SeaweedFs

__all__ = ["IMPATIENT", "Faults", "Played"]

IMPATIENT: Final = Patience(
    connect_s=2.0,
    small_s=0.3,
    bulk_s=2.0,
    retry_s=0.8,
    first_s=0.8,
    pause_s=0.004,
    pause_max_s=0.05,
)
_SHARES: Final = (0.03, 0.08, 0.2)
_STORM: Final = 40
# What lets a client wait in vain is rare: it is what a schedule's time goes to.
_WEIGHTS: Final = {fault: 1 if fault is Fault.HANG else 4 for fault in Fault}
_UNSEEN: Final = {Fault.FLIP, Fault.STALE}
"""What no client is told of: what it then finds damaged or missing may be whole."""


@dataclass(slots=True)
class Played:
    """What became of a schedule.

    Attributes:
        done, failed: verbs that returned, and that said that they failed.
        faults: how often each happened.
        restored: backups at the end.
    """

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    restored: int = 0

    def __iadd__(self, other: Played) -> Self:
        """Add another one's."""
        self.done += other.done
        self.failed += other.failed
        self.faults += other.faults
        self.restored += other.restored
        return self


class _Plan:
    """What goes wrong with the requests of one schedule."""

    def __init__(self, rng: random.Random, prefix: str, faults: Counter[str]) -> None:
        self._rng = rng
        self._prefix = prefix
        self._faults = faults
        self._share = rng.choice(_SHARES)
        self._storm = 0
        self._lock = threading.Lock()
        self.unseen = False

    def __call__(self, request: Request) -> Fault | None:
        """The fault of a request."""
        if self._prefix not in request.path and self._prefix not in request.query.replace(
            "%2F", "/"
        ):
            return None  # what an earlier schedule's threads still try
        with self._lock:
            fault = self._choose(request)
            if fault is not None:
                self._faults[fault] += 1
                self.unseen = self.unseen or fault in _UNSEEN
            return fault

    def _choose(self, request: Request) -> Fault | None:
        if self._storm:
            self._storm -= 1
            return Fault.BEFORE_503
        if self._rng.random() < 0.003:
            self._storm = self._rng.randrange(_STORM)
        if self._rng.random() >= self._share:
            return None
        fault = self._rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        # A bit that flips in a listing or an error is nothing that a client can see.
        if fault is Fault.FLIP and (request.method != "GET" or request.lists):
            return None
        return None if fault is Fault.STALE and not request.lists else fault


class Faults:
    """Schedules on one server, each below a prefix of its own."""

    def __init__(self, server: SeaweedFs, front: Proxy, *, prefix: str = "faults") -> None:
        self._server = server
        self._front = front
        self._prefix = prefix

    def play(self, seed: int) -> Played:
        """One schedule.

        Raises:
            AssertionError: something that was acknowledged is lost, or wrong bytes were believed.
        """
        return _Schedule(self._server, self._front, f"{self._prefix}/{seed}", seed).run()


class _Schedule:
    """One history."""

    def __init__(self, server: SeaweedFs, front: Proxy, prefix: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._prefix = prefix
        self._server = server
        self._front = front
        self._world = World()
        self._played = Played()
        self._plan = _Plan(random.Random(seed + 1), f"{prefix}/", self._played.faults)
        self._store = self._open(server.endpoint, PATIENCE)
        self._failing = self._open(front.endpoint, IMPATIENT)
        self._before: Past = Past({})
        self._verbs: dict[str, tuple[int, Callable[[], object]]] = {
            "backup": (6, self._back_up),
            "restore": (3, self._restore),
            "verify": (1, self._verify),
            "forget": (2, self._forget),
            "undo": (1, self._undo),
            "repack": (1, lambda: self._world.repack(self._failing)),
            "gc": (3, self._collect),
        }

    def _open(self, endpoint: str, patience: Patience) -> ObjectStore:
        location = f"s3://bucket0/{self._prefix}"
        environment = {**self._server.env, "AWS_ENDPOINT_URL": endpoint}
        return ObjectStore(parse_cloud(location, environment), patience=patience)

    def run(self) -> Played:
        """Play it."""
        names = list(self._verbs)
        weights = [weight for weight, _ in self._verbs.values()]
        verbs = ["backup", *self._rng.choices(names, weights, k=self._rng.randrange(4, 8))]
        for verb in verbs:
            with self._failures():
                try:
                    self._verbs[verb][1]()
                except Error:
                    self._played.failed[verb] += 1
                else:
                    self._played.done[verb] += 1
        # The next runs, by processes that all goes well for.
        self._world.back_up(self._store, self._rng)
        self._collect_all(self._store)
        self._played.restored = self._world.check(self._store)
        return self._played

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Until the end of the block things go wrong."""
        # A listing that lags shows what was there before the last verb.
        self._front.past, self._before = (
            self._before,
            Past.of(self._server.client.listing("bucket0", f"{self._prefix}/")),
        )
        self._plan.unseen = False
        self._front.plan = self._plan
        try:
            yield
        finally:
            self._front.plan = lambda _request: None

    # -- verbs ---------------------------------------------------------------------------------------

    def _back_up(self) -> None:
        level = self._rng.choice([Level.FULL, Level.INCREMENTAL, Level.INCREMENTAL])
        self._world.back_up(
            self._failing, self._rng, level=level, disks=self._rng.choice((1, 1, 2))
        )

    def _restore(self) -> None:
        repository = self._world.repository(self._failing)
        for backup in repository.backups():
            if backup.complete and not self._world.restore(repository, backup):
                assert self._plan.unseen, f"{backup.id} is said to miss packs"

    def _verify(self) -> None:
        result = self._world.verify(self._failing)
        wrong = [one for one in result.damaged if "is incomplete" not in one.problem]
        assert self._plan.unseen or not wrong, f"verify tells of damage: {wrong}"

    def _forget(self) -> None:
        if self._world.committed:
            self._world.forget(self._failing, self._rng.choice(sorted(self._world.committed)))

    def _undo(self) -> None:
        if self._world.forgotten:
            self._world.undo(self._failing, self._rng.choice(sorted(self._world.forgotten)))

    def _collect(self) -> None:
        if self._rng.random() < 0.5:
            self._collect_all(self._failing)
        else:
            self._world.collect(self._failing)

    def _collect_all(self, store: ObjectStore) -> None:
        """Collect; sessions of backups that failed count as dead at once."""
        idle_s = alive.IDLE_S
        alive.IDLE_S = -1.0  # type: ignore[misc]
        try:
            self._world.collect(store)
        finally:
            alive.IDLE_S = idle_s  # type: ignore[misc]
