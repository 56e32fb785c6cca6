"""Calls to a store, and the threads that make them, which nobody has to wait for.

A thread makes one call after the other, and ends soon after the last one. A new one for each call costs 50 to 100 us
of CPU time, handing a call over 10 us, and some times that when all cores are busy (Python 3.11, 2 cores). They are
daemons: the threads of `concurrent.futures` are waited for when the interpreter ends, and these may hang for ever.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

__all__ = ["Call", "CallThreads", "Told", "abandoned_calls"]

_T = TypeVar("_T")

_IDLE_S: Final = 1.0
"""How long a thread waits for another call before it ends."""

_abandoned: set[Call[Any]] = set()


def abandoned_calls() -> bool:
    """Whether calls of this process are still under way that nobody waits for."""
    return any(not call.ended for call in list(_abandoned))


@dataclass(frozen=True, slots=True)
class Told:
    """What a call is, for people, and how patient to be where the store itself never gives up.

    Attributes:
        what, where: ``write`` and ``/mnt/nas/repo/d/...``.
        look_s: how often it is looked at: that it is still under way is told the second time. None where the
            store itself sees to that.
        looks: after so many it has failed. Not after a time: this process itself can be stopped for hours.
    """

    what: str
    where: object
    look_s: float | None = None
    looks: int = 2

    def __str__(self) -> str:
        """As it stands in a message."""
        return f"'{self.what} {self.where}'"


class Call(Generic[_T]):
    """One call, and whoever waits for it.

    Attributes:
        began: by `time.monotonic`.
        woken: gets something when there is something to look at.
        looks: how often it was looked at.
    """

    def __init__(
        self, work: Callable[[], _T], told: Told, woken: queue.SimpleQueue[Any] | None = None
    ) -> None:
        """`woken` is of whoever waits for more than this call."""
        self._work = work
        self.told = told
        self.began = time.monotonic()
        self.woken: queue.SimpleQueue[Any] = queue.SimpleQueue() if woken is None else woken
        self.ended = False
        self.failure: BaseException | None = None
        self.results: list[_T] = []
        self.looks = 0

    def run(self) -> None:
        """Make it; what came of it is kept for `result`."""
        try:
            self.results.append(self._work())
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            self.failure = exc

    def end(self) -> None:
        """Note that it has ended, and wake whoever waits for it."""
        self.note_end()
        self.woken.put(None)

    def note_end(self) -> None:
        """Note that it has ended."""
        self.ended = True
        _abandoned.discard(self)

    def abandon(self) -> None:
        """Note that nobody waits for it any more."""
        _abandoned.add(self)
        if self.ended:  # just now
            _abandoned.discard(self)

    def result(self) -> _T:
        """What it returned or raised, once it has ended."""
        if self.failure is not None:
            try:
                raise self.failure
            finally:
                self.failure = None  # else it and its traceback refer to each other
        return self.results[0]


_Queue = queue.SimpleQueue[Call[Any] | None]


class CallThreads:
    """Threads that make calls: as many as there are calls at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By niceness: each inherits that of whoever called first, and a pull goes behind the VMs.
        self._idle: dict[int, list[tuple[_Queue, threading.Thread]]] = {}
        self._stay = True

    def make(self, call: Call[Any]) -> None:
        """Have the call made."""
        nice = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread
        with self._lock:
            idle = self._idle.setdefault(nice, [])
            calls = idle.pop()[0] if idle else None
        if calls is None:
            calls = queue.SimpleQueue()
            threading.Thread(
                target=self._run, args=(calls, idle), name="nbdpull-store", daemon=True
            ).start()
        calls.put(call)

    def rest(self, *, stay: bool) -> None:
        """End those that have nothing to do; where they don't `stay`, later ones end after each call."""
        with self._lock:
            self._stay = self._stay and stay
            ended = [one for idle in self._idle.values() for one in idle]
            for idle in self._idle.values():
                idle.clear()
        for calls, _ in ended:
            calls.put(None)
        for _, thread in ended:
            thread.join()

    def _run(self, calls: _Queue, idle: list[tuple[_Queue, threading.Thread]]) -> None:
        own = calls, threading.current_thread()
        while True:
            try:
                call = calls.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if own in idle:
                        idle.remove(own)
                        return
                continue  # it was chosen just now
            if call is None:
                return
            call.run()
            with self._lock:
                stay = self._stay
                if stay:
                    idle.append(own)  # before the next call comes from whoever waits for this one
            call.end()
            if not stay:
                return
            del call  # and what it holds
