"""Kill points: the process dies at a call of the store, before or after the call had its effect.

The process is a real one, a fork, and its death is `os._exit`: nothing cleans up. What is left is then looked
at, and the next runs must find their way in it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdpull.repo.local import LocalStore
from nbdpull.repo.store import Store
from tests.protocol.stores import WatchedStore
from tests.protocol.world import World

__all__ = ["OPERATIONS", "KillPoints", "Point"]

_DIED: Final = 99
_DAY_S: Final = 86400.0

OPERATIONS: Final[Mapping[str, Callable[[World, Store, int], object]]] = {
    "full": lambda world, store, seed: world.back_up(
        store, random.Random(seed), full=True, disks=2
    ),
    "incremental": lambda world, store, seed: world.back_up(store, random.Random(seed), disks=2),
    "forget": lambda world, store, _seed: world.forget(store, min(world.committed)),
    "undo": lambda world, store, _seed: world.undo(store, min(world.forgotten)),
    "gc": lambda world, store, _seed: world.collect(store),
    "repack": lambda world, store, _seed: world.repack(store),
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
        self._base.mkdir(parents=True)
        store = LocalStore(self._base)
        rng = random.Random(seed)
        self._world = World()
        names = [self._world.back_up(store, rng, disks=2) for _ in range(4)]
        self._kill(self._world, store, Point("incremental", 30, after=True))
        self._world.forget(store, names[0])

    def count(self, operation: str) -> int:
        """How many calls the operation makes."""
        root = self._copy()
        calls = 0

        @contextmanager
        def gate(_name: str, _key: str) -> Iterator[None]:
            nonlocal calls
            calls += 1
            yield

        world = deepcopy_world(self._world)
        OPERATIONS[operation](world, WatchedStore(LocalStore(root), gate), self._seed)
        self._world.possible |= world.committed
        return calls

    def points(self, operation: str) -> Iterator[Point]:
        """All points of an operation."""
        for call in range(self.count(operation)):
            for after in (False, True):
                yield Point(operation, call, after)

    def play(self, point: Point, *, thorough: bool = True) -> None:
        """Kill there, look at what is left, and go on with a backup and a collection.

        `thorough` also repacks, and sees that two days later nothing is left over.

        Raises:
            AssertionError: something acknowledged is lost, something half is shown, or the next runs fail.
        """
        root = self._copy()
        store = LocalStore(root)
        world = deepcopy_world(self._world)
        if point.operation == "forget":
            world.forgotten.add(min(world.committed))
        assert self._kill(world, store, point), f"{point} is no point"
        world.check(store)
        # The next runs, by the next processes.
        world.back_up(store, random.Random(self._seed + 1), disks=2)
        world.collect(store)
        if not thorough:
            world.check(store)
            return
        world.repack(store)
        world.check(store)
        # Two days later nothing is left over.
        _age(root)
        for _ in range(2):
            world.collect(store)
            _age(root)
        world.check(store)
        assert world.garbage(store) == []
        assert [listed.key for listed in store.list("s")] == []

    def _kill(self, world: World, store: LocalStore, point: Point) -> bool:
        """Whether the process died at the point."""
        pid = os.fork()
        if pid:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            assert code in {0, _DIED}, f"{point} ended with {code}"
            return code == _DIED
        calls = 0

        @contextmanager
        def gate(_name: str, _key: str) -> Iterator[None]:
            nonlocal calls
            number, calls = calls, calls + 1
            if number == point.call and not point.after:
                os._exit(_DIED)
            try:
                yield
            finally:  # also when the call raises: what it looked for is not there
                if number == point.call:
                    os._exit(_DIED)

        code = 1
        try:
            OPERATIONS[point.operation](world, WatchedStore(store, gate), self._seed)
            code = 0
        finally:
            os._exit(code)

    def _copy(self) -> Path:
        root = self._folder / "now"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self._base, root, symlinks=True)
        return root


def deepcopy_world(world: World) -> World:
    """The same, to go on with."""
    return World(
        config=world.config,
        committed=deepcopy(world.committed),
        possible=deepcopy(world.possible),
        forgotten=set(world.forgotten),
    )


def _age(root: Path) -> None:
    """Let two days pass, by the store's clock."""
    for path in root.rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - 2 * _DAY_S
            os.utime(path, (then, then))
