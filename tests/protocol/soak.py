"""Many processes on one repository, killed at random: whatever was acknowledged must be there in the end.

Writers, collectors, forgetting and repacking run as processes of their own, over and over. Their clocks are
off by hours, some are stopped until their sessions count as dead, and all are killed with SIGKILL again and
again. A writer notes a backup's name and the hash of its content after its commit has returned, one that
forgets notes the name before it begins. In the end every noted backup that nobody began to forget is
restored and hashed.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from nbdpull.errors import Error
from nbdpull.model.results import Level
from nbdpull.repo import alive
from nbdpull.repo.location import open_store
from nbdpull.repo.store import Store
from tests.protocol.stores import Killed
from tests.protocol.world import World
from tests.repo.helpers import restore

__all__ = ["LOCAL", "S3", "Pace", "Soak", "Soaked"]


class Pace(NamedTuple):
    """How fast a soak is, which is how fast its store is.

    Attributes:
        idle_s: after so long a session counts as dead, instead of a day.
        pause_s: between two signals at most.
    """

    idle_s: float
    pause_s: float


LOCAL: Final = Pace(2.0, 0.15)
S3: Final = Pace(10.0, 1.0)


@dataclass(slots=True)
class Soaked:
    """What happened.

    Attributes:
        commits: acknowledged.
        kept: of these, not forgotten; all were restored.
        kills, stops: signals sent.
        collections: finished.
        refused: runs that failed loudly, as one may beside others.
    """

    commits: int = 0
    kept: int = 0
    kills: int = 0
    stops: int = 0
    collections: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


class Soak:
    """One soak of a repository."""

    def __init__(
        self, folder: Path, seed: int, *, location: str | None = None, pace: Pace = LOCAL
    ) -> None:
        """Prepare an empty repository.

        Args:
            folder: an empty one.
            seed: of all that is left to chance here.
            location: of a prefix in an object store with nothing in it; None is in the folder. Nobody
                may have opened one in this process: its library does not outlive a fork.
            pace: of the store.
        """
        self._log = folder / "log"
        self._location = location or str(folder / "repo")
        if location is None:
            (folder / "repo").mkdir()
        self._pace = pace
        self._rng = random.Random(seed)
        self._world = World()
        self._pids: dict[int, str] = {}
        self._next = seed << 20

    def run(
        self,
        *,
        writers: int,
        collectors: int,
        kills: int,
        forgetters: int = 1,
        seconds: float = float("inf"),
    ) -> Soaked:
        """Soak until so many processes were killed, or for so long, and check.

        Raises:
            AssertionError: something acknowledged is lost.
        """
        roles = ["writer"] * writers + ["collector"] * collectors
        roles += ["forgetter"] * forgetters + ["repacker"]
        done = Soaked()
        end = time.monotonic() + seconds
        while done.kills < kills and time.monotonic() < end:
            for role in roles:
                while list(self._pids.values()).count(role) < roles.count(role):
                    self._start(role)
            time.sleep(self._rng.uniform(0.01, self._pace.pause_s))
            pid = self._rng.choice(list(self._pids))
            if self._rng.random() < 0.2 and self._pids[pid] == "writer":
                os.kill(pid, signal.SIGSTOP)
                done.stops += 1
                self._pids[pid] = (
                    "stopped"  # another takes its place, until it is killed or goes on
                )
            elif self._pids[pid] == "stopped" and self._rng.random() < 0.5:
                os.kill(pid, signal.SIGCONT)
                self._pids[pid] = "resumed"
            else:
                self._end(pid)
                done.kills += 1
        for pid in list(self._pids):
            self._end(pid)
        self._read_log(done)
        self._check(done)
        return done

    def _start(self, role: str) -> None:
        self._next += 1
        pid = os.fork()
        if pid:
            self._pids[pid] = role
            return
        try:
            _Process(self._world, self._location, self._log, self._next, self._pace).work(role)
        finally:
            os._exit(1)

    def _end(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del self._pids[pid]

    def _read_log(self, done: Soaked) -> None:
        self._hashes: dict[str, str] = {}
        for line in self._log.read_text(encoding="ascii").splitlines():
            kind, _, rest = line.partition(" ")
            match kind:
                case "committed":
                    name, _, digest = rest.partition(" ")
                    self._hashes[name] = digest
                    done.commits += 1
                case "forget":
                    self._world.forgotten.add(rest)
                case "collected":
                    done.collections += 1
                case "refused":
                    done.refused += 1
                case _:
                    done.failures.append(line)

    def _check(self, done: Soaked) -> None:
        assert done.failures == [], f"a process failed: {done.failures[:3]}"
        store = open_store(self._location)
        repository = self._world.repository(store)
        assert repository.unreadable() == []
        shown = {backup.id: backup for backup in repository.backups()}
        lost = self._hashes.keys() - self._world.forgotten - shown.keys()
        assert not lost, f"lost: {sorted(lost)}"
        for name, backup in shown.items():
            for summary in backup.disks:
                content = restore(repository.reader(repository.manifest(summary)))
                digest = hashlib.sha256(content).hexdigest()
                assert self._hashes.get(name, digest) == digest, f"{name} restores to other bytes"
            done.kept += name in self._hashes and name not in self._world.forgotten


class _Process:
    """What a child does."""

    def __init__(self, world: World, location: str, log: Path, seed: int, pace: Pace) -> None:
        self._world = world
        self._rng = random.Random(seed)
        self._store = open_store(location)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        off_s = self._rng.uniform(-10, 10) * 3600
        real, real_ns = time.time, time.time_ns
        time.time = lambda: real() + off_s
        time.time_ns = lambda: real_ns() + int(off_s * 1e9)
        alive.IDLE_S = pace.idle_s  # type: ignore[misc]

    def work(self, role: str) -> None:
        """Go on until killed."""
        roles: Mapping[str, Callable[[Store], None]] = {
            "writer": self._write,
            "collector": self._collect,
            "forgetter": self._forget,
            "repacker": self._repack,
        }
        while True:
            try:
                roles[role](self._store)
            except Error as exc:
                self._note(f"refused {exc}" if _is_expected(exc) else f"{role} {exc}")
            except (Exception, Killed) as exc:  # noqa: BLE001 - told by the parent
                self._note(f"{role} {exc!r}")

    def _note(self, line: str) -> None:
        os.write(self._log, f"{line}\n".encode("ascii", "replace"))

    def _write(self, store: Store) -> None:
        level = Level.FULL if self._rng.random() < 0.1 else Level.INCREMENTAL
        name = self._world.back_up(store, self._rng, level=level, disks=self._rng.choice((1, 2)))
        digest = hashlib.sha256(self._world.committed.pop(name)).hexdigest()
        self._note(f"committed {name} {digest}")

    def _collect(self, store: Store) -> None:
        self._world.collect(store)
        self._note("collected")

    def _forget(self, store: Store) -> None:
        backups = self._world.repository(store).backups()
        # Several at once: one that is killed again and again has to keep up with the writers.
        for backup in self._rng.sample(backups[:-2], max(0, len(backups) - 8)):
            self._note(f"forget {backup.id}")
            self._world.forget(store, backup.id)

    def _repack(self, store: Store) -> None:
        self._world.repack(store)
        time.sleep(0.2)


def _is_expected(exc: Error) -> bool:
    """Whether a run may end so beside others: loud, and nothing is acknowledged."""
    words = (
        "was revoked",
        "was taken over",
        "is forgotten",
        "no backup",
        "being forgotten",
        "is missing",
        "is lost",
        "ahead",
        "does not list s/",
    )
    return any(word in str(exc) for word in words)
