"""nbdpull verify."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.progress import show_progress
from nbdpull.cli.run import EXIT_FAILURE
from nbdpull.model.results import Damage, VerifyResult
from nbdpull.units import format_duration, format_size

__all__ = ["command"]


@click.command("verify", short_help="Read and hash again everything backups refer to.")
@click.argument("backups", metavar="[BACKUP]...", nargs=-1)
@repository_option()
@vm_option
@verb
def command(console: Console, backups: tuple[str, ...], repository: str, vm: str | None) -> int:
    """Verify the named backups, or all: read everything they refer to and compare its hashes.

    Ends with 1 when anything is damaged, and tells what is lost.
    """
    with show_progress(console) as progress:
        result = api.verify(repository, backups, vm=vm, keys=keys_of_user(), progress=progress)
    console.result(result, lambda: _text(result), needed=not result.ok)
    return 0 if result.ok else EXIT_FAILURE


def _text(result: VerifyResult) -> str:
    count = len(result.backups)
    read = (
        f"{count} {'backup' if count == 1 else 'backups'}, {result.frames} frames,"
        f" {format_size(result.read_bytes)} in {format_duration(result.duration_s)}"
    )
    if result.ok:
        return f"verified {read}: no damage"
    found = len(result.damaged)
    return "\n".join(
        [
            *(_damage(damage) for damage in result.damaged),
            f"verified {read}: {found} {'thing is' if found == 1 else 'things are'} damaged",
        ]
    )


def _damage(damage: Damage) -> str:
    line = f"damaged: {damage.key}: {damage.problem}"
    if damage.backup is not None:
        line += f"; backup {damage.backup}"
    if damage.disk is not None:
        line += f", disk {damage.disk}"
    if damage.ranges:
        lost = sum(end - start for start, end in damage.ranges)
        where = ", ".join(f"{start}-{end}" for start, end in damage.ranges)
        line += f": {format_size(lost)} lost, bytes {where}"
    return one_line(line)
