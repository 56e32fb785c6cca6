"""Blocking work below an async verb: one thread that is told to stop, and waited for, when cancelled."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ParamSpec, TypeVar

from nbdpull.nbdio.connection import Cancelled

__all__ = ["call", "give_way", "in_thread", "run_all", "worker_count"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_MAX_WORKERS = 16
_NICE = 10


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


async def in_thread(work: Callable[[threading.Event], _T]) -> _T:
    """What `work` returns or raises, run in a thread of its own.

    When the caller is cancelled, the event given to `work` is set, and its end is waited for before
    `CancelledError` goes on: no thread outlives the call, and `work` has cleaned up.
    """
    loop = asyncio.get_running_loop()
    cancel = threading.Event()
    result: asyncio.Future[_T] = loop.create_future()

    def run() -> None:
        try:
            value = work(cancel)
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
            cancelled = cancelled or exc
            cancel.set()
    thread.join()
    if cancelled is None:
        return result.result()
    failure = result.exception()
    if failure is None or isinstance(failure, Cancelled):
        raise cancelled
    raise cancelled from failure


async def call(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `function` returns or raises, run in a thread; when cancelled, its end is waited for."""
    return await in_thread(lambda _cancel: function(*args, **kwargs))


def run_all(workers: Sequence[Callable[[], None]], cancel: threading.Event) -> None:
    """Run each in a thread of its own until all have ended.

    The first failure sets `cancel`, which each worker must look at, and is raised when all have ended.
    """
    lock = threading.Lock()
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - raised below, in the caller's thread
            with lock:
                failures.append(exc)
            cancel.set()

    threads = [
        threading.Thread(target=run, args=(work,), name="nbdpull-worker", daemon=True)
        for work in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The others raise Cancelled because of the first one, which can have come from outside.
    real = [exc for exc in failures if not isinstance(exc, Cancelled)]
    if failures:
        raise (real or failures)[0]
