r"""When calls to a store are given up: a store that hangs holds nobody up who wants to leave.

A request to an object store can take minutes to fail, and a call to a folder on a network file system whose
server is gone never returns; neither can be ended from outside. So each is made by another thread, which is
left behind when the verb is cancelled and its deadline is over: whoever waits for it gets `Cancelled`, and
unwinds as from any other failure. The repository allows that at any moment: what the call still does is what
a killed client's would have done.

    verb's thread   ... call ----------+  Cancelled -> part files go, sessions are abandoned
                          \            |
    store's thread         +===== call ======== ... (ends some time, nobody looks)
                                       ^ deadline

Handing a call to one of `nbdpull.repo.calls` would be 7 % of a pull's CPU time, so a puller writes its frames itself:
it is `Leavable`, and left behind as a whole.

One deadline belongs to one verb. It is made by `nbdpull.ops.threads`, and a store takes the one of the verb that
opens it.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from nbdpull.errors import StoreError
from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo.calls import Call, CallThreads, Told

__all__ = [
    "Deadline",
    "Leavable",
    "current",
    "directly_in_time",
    "ended_in_time",
    "in_time",
]

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

current: ContextVar[Deadline | None] = ContextVar("nbdpull_deadline", default=None)
"""Of the running verb."""

_SLOW_S: Final = 5.0
"""A call that took less when it was left behind is not worth a word."""
_TELL: Final = 2
_ENDING_S: Final = 0.1
"""What letting go of something takes, with much to spare, where nothing hangs."""


class Deadline:
    """The time from which on nobody waits for a store. Any thread may call any method.

    Attributes:
        owner: the task of the verb that it belongs to, if there is one, while that is there.
    """

    def __init__(self, owner: object = None) -> None:
        self.owner: Callable[[], object] = (lambda: None) if owner is None else weakref.ref(owner)
        self._at = math.inf
        self._lock = threading.Lock()
        self._threads = CallThreads()
        self._calls: set[Call[Any]] = set()
        self._slow_told = False
        self._left_told = False

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
            call.woken.put(None)

    def clear(self) -> None:
        """Have no such time any more: what failed is tried again, by the same verb."""
        with self._lock:
            self._at = math.inf
            self._left_told = False

    def rest(self) -> None:
        """End the threads that wait for more calls; a verb that comes to its end leaves none behind."""
        self._threads.rest(stay=not self.is_set)

    def within(self, work: Callable[[], _T], told: Told) -> _T:
        """What `work` returns or raises, if it does in time.

        Raises:
            Cancelled: it did not; it goes on in a thread of its own.
            StoreError: the same, and it was the patience of `told` that came to its end.
        """
        if self.over:
            raise Cancelled
        call = self._begin(work, told)
        try:
            self._wait(call)
        finally:
            with self._lock:
                self._calls.discard(call)
        return call.result()

    def end(self, work: Callable[[], None], told: Told) -> None:
        """Have `work` done, also after the deadline; whether it is, and whether it fails, is not told."""
        call = self._begin(work, told)
        try:
            self._wait(call, least_s=_ENDING_S)
        except (Cancelled, StoreError):
            pass
        finally:
            with self._lock:
                self._calls.discard(call)
            call.failure = None

    def _begin(self, work: Callable[[], _T], told: Told) -> Call[_T]:
        call = Call(work, told)
        with self._lock:
            self._calls.add(call)
        try:
            self._threads.make(call)
        except BaseException:  # there can't be one more thread
            with self._lock:
                self._calls.discard(call)
            raise
        return call

    def _wait(self, call: Call[_T], *, least_s: float = 0.0) -> None:
        look_s = math.inf if call.told.look_s is None else call.told.look_s
        while not call.ended:
            left_s = max(self._at, call.began + least_s) - time.monotonic()
            if left_s <= 0:
                self.leave(call)
                raise Cancelled
            try:
                call.woken.get(timeout=min(left_s, look_s, threading.TIMEOUT_MAX))
            except queue.Empty:
                if left_s >= look_s and (exc := self.look(call)) is not None:
                    raise exc from None

    def look(self, call: Call[Any]) -> StoreError | None:
        """Note that a call is still under way; why it has failed because of that, if it has."""
        call.looks += 1
        told = call.told
        took_s = time.monotonic() - call.began
        if told.look_s is None or call.looks < _TELL:
            return None
        if call.looks >= told.looks:
            call.abandon()
            return StoreError(
                f"can't {told.what} {told.where}: that has not come to an end for {took_s:.0f} s; does what"
                " holds it answer?"
            )
        with self._lock:
            tell, self._slow_told = not self._slow_told, True
        if tell:
            _log.warning(
                "the repository hangs: %s has not come to an end for %.0f s; waiting for it",
                told,
                took_s,
            )
        return None

    def leave(self, call: Call[Any]) -> None:
        """Leave a call behind, at the deadline."""
        call.abandon()
        with self._lock:
            oldest = min(self._calls, key=lambda one: one.began, default=call)
            took_s = time.monotonic() - oldest.began
            tell = took_s >= _SLOW_S and not self._left_told
            self._left_told |= tell
        if tell:
            _log.warning(
                "the repository hangs: %s has not come to an end for %.0f s; it is not waited for any more",
                oldest.told,
                took_s,
            )

    # -- calls that a thread makes itself ----------------------------------------------------------

    def directly(self, work: Callable[[], _T], told: Told) -> _T:
        """As `within`; but a thread that is leavable makes the call itself. It must hold no lock then."""
        own: Leavable | None = getattr(_here, "own", None)
        if own is None:
            return self.within(work, told)
        call = Call(work, told, own.woken)
        own.enter(self, call)
        try:
            return work()
        finally:
            own.leave()

    @property
    def left_s(self) -> float:
        """Seconds until it is over."""
        return self._at - time.monotonic()

    def add(self, call: Call[Any]) -> None:
        """Have a call woken when the deadline is set."""
        with self._lock:
            self._calls.add(call)

    def discard(self, call: Call[Any]) -> None:
        """It has ended, or is left behind."""
        with self._lock:
            self._calls.discard(call)


_here = threading.local()


class Leavable:
    """A thread that can be left behind as it is, in a call to a store that it makes itself.

    It enters this; whoever waits for the thread asks `given_up` now and then, and whenever `woken` has something.
    """

    def __init__(self, woken: queue.SimpleQueue[Any]) -> None:
        self.woken = woken
        self._lock = threading.Lock()
        self._call: tuple[Deadline, Call[Any]] | None = None
        self._left = False

    def __enter__(self) -> None:
        _here.own = self

    def __exit__(self, *_exc: object) -> None:
        _here.own = None

    def enter(self, deadline: Deadline, call: Call[Any]) -> None:
        """The thread begins a call.

        Raises:
            Cancelled: the deadline is over.
        """
        deadline.add(call)
        with self._lock:
            self._call = deadline, call
        # Whoever waits saw no call of this thread when the deadline was set.
        if deadline.over:
            self.leave()
            raise Cancelled
        if deadline.is_set:
            self.woken.put(None)

    def leave(self) -> None:
        """The call has ended.

        Raises:
            Cancelled: and the thread was left behind meanwhile.
        """
        with self._lock:
            if self._call is not None:
                deadline, call = self._call
                call.note_end()
                deadline.discard(call)
            self._call = None
            left = self._left
        if left:
            raise Cancelled

    @property
    def is_left(self) -> bool:
        """Whether the thread was left behind."""
        with self._lock:
            return self._left

    @property
    def left_s(self) -> float:
        """For how long the thread is waited for."""
        with self._lock:
            return math.inf if self._call is None else self._call[0].left_s

    def given_up(self, *, look: bool) -> Exception | None:
        """Why the thread is left behind, from now on, if it is; `look` counts as one of `Told.looks`."""
        with self._lock:
            if self._call is None:
                return None
            deadline, call = self._call
            exc: Exception | None = None
            if deadline.over:
                deadline.leave(call)
                exc = Cancelled()
            elif look:
                exc = deadline.look(call)
            self._left = exc is not None
            return exc


def in_time(deadline: Deadline | None, work: Callable[[], _T], told: Told) -> _T:
    """What `work` returns or raises, before the deadline where there is one: see `Deadline.within`."""
    return work() if deadline is None else deadline.within(work, told)


def directly_in_time(deadline: Deadline | None, work: Callable[[], _T], told: Told) -> _T:
    """The same; see `Deadline.directly`."""
    return work() if deadline is None else deadline.directly(work, told)


def ended_in_time(deadline: Deadline | None, work: Callable[[], None], told: Told) -> None:
    """Have `work`, which lets go of something, done; see `Deadline.end`."""
    if deadline is None:
        work()
    else:
        deadline.end(work, told)
