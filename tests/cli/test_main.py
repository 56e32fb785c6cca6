"""Finding the verb, usage errors, exit codes, streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from nbdpull import api
from tests.cli.conftest import Cli, info, spawn_cli

VERBS = ("backup", "restore", "init", "list", "show", "verify", "cleanup", "estimate", "doctor")


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    return fail


def test_version_loads_no_verb() -> None:
    # What takes long to load; scripts/bench has the time.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nbdpull", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"nbdpull {nbdpull.__version__}\n"
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in modules
    assert {"numpy", "rich", "qemu", "nbd", "asyncio"}.isdisjoint(modules)


def test_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nbdpull", "-V"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"nbdpull {nbdpull.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("form", [("{}", "-h"), ("{}", "--help"), ("help", "{}")])
def test_every_verb_has_help(cli: Cli, verb: str, form: tuple[str, ...]) -> None:
    done = cli(*(word.format(verb) for word in form))
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: nbdpull {verb} [OPTIONS]")
    assert "--json" in done.stdout
    assert "NBDPULL_REPO" in done.stdout


def test_help_names_every_verb(cli: Cli) -> None:
    for args in (("-h",), ("--help",), ("help",)):
        done = cli(*args)
        assert done.exit_code == 0
        assert [verb for verb in VERBS if f"  {verb} " not in done.stdout] == []


def test_no_verb_shows_help_and_is_a_usage_error(cli: Cli) -> None:
    done = cli()
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: nbdpull")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["bakup"], "there is no command 'bakup'; did you mean 'backup'; see 'nbdpull --help'"),
        (["xyz"], "there is no command 'xyz'; expected one of backup, restore, init, list, show,"),
        (["help", "lst"], "there is no command 'lst'; did you mean 'list'"),
        (["--vers"], "there is no option '--vers'; did you mean '--version'"),
        (
            ["backup", "qmp:/s", "--lvel", "full"],
            "there is no option '--lvel'; did you mean '--level'; see 'nbdpull backup --help'",
        ),
        (["backup", "-r", "x"], "missing argument 'SOURCE...'"),
        (["backup", "qmp:/s", "-r", "x", "-l", "most"], "'most' is not one of 'auto', 'full'"),
        (["backup", "qmp:/s", "-r", "x", "--compression-level", "20"], "20 is not in the range"),
        (["restore", "latest", "-r", "x"], "missing option '--to'"),
        (["list", "-r", "x", "extra"], "got unexpected extra argument (extra)"),
        (["list", "-r", "x", "--progress", "no"], "'no' is not one of 'auto', 'json'"),
        *(
            (
                [verb, *more],
                "no repository is given; name one with -r/--repository, or in NBDPULL_REPO",
            )
            for verb, more in [
                ("backup", ["qmp:/s"]),
                ("restore", ["latest", "--to", "x"]),
                ("init", []),
                ("list", []),
                ("show", ["latest"]),
                ("verify", []),
            ]
        ),
    ],
)
def test_usage_error_is_one_line_and_2(cli: Cli, args: list[str], line: str) -> None:
    done = cli(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert line in done.stderr
    assert done.stderr.startswith("nbdpull: ")
    assert done.stderr.count("\n") == 1


def test_repository_from_the_environment(cli: Cli, tmp_path: Path) -> None:
    env = {"NBDPULL_REPO": str(tmp_path / "repo")}
    assert cli("init", env=env).exit_code == 0
    assert cli("list", env=env).exit_code == 0
    # Set but empty is not set.
    assert "no repository is given" in cli("list", env={"NBDPULL_REPO": ""}).stderr
    # The option wins.
    assert cli("list", "-r", tmp_path / "other", env=env).exit_code == 10


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (nbdpull.Error("something is wrong"), 1),
        (nbdpull.UsageError("that can't be"), 2),
        (nbdpull.RepositoryNotFoundError("no repository at x"), 10),
        (nbdpull.InUseError("in use"), 11),
        (nbdpull.MonitorInUseError("in use"), 11),
        (nbdpull.WrongKeyError("wrong key"), 12),
        (nbdpull.DamagedError("damaged", key="d/1"), 1),
        (nbdpull.CommandError("stop", "GenericError", "no"), 1),
    ],
)
def test_expected_error_is_one_line_and_its_code(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: nbdpull.Error, code: int
) -> None:
    monkeypatch.setattr(api, "list_backups", raising(error))
    for more in ([], ["--json"], ["-q"]):
        done = cli("list", "-r", "x", *more)
        assert done.exit_code == code
        assert done.stdout == ""
        assert done.stderr == f"nbdpull: {error}\n"


def test_error_with_json_progress_is_an_event(cli: Cli, tmp_path: Path) -> None:
    done = cli("list", "-r", tmp_path / "no", "--json", "--progress", "json")
    assert done.exit_code == 10
    assert done.stdout == ""
    assert re.fullmatch(
        r'\{"event": "error", "verb": "list", "error": "RepositoryNotFoundError", "message": "no'
        r' repository at .*", "exit_code": 10\}\n',
        done.stderr,
    )


def test_hostile_message_stays_on_one_line_and_harmless(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "list_backups", raising(nbdpull.Error("a\n\x1b[2Jb\x07\u202ec\udcff")))
    done = cli("list", "-r", "x")
    assert done.stderr == "nbdpull: a \\x1b[2Jb\\x07\\u202ec\\udcff\n"


def test_bug_shows_a_traceback_and_is_1() -> None:
    patch = (
        "from nbdpull import api\ndef bug(*a, **k): raise ZeroDivisionError\napi.list_backups = bug"
    )
    process = spawn_cli("list", "-r", "x", patch=patch)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" in err
    assert "ZeroDivisionError" in err
    assert "this is a bug in nbdpull" in err.splitlines()[-1]


def test_missing_libnbd_is_one_line() -> None:
    patch = "import sys\nsys.modules['nbd'] = None"
    process = spawn_cli("backup", "qmp:/s", "-r", "x", patch=patch)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith("nbdpull: libnbd's Python module 'nbd' is not installed")
    assert err.count("\n") == 1


MANY = """
from nbdpull import api
from tests.cli.conftest import info
api.list_backups = lambda *a, **k: tuple(info("%016x" % (i << 32)) for i in range(20000))
"""


def test_reader_that_leaves_early_is_no_error_message(tmp_path: Path) -> None:
    process = spawn_cli("list", "-r", "x", "--json", patch=MANY)
    assert process.stdout is not None
    assert process.stdout.read(1) == "["
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(30) == 128 + 13


def test_full_standard_output_is_an_error() -> None:
    patch = "from nbdpull import api\napi.list_backups = lambda *a, **k: ()"
    for args in (["list", "-r", "x"], ["list", "-r", "x", "--json"]):
        with Path("/dev/full").open("w", encoding="ascii") as full:
            process = spawn_cli(*args, patch=patch, stdout=full)
            _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert err == "nbdpull: can't write to standard output: No space left on device\n"


def test_closed_standard_output_never_becomes_a_file(tmp_path: Path) -> None:
    process = spawn_cli(
        "init", "-r", tmp_path / "repo", stdout=None, preexec_fn=lambda: os.close(1)
    )
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == "nbdpull: can't write to standard output: Bad file descriptor\n"
    # The repository was made, and nothing was printed into one of its files.
    again = spawn_cli("list", "-r", tmp_path / "repo", "--json")
    assert again.communicate(timeout=30)[0] == "[]\n"


def test_closed_standard_error_is_harmless(tmp_path: Path) -> None:
    process = spawn_cli(
        "list", "-r", tmp_path, "--debug", stderr=None, preexec_fn=lambda: os.close(2)
    )
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (10, "")


def test_name_that_the_locale_cannot_spell_is_printed_anyhow() -> None:
    patch = MANY.replace("range(20000)", "range(1)").replace("32))", "32), vm='\\u0416')")
    process = spawn_cli(
        "list", "-r", "x", patch=patch, env={**os.environ, "PYTHONIOENCODING": "latin-1"}
    )
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "\\u0416" in out


def test_verbose_and_debug_log_to_standard_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging  # noqa: PLC0415

    def talk(*_args: object, **_kwargs: object) -> tuple[nbdpull.BackupInfo, ...]:
        log = logging.getLogger("nbdpull.ops.test")
        log.debug("step")
        log.info("milestone")
        log.warning("trouble\nin two lines")
        return (info(),)

    monkeypatch.setattr(api, "list_backups", talk)
    plain = cli("list", "-r", "x", "--json")
    assert plain.stderr == "nbdpull: warning: trouble\nnbdpull: warning: in two lines\n"
    assert "milestone" in cli("list", "-r", "x", "-v").stderr
    debug = cli("list", "-r", "x", "--debug")
    assert "nbdpull: debug: nbdpull.ops.test: step\n" in debug.stderr
    assert cli("list", "-r", "x", "--json").stderr == plain.stderr
    events = cli("list", "-r", "x", "-v", "--progress", "json").stderr.splitlines()
    assert events[0] == (
        '{"event": "log", "verb": "list", "level": "info", "message": "milestone"}'
    )
