"""What a new manifest refers to stays locked as long as the manifest itself; and when a backup's first lock ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final

from nbdpull.model.config import Lock
from nbdpull.model.manifest import Manifest
from nbdpull.repo.objectlock import locked_until
from nbdpull.repo.store import AccessDeniedError, Listed, Store

__all__ = ["first_unlock", "hold_locks"]

_log = logging.getLogger(__name__)

_FURTHER: Final = 4
"""Locks are extended by a quarter more than is needed, so that not each backup extends each of them."""


def hold_locks(store: Store, manifest: Manifest, lock: Lock) -> None:
    """Extend the locks that end before that of a manifest which is about to be made.

    Those of packs, their indexes, and key slots. Where that can't be done it is logged as a warning: the
    backup itself is as good as without.

    Raises:
        StoreError: the store failed.
    """
    from nbdpull.repo.objects import ObjectStore  # noqa: PLC0415 - most repositories are folders

    if not isinstance(store, ObjectStore):
        return
    until = locked_until(time.time(), lock)
    # What was written in this very hour is locked as long, and is not asked about.
    short = [
        listed.key
        for listed in _needed(store, manifest)
        if locked_until(listed.modified, lock) < until
    ]
    try:
        held = store.hold(short, until, until + lock.duration_s // _FURTHER)
    except AccessDeniedError as exc:
        _log.warning("locks of older objects are not extended: %s", exc)
        return
    if held is None:
        _log.warning(
            "the locks of %d older objects that this backup needs may end before its own; install"
            " 'nbdpull[lock]' to have them extended",
            len(short),
        )
    else:
        _log.debug("%d of %d older locks were extended", held, len(short))


def _needed(store: Store, manifest: Manifest) -> Iterator[Listed]:
    """What is there of all that the manifest refers to."""
    sids = [ref.sid for ref in manifest.sessions]
    keys = {f"d/{sids[session]}/{seq:08x}" for session, seq in manifest.packs()}
    for ref in manifest.sessions:
        keys.update(f"x/{ref.sid}/{number}" for number, _ in ref.index)
    for sid in dict.fromkeys(sids):
        if sid:
            for prefix in ("d", "x"):
                for listed in store.list(f"{prefix}/{sid}"):
                    if listed.key in keys:
                        yield listed
    yield from store.list("key")


def first_unlock(store: Store, manifests: Sequence[Manifest], lock: Lock) -> float | None:
    """When the first object can be deleted that a backup needs, seconds since the Unix epoch.

    No lock ends before; None where there are none. The store is asked of the manifests, and of what was
    written too early to be locked as long: where it can't be asked, extended locks don't count.

    Raises:
        KeyMissingError: an object is gone.
        StoreError: the store failed.
    """
    from nbdpull.repo.objects import ObjectStore  # noqa: PLC0415 - most repositories are folders

    if not isinstance(store, ObjectStore):
        return None
    own = [store.stat(f"m/{one.summary.disk_id}/{one.summary.session}") for one in manifests]
    first = min(store.lock_ends(own, lock))
    older = {
        listed.key: listed
        for manifest in manifests
        for listed in _needed(store, manifest)
        if locked_until(listed.modified, lock) < first
    }
    return min([first, *store.lock_ends(older.values(), lock)])
