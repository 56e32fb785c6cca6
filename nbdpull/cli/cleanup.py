"""nbdpull cleanup."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import repository_option, source_argument, verb
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.progress import show_progress
from nbdpull.model.outcomes import CleanupResult

__all__ = ["command"]


@click.command("cleanup", short_help="Remove what a killed backup left.")
@source_argument
@repository_option(needed=False)
@click.option("--scratch", metavar="FOLDER", help="The folder that the backup was told to use.")
@click.option("--force", is_flag=True, help="Also take away what a run that is alive uses.")
@verb
def command(
    console: Console,
    source: tuple[str, ...],
    repository: str | None,
    scratch: str | None,
    force: bool,
) -> int:
    """Remove what killed runs left in the QEMU, or the images, at SOURCE, and nothing of others.

    The next backup does so by itself. Give the repository too, so that checkpoints which its backups
    can still be counted from stay.
    """
    with show_progress(console) as progress:
        result = api.cleanup(
            source,
            repository=repository,
            scratch=scratch,
            force=force,
            keys=keys_of_user(),
            progress=progress,
        )
    console.result(result, lambda: _text(result))
    return 0


def _text(result: CleanupResult) -> str:
    lines = [f"removed {line}" for line in result.removed]
    lines += [f"kept {line}" for line in result.kept]
    return "\n".join(one_line(line) for line in lines or ["nothing to clean up"])
