"""What a verb says: results to standard output, all else to standard error.

    standard output   the result: for people, or with --json one JSON object or array, or nothing
    standard error    progress, warnings, and one line for an error; with --progress json only events

A result is printed when the verb has done its work, so with --json standard output stays empty on an error.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from nbdpull.cli.jsonform import Json, dumps, to_json

__all__ = ["Console", "ProgressMode", "StdoutError", "one_line", "write_stderr"]


class StdoutError(Exception):
    """Standard output can't be written; the message is the system's own.

    Attributes:
        reader_gone: nobody reads it any more, as in ``| head``.
    """

    def __init__(self, message: str, *, reader_gone: bool) -> None:
        super().__init__(message)
        self.reader_gone = reader_gone


class ProgressMode(StrEnum):
    """How progress is told."""

    BAR = "bar"
    """Moving bars on a terminal."""
    PLAIN = "plain"
    """A line now and then."""
    JSON = "json"
    """One JSON object a line."""
    NONE = "none"

    @staticmethod
    def choose(wanted: str, *, quiet: bool) -> ProgressMode:
        """The mode that ``auto`` means here; an explicit one is taken although `quiet`."""
        if wanted != "auto":
            return ProgressMode(wanted)
        if quiet:
            return ProgressMode.NONE
        terminal = sys.stderr is not None and sys.stderr.isatty()
        if terminal and os.environ.get("TERM", "dumb") != "dumb":
            return ProgressMode.BAR
        return ProgressMode.PLAIN


def one_line(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey.

    Names and messages come from QEMU, from a repository, from file names: none of them is ours.
    """
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def write_stderr(line: str) -> None:
    """Write one whole line, if anybody still listens.

    Not through `print`: from a signal handler that could interrupt itself.
    """
    data = (line + "\n").encode(errors="backslashreplace")
    with suppress(OSError, ValueError):
        if sys.stderr is sys.__stderr__ and sys.stderr is not None:
            os.write(sys.stderr.fileno(), data)
        elif sys.stderr is not None:
            # Replaced: by the progress bars, which keep such lines above them, or by a test.
            sys.stderr.write(data.decode())
            sys.stderr.flush()


def _write_stdout(text: str) -> None:
    """Print, and know at once that all of it arrived.

    Raises:
        StdoutError: it did not.
    """
    stream = sys.stdout
    data = memoryview((text + "\n").encode(stream.encoding, errors="backslashreplace"))
    try:
        stream.flush()
        while data:
            # Under PYTHONUNBUFFERED this is a bare write(), which may take a part; 'print' loses the rest.
            written = stream.buffer.write(data)
            if not written:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            data = data[written:]
        stream.buffer.flush()
    except OSError as exc:
        # Not let through: click would take a broken pipe for its own business.
        gone = isinstance(exc, BrokenPipeError)
        raise StdoutError(str(exc.strerror), reader_gone=gone) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """Where one verb talks.

    Attributes:
        verb: its name.
        json: print the result as JSON.
        quiet: leave out what only reports success.
        mode: how progress is told.
        debug: show where an error comes from.
    """

    verb: str
    json: bool = False
    quiet: bool = False
    mode: ProgressMode = ProgressMode.NONE
    debug: bool = False

    def result(
        self,
        value: object,
        human: Callable[[], str],
        *,
        needed: bool = False,
        to_stderr: bool = False,
    ) -> None:
        """Tell the result.

        Args:
            value: a result's dataclass or what `to_json` makes of one.
            human: makes the text for people.
            needed: the text is what was asked for, so --quiet does not hide it.
            to_stderr: standard output carries a disk, so the text goes beside it.
        """
        if self.mode is ProgressMode.JSON:
            self._event("result", result=to_json(value))
        if self.json:
            _write_stdout(dumps(to_json(value), indent=2))
        elif to_stderr:
            if not self.quiet and self.mode is not ProgressMode.JSON:
                write_stderr(human())
        elif needed or not self.quiet:
            text = human()
            if text:
                _write_stdout(text)

    def error(self, kind: str, message: str, exit_code: int) -> None:
        """Tell why the verb failed."""
        if self.mode is ProgressMode.JSON:
            self._event("error", error=kind, message=message, exit_code=exit_code)
        else:
            write_stderr(f"nbdpull: {one_line(message)}")

    def warning(self, message: str) -> None:
        """Tell what went wrong without harm."""
        if self.mode is ProgressMode.JSON:
            self._event("warning", message=message)
        else:
            write_stderr(f"nbdpull: warning: {one_line(message)}")

    def note(self, message: str) -> None:
        """Tell what the user should know while it happens."""
        if self.mode is ProgressMode.JSON:
            self._event("message", text=message)
        else:
            write_stderr(f"nbdpull: {one_line(message)}")

    def log(self, level: str, message: str) -> None:
        """Tell one log record; a traceback keeps its lines."""
        if self.mode is ProgressMode.JSON:
            self._event("log", level=level, message=message)
        else:
            for line in message.splitlines():
                write_stderr(f"nbdpull: {level}: {_printable(line)}")

    def _event(self, event: str, **fields: Json) -> None:
        write_stderr(dumps({"event": event, "verb": self.verb, **fields}))
