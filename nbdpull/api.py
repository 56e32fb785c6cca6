"""The verbs as blocking functions: those of `nbdpull.aio`, each in an event loop of its own.

A verb that is interrupted cleans up, in QEMU too, before its function ends: by Ctrl-C where Python's
own SIGINT handler is in place and the call is in the main thread (then `KeyboardInterrupt`), or from
anywhere with `cancellable` (then `concurrent.futures.CancelledError`).
"""

from __future__ import annotations

import functools
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from nbdpull import aio

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "Cancel",
    "backup",
    "cancellable",
    "cleanup",
    "copy",
    "doctor",
    "estimate",
    "forget",
    "gc",
    "init",
    "key_add",
    "key_export",
    "key_import",
    "key_list",
    "key_remove",
    "key_rotate",
    "list_backups",
    "protect",
    "repack",
    "restore",
    "show",
    "undo",
    "unprotect",
    "verify",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Cancel:
    """Call it to end the blocking functions of one `cancellable` block: the running one and later ones.

    It may be called from any thread and from a signal handler, and returns at once; the function
    returns when everything is torn down, whether a store answers or not. Further calls do nothing, so that
    teardown is left alone.
    """

    # No lock: a signal handler runs in the middle of the code that would hold it. Each side writes
    # its own attribute first and reads the other's after, so one of them always sees the other.

    def __init__(self) -> None:
        self._cancelled = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether it was called."""
        return self._cancelled

    @property
    def running(self) -> bool:
        """Whether there is a running function that will end because of a call."""
        return self._running is not None

    def __call__(self) -> None:
        """Cancel."""
        if self._cancelled:
            return
        self._cancelled = True
        if (running := self._running) is not None:
            loop, task = running
            # A loop that was closed just now refuses: the function has ended by itself.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)

    async def watch(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """What `coroutine` returns or raises, unless it is cancelled first."""
        import asyncio  # noqa: PLC0415

        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("watch() must run in a task")
        loop = asyncio.get_running_loop()
        with _woken_by_signals(loop):
            self._running = loop, task
            try:
                if self._cancelled:
                    coroutine.close()
                    raise asyncio.CancelledError
                return await coroutine
            finally:
                self._running = None


@contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Have a signal wake the loop up, so that Python's handler runs at once.

    Else one that arrives just before the loop begins to wait, or in another thread, is noticed when
    the loop has something else to do, which may be never.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers don't run here
        return
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0)
        theirs.settimeout(0)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            if before != -1:
                # A program that embeds us listens itself: it is told of signals, and we leave it that.
                signal.set_wakeup_fd(before)
                yield
                return
            loop.add_reader(ours, ours.recv, 4096)
            try:
                yield
            finally:
                loop.remove_reader(ours)
        finally:
            signal.set_wakeup_fd(before)


_cancel: ContextVar[Cancel | None] = ContextVar("nbdpull_cancel", default=None)


@contextmanager
def cancellable() -> Iterator[Cancel]:
    """Make the blocking functions called in this block, by this thread, cancellable from elsewhere.

    ``with nbdpull.cancellable() as cancel:`` hand `cancel` to another thread or a signal handler; after
    a call of it, the function that runs tears down and raises `concurrent.futures.CancelledError`.
    """
    cancel = Cancel()
    token = _cancel.set(cancel)
    try:
        yield cancel
    finally:
        _cancel.reset(token)


def calls_left_behind() -> bool:
    """Whether calls to a store that did not answer are still under way, in threads of their own.

    Requests to an object store end after minutes, calls to a folder when its file system answers again. They need
    nobody, and don't keep the interpreter from ending.
    """
    from nbdpull.repo.calls import abandoned_calls  # noqa: PLC0415 - as below

    return abandoned_calls()


def _blocking(function: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, _T]:
    """The same function, with the same arguments, blocking."""

    @functools.wraps(function)
    def blocking(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        import asyncio  # noqa: PLC0415 - a third of the time that 'import nbdpull' would take
        import concurrent.futures  # noqa: PLC0415

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            name = function.__name__
            raise RuntimeError(
                f"nbdpull.{name}() blocks, and was called from a running event loop; await"
                f" nbdpull.aio.{name}() there"
            )
        cancel = _cancel.get() or Cancel()
        # With a factory, the runner leaves the thread's current event loop as it is.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            try:
                return runner.run(cancel.watch(function(*args, **kwargs)))
            except asyncio.CancelledError as exc:
                # Its cause is what went wrong in teardown, if anything did.
                raise concurrent.futures.CancelledError(
                    f"nbdpull.{function.__name__}() was cancelled"
                ) from (exc.__cause__ or exc)

    blocking.__module__ = __name__
    return blocking


init = _blocking(aio.init)
backup = _blocking(aio.backup)
restore = _blocking(aio.restore)
list_backups = _blocking(aio.list_backups)
show = _blocking(aio.show)
verify = _blocking(aio.verify)
cleanup = _blocking(aio.cleanup)
forget = _blocking(aio.forget)
undo = _blocking(aio.undo)
protect = _blocking(aio.protect)
unprotect = _blocking(aio.unprotect)
gc = _blocking(aio.gc)
copy = _blocking(aio.copy)
repack = _blocking(aio.repack)
key_list = _blocking(aio.key_list)
key_add = _blocking(aio.key_add)
key_remove = _blocking(aio.key_remove)
key_rotate = _blocking(aio.key_rotate)
key_export = _blocking(aio.key_export)
key_import = _blocking(aio.key_import)


estimate = _blocking(aio.estimate)
doctor = _blocking(aio.doctor)
