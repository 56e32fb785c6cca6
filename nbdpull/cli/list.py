"""nbdpull list."""

from __future__ import annotations

from collections.abc import Sequence

import click

from nbdpull import api
from nbdpull.cli.console import Console
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.tables import backup_state, local_time, short_ids, table
from nbdpull.model.results import BackupInfo
from nbdpull.units import format_size

__all__ = ["command"]


@click.command("list", short_help="List the backups in a repository.")
@repository_option()
@vm_option
@click.option("--chain", metavar="NAME", help="Only backups of this chain.")
@click.option("-a", "--all", "all_", is_flag=True, help="Also backups that lack a disk.")
@click.option(
    "--forgotten", is_flag=True, help="Also forgotten backups, which 'undo' can still bring back."
)
@verb
def command(
    console: Console,
    repository: str,
    vm: str | None,
    chain: str | None,
    all_: bool,
    forgotten: bool,
) -> int:
    """List backups, oldest first. A backup lacks a disk when its run died in the middle of its end."""
    found = api.list_backups(
        repository,
        vm=vm,
        chain=chain,
        incomplete=True,
        forgotten=forgotten,
        keys=keys_of_user(),
    )
    shown = found if all_ else tuple(info for info in found if info.complete)
    console.result(shown, lambda: _table(found, shown), needed=True)
    hidden = len(found) - len(shown)
    if hidden and not console.quiet:
        lacks = "1 more backup lacks" if hidden == 1 else f"{hidden} more backups lack"
        console.note(f"{lacks} a disk and can't be restored as a whole; 'list --all' shows it")
    return 0


def _table(found: Sequence[BackupInfo], shown: Sequence[BackupInfo]) -> str:
    if not shown:
        return "no backups"
    short = short_ids(info.backup for info in found)
    columns = ["backup", "time", "vm", "chain", "level", "parent"]
    columns += [">disks", ">size", ">read", ">stored"]
    partial = any(not info.complete or info.forgotten or info.protected for info in shown)
    if partial:
        columns.append("state")
    rows = []
    for info in shown:
        row = [
            short[info.backup],
            local_time(info.time),
            info.vm,
            info.chain,
            info.level,
            "-" if info.parent is None else short.get(info.parent, info.parent),
            str(len(info.disks)),
            format_size(sum(disk.size for disk in info.disks)),
            format_size(sum(disk.read_bytes for disk in info.disks)),
            format_size(sum(disk.stored_bytes for disk in info.disks)),
        ]
        rows.append([*row, backup_state(info)] if partial else row)
    return table(columns, rows)
