"""nbdpull key: the keys of an encrypted repository."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import Kdf, kdf_option, repository_option, verb
from nbdpull.cli.password import keys_of_user, new_keys_of_user
from nbdpull.cli.tables import local_time, short_ids, table
from nbdpull.model.outcomes import KeyInfo

__all__ = ["command"]

_label_option = click.option(
    "--label", metavar="TEXT", default="", help="A note for people; it is not encrypted."
)


class _Group(click.Group):
    """Says in one line what was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` begin with."""
        name = args[0]
        if name.startswith("-") or ctx.resilient_parsing or self.get_command(ctx, name) is not None:
            return super().resolve_command(ctx, args)
        names = self.list_commands(ctx)
        close = difflib.get_close_matches(name, names)
        meant = f"did you mean '{close[0]}'" if close else f"expected one of {', '.join(names)}"
        raise click.UsageError(f"there is no command 'key {name}'; {meant}", ctx)


@click.group(
    "key",
    cls=_Group,
    short_help="Manage the keys of an encrypted repository.",
    invoke_without_command=True,
)
@click.pass_context
def command(context: click.Context) -> int:
    """Manage the keys of an encrypted repository.

    The password is asked for, or comes from NBDPULL_PASSWORD_FILE, NBDPULL_PASSWORD_COMMAND or
    NBDPULL_PASSWORD; a new one from NBDPULL_NEW_PASSWORD_FILE and its like.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        return 2
    return 0


@command.command("list", short_help="List the key slots.")
@repository_option()
@verb
def _list(console: Console, repository: str) -> int:
    """List the passwords that open the repository, newest keys first. No password is needed."""
    found = api.key_list(repository)
    console.result(found, lambda: _table(found), needed=True)
    return 0


@command.command("add", short_help="Let another password open the repository too.")
@repository_option()
@_label_option
@kdf_option
@verb
def _add(console: Console, repository: str, label: str, kdf: Kdf) -> int:
    """Let another password open the repository too.

    To change a password, add the new one and remove the slot of the old one.
    """
    added = api.key_add(
        repository, keys=keys_of_user(), new=new_keys_of_user(), label=label, kdf=kdf
    )
    console.result(added, lambda: f"added key {added.key}")
    return 0


@command.command("remove", short_help="Delete a key slot.")
@click.argument("key", metavar="KEY")
@repository_option()
@click.option("--force", is_flag=True, help="Also the last one that opens everything.")
@verb
def _remove(console: Console, key: str, repository: str, force: bool) -> int:
    """Delete key slot KEY: an id, or the beginning of one.

    Who has a copy of the slot, and its password, still opens what is there. For what comes then,
    'nbdpull key rotate'.
    """
    removed = api.key_remove(repository, key, force=force)
    console.result(removed, lambda: f"removed key {removed.key}")
    return 0


@command.command("rotate", short_help="Seal new backups to new keys.")
@repository_option()
@_label_option
@kdf_option
@verb
def _rotate(console: Console, repository: str, label: str, kdf: Kdf) -> int:
    """Seal what is written from now on to new keys, under the same password or a new one.

    A new password is taken from NBDPULL_NEW_PASSWORD_FILE and its like. Other passwords and exported
    keys open what was there before, and nothing newer.
    """
    slot = api.key_rotate(repository, keys=keys_of_user(), label=label, kdf=kdf)
    console.result(
        slot,
        lambda: (
            f"generation {slot.generation} of the keys begins, in key {slot.key}\n"
            "add the other passwords again (key add), export writers' and recovery keys again (key export),"
            " and remove old slots (key remove)"
        ),
    )
    return 0


@command.command("export", short_help="Write a key into a file.")
@click.argument("file", metavar="FILE")
@repository_option()
@click.option(
    "--writer", is_flag=True, help="A key that adds backups, and can't read the data of any."
)
@verb
def _export(console: Console, file: str, repository: str, writer: bool) -> int:
    """Write the recovery key, or with --writer one for a host that only backs up, into the new FILE.

    Name it in NBDPULL_KEY_FILE to use it. The recovery key opens everything without any password: keep
    it away from the repository and from the hosts.
    """
    done = api.key_export(repository, file, writer=writer, keys=keys_of_user())
    kind = "writer" if writer else "recovery"
    console.result(done, lambda: f"wrote the {kind} key to {one_line(done.file)}")
    return 0


@command.command("import", short_help="Set a new password with a recovery key.")
@click.argument("file", metavar="FILE")
@repository_option()
@_label_option
@kdf_option
@verb
def _import(console: Console, file: str, repository: str, label: str, kdf: Kdf) -> int:
    """Let a new password open the repository, with the recovery key in FILE: when the old one is lost."""
    slot = api.key_import(repository, file, new=new_keys_of_user(), label=label, kdf=kdf)
    console.result(slot, lambda: f"added key {slot.key}")
    return 0


def _table(found: Sequence[KeyInfo]) -> str:
    if not found:
        return "no keys: only an exported recovery key opens this repository"
    short = short_ids(info.key for info in found)
    rows = [
        [
            short[info.key],
            local_time(info.time),
            f"{info.generation} ({'newest' if info.newest else 'old'})",
            info.kdf,
            one_line(info.label) or "-",
        ]
        for info in found
    ]
    return table(["key", "made", "generation", "password", "label"], rows)
