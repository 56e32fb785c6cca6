"""nbdpull show."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console
from nbdpull.cli.jsonform import Json, to_json
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.tables import backup_state, block, disk_table, local_time, table
from nbdpull.model.outcomes import ShowResult
from nbdpull.units import format_duration, format_size

__all__ = ["command"]


@click.command("show", short_help="Show all about one backup.")
@click.argument("backup", metavar="BACKUP")
@repository_option()
@vm_option
@verb
def command(console: Console, backup: str, repository: str, vm: str | None) -> int:
    """Show BACKUP (an id, the beginning of one, or 'latest'): disks, cost, and descent."""
    result = api.show(repository, backup, vm=vm, keys=keys_of_user())
    console.result(_json(result), lambda: _text(result), needed=True)
    return 0


def _json(result: ShowResult) -> Json:
    """The backup's own keys, as `list` has them, and the totals and ancestors beside them."""
    shown = to_json(result.backup)
    if not isinstance(shown, dict):
        raise TypeError("a backup's JSON form is an object")
    ratio = result.compression
    return {
        **shown,
        "size": result.size,
        "changed_bytes": result.changed_bytes,
        "read_bytes": result.read_bytes,
        "stored_bytes": result.stored_bytes,
        "reused_bytes": result.reused_bytes,
        "compression": None if ratio is None else round(ratio, 3),
        "lineage": to_json(result.lineage),
        "lineage_end": result.lineage_end,
        "locked_until": result.locked_until,
    }


def _text(result: ShowResult) -> str:
    info = result.backup
    ratio = result.compression
    ends = result.locked_until
    parts = [
        block(
            [
                ("backup", info.backup),
                ("vm", info.vm),
                ("chain", info.chain),
                ("level", info.level),
                ("parent", info.parent or "-"),
                ("time", local_time(info.time)),
                ("duration", format_duration(info.duration_s)),
                ("state", backup_state(info)),
                *([] if ends is None else [("locked until", local_time(ends))]),
                ("tags", ", ".join(info.tags) or "-"),
                ("size", format_size(result.size)),
                ("changed", format_size(result.changed_bytes)),
                ("read", format_size(result.read_bytes)),
                ("stored", format_size(result.stored_bytes)),
                ("reused", format_size(result.reused_bytes)),
                ("compression", "-" if ratio is None else f"{ratio:.2f} to 1 (read to stored)"),
            ]
        ),
        "",
        disk_table(info.disks),
    ]
    if info.machine:
        files = [[name, format_size(size)] for name, size in info.machine]
        parts += ["", table(["machine's state", ">size"], files)]
    if result.lineage:
        rows = [[one.backup, local_time(one.time), one.level] for one in result.lineage]
        parts += ["", table(["counted from", "time", "level"], rows)]
    if result.lineage_end is not None:
        parts += ["", f"{result.lineage_end} came before, and is not in the repository"]
    return "\n".join(parts)
