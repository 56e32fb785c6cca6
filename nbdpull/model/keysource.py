"""Where a repository's key comes from. Nothing heavy is imported here: it is a public name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["KeySource"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """What opens an encrypted repository.

    What is given here is used; else, with `environment`, the first of these that is set:

        NBDPULL_KEY_FILE           a file that 'nbdpull key export' wrote
        NBDPULL_PASSWORD           the password
        NBDPULL_PASSWORD_FILE      a file whose first line it is
        NBDPULL_PASSWORD_COMMAND   a command whose first line of output it is

    Where a verb has two repositories, `variables` of the second one is ``NBDPULL_NEW``: NBDPULL_NEW_PASSWORD
    and so on.

    Attributes:
        password: or a function that is called when one is needed, once, in a thread of its own.
        key_file: path of an exported key.
        environment: whether to look at the variables above.
        variables: what the variables' names begin with.
        ask: called when nothing else gives a password; returns None when nobody can be asked.
    """

    password: str | Callable[[], str] | None = field(default=None, repr=False)
    key_file: str | None = None
    environment: bool = True
    variables: str = "NBDPULL"
    ask: Callable[[], str | None] | None = field(default=None, repr=False)
