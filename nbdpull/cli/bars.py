"""Moving bars on a terminal, one a disk: bytes, rate, time left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nbdpull.cli.console import one_line
from nbdpull.model.results import Progress as Event
from nbdpull.model.results import ProgressCallback, ProgressKind
from nbdpull.units import format_rate, format_size

__all__ = ["show_bars"]

_KEPT = 12
"""Bars of disks that are done: more than fit the screen would break the display."""


class _Bytes(ProgressColumn):
    """``1.20 GiB of 20.0 GiB``."""

    def render(self, task: Task) -> Text:
        total = format_size(task.total or 0)
        return Text(f"{format_size(task.completed)} of {total}", justify="right")


class _Rate(ProgressColumn):
    """``512 MiB/s``."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(format_rate(speed) if speed else "", justify="right")


class _Bars:
    """Rich's own lock makes each update safe; ours makes 'is there a bar yet' and 'add one' one step."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._lock = threading.Lock()
        self._tasks: dict[str | None, TaskID] = {}
        self._ended: list[TaskID] = []

    def __call__(self, event: Event) -> None:
        # Not before there is something to show: what moves would wipe a question for a password away.
        self._bars.start()
        if event.kind is ProgressKind.MESSAGE:
            self._bars.console.print(
                Text(one_line(event.text)), highlight=False, soft_wrap=True, style="dim"
            )
            return
        with self._lock:
            task = self._tasks.get(event.disk)
            if task is None:
                name = one_line(event.disk or event.verb)
                task = self._tasks[event.disk] = self._bars.add_task(name, total=event.total)
        self._bars.update(task, completed=event.done, total=event.total)
        if event.kind is ProgressKind.DISK_END:
            self._bars.update(task, completed=event.total)
            with self._lock:
                self._ended.append(task)
                if len(self._ended) > _KEPT:
                    self._bars.remove_task(self._ended.pop(0))


@contextmanager
def show_bars() -> Iterator[ProgressCallback]:
    """Show bars as long as the block runs; they stay on the screen at the end."""
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        _Bytes(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=5,
        redirect_stdout=False,
    )
    try:
        yield _Bars(bars)
    finally:
        bars.stop()
