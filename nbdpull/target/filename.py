"""File names for disk names, which come out of the repository and are not to be trusted."""

from __future__ import annotations

import hashlib
import string
from urllib.parse import quote

__all__ = ["disk_file_name"]

_PLAIN = frozenset(string.ascii_letters + string.digits + "._-")
_MAX = 200
"""A file name has at most 255 bytes; the rest is for the extension and the temporary name."""


def disk_file_name(disk: str, extension: str) -> str:
    """A name without any meaning to a file system; two disks never get the same one.

    Everything outside [A-Za-z0-9._-] and a leading dot is percent-encoded, as UTF-8. A name that
    gets too long keeps its beginning and ends with ``~`` and a hash, which no other name can have.
    """
    name = "".join(
        char if char in _PLAIN and (at or char != ".") else _percent(char)
        for at, char in enumerate(disk)
    )
    if len(name) > _MAX:
        digest = hashlib.blake2b(disk.encode(errors="surrogatepass"), digest_size=16).hexdigest()
        name = f"{name[: _MAX - 33]}~{digest}"
    return f"{name}.{extension}"


def _percent(char: str) -> str:
    return "%2E" if char == "." else quote(char, safe="", errors="surrogatepass")
