"""nbdpull forget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.run import EXIT_WARNINGS
from nbdpull.cli.tables import local_time, table
from nbdpull.errors import UsageError
from nbdpull.model.outcomes import ForgetResult, Forgotten
from nbdpull.model.retention import Policy
from nbdpull.units import parse_duration

__all__ = ["command"]

_F = TypeVar("_F", bound=Callable[..., Any])
_RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def _keep_options(function: _F) -> _F:
    """``--keep-last`` and its like."""
    for name in reversed(_RULES):
        text = "Keep the newest N." if name == "last" else f"Keep N {name} ones."
        function = click.option(
            f"--keep-{name}", type=click.IntRange(min=0), default=0, metavar="N", help=text
        )(function)
    return function


@click.command(
    "forget", short_help="Forget backups that a policy does not keep, or that are named."
)
@click.argument("backups", metavar="[BACKUP]...", nargs=-1)
@repository_option()
@vm_option
@click.option("--chain", metavar="NAME", help="Only backups of this chain.")
@_keep_options
@click.option(
    "--keep-within",
    metavar="DURATION",
    help="Keep all that are at most so much older than the newest one: 12h, 7d, 4w, 1y.",
)
@click.option(
    "--keep-tag",
    "keep_tags",
    multiple=True,
    metavar="TAG",
    help="Keep all with this tag; repeatable.",
)
@click.option(
    "--min-keep",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Keep at least N of each set, whatever the rules say.",
)
@click.option(
    "--trust-store-time",
    is_flag=True,
    help="Also judge sets with a backup that was stored long after it was taken, as after copying.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only tell what would be kept and dropped.")
@verb
def command(  # noqa: PLR0913 - an option is a parameter
    console: Console,
    /,
    *,
    backups: tuple[str, ...],
    repository: str,
    vm: str | None,
    chain: str | None,
    keep_within: str | None,
    keep_tags: tuple[str, ...],
    min_keep: int,
    trust_store_time: bool,
    dry_run: bool,
    **counts: int,
) -> int:
    """Forget the named backups, or all that no --keep rule wants.

    Backups with the same VM, chain and disks are judged together, by the time at which the store took
    them in, in UTC. 'undo' brings back what was forgotten, until 'gc' deletes it, 7 days later by default.
    """
    policy = None
    if any(counts.values()) or keep_within is not None or keep_tags:
        try:
            policy = Policy(
                keep_within_s=None if keep_within is None else parse_duration(keep_within),
                keep_tags=keep_tags,
                min_keep=min_keep,
                **counts,
            )
        except ValueError as exc:
            raise UsageError(str(exc)) from exc
    result = api.forget(
        repository,
        backups,
        policy=policy,
        vm=vm,
        chain=chain,
        trust_store_time=trust_store_time,
        dry_run=dry_run,
        keys=keys_of_user(),
    )
    for warning in result.warnings:
        console.warning(warning)
    console.result(result, lambda: _text(result), needed=dry_run)
    return EXIT_WARNINGS if result.warnings else 0


def _text(result: ForgetResult) -> str:
    lines = []
    rows = [_row("keep", one) for one in result.kept] + [
        _row("drop", one) for one in result.dropped
    ]
    if rows:
        lines.append(table(["", "backup", "stored", "vm", "chain", "level", "why"], rows))
    count = len(result.dropped)
    what = f"{count} {'backup' if count == 1 else 'backups'}"
    if result.damaged:
        what += f" and {len(result.damaged)} damaged manifests"
    if result.dry_run:
        lines.append(f"would forget {what}")
    else:
        lines.append(
            f"forgot {what}"
            + ("; 'undo' brings them back until 'gc' deletes them" if count else "")
        )
    return "\n".join(lines)


def _row(verdict: str, one: Forgotten) -> list[str]:
    return [
        verdict,
        one.backup,
        local_time(one.stored_time),
        one_line(one.vm),
        one_line(one.chain),
        one.level,
        ", ".join(one.reasons),
    ]
