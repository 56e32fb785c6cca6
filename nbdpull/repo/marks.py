"""Marks beside the manifests: forgotten, being deleted, protected.

    f/<disk>/<sid>   forgotten: hidden; becomes a tombstone when the undo window is over
    t/<disk>/<sid>   tombstone: final; nobody may build on the manifest, a collector deletes it
    p/<backup>       protected: nothing forgets the backup
    o/<disk>/<sid>/<ms>   in a replica: when the original's store had taken the manifest in

Undoing takes no mark away: it commits the same content again (`ops/undo.py`), for which the pins of an
ordinary session are enough; so no undo that was acknowledged can lose a race with a collector.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from nbdpull.errors import RepositoryError
from nbdpull.model.ids import BackupId, is_hex
from nbdpull.model.intent import is_pin
from nbdpull.repo.store import KeyExistsError, KeyMissingError, LostBytesError, Store

__all__ = [
    "REPLACED",
    "Marks",
    "forget",
    "keep_time",
    "original_times",
    "protect",
    "read_marks",
    "reason_of",
    "there",
    "tombstones",
    "unprotect",
]

REPLACED: Final = "replaced"
"""Why a manifest is forgotten whose backup was committed again."""
_MARK_MAX: Final = 64 << 10

_BACKUP_DIGITS = 16
_TIME_DIGITS: Final = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What marks there are.

    Attributes:
        forgotten, tombstones: when each was made, by the store's clock, by ``<disk>/<sid>``.
        protected: ids of backups.
    """

    forgotten: Mapping[str, float]
    tombstones: Mapping[str, float]
    protected: frozenset[str]


def read_marks(store: Store) -> Marks:
    """All marks. `p/` is listed last: `protect` relies on it."""
    return Marks(
        forgotten=_pins(store, "f"), tombstones=tombstones(store), protected=_protected(store)
    )


def tombstones(store: Store) -> dict[str, float]:
    """The tombstones, and when each was made."""
    return _pins(store, "t")


def _pins(store: Store, prefix: str) -> dict[str, float]:
    found = {}
    for listed in store.list(prefix):
        pin = listed.key.partition("/")[2]
        if is_pin(pin):
            found[pin] = listed.modified
    return found


def _protected(store: Store) -> frozenset[str]:
    names = (listed.key.partition("/")[2] for listed in store.list("p"))
    return frozenset(name for name in names if is_hex(name, _BACKUP_DIGITS))


def keep_time(store: Store, pin: str, stored: float) -> None:
    """Note in a replica when the original's store took a manifest in, seconds since the Unix epoch."""
    with suppress(KeyExistsError):
        store.create(f"o/{pin}/{max(0, round(stored * 1000))}", b"")


def original_times(store: Store) -> dict[str, float]:
    """What `keep_time` noted; of several times the first one."""
    found: dict[str, float] = {}
    for listed in store.list("o"):
        pin, _, digits = listed.key.partition("/")[2].rpartition("/")
        if is_pin(pin) and digits.isdecimal() and len(digits) <= _TIME_DIGITS:
            found[pin] = min(int(digits) / 1000, found.get(pin, float("inf")))
    return found


def forget(store: Store, pins: Iterable[str], reason: str) -> None:
    """Mark manifests as forgotten; those that are so already keep their time."""
    raw = json.dumps({"reason": reason, "time": time.time()}).encode()
    for pin in pins:
        with suppress(KeyExistsError):
            store.create(f"f/{pin}", raw)


def reason_of(store: Store, pin: str) -> str:
    """Why a manifest was forgotten, as far as its mark can tell."""
    try:
        fields: Any = json.loads(store.get(f"f/{pin}", limit=_MARK_MAX))
    except (KeyMissingError, LostBytesError, ValueError, RecursionError):
        return ""
    reason = fields.get("reason") if isinstance(fields, dict) else None
    return reason if isinstance(reason, str) else ""


def protect(store: Store, backup: BackupId, pins: Iterable[str]) -> None:
    """Protect a backup whose manifests are `pins`.

    Raises:
        RepositoryError: it is forgotten.
    """
    # Looked for first: an object store's `create` may not tell that another one's is there already, and
    # only one's own is taken back below.
    if there(store, f"p/{backup}"):
        return
    try:
        store.create(f"p/{backup}", b"")
    except KeyExistsError:
        return
    # A collector lists the protected after the forgotten: if this one was not forgotten by now, it sees
    # the protection before it would end the undo window.
    for pin in pins:
        if _is_going(store, pin):
            store.delete(f"p/{backup}")
            raise RepositoryError(
                f"backup {backup} was forgotten meanwhile; bring it back with 'nbdpull undo' first"
            )


def _is_going(store: Store, pin: str) -> bool:
    """Whether a manifest's backup is forgotten, and not only committed again under other sessions."""
    forgotten = there(store, f"f/{pin}") or there(store, f"t/{pin}")
    return forgotten and reason_of(store, pin) != REPLACED


def unprotect(store: Store, backup: BackupId) -> None:
    """Take the protection away."""
    store.delete(f"p/{backup}")


def there(store: Store, key: str) -> bool:
    """Whether there is such an object."""
    try:
        store.stat(key)
    except KeyMissingError:
        return False
    return True
