"""Where passwords and exported keys come from; none is ever logged, nor part of an error."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from nbdpull.errors import UsageError, WrongKeyError
from nbdpull.model.frame import FormatError
from nbdpull.model.keyring import KEY_FILE_MAX, Ring
from nbdpull.model.keysource import KeySource

__all__ = ["KEY_FILE", "NEW_PASSWORD", "PASSWORD", "password_of", "ring_of", "wants_key"]

KEY_FILE: Final = "NBDPULL_KEY_FILE"
PASSWORD: Final = "NBDPULL_PASSWORD"  # noqa: S105 - a variable's name
NEW_PASSWORD: Final = "NBDPULL_NEW_PASSWORD"  # noqa: S105 - a variable's name
_PASSWORD_MAX: Final = 64 << 10
_COMMAND_WITHIN_S: Final = 300.0


def _variables(name: str) -> Mapping[str, Callable[[str], str]]:
    return {name: lambda value: value, f"{name}_FILE": _from_file, f"{name}_COMMAND": _from_command}


def wants_key(source: KeySource) -> bool:
    """Whether the caller, or the environment, gave a key, and so expects encryption."""
    if source.password is not None or source.key_file is not None:
        return True
    names = (f"{source.variables}_KEY_FILE", *_variables(f"{source.variables}_PASSWORD"))
    return source.environment and any(os.environ.get(name) for name in names)


def ring_of(source: KeySource) -> Ring | None:
    """The exported key that was given; None when none was.

    Raises:
        WrongKeyError: the file is not there, or is no exported key.
    """
    path = source.key_file
    if path is None and source.password is None and source.environment:
        path = os.environ.get(f"{source.variables}_KEY_FILE") or None
    if path is None:
        return None
    try:
        with Path(path).open("rb") as file:
            raw = file.read(KEY_FILE_MAX + 1)
    except OSError as exc:
        raise WrongKeyError(f"can't read the key file {path}: {exc.strerror}") from exc
    if len(raw) > KEY_FILE_MAX:
        raise WrongKeyError(f"the key file {path} has more than {KEY_FILE_MAX} bytes")
    try:
        return Ring.decode(raw)
    except FormatError as exc:
        raise WrongKeyError(f"the key file {path} can't be used: {exc}") from exc


def password_of(source: KeySource, name: str | None = None) -> bytes | None:
    """The password that was given, asked for, or set in the environment; None when there is none.

    Args:
        source: where to look.
        name: of the environment's variable, without ``_FILE`` and ``_COMMAND``; None is the source's own.

    Raises:
        WrongKeyError: it can't be had, or is empty.
        UsageError: more than one of the variables is set.
    """
    given = source.password
    text = given if given is None or isinstance(given, str) else given()
    if text is None and source.environment:
        text = _from_environment(name or f"{source.variables}_PASSWORD")
    if text is None and source.ask is not None:
        text = source.ask()
    if text is None:
        return None
    if not text:
        raise WrongKeyError("the password is empty")
    return text.encode("utf-8", "surrogateescape")


def _from_environment(name: str) -> str | None:
    variables = _variables(name)
    given = [one for one in variables if os.environ.get(one)]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are set; expected one of them")
    return variables[given[0]](os.environ[given[0]]) if given else None


def _from_file(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_PASSWORD_MAX)
    except OSError as exc:
        raise WrongKeyError(f"can't read the password file {path}: {exc.strerror}") from exc
    return _first_line(raw)


def _from_command(command: str) -> str:
    # Its words, without a shell; what it says on standard error is for the user to see.
    try:
        words = shlex.split(command)
        if not words:
            raise WrongKeyError("the password command is empty")
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=_COMMAND_WITHIN_S,
            check=False,
        )
    except (OSError, ValueError) as exc:
        raise WrongKeyError(f"the password command can't be run: {exc}") from exc
    except subprocess.TimeoutExpired as exc:
        raise WrongKeyError(
            f"the password command did not end within {_COMMAND_WITHIN_S:.0f} s"
        ) from exc
    if done.returncode:
        raise WrongKeyError(f"the password command ended with {done.returncode}")
    return _first_line(done.stdout)


def _first_line(raw: bytes) -> str:
    return raw.split(b"\n", 1)[0].removesuffix(b"\r").decode("utf-8", "surrogateescape")
