"""What surrounds every verb: signals, logging, and errors as exit codes.

0 ok   1 failure   2 usage   3 done with warnings   10 no such repository   11 locked or in use
12 wrong key   13 no more scratch room   128+N ended by signal N
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final, NoReturn

from nbdpull import api
from nbdpull.cli.console import Console
from nbdpull.cli.password import interrupt
from nbdpull.errors import Error

__all__ = ["EXIT_FAILURE", "EXIT_WARNINGS", "end_at_once", "run_verb"]

EXIT_FAILURE = 1
EXIT_WARNINGS = 3
_EXIT_SIGNAL = 128
_IN_QEMU: Final = frozenset({"backup", "cleanup", "doctor", "estimate"})
"""Verbs that a process which ends at once may leave something of in QEMU."""
_TOLD_AT: Final = 2

_log = logging.getLogger(__name__)


def run_verb(console: Console, work: Callable[[], int], *, verbose: bool) -> int:
    """Do `work` and return the exit code; an expected error becomes one line.

    A bug passes through. So does `StdoutError`, which is no business of the verb.
    """
    with (
        _logging(console, verbose=verbose),
        api.cancellable() as cancel,
        _signals(console, cancel) as received,
    ):
        return _coded(console, work, received)


def _coded(console: Console, work: Callable[[], int], received: Sequence[int]) -> int:
    try:
        return work()
    except Error as exc:
        _log.debug("the error came from here", exc_info=exc)
        console.error(type(exc).__name__, str(exc), exc.exit_code)
        return exc.exit_code
    except concurrent.futures.CancelledError as exc:
        if not received:
            raise
        _log.debug("it was cancelled here", exc_info=exc)
        return _stopped(console, received[0], exc.__cause__)
    except ModuleNotFoundError as exc:
        if exc.name != "nbd":
            raise
        console.error(
            "ModuleNotFoundError",
            f"libnbd's Python module 'nbd' is not installed for {sys.executable}; it is in"
            " the system's package python3-libnbd, and scripts/setup links it into .venv",
            EXIT_FAILURE,
        )
        return EXIT_FAILURE


def end_at_once(code: int) -> NoReturn:
    """End this process, and wait for none of its threads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _stopped(console: Console, signum: int, cause: BaseException | None) -> int:
    name = signal.Signals(signum).name
    message = f"ended by {name}; everything was torn down"
    if isinstance(cause, Error):
        message = f"ended by {name}, and tearing down failed: {cause}"
    console.error(name, message, _EXIT_SIGNAL + signum)
    return _EXIT_SIGNAL + signum


@contextmanager
def _signals(console: Console, cancel: api.Cancel) -> Iterator[list[int]]:
    """Let the first SIGINT, SIGTERM or SIGHUP cancel the running verb; yields the signals received.

    The second one ends the process at once. But not a verb that has something in QEMU, where teardown may
    well get to its end: there it is told what another one would leave, and the third one ends it.
    """
    received: list[int] = []

    def handler(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        interrupt()
        if cancel.cancelled:
            if console.verb not in _IN_QEMU or len(received) > _TOLD_AT:
                end_at_once(_EXIT_SIGNAL + signum)
            console.note(
                "still tearing down, which needs QEMU to answer; once more ends it at once, and 'nbdpull"
                " cleanup' then removes what is left"
            )
        elif cancel.running:
            cancel()
            if not console.quiet:
                console.note(f"got {signal.Signals(signum).name}, tearing down")
        else:
            # Nothing has begun, or all is done: nothing to tear down.
            raise SystemExit(_EXIT_SIGNAL + signum)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # 'nohup' ignores SIGHUP, and means it.
        if signum is signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
            continue
        before[signum] = signal.signal(signum, handler)
    try:
        yield received
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


class _Handler(logging.Handler):
    """Log records through the console, so that bars and events stay whole."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(
            logging.Formatter("%(name)s: %(message)s" if console.debug else "%(message)s")
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Tell one record."""
        self._console.log(record.levelname.lower(), self.format(record))


@contextmanager
def _logging(console: Console, *, verbose: bool) -> Iterator[None]:
    handler = _Handler(console)
    root = logging.getLogger()
    ours = logging.getLogger("nbdpull")
    qmp = logging.getLogger("qemu")
    before = ours.level, qmp.level
    ours.setLevel(logging.DEBUG if console.debug else logging.INFO if verbose else logging.WARNING)
    # It logs every error that it also raises, and we tell those ourselves.
    qmp.setLevel(logging.DEBUG if console.debug else logging.CRITICAL)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(before[0])
        qmp.setLevel(before[1])
