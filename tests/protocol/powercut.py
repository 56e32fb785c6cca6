"""Power cuts: of everything that a local repository did up to some moment, only what was synced is left.

Backups, forgetting, undoing, repacking and collections run once and are recorded (`oslog.py`). Then for many
moments the folder is made anew as a cut at that moment could leave it, and looked at: every backup that
was acknowledged before the cut must be there, whole, and the next runs must succeed.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

from nbdpull.errors import Error
from nbdpull.model.results import Level
from nbdpull.repo.local import LocalStore
from tests.protocol.oslog import OsLog, Survivors, dropping
from tests.protocol.world import World

__all__ = ["PowerCut"]


class PowerCut:
    """One recorded history.

    Attributes:
        length: events in the log.
        commits: backups in it.
    """

    def __init__(self, folder: Path, seed: int, *, rounds: int = 4) -> None:
        """Record a history of a repository in an empty folder."""
        self._folder = folder
        self._rng = random.Random(seed)
        self._world = World()
        root = folder / "repo"
        root.mkdir()
        log = OsLog(root)
        with log.recording():
            self._record(LocalStore(root), log, rounds)
        self._events = log.events
        self.length = len(log.events)
        self.commits = len(self._world.committed)

    def _record(self, store: LocalStore, log: OsLog, rounds: int) -> None:
        world, rng = self._world, self._rng
        for number in range(rounds):
            for _ in range(3):
                level = Level.FULL if rng.random() < 0.2 else Level.INCREMENTAL
                name = world.back_up(store, rng, level=level, disks=2)
                log.note(json.dumps(["committed", name]))
            visible = [backup.id for backup in world.repository(store).backups()]
            for name in rng.sample(visible[:-1], min(2, len(visible) - 1)):
                log.note(json.dumps(["forget", name]))
                world.forget(store, name)
            if number % 2:
                name = min(world.forgotten & world.committed.keys())
                if world.undo(store, name):
                    log.note(json.dumps(["undone", name]))
            world.repack(store)
            world.collect(store)

    def run(self, cuts: int, *, seconds: float = float("inf")) -> int:
        """Cut at so many moments, evenly spread, for at most so long; returns how many there were.

        Raises:
            AssertionError: something acknowledged is lost.
        """
        moments = sorted({round(at * self.length / cuts) for at in range(1, cuts + 1)})
        survivors = Survivors()
        done = 0
        tried = 0
        end = time.monotonic() + seconds
        for moment in moments:
            if time.monotonic() > end:
                break
            tried += 1
            for event in self._events[done:moment]:
                survivors.add(event)
            done = moment
            self._cut(survivors, moment)
        return tried

    def _cut(self, survivors: Survivors, moment: int) -> None:
        root = self._folder / "after"
        shutil.rmtree(root, ignore_errors=True)
        rng = random.Random(moment)
        survivors.write_to(root, dropping(rng))
        world = self._known(moment)
        store = LocalStore(root)
        try:
            world.check(store)
            world.back_up(store, rng, disks=2)
            world.collect(store)
            world.check(store)
        except (AssertionError, Error) as exc:
            raise AssertionError(f"cut after {moment} of {self.length} events: {exc}") from exc

    def _known(self, moment: int) -> World:
        """What was acknowledged by then."""
        known = World(config=self._world.config, possible=dict(self._world.committed))
        for event in self._events[:moment]:
            if event.kind != "note":
                continue
            what, name = json.loads(event.path)
            if what == "committed":
                known.committed[name] = self._world.committed[name]
            elif what == "forget":
                known.forgotten.add(name)
            else:
                known.forgotten.discard(name)
        return known
