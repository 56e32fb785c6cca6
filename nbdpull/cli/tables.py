"""Aligned columns for people."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from io import StringIO

from nbdpull.cli.console import one_line
from nbdpull.model.results import BackupInfo, DiskInfo
from nbdpull.units import format_size

__all__ = ["backup_state", "block", "disk_table", "local_time", "short_ids", "table"]

_UNLIMITED = 100_000
_SHORTEST_ID = 8


def local_time(time: float) -> str:
    """``2025-01-31 10:05:00``, in this machine's time zone."""
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def short_ids(ids: Iterable[str]) -> dict[str, str]:
    """For each id its shortest prefix, of 8 letters or more, that no other one has."""
    ordered = sorted(set(ids))
    short = {}
    for at, name in enumerate(ordered):
        needed = _SHORTEST_ID
        # Sorted, so the longest common prefix is that with one of the neighbours.
        for other in ordered[max(at - 1, 0) : at] + ordered[at + 1 : at + 2]:
            common = next(
                (i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b),
                min(len(name), len(other)),
            )
            needed = max(needed, common + 1)
        short[name] = name[:needed]
    return short


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under headings. A column whose heading starts with ``>`` is flush right.

    On a terminal long cells are wrapped to its width; elsewhere each row is one line, whole.
    """
    from rich.console import Console  # noqa: PLC0415 - loads slowly, and --json never needs it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else _UNLIMITED
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        grid.add_column(
            Text(column.removeprefix(">")),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(Text(one_line(cell)) for cell in row))
    buffer = StringIO()
    # Through a buffer: rich itself would end the process when the reader of a pipe has gone.
    console = Console(file=buffer, width=width, force_terminal=terminal, legacy_windows=False)
    console.print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def block(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, a pair a line."""
    shown = [(name, one_line(value)) for name, value in pairs]
    width = max(len(name) for name, _ in shown)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in shown)


def disk_table(disks: Iterable[DiskInfo]) -> str:
    """A backup's disks: what was read, why, and what that came to."""
    return table(
        ["disk", ">size", "level", ">changed", ">read", ">stored", ">reused", "why"],
        [
            [
                disk.name,
                format_size(disk.size),
                disk.level,
                format_size(disk.changed_bytes),
                format_size(disk.read_bytes),
                format_size(disk.stored_bytes),
                format_size(disk.reused_bytes),
                disk.reason,
            ]
            for disk in disks
        ],
    )


def backup_state(info: BackupInfo) -> str:
    """``complete``, or what is missing; and whether it is forgotten or protected."""
    state = "complete"
    if not info.complete:
        state = f"incomplete, without {', '.join(info.missing) or 'all of its disks'}"
    if info.forgotten:
        state += ", forgotten"
    if info.protected:
        state += ", protected"
    return state
