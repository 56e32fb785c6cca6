"""Blocking work below an async verb: one thread that is told to stop, and waited for, when cancelled.

It has nothing to wait for then but its own cleaning up: calls to a store are given up, see
`nbdpull.repo.deadline`.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ParamSpec, TypeVar

from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo.deadline import Deadline, Leavable, current

__all__ = [
    "call",
    "give_way",
    "in_thread",
    "run_all",
    "store_deadline",
    "wait_for_stores_again",
    "worker_count",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_MAX_WORKERS = 16
_NICE = 10
_LOOK_S = 30.0
_GRACE_S = 2.0
"""For what a store is asked when a verb is cancelled: its answer comes by far sooner, or not soon at all."""


def worker_count() -> int:
    """Threads that keep the cores busy which this process may use, while some of them wait."""
    return min(2 * len(os.sched_getaffinity(0)), _MAX_WORKERS)


def give_way() -> None:
    """Let the calling thread go behind all else that wants the cores: behind the VMs, where they run here.

    A thread has a niceness of its own in Linux, see setpriority(2), and keeps it to its end.
    """
    thread = threading.get_native_id()
    with suppress(OSError):  # where that is forbidden it runs as others do
        os.setpriority(os.PRIO_PROCESS, thread, max(_NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def store_deadline() -> Deadline:
    """Of the running verb: when it gives up its calls to stores. Only for tasks, not for their threads."""
    deadline = current.get()
    task = asyncio.current_task()
    # It may be that of a verb which was cancelled, or, in a task that was started after it, another verb's.
    if deadline is None or deadline.is_set or deadline.owner() is not task:
        deadline = Deadline(task)
        current.set(deadline)
    return deadline


def wait_for_stores_again(deadline: Deadline) -> None:
    """Let the running verb, whose `store_deadline` that was, go on with its stores after a pull that failed."""
    deadline.clear()
    current.set(deadline)


async def in_thread(work: Callable[[threading.Event], _T], *, grace_s: float = _GRACE_S) -> _T:
    """What `work` returns or raises, run in a thread of its own.

    When the caller is cancelled, the event given to `work` is set, and its end is waited for before
    `CancelledError` goes on: `work` has cleaned up, and no thread outlives the call but those that
    a store did not answer for `grace_s` more.
    """
    loop = asyncio.get_running_loop()
    deadline = store_deadline()
    context = contextvars.copy_context()
    cancel = threading.Event()
    result: asyncio.Future[_T] = loop.create_future()

    def run() -> None:
        try:
            value = context.run(work, cancel)
        except BaseException as exc:  # noqa: BLE001 - handed on to the event loop
            loop.call_soon_threadsafe(result.set_exception, exc)
        else:
            loop.call_soon_threadsafe(result.set_result, value)

    # Not the default executor: it has few threads, and a program that embeds us uses it too.
    thread = threading.Thread(target=run, name="nbdpull", daemon=True)
    thread.start()
    cancelled: asyncio.CancelledError | None = None
    while not result.done():
        try:
            await asyncio.wait([result])
        except asyncio.CancelledError as exc:
            if cancelled is None:
                cancelled = exc
                cancel.set()
                deadline.set_in(grace_s)
    thread.join()
    deadline.rest()
    if cancelled is None:
        return result.result()
    failure = result.exception()
    if failure is None or isinstance(failure, Cancelled):
        raise cancelled
    raise cancelled from failure


async def call(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `function` returns or raises, run in a thread; when cancelled, its end is waited for."""
    return await in_thread(lambda _cancel: function(*args, **kwargs))


class _Worker:
    """One of the threads of `run_all`."""

    def __init__(
        self,
        work: Callable[[], None],
        failed: Callable[[BaseException], None],
        woken: queue.SimpleQueue[_Worker | None],
        leave: Callable[[], None] | None = None,
    ) -> None:
        self._work = work
        self._failed = failed
        self._woken = woken
        self._leave = leave
        self._own = Leavable(woken)
        self.thread = threading.Thread(target=self._run, name="nbdpull-worker", daemon=True)

    def _run(self) -> None:
        try:
            if self._leave is None:
                self._work()
            else:
                with self._own:
                    self._work()
        except BaseException as exc:  # noqa: BLE001 - raised in the caller's thread
            # Of one that was left behind nobody wants to hear: what failed may be under way once more by now.
            if not self._own.is_left:
                self._failed(exc)
        self._woken.put(self)

    @property
    def left_s(self) -> float:
        """For how long it is waited for."""
        return self._own.left_s

    def given_up(self, *, look: bool) -> bool:
        """Whether it is left behind where it is, from now on; then it has failed."""
        exc = self._own.given_up(look=look)
        if exc is None:
            return False
        self._failed(exc)
        if self._leave is not None:
            self._leave()
        return True


def run_all(
    workers: Sequence[Callable[[], None]],
    cancel: threading.Event,
    *,
    leavable: Sequence[tuple[Callable[[], None], Callable[[], None]]] = (),
    on_failure: Callable[[], None] = lambda: None,
) -> None:
    """Run each in a thread of its own until all have ended.

    The first failure sets `cancel`, which each worker must look at, and is raised when all have ended.
    `on_failure` is called then, too, by the thread that failed. Of the workers in `leavable` threads are left behind
    that hang in a call to a store; what comes second closes what such a one holds, and is called by this thread.
    """
    lock = threading.Lock()
    failures: list[BaseException] = []

    def failed(exc: BaseException) -> None:
        with lock:
            failures.append(exc)
        cancel.set()
        on_failure()

    woken: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
    running = [
        *[_Worker(work, failed, woken) for work in workers],
        *[_Worker(work, failed, woken, leave) for work, leave in leavable],
    ]
    for worker in running:
        worker.thread.start()
    while running:
        left_s = min(worker.left_s for worker in running)
        look, ended = False, None
        try:
            ended = woken.get(timeout=max(0.0, min(left_s, _LOOK_S)))
        except queue.Empty:
            look = left_s > _LOOK_S
        if ended is None:
            running = [worker for worker in running if not worker.given_up(look=look)]
        elif ended in running:
            ended.thread.join()
            running.remove(ended)
    # The others raise Cancelled because of the first one, which can have come from outside.
    real = [exc for exc in failures if not isinstance(exc, Cancelled)]
    if failures:
        raise (real or failures)[0]
