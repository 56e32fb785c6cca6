"""Identifiers that the repository is built from; each is lower-case hex, safe as part of a key."""

from __future__ import annotations

import re
from typing import Final, NewType

from blake3 import blake3

__all__ = [
    "BackupId",
    "DiskId",
    "SessionId",
    "disk_id",
    "is_hex",
    "make_session_id",
    "may_be_of",
    "session_id_of",
]

SessionId = NewType("SessionId", str)
"""32 hex digits: 48 bits of milliseconds (a hint only), and 80 random bits; or 64, and 16 of its disk's id."""

BackupId = NewType("BackupId", str)
"""16 random hex digits, one for all disks of a backup."""

DiskId = NewType("DiskId", str)
"""32 hex digits that stand for a disk of a VM in keys: names are never part of a path."""

_DISK_DIGITS: Final = 4

_HEX: Final = re.compile(r"[0-9a-f]+")


def is_hex(text: str, digits: int) -> bool:
    """Whether `text` is exactly so many lower-case hex digits."""
    return len(text) == digits and _HEX.fullmatch(text) is not None


def make_session_id(ms: int, random10: bytes) -> SessionId:
    """A session id from milliseconds since the epoch and ten random bytes."""
    return SessionId((ms & ((1 << 48) - 1)).to_bytes(6, "big").hex() + random10.hex())


def session_id_of(disk: DiskId, ms: int, random8: bytes) -> SessionId:
    """A session id that ends as the disk's id begins: among thousands, a disk's sessions are soon found."""
    return make_session_id(ms, random8 + bytes.fromhex(disk[:_DISK_DIGITS]))


def may_be_of(sid: str, disk: DiskId) -> bool:
    """Whether a session may be of that disk, judged by its id alone."""
    return sid[-_DISK_DIGITS:] == disk[:_DISK_DIGITS]


def disk_id(vm: str, disk: str, key: bytes | None = None) -> DiskId:
    """The id of a VM's disk: BLAKE3 of both names, each led by its length.

    With `key` (32 bytes) it is keyed: without it nobody can try names until one fits.
    """
    digest = blake3() if key is None else blake3(key=key)
    for part in (vm, disk):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(4, "little"))
        digest.update(raw)
    return DiskId(digest.hexdigest()[:32])
