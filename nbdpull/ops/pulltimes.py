"""Where the time of a pull goes, counted by the threads of it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from nbdpull.model.results import BackupProfile
from nbdpull.nbdio.connection import Connection
from nbdpull.repo.repository import Session

__all__ = ["PullTimes", "ThreadTimes"]


@dataclass(slots=True)
class ThreadTimes:
    """What one thread spent, in seconds: see `BackupProfile`."""

    status_s: float = 0.0
    idle_s: float = 0.0
    source_s: float = 0.0
    requests: int = 0

    def close(self, connection: Connection) -> None:
        """Close a connection, and count what it was asked."""
        self.requests += connection.requests
        connection.close()


class PullTimes:
    """Sums over all threads."""

    def __init__(self, workers: int) -> None:
        self._lock = threading.Lock()
        self._workers = workers
        self._sum = ThreadTimes()

    def add(self, thread: ThreadTimes) -> None:
        """Count what a thread that ends has spent."""
        with self._lock:
            self._sum.status_s += thread.status_s
            self._sum.idle_s += thread.idle_s
            self._sum.source_s += thread.source_s
            self._sum.requests += thread.requests

    def profile(self, sessions: Iterable[Session]) -> BackupProfile:
        """All of it, with what the sessions that were pulled into spent."""
        stages = [session.stages for session in sessions]
        return BackupProfile(
            workers=self._workers,
            status_s=self._sum.status_s,
            idle_s=self._sum.idle_s,
            source_s=self._sum.source_s,
            hash_s=sum(one.hash_s for one in stages),
            compress_s=sum(one.compress_s for one in stages),
            encrypt_s=sum(one.encrypt_s for one in stages),
            store_s=sum(one.store_s for one in stages),
            requests=self._sum.requests,
        )
