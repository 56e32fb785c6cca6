"""nbdpull unprotect."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user

__all__ = ["command"]


@click.command("unprotect", short_help="Let protected backups be forgotten again.")
@click.argument("backups", metavar="BACKUP...", nargs=-1, required=True)
@repository_option()
@vm_option
@verb
def command(console: Console, backups: tuple[str, ...], repository: str, vm: str | None) -> int:
    """Take the protection of backups away; nothing is forgotten by that."""
    result = api.unprotect(repository, backups, vm=vm, keys=keys_of_user())
    console.result(result, lambda: f"no longer protected: {', '.join(result.backups)}")
    return 0
