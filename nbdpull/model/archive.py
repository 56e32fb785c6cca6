"""A few small files as one run of bytes, and back: the plain tar format, of which only this much is understood.

| header 512 | file, padded with zeroes to a multiple of 512 | ... | 1024 zeroes |

Any ``tar`` unpacks it. A header is read by writing what it should be and comparing: so there are no links, no
folders, no extensions, and no two ways to read anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from nbdpull.model.frame import FormatError

__all__ = ["ARCHIVE_MAX", "FILES_MAX", "File", "is_name", "pack_files", "unpack_files"]

File = tuple[str, bytes]
"""Its name and content."""

ARCHIVE_MAX: Final = 64 << 20
FILES_MAX: Final = 64

_BLOCK: Final = 512
_END: Final = bytes(2 * _BLOCK)
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*){0,4}")
_NAME_MAX: Final = 99


def is_name(name: str) -> bool:
    """Whether a file may be called so: relative, plain letters, no part that begins with a dot."""
    return len(name) <= _NAME_MAX and _NAME.fullmatch(name) is not None


def _header(name: str, size: int) -> bytes:
    fields = (
        name.encode("ascii").ljust(100, b"\0")
        + b"0000600\0"
        + 2 * b"0000000\0"
        + b"%011o\0" % size
        + b"%011o\0" % 0
    )
    rest = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + 2 * b"0000000\0" + bytes(167)
    total = sum(fields) + sum(rest) + 8 * ord(" ")
    return fields + b"%06o\0 " % total + rest


def pack_files(files: Sequence[File]) -> bytes:
    """The archive of files, in that order.

    Raises:
        ValueError: a name that `is_name` refuses or that is there twice, or too much.
    """
    names = [name for name, _ in files]
    if not all(map(is_name, names)) or len(set(names)) < len(names) or len(names) > FILES_MAX:
        raise ValueError("these names can't be")
    raw = b"".join(
        _header(name, len(data)) + data + bytes(-len(data) % _BLOCK) for name, data in files
    )
    if len(raw) + len(_END) > ARCHIVE_MAX:
        raise ValueError(f"{len(raw)} bytes are more than {ARCHIVE_MAX}")
    return raw + _END


def unpack_files(raw: bytes) -> list[File]:
    """The opposite of `pack_files`.

    Raises:
        FormatError: it is nothing that `pack_files` writes.
    """
    files: list[File] = []
    at = 0
    while at + len(_END) != len(raw) or not raw.endswith(_END):
        if len(files) == FILES_MAX:
            raise FormatError(f"the archive has more than {FILES_MAX} files")
        header = raw[at : at + _BLOCK]
        try:
            name = header[:100].rstrip(b"\0").decode("ascii")
            size = int(header[124:135], 8)
        except ValueError:
            name, size = "", 0
        if not is_name(name) or not 0 <= size <= len(raw) or header != _header(name, size):
            raise FormatError(f"the archive has no file that can be at {at}")
        at += _BLOCK
        data = raw[at : at + size]
        padding = raw[at + size : at + size + -size % _BLOCK]
        if len(data) < size or len(padding) != -size % _BLOCK or any(padding):
            raise FormatError(f"the archive is cut in '{name}'")
        files.append((name, data))
        at += size + len(padding)
    if len({name for name, _ in files}) < len(files):
        raise FormatError("the archive has names that can't be")
    return files
