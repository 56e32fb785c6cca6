"""Kill points: the process dies at a call of the store, before or after the call had its effect.

The process is a real one, a fork, and its death is `os._exit`: nothing cleans up. What is left is then looked
at, and the next runs must find their way in it.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdpull.model.results import Level
from nbdpull.repo.local import LocalStore
from nbdpull.repo.store import Store
from tests.protocol.stores import Gate, WatchedStore
from tests.protocol.world import World

__all__ = ["OPERATIONS", "KillPoints", "Point"]

_DIED: Final = 99
_DAY_S: Final = 86400.0


@dataclass(frozen=True, slots=True)
class _Case:
    """What an operation works on: both stores are watched."""

    world: World
    store: Store
    replica: Store
    seed: int

    def back_up(self, level: Level) -> None:
        # Not what the preparation began with: no two backups may have one id.
        self.world.back_up(self.store, random.Random(f"{self.seed} {level}"), level=level, disks=2)


OPERATIONS: Final[Mapping[str, Callable[[_Case], object]]] = {
    "full": lambda case: case.back_up(Level.FULL),
    "incremental": lambda case: case.back_up(Level.INCREMENTAL),
    "differential": lambda case: case.back_up(Level.DIFFERENTIAL),
    "forget": lambda case: case.world.forget(case.store, min(case.world.committed)),
    "undo": lambda case: case.world.undo(case.store, min(case.world.forgotten)),
    "gc": lambda case: case.world.collect(case.store),
    "repack": lambda case: case.world.repack(case.store),
    "copy": lambda case: case.world.copy(case.store, case.replica),
}


@dataclass(frozen=True, slots=True)
class Point:
    """Call number `call` of an operation."""

    operation: str
    call: int
    after: bool


class KillPoints:
    """A prepared repository, and all points at which an operation on it can be killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Prepare: three backups and a forgotten one of two disks each, and a session that died."""
        self._folder = folder
        self._seed = seed
        self._base = folder / "base"
        self._replica = folder / "replica"
        for made in (self._base, self._replica):
            made.mkdir(parents=True)
        store = LocalStore(self._base)
        rng = random.Random(seed)
        self._world = World()
        self._possible: dict[str, dict[str, bytes]] = {}
        levels = (Level.FULL, Level.FULL, Level.INCREMENTAL, Level.INCREMENTAL)
        names = [self._world.back_up(store, rng, level=level, disks=2) for level in levels]
        self._kill(self._world, store, Point("incremental", 30, after=True))
        self._world.forget(store, names[0])

    def count(self, operation: str) -> int:
        """How many calls the operation makes."""
        root = self._copy()
        calls = itertools.count()

        @contextmanager
        def gate(_name: str, _key: str) -> Iterator[None]:
            next(calls)
            yield

        world = deepcopy_world(self._world)
        self._run(operation, world, LocalStore(root), gate)
        self._possible[operation] = world.possible
        return next(calls)

    def points(self, operation: str) -> Iterator[Point]:
        """All points of an operation."""
        for call in range(self.count(operation)):
            for after in (False, True):
                yield Point(operation, call, after)

    def play(self, point: Point) -> None:
        """Kill at one of `points`, look at what is left, and go on until nothing may be left over.

        Raises:
            AssertionError: something acknowledged is lost, something half is shown, or the next runs fail.
        """
        try:
            self._play(point)
        except AssertionError as exc:
            exc.add_note(str(point))
            raise

    def _play(self, point: Point) -> None:
        store = LocalStore(self._copy())
        world = deepcopy_world(self._world)
        world.possible = dict(self._possible[point.operation])
        if point.operation == "forget":
            world.forgotten.add(min(world.committed))
        assert self._kill(world, store, point), f"{point} is no point"
        world.check(store)
        # The next runs, by the next processes.
        if point.operation == "copy":
            self._go_on_copying(world, store)
        world.back_up(store, random.Random(f"{self._seed} next"), disks=2)
        world.collect(store)
        world.repack(store)
        world.check(store)
        _wait_and_collect(world, store)
        world.check(store)

    def _go_on_copying(self, world: World, store: LocalStore) -> None:
        """Copy again, whether or not the replica was collected meanwhile, and long after."""
        replica = LocalStore(self._replica)
        world.check(replica, whole=False)
        world.collect(replica)
        world.check(replica, whole=False)
        world.copy(store, replica)
        world.check(replica)
        _wait_and_collect(world, replica)
        world.copy(store, replica)
        world.check(replica)

    def _run(self, operation: str, world: World, store: LocalStore, gate: Gate) -> None:
        watched, replica = (WatchedStore(one, gate) for one in (store, LocalStore(self._replica)))
        OPERATIONS[operation](_Case(world, watched, replica, self._seed))

    def _kill(self, world: World, store: LocalStore, point: Point) -> bool:
        """Whether the process died at the point."""
        pid = os.fork()
        if pid:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            assert code in {0, _DIED}, f"{point} ended with {code}"
            return code == _DIED
        calls = itertools.count()  # one `next` is one step, whichever thread it is of

        @contextmanager
        def gate(_name: str, _key: str) -> Iterator[None]:
            number = next(calls)
            if number == point.call and not point.after:
                os._exit(_DIED)
            try:
                yield
            finally:  # also when the call raises: what it looked for is not there
                if number == point.call:
                    os._exit(_DIED)

        code = 1
        try:
            self._run(point.operation, world, store, gate)
            code = 0
        finally:
            os._exit(code)

    def _copy(self) -> Path:
        root = self._folder / "now"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self._base, root, symlinks=True)
        shutil.rmtree(self._replica)
        self._replica.mkdir()
        return root


def deepcopy_world(world: World) -> World:
    """The same, to go on with."""
    return World(
        config=world.config,
        committed=deepcopy(world.committed),
        possible=deepcopy(world.possible),
        forgotten=set(world.forgotten),
    )


def _wait_and_collect(world: World, store: LocalStore) -> None:
    """Two days later nothing is left over."""
    _age(store.root)
    for _ in range(2):
        world.collect(store)
        _age(store.root)
    assert world.garbage(store) == []
    assert [listed.key for listed in store.list("s")] == []


def _age(root: Path) -> None:
    """Let two days pass, by the store's clock."""
    for path in root.rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - 2 * _DAY_S
            os.utime(path, (then, then))
