"""nbdpull estimate."""

from __future__ import annotations

from typing import cast

import click

from nbdpull import api
from nbdpull.cli.backup import LEVELS, Level, chain_option, full_level
from nbdpull.cli.console import Console
from nbdpull.cli.options import repository_option, source_argument, verb
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.tables import table
from nbdpull.model.outcomes import EstimateResult
from nbdpull.units import format_size

__all__ = ["command"]


@click.command("estimate", short_help="Tell what a backup would read now.")
@source_argument
@repository_option()
@click.option(
    "-l",
    "--level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="auto",
    metavar="LEVEL",
    help="Of this level, as for 'backup'.",
)
@click.option("-i", "--include", multiple=True, metavar="DISK", help="Only this disk; repeatable.")
@click.option("-x", "--exclude", multiple=True, metavar="DISK", help="Not this disk; repeatable.")
@chain_option
@click.option("--vm", metavar="NAME", help="What the VM is called in the repository.")
@verb
def command(
    console: Console,
    source: tuple[str, ...],
    repository: str,
    level: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    chain: str,
    vm: str | None,
) -> int:
    """Tell what a backup of SOURCE would read now; nothing is changed."""
    result = api.estimate(
        source,
        repository,
        level=cast("Level", full_level(level)),
        vm=vm,
        include=include,
        exclude=exclude,
        chain=chain,
        keys=keys_of_user(),
    )
    console.result(result, lambda: _text(result), needed=True)
    return 0


def _text(result: EstimateResult) -> str:
    rows = [
        (
            disk.name,
            format_size(disk.size),
            disk.level,
            "?" if disk.changed_bytes is None else format_size(disk.changed_bytes),
            disk.reason,
        )
        for disk in result.disks
    ]
    return f"the next backup of {result.vm}: {result.level}\n" + table(
        ("disk", ">size", "level", ">to read", "reason"), rows
    )
