"""The program: finds the verb, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from nbdpull.cli.console import StdoutError, one_line, write_stderr
from nbdpull.version import __version__

__all__ = ["main", "program"]

# numpy's linear algebra is not used, but starts a thread for each core when it is loaded, and they cost CPU
# time although they have nothing to do: 4 % of a restore's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_VERBS = (
    "backup",
    "restore",
    "init",
    "list",
    "show",
    "verify",
    "cleanup",
    "forget",
    "undo",
    "protect",
    "unprotect",
    "gc",
    "copy",
    "repack",
    "key",
    "estimate",
    "doctor",
)
_EXIT_SIGNAL = 128


class _Program(click.Group):
    """Loads a verb's module when it is needed, so that starting takes no longer for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order in which one meets them."""
        del ctx
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command."""
        if cmd_name == "help":
            return _help
        if cmd_name not in _VERBS:
            return super().get_command(ctx, cmd_name)
        command = importlib.import_module(f"nbdpull.cli.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"nbdpull.cli.{cmd_name} has no command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that `args` begin with, or what was probably meant."""
        name = args[0]
        if name.startswith("-") or self.get_command(ctx, name) is not None or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        import difflib  # noqa: PLC0415 - only for who mistyped

        close = difflib.get_close_matches(name, _VERBS)
        meant = f"did you mean '{close[0]}'" if close else f"expected one of {', '.join(_VERBS)}"
        raise click.UsageError(f"there is no command '{name}'; {meant}", ctx)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit with the verb's code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as exc:
            write_stderr(f"nbdpull: {_usage_line(exc)}")
            code = exc.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = _EXIT_SIGNAL + signal.SIGINT
        except StdoutError as exc:
            _abandon_stdout()
            code = _EXIT_SIGNAL + signal.SIGPIPE
            if not exc.reader_gone:
                write_stderr(f"nbdpull: can't write to standard output: {exc}")
                code = 1
        sys.exit(code if isinstance(code, int) else 0)


def _usage_line(exc: click.ClickException) -> str:
    """A usage error in one line, with where to read on."""
    if isinstance(exc, click.NoSuchOption):
        message = f"there is no option '{exc.option_name}'"
        if exc.possibilities:
            message += f"; did you mean '{exc.possibilities[0]}'"
    else:
        message = one_line(exc.format_message()).removesuffix(".")
    message = message[:1].lower() + message[1:]
    context = exc.ctx if isinstance(exc, click.UsageError) else None
    if context is None:
        return message
    return f"{message}; see '{context.command_path} --help'"


def _abandon_stdout() -> None:
    """Let what is left in standard output go nowhere, or Python would complain about it at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@click.group(
    cls=_Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 done with warnings, 10 no such repository,"
    " 11 locked or in use, 12 wrong key, 13 no more scratch room, 128+N ended by signal N.",
)
@click.version_option(__version__, "-V", "--version", message="nbdpull %(version)s")
@click.pass_context
def program(context: click.Context) -> int:
    """Back up running QEMU virtual machines over NBD, and get them back.

    A first time: nbdpull init -r REPO, then nbdpull backup qmp:/path/to/socket -r REPO, later
    nbdpull restore latest -r REPO --to FOLDER.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        return 2
    return 0


@click.command("help", add_help_option=False)
@click.argument("name", metavar="[COMMAND]", required=False)
@click.pass_context
def _help(context: click.Context, name: str | None) -> int:
    """Show help, of all or of one command."""
    parent = context.parent
    if parent is None:
        raise RuntimeError("help is a command of the program")
    if name is None:
        click.echo(parent.get_help())
        return 0
    _, command, _ = program.resolve_command(parent, [name])
    if command is not None:
        click.echo(command.get_help(click.Context(command, info_name=name, parent=parent)))
    return 0


def _reserve_descriptors() -> None:
    """Fill in standard streams that the caller closed.

    Else the next file that is opened, of a repository perhaps, would get the number 1, and be written
    to by whatever writes to standard output. Writing to the one put there fails, and says so.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)


def _leave() -> None:
    """End the process, whose verb succeeded; comes back where what was printed can't be written.

    Python would take itself apart first, for 40 ms with numpy in it, and that does nothing more: a verb that
    succeeded has ended its threads and closed its files. One that failed may have left some that still end.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        if sys.stderr is not None:
            sys.stderr.flush()
        os._exit(0)


def _leave_calls_behind(code: object) -> None:
    """End here where requests to a store were given up, rather than take the interpreter down under them."""
    api = sys.modules.get("nbdpull.api")
    if api is not None and api.calls_left_behind():
        from nbdpull.cli.run import end_at_once  # noqa: PLC0415 - loaded with the verb

        end_at_once(code if isinstance(code, int) else 0 if code is None else 1)


def main() -> NoReturn:
    """Run the command line of this process."""
    # What modules consist of is no garbage, and looking for some after each 700 new objects of it takes a
    # twentieth of a start; once among the 65,000 that are there in the end, 11 ms.
    gc.set_threshold(100_000)
    _reserve_descriptors()
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    try:
        program.main(prog_name="nbdpull")
    except SystemExit as exc:
        _leave_calls_behind(exc.code)
        if exc.code == 0:
            _leave()
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the traceback is what helps
        traceback.print_exc()
        write_stderr(
            f"nbdpull: this is a bug in nbdpull {__version__}; please report it with the lines above"
        )
    sys.exit(1)
