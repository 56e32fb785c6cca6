"""nbdpull init."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import (
    Kdf,
    kdf_option,
    lock_mode_option,
    lock_option,
    parsed_lock,
    repository_option,
    verb,
)
from nbdpull.cli.password import new_keys_of_user
from nbdpull.cli.run import EXIT_WARNINGS

__all__ = ["command"]


@click.command("init", short_help="Create a repository.")
@repository_option()
@click.option(
    "--encrypt",
    is_flag=True,
    help="Encrypt everything in it, under a password. It can't be undone.",
)
@kdf_option
@lock_option("the repository's")
@lock_mode_option
@verb
def command(
    console: Console,
    repository: str,
    encrypt: bool,
    kdf: Kdf,
    lock: str | None,
    lock_mode: str | None,
) -> int:
    """Create an empty repository in a place that is new or empty.

    REPO is a folder, or s3://bucket/prefix, gs://bucket/prefix, az://container/prefix. The bucket must
    be there. What its store can be trusted with is tried out.

    The password of an encrypted one is asked for, or comes from NBDPULL_PASSWORD_FILE,
    NBDPULL_PASSWORD_COMMAND or NBDPULL_PASSWORD. Who loses it loses the backups: see 'nbdpull key export'.
    """
    lock_s, mode = parsed_lock(lock, lock_mode)
    result = api.init(
        repository,
        encrypt=encrypt,
        kdf=kdf,
        keys=new_keys_of_user(),
        lock_s=lock_s,
        lock_mode=mode,
    )
    for warning in result.warnings:
        console.warning(warning)
    kind = "encrypted repository" if result.encrypted else "repository"
    note = "\nkeep a recovery key in a safe place: 'nbdpull key export FILE'" if encrypt else ""
    console.result(
        result, lambda: f"created {kind} {result.id} in {one_line(result.repository)}{note}"
    )
    return EXIT_WARNINGS if result.warnings else 0
