"""Runs the real code of several processes against one store, one call at a time, in a chosen order.

Each process has a thread and a watched store. A call waits until it is its process's turn; so a schedule
is a sequence of choices, from a seed. Processes have priorities, which change now and then: a process of low
priority stalls, for long (Burckhardt et al., "A randomized scheduler with probabilistic guarantees of finding
bugs", ASPLOS 2010). They change where a process goes over to another kind of call or of object: that is where
a rule of the protocol matters, and there are ten times fewer of these places than calls.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from nbdpull.errors import Error
from nbdpull.repo.store import Store
from tests.protocol.stores import Killed, WatchedStore
from tests.protocol.world import Work

__all__ = ["Schedule"]

_WAIT_S = 60.0


@dataclass
class _Process:
    number: int
    priority: float
    waiting: int = 0
    granted: int = 0
    running: int = 0
    ended: bool = False
    dies_at: int | None = None
    calls: int = 0
    doing: tuple[str, str] = ("", "")
    next: tuple[str, str] = ("", "")
    failure: BaseException | None = None


@dataclass
class Schedule:
    """One run.

    Attributes:
        changes: how many times a priority changes, on average, in a hundred of these places.
        kills: chance that a process is killed somewhere.
    """

    store: Store
    seed: int
    changes: float = 10.0
    kills: float = 0.0
    calls: int = 0
    _processes: list[_Process] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self, works: Sequence[Work]) -> None:
        """Run all to their ends. An expected error ends only its process; a bug is raised here."""
        rng = random.Random(self.seed)
        threads = []
        for number, work in enumerate(works):
            process = _Process(number, rng.random())
            if rng.random() < self.kills:
                process.dies_at = rng.randrange(60)
            self._processes.append(process)
            threads.append(threading.Thread(target=self._run, args=(process, work), daemon=True))
        for thread in threads:
            thread.start()
        self._schedule(rng)
        for thread in threads:
            thread.join(_WAIT_S)
        for process in self._processes:
            if process.failure is not None:
                raise process.failure

    def _run(self, process: _Process, work: Work) -> None:
        store = WatchedStore(self.store, lambda name, key: self._gate(process, name, key))
        try:
            work(store)
        except (Error, Killed):
            pass
        except BaseException as exc:  # noqa: BLE001 - raised by `run`
            process.failure = exc
        finally:
            with self._changed:
                process.ended = True
                self._changed.notify_all()

    @contextmanager
    def _gate(self, process: _Process, name: str, key: str) -> Iterator[None]:
        with self._changed:
            process.next = (name, key[:1])
            if process.dies_at is not None and process.calls > process.dies_at:
                raise Killed
            process.waiting += 1
            self._changed.notify_all()
            while not process.granted:
                self._changed.wait(_WAIT_S)
            process.granted -= 1
            process.waiting -= 1
            process.running += 1
            process.calls += 1
            dies = process.dies_at is not None and process.calls > process.dies_at
        try:
            if dies and process.number % 2:
                raise Killed  # before the call has an effect; else after it
            yield
            if dies:
                raise Killed
        finally:
            with self._changed:
                process.running -= 1
                self._changed.notify_all()

    def _schedule(self, rng: random.Random) -> None:
        while True:
            with self._changed:
                while not all(
                    one.ended or (one.waiting > one.granted and not one.running)
                    for one in self._processes
                ):
                    assert self._changed.wait(_WAIT_S), "a process neither calls nor ends"
                ready = [one for one in self._processes if not one.ended]
                if not ready:
                    return
                chosen = max(ready, key=lambda one: one.priority)
                while chosen.next != chosen.doing:
                    chosen.doing = chosen.next
                    if rng.random() * 100 < self.changes:
                        chosen.priority = rng.random()
                    chosen = max(ready, key=lambda one: one.priority)
                self.calls += 1
                chosen.granted += 1
                self._changed.notify_all()
                while chosen.granted and not chosen.ended:
                    assert self._changed.wait(_WAIT_S), "a granted call was not made"
