"""nbdpull repack."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.progress import show_progress
from nbdpull.model.outcomes import RepackResult
from nbdpull.units import format_duration, format_size

__all__ = ["command"]


@click.command("repack", short_help="Rewrite packs that are mostly no longer needed.")
@repository_option()
@vm_option
@click.option(
    "--ratio",
    type=click.FloatRange(min=1),
    default=1.4,
    show_default=True,
    help="Rewrite packs with so many bytes for each byte needed.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only tell what would be rewritten.")
@verb
def command(console: Console, repository: str, vm: str | None, ratio: float, dry_run: bool) -> int:
    """Store what is still needed of sparse packs once more, so that 'gc' can delete them.

    Backups keep their ids. The space comes back when the undo window of the old packs is over.
    """
    with show_progress(console) as progress:
        result = api.repack(
            repository, vm=vm, ratio=ratio, dry_run=dry_run, progress=progress, keys=keys_of_user()
        )
    console.result(result, lambda: _text(result), needed=dry_run)
    return 0


def _text(result: RepackResult) -> str:
    found = f"{result.sparse_packs} sparse packs, {format_size(result.sparse_bytes)}"
    if result.dry_run:
        return f"would rewrite {found}, and {len(result.backups)} backups"
    return (
        f"rewrote {found} as {format_size(result.stored_bytes)}, and {len(result.backups)} backups,"
        f" in {format_duration(result.duration_s)}"
    )
