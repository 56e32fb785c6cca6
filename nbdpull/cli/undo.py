"""nbdpull undo."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user
from nbdpull.model.outcomes import UndoResult

__all__ = ["command"]


@click.command("undo", short_help="Bring forgotten backups back.")
@click.argument("backups", metavar="BACKUP...", nargs=-1, required=True)
@repository_option()
@vm_option
@verb
def command(console: Console, backups: tuple[str, ...], repository: str, vm: str | None) -> int:
    """Bring forgotten backups back ('list --forgotten' shows them), as long as 'gc' has not come to them."""
    result = api.undo(repository, backups, vm=vm, keys=keys_of_user())
    console.result(result, lambda: _text(result))
    return 0


def _text(result: UndoResult) -> str:
    lines = [f"backup {name} is back" for name in result.restored]
    lines += [f"backup {name} was not forgotten" for name in result.unchanged]
    return "\n".join(lines)
