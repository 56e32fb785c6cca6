"""nbdpull init."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import repository_option, verb

__all__ = ["command"]


@click.command("init", short_help="Create a repository.")
@repository_option()
@verb
def command(console: Console, repository: str) -> int:
    """Create an empty repository in a folder that is new or empty."""
    result = api.init(repository)
    console.result(
        result, lambda: f"created repository {result.id} in {one_line(result.repository)}"
    )
    return 0
