"""nbdpull restore."""

from __future__ import annotations

import sys
from typing import Literal

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import repository_option, tls_option, verb, vm_option
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.progress import show_progress
from nbdpull.cli.run import EXIT_WARNINGS
from nbdpull.cli.tables import table
from nbdpull.model.outcomes import RestoreResult
from nbdpull.units import format_duration, format_size

__all__ = ["command"]


@click.command("restore", short_help="Write a backup's disks to files, a device or an export.")
@click.argument("backup", metavar="BACKUP")
@repository_option()
@click.option(
    "--to",
    required=True,
    metavar="TARGET",
    help="A folder, which gets a file for each disk; or for one disk: - (standard output),"
    " nbd://..., nbd+unix://... or /dev/...",
)
@click.option("--disk", metavar="NAME", help="Only this disk.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["raw", "qcow2"]),
    default="raw",
    show_default=True,
    help="Of the files in a folder.",
)
@vm_option
@click.option("--force", is_flag=True, help="Replace files, and write to a device in use.")
@click.option(
    "--salvage",
    is_flag=True,
    help="Where something is lost, restore the rest: what is lost reads as zeroes, and each range is told.",
)
@tls_option
@verb
def command(  # noqa: PLR0913, PLR0917 - an option is a parameter
    console: Console,
    backup: str,
    repository: str,
    to: str,
    disk: str | None,
    format_: Literal["raw", "qcow2"],
    vm: str | None,
    force: bool,
    salvage: bool,
    tls: str | None,
) -> int:
    """Restore BACKUP: an id, the beginning of one, or 'latest'.

    Every byte is verified before it is written. No other backup is needed for it.
    """
    stream = to == "-"
    if stream and console.json:
        raise click.UsageError(
            "--to - and --json both want standard output; use --progress json, whose last event is"
            " the result",
            click.get_current_context(),
        )
    if stream and sys.stdout.isatty():
        raise click.UsageError(
            "--to - would write a disk to this terminal; redirect standard output",
            click.get_current_context(),
        )
    with show_progress(console) as progress:
        result = api.restore(
            repository,
            backup,
            to,
            vm=vm,
            disk=disk,
            format=format_,
            force=force,
            salvage=salvage,
            tls=tls,
            keys=keys_of_user(),
            progress=progress,
        )
    for warning in result.warnings:
        console.warning(warning)
    console.result(result, lambda: _summary(result), to_stderr=stream)
    return EXIT_WARNINGS if result.warnings else 0


def _summary(result: RestoreResult) -> str:
    duration = format_duration(result.duration_s)
    return (
        f"restored backup {result.backup} of {one_line(result.vm)} in {duration}\n"
        + table(
            ["disk", ">size", ">data", "to"],
            [
                [disk.name, format_size(disk.size), format_size(disk.written_bytes), disk.target]
                for disk in result.disks
            ],
        )
        + "".join(f"\nmachine's state: {path}" for path in result.machine)
    )
