"""Passwords from a terminal: never shown, never in an argument, never logged."""

from __future__ import annotations

import os
import select
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from nbdpull.model.keysource import KeySource

__all__ = ["interrupt", "keys_of_user", "new_keys_of_user", "target_keys_of_user"]

_TERMINAL = "/dev/tty"
_LINE_MAX = 4096
_interrupted = threading.Event()


def keys_of_user() -> KeySource:
    """What the environment has; else somebody at a terminal is asked."""
    _interrupted.clear()
    return KeySource(ask=lambda: _ask("password: "))


def new_keys_of_user() -> KeySource:
    """The same for a password that is chosen now, which is asked for twice."""
    _interrupted.clear()
    return KeySource(ask=_ask_twice)


def target_keys_of_user() -> KeySource:
    """What the environment has for the repository that is copied to; else somebody is asked."""
    _interrupted.clear()
    return KeySource(variables="NBDPULL_NEW", ask=lambda: _ask("password of the copy: "))


def interrupt() -> None:
    """End a question that nobody answers; may be called from a signal handler."""
    _interrupted.set()


def _ask_twice() -> str | None:
    while True:
        first = _ask("new password: ")
        if first is None or first == _ask("the same again: "):
            return first
        _tell(b"they differ; try again\n")


def _tell(text: bytes) -> None:
    with suppress(OSError), open(_TERMINAL, "wb", buffering=0) as terminal:  # noqa: PTH123
        terminal.write(text)


def _ask(question: str) -> str | None:
    """One line from the terminal that the process belongs to; None when it has none."""
    try:
        fd = os.open(_TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with _no_echo(fd):
            os.write(fd, question.encode())
            try:
                return _line(fd)
            finally:
                os.write(fd, b"\n")
    except termios.error:
        return None
    finally:
        os.close(fd)


def _line(fd: int) -> str:
    # The thread that waits here is not the one that a signal interrupts, so it looks up now and then.
    while not select.select([fd], [], [], 0.1)[0]:
        if _interrupted.is_set():
            raise click.Abort
    raw = os.read(fd, _LINE_MAX)
    if not raw:
        raise click.Abort
    return raw.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


@contextmanager
def _no_echo(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    quiet = termios.tcgetattr(fd)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSAFLUSH, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
