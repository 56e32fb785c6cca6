"""Progress of a running verb on standard error: bars, plain lines, or events."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nbdpull.cli.console import Console, ProgressMode, one_line, write_stderr
from nbdpull.cli.jsonform import Json, dumps, iso_time
from nbdpull.model.results import Progress, ProgressCallback, ProgressKind
from nbdpull.units import format_duration, format_rate, format_size

__all__ = ["show_progress"]

_PLAIN_S = 10.0
"""Between two plain lines of one disk: a log of an hour stays readable."""


@contextmanager
def show_progress(console: Console) -> Iterator[ProgressCallback | None]:
    """A callback that shows progress as long as the block runs; None when nobody wants to see any."""
    match console.mode:
        case ProgressMode.NONE:
            yield None
        case ProgressMode.JSON:
            yield _event
        case ProgressMode.PLAIN:
            yield _Plain()
        case ProgressMode.BAR:
            # Loads rich, which takes longer than most of what runs without a terminal.
            from nbdpull.cli.bars import show_bars  # noqa: PLC0415

            with show_bars() as callback:
                yield callback


def _event(progress: Progress) -> None:
    event: dict[str, Json] = {
        "event": progress.kind.value,
        "verb": progress.verb,
        "time": iso_time(time.time()),
        "disk": progress.disk,
    }
    if progress.kind is ProgressKind.MESSAGE:
        event["text"] = progress.text
    else:
        event["done"] = progress.done
        event["total"] = progress.total
    # Last, and never over one of the names above.
    event.update({name: value for name, value in progress.fields.items() if name not in event})
    write_stderr(dumps(event))


class _Plain:
    """Lines for a log: each disk's end, and where it is every few seconds.

    Of a verify, which goes through many disks of many backups, only where it is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began: dict[str | None, float] = {}
        self._told: dict[str | None, float] = {}

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            line = self._line(progress, time.monotonic())
        if line:
            write_stderr(f"nbdpull: {one_line(line)}")

    def _line(self, progress: Progress, now: float) -> str:
        if progress.kind is ProgressKind.MESSAGE:
            return progress.text
        name = progress.disk or progress.verb
        many = progress.verb == "verify"
        took_s = now - self._began.setdefault(progress.disk, now)
        line = ""
        if progress.kind is ProgressKind.DISK_END:
            del self._began[progress.disk]
            if not many:
                counts = _counts(progress.fields)
                took = format_duration(took_s)
                line = f"{name}: done, {format_size(progress.total)} in {took}{counts}"
        elif now - self._told.setdefault(None if many else progress.disk, now) >= _PLAIN_S:
            self._told[None if many else progress.disk] = now
            line = f"{name}: {format_size(progress.done)} of {format_size(progress.total)}"
            rate = progress.done / took_s if took_s else 0.0
            if rate:
                left_s = max(progress.total - progress.done, 0) / rate
                line += f", {format_rate(rate)}, {format_duration(left_s)} left"
        return line


def _counts(fields: Mapping[str, str | int | float]) -> str:
    """``, 8.00 MiB read, 2.10 KiB stored``."""
    return "".join(
        f", {format_size(value)} {name.removesuffix('_bytes')}"
        for name, value in fields.items()
        if name.endswith("_bytes") and not isinstance(value, str)
    )
