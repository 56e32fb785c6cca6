r"""When calls to a store are given up: a store that hangs holds nobody up who wants to leave.

A request to an object store can take minutes to fail, and can't be ended from outside. So each is made in a
thread of its own, which is left behind when the verb is cancelled and its deadline is over: whoever waits for
it gets `Cancelled`, and unwinds as from any other failure. The repository allows that at any moment: what the
request still does is what a killed client's would have done.

    verb's thread   ... call ----------+  Cancelled -> part files go, sessions are abandoned
                          \            |
    store's thread         +== request ====== ... (ends some time, nobody looks)
                                       ^ deadline

One deadline belongs to one verb. It is made by `nbdpull.ops.threads`, and a store takes the one of the verb that
opens it.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Generic, TypeVar

from nbdpull.nbdio.errors import Cancelled

__all__ = ["Deadline", "abandoned_calls", "current", "in_time"]

_T = TypeVar("_T")

current: ContextVar[Deadline | None] = ContextVar("nbdpull_deadline", default=None)
"""Of the running verb."""

_abandoned: set[threading.Thread] = set()


def abandoned_calls() -> bool:
    """Whether calls of this process are still under way that nobody waits for."""
    return any(thread.is_alive() for thread in list(_abandoned))


class _Call(Generic[_T]):
    """One call, and who waits for it."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self.changed = threading.Condition()
        self.ended = False
        self.failure: BaseException | None = None
        self.results: list[_T] = []

    def run(self) -> None:
        try:
            self.results.append(self._work())
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            self.failure = exc
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def result(self) -> _T:
        if self.failure is not None:
            try:
                raise self.failure
            finally:
                self.failure = None  # else it and its traceback refer to each other
        return self.results[0]


class Deadline:
    """The time from which on nobody waits for a store. Any thread may call any method.

    Attributes:
        owner: the task of the verb that it belongs to, if there is one, while that is there.
    """

    def __init__(self, owner: object = None) -> None:
        self.owner: Callable[[], object] = (lambda: None) if owner is None else weakref.ref(owner)
        self._at = math.inf
        self._lock = threading.Lock()
        self._calls: set[_Call[object]] = set()

    @property
    def over(self) -> bool:
        """Whether it is past."""
        return time.monotonic() >= self._at

    @property
    def is_set(self) -> bool:
        """Whether there is such a time."""
        return self._at < math.inf

    def set_in(self, seconds: float) -> None:
        """Give up calls that are not done in `seconds`, those under way and later ones.

        Another call sets another time; one that was over can lie ahead again, for what is called then.
        """
        with self._lock:
            self._at = time.monotonic() + seconds
            calls = list(self._calls)
        for call in calls:
            with call.changed:
                call.changed.notify_all()

    def clear(self) -> None:
        """Have no such time any more: what failed is tried again, by the same verb."""
        with self._lock:
            self._at = math.inf

    def within(self, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises, if it does in time.

        Raises:
            Cancelled: it did not; it goes on in a thread of its own.
        """
        if self.over:
            raise Cancelled
        call = _Call(work)
        thread = threading.Thread(target=call.run, name="nbdpull-store", daemon=True)
        with self._lock:
            self._calls.add(call)  # type: ignore[arg-type]
        try:
            thread.start()
            with call.changed:
                while not call.ended:
                    left = self._at - time.monotonic()
                    if left <= 0:
                        _abandon(thread)
                        raise Cancelled
                    call.changed.wait(min(left, threading.TIMEOUT_MAX))
        finally:
            with self._lock:
                self._calls.discard(call)
        return call.result()


def _abandon(thread: threading.Thread) -> None:
    for ended in [one for one in list(_abandoned) if not one.is_alive()]:
        _abandoned.discard(ended)
    _abandoned.add(thread)


def in_time(deadline: Deadline | None, work: Callable[[], _T]) -> _T:
    """What `work` returns or raises, before the deadline where there is one: see `Deadline.within`."""
    return work() if deadline is None else deadline.within(work)
