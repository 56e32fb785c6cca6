"""nbdpull gc."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console
from nbdpull.cli.options import repository_option, verb
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.tables import local_time
from nbdpull.errors import UsageError
from nbdpull.model.outcomes import GcResult
from nbdpull.units import format_duration, format_size, parse_duration

__all__ = ["command"]


@click.command("gc", short_help="Delete what no backup needs any more.")
@repository_option()
@click.option(
    "--undo-window",
    metavar="DURATION",
    default="7d",
    show_default=True,
    help="How long forgotten backups can be brought back; 0s ends that now.",
)
@click.option(
    "--exclusive",
    is_flag=True,
    help="Nothing else uses the repository now; only needed where the store can't tell writers apart.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only tell what would be deleted.")
@verb
def command(
    console: Console, repository: str, undo_window: str, exclusive: bool, dry_run: bool
) -> int:
    """Delete forgotten backups whose undo window is over, and what failed runs left.

    Any number of these may run at once, on any hosts, beside backups and restores.
    """
    try:
        window_s = parse_duration(undo_window)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    result = api.gc(
        repository,
        undo_window_s=window_s,
        exclusive=exclusive,
        dry_run=dry_run,
        keys=keys_of_user(),
    )
    console.result(result, lambda: _text(result), needed=dry_run)
    return 0


def _text(result: GcResult) -> str:
    objects = result.packs + result.indexes + result.manifests + result.others
    lines = [
        f"session {sid} idled for a day and can't be committed any more" for sid in result.revoked
    ]
    if result.live:
        lines.append(f"spared what {len(result.live)} running or lately failed sessions wrote")
    if result.refused:
        ends = f"; the first lock ends {local_time(result.unlock)}" if result.unlock else ""
        lines.append(f"{len(result.refused)} objects are locked, or may not be deleted by us{ends}")
    lines.append(
        f"{'would delete' if result.dry_run else 'deleted'} {objects} objects"
        f" ({result.packs} packs, {result.manifests} manifests), {format_size(result.freed_bytes)},"
        f" in {format_duration(result.duration_s)}"
    )
    return "\n".join(lines)
