"""What the repository needs of the storage below it: few calls, that every object store has.

No rename, no overwrite, no append: an object appears whole under its key, or not at all, and is never
changed. Calls are synchronous and may come from several threads at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from nbdpull.errors import StoreError
from nbdpull.model.frame import FormatError

__all__ = [
    "AccessDeniedError",
    "KeyExistsError",
    "KeyMissingError",
    "Listed",
    "LostBytesError",
    "Store",
    "Upload",
    "check_key",
]

_KEY: Final = re.compile(r"[a-z0-9]+(\.json)?(/[a-z0-9]+)*")


class KeyExistsError(StoreError):
    """`create` found the key taken."""


class AccessDeniedError(StoreError):
    """The store does not let us do that: locked, or not allowed with these credentials.

    Attributes:
        until: when the lock ends, seconds since the Unix epoch; None when that is not why.
    """

    def __init__(self, message: str, *, until: float | None = None) -> None:
        super().__init__(message)
        self.until = until


class KeyMissingError(StoreError):
    """There is no object under that key."""


class LostBytesError(StoreError, FormatError):
    """The storage says that it has lost bytes of an object (EIO): it is damaged, like one with other bytes."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing.

    Attributes:
        size: bytes.
        modified: when it was made, by the store's clock, seconds since the Unix epoch.
    """

    key: str
    size: int
    modified: float


class Upload(Protocol):
    """An object under way; it has no key until `commit`."""

    def write(self, offset: int, *parts: bytes | bytearray | memoryview) -> None:
        """Put the parts one after the other at `offset`, which may leave gaps for a later call.

        May be called by several threads at once, but not beside `commit` or `abort`.
        """

    def commit(self) -> None:
        """Make the object durable and give it its key.

        Raises:
            KeyExistsError: the key was taken meanwhile.
        """

    def abort(self) -> None:
        """Drop it; a second call, or one after `commit`, does nothing."""


class Store(Protocol):
    """A flat space of immutable objects."""

    def create(self, key: str, data: bytes) -> None:
        """Make an object; durable when it returns.

        Raises:
            KeyExistsError: the key is taken; the object there is untouched. An object store may also
                return, as if it had made it, when the object there has the very same bytes: it can't
                tell another's from its own whose answer was lost.
        """

    def begin(self, key: str) -> Upload:
        """Start an object that is written in pieces.

        A store that keeps the pieces in memory waits here while it has too many on their way.
        """

    def get(self, key: str, *, limit: int) -> bytes:
        """A whole object of at most `limit` bytes.

        Raises:
            KeyMissingError: there is none.
            StoreError: it is larger.
        """

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """The bytes [start, start + length) of an object, fewer where it ends before.

        Raises:
            KeyMissingError: there is none.
        """

    def stat(self, key: str) -> Listed:
        """What a listing would say of one object.

        Raises:
            KeyMissingError: there is none.
        """

    def list(self, prefix: str) -> Iterator[Listed]:
        """All objects below `prefix` (one or more whole path parts, or nothing), in any order.

        An object whose key *is* the prefix is not below it: that is what `stat` is for.
        """

    def sync(self, prefix: str) -> None:
        """Make durable what `list` shows below `prefix`, whoever made it.

        Its maker may have been killed when it could be seen already, and was not durable yet.
        """

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error.

        Raises:
            AccessDeniedError: it is locked, or may not be removed by us.
        """


def check_key(key: str) -> str:
    """Return `key`, which must be one of ours: no key is ever made from outside data.

    Raises:
        ValueError: a bug in the caller.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"'{key}' is no repository key")
    return key
