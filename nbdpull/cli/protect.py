"""nbdpull protect."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user

__all__ = ["command"]


@click.command("protect", short_help="Keep backups from being forgotten.")
@click.argument("backups", metavar="BACKUP...", nargs=-1, required=True)
@repository_option()
@vm_option
@verb
def command(console: Console, backups: tuple[str, ...], repository: str, vm: str | None) -> int:
    """Keep backups from being forgotten, by a policy or by name, until 'unprotect'."""
    result = api.protect(repository, backups, vm=vm, keys=keys_of_user())
    console.result(result, lambda: f"protected {', '.join(result.backups)}")
    return 0
