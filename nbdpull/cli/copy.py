"""nbdpull copy."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import lock_mode_option, lock_option, parsed_lock, verb
from nbdpull.cli.password import keys_of_user, target_keys_of_user
from nbdpull.cli.progress import show_progress
from nbdpull.cli.run import EXIT_WARNINGS
from nbdpull.model.outcomes import CopyResult
from nbdpull.units import format_duration, format_size

__all__ = ["command"]


@click.command("copy", short_help="Copy backups into a replica, or to other keys.")
@click.argument("source", metavar="REPO1")
@click.argument("target", metavar="REPO2")
@click.argument("backups", metavar="[BACKUP]...", nargs=-1)
@click.option(
    "--rekey", is_flag=True, help="Store all of it anew, with the keys of REPO2, made by 'init'."
)
@lock_option("a new replica's")
@lock_mode_option
@verb
def command(
    console: Console,
    source: str,
    target: str,
    backups: tuple[str, ...],
    *,
    rekey: bool,
    lock: str | None,
    lock_mode: str | None,
) -> int:
    """Copy the named backups of REPO1, or all, into REPO2, which becomes or is its replica.

    Objects are copied as they are, each one checked on its way. What is there is not copied again, so
    a copy that was interrupted goes on where it ended.

    With --rekey, REPO2 is a repository of its own: other keys, or none, or the first ones. It is opened with
    NBDPULL_NEW_PASSWORD_FILE and its like, or NBDPULL_NEW_KEY_FILE.
    """
    lock_s, mode = parsed_lock(lock, lock_mode)
    with show_progress(console) as progress:
        result = api.copy(
            source,
            target,
            backups,
            rekey=rekey,
            lock_s=lock_s,
            lock_mode=mode,
            keys=keys_of_user(),
            target_keys=target_keys_of_user(),
            progress=progress,
        )
    for warning in result.warnings:
        console.warning(warning)
    console.result(result, lambda: _text(result))
    return EXIT_WARNINGS if result.warnings else 0


def _text(result: CopyResult) -> str:
    parts = [f"{len(result.copied)} backups copied", f"{len(result.present)} there already"]
    if result.forgotten:
        parts.append(f"{len(result.forgotten)} left out, because they were forgotten there")
    return one_line(
        f"{', '.join(parts)}; {result.objects} objects, {format_size(result.written_bytes)}"
        f" in {format_duration(result.duration_s)}"
    )
