"""Options that several verbs have, and what turns a verb's function into a command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, cast

import click

from nbdpull.cli.console import Console, ProgressMode
from nbdpull.cli.run import run_verb
from nbdpull.units import parse_duration, parse_size

__all__ = [
    "SIZE",
    "Kdf",
    "kdf_option",
    "lock_mode_option",
    "lock_option",
    "parsed_lock",
    "repository_option",
    "source_argument",
    "tls_option",
    "verb",
    "vm_option",
]

_P = ParamSpec("_P")
_F = TypeVar("_F", bound=Callable[..., Any])


class _Size(click.ParamType[int]):
    """A size such as ``100M`` in bytes."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Bytes of a size, 1 or more."""
        try:
            size = parse_size(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        if size < 1:
            self.fail(f"'{value}' is less than a byte", param, ctx)
        return size


SIZE = _Size()


def _given(context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is None and not context.resilient_parsing:
        raise click.UsageError(
            "no repository is given; name one with -r/--repository, or in NBDPULL_REPO", context
        )
    return value


def repository_option(
    *, needed: bool = True, text: str = "A repository whose backups' checkpoints are to stay."
) -> Callable[[_F], _F]:
    """``-r/--repository``."""
    return click.option(
        "-r",
        "--repository",
        envvar="NBDPULL_REPO",
        show_envvar=True,
        metavar="REPO",
        callback=_given if needed else None,
        help="The repository: a folder, or s3://, gs:// or az://BUCKET/PREFIX." if needed else text,
    )


def source_argument(function: _F) -> _F:
    """SOURCE: one, or all images of a VM."""
    return click.argument("source", metavar="SOURCE...", nargs=-1, required=True)(function)


def tls_option(function: _F) -> _F:
    """``--tls``."""
    return click.option(
        "--tls",
        metavar="PATH",
        help="For NBD over TCP: a folder of certificates (ca-cert.pem, client-cert.pem, client-key.pem;"
        " for a running VM server-cert.pem and server-key.pem too), or a file of shared keys (keys.psk).",
    )(function)


def vm_option(function: _F) -> _F:
    """``--vm`` where it chooses among backups."""
    return click.option("--vm", metavar="NAME", help="Only backups of this VM.")(function)


_OUTPUT_OPTIONS: tuple[Callable[[Callable[..., int]], Callable[..., int]], ...] = (
    click.option(
        "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
    ),
    click.option(
        "--progress",
        type=click.Choice(["auto", "json", "plain", "none"]),
        default="auto",
        help="Progress on standard error: bars on a terminal and lines elsewhere (auto), or one"
        " JSON object for each event.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Tell only results, warnings and errors."),
    click.option("-v", "--verbose", is_flag=True, help="Log milestones on standard error."),
    click.option("--debug", is_flag=True, help="Log every step on standard error."),
)


def verb(function: Callable[Concatenate[Console, _P], int]) -> Callable[..., int]:
    """Give a verb the options about its output, and run it with signals and errors handled.

    The function gets a `Console` first, and returns the exit code. Put this last, next to it.
    """

    @functools.wraps(function)
    def command(
        *args: Any,
        as_json: bool,
        progress: str,
        quiet: bool,
        verbose: bool,
        debug: bool,
        **kwargs: Any,
    ) -> int:
        console = Console(
            verb=click.get_current_context().command_path.partition(" ")[2],
            json=as_json,
            quiet=quiet,
            mode=ProgressMode.choose(progress, quiet=quiet),
            debug=debug,
        )
        return run_verb(console, lambda: function(console, *args, **kwargs), verbose=verbose)

    decorated: Callable[..., int] = command
    for option in reversed(_OUTPUT_OPTIONS):
        decorated = option(decorated)
    return decorated


def lock_option(whose: str) -> Callable[[_F], _F]:
    """``--lock``, of what is made."""
    return click.option(
        "--lock",
        metavar="DURATION",
        help=f"Have S3 lock {whose} backups: each object they consist of this long from when it is written (30d).",
    )


lock_mode_option = click.option(
    "--lock-mode",
    type=click.Choice(["governance", "compliance"]),
    help="Whether somebody with a special permission can end a lock, which is the default, or nobody.",
)


def parsed_lock(
    lock: str | None, mode: str | None
) -> tuple[float | None, Literal["governance", "compliance"]]:
    """Seconds and mode of these two options.

    Raises:
        click.UsageError: they can't be.
    """
    if mode is not None and lock is None:
        raise click.UsageError("--lock-mode is about locks; give --lock 30d, too, or leave it out")
    try:
        lock_s = None if lock is None else parse_duration(lock)
    except ValueError as exc:
        raise click.UsageError(f"--lock: {exc}") from exc
    return lock_s, cast("Literal['governance', 'compliance']", mode or "governance")


Kdf = Literal["argon2id", "scrypt"]

kdf_option = click.option(
    "--kdf",
    type=click.Choice(["argon2id", "scrypt"]),
    default="argon2id",
    show_default=True,
    help="What the password goes through, 256 MiB of memory either way.",
)
