"""Keeps collectors off what a copy brings, until its manifests are there.

    s/<own>  names the sessions whose packs come   ->  packs, indexes, manifests   ->  not revoked? done

A collector that lists the intent spares these sessions. One that began before it was made may already
have listed packs that lie there without a manifest, and is waited for by the user. Each copy has an intent
of its own, so any number of copies go on at once, also of the same backups.

The intent's register has a disk id that no disk has: if the copy is taken for dead, the revocation lies
where it hinders nobody. A collector lists the manifests after it has revoked: so when the intent is not
revoked after the manifests were made, every collector that could pass it over sees them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from nbdpull.errors import InUseError, StoreError
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import SessionId, make_session_id
from nbdpull.model.intent import INTENT_MAX, Intent
from nbdpull.repo.alive import KeepAlive
from nbdpull.repo.store import AccessDeniedError, KeyMissingError, Store

__all__ = ["CopyGuard", "check_revoked"]

_NOBODY: Final = "0" * 32


class CopyGuard:
    """Made before the first object is looked for in the target; ends with `end`.

    One that is never ended goes on for a day, so that what was copied is there for the next try.
    """

    def __init__(self, target: Store, sids: Iterable[SessionId]) -> None:
        """Make the intent.

        Raises:
            InUseError: a collection began before it.
        """
        self._target = target
        self._own = make_session_id(time.time_ns() // 1_000_000, os.urandom(10))
        intent = Intent(role="copy", disk=_NOBODY, brings=tuple(sorted(sids)), time=time.time())
        target.create(f"s/{self._own}", intent.encode(self._own))
        self._alive = KeepAlive(target, self._own)
        try:
            _check_collectors(target)
        except InUseError:
            self.end()
            raise

    def check(self) -> None:
        """Call it when the manifests are there.

        Raises:
            StoreError: a collector took the copy for dead meanwhile.
        """
        try:
            self._target.stat(f"m/{_NOBODY}/{self._own}")
        except KeyMissingError:
            return
        self.stop()
        raise StoreError(
            "the copy stood still for more than a day, and a garbage collection of the target took it for"
            " dead; copy again"
        )

    def stop(self) -> None:
        """Let the intent grow old."""
        self._alive.stop()

    def end(self) -> None:
        """Take the intent back: the manifests hold the packs now."""
        self.stop()
        with suppress(AccessDeniedError):  # a collector takes it away some day
            self._target.delete(f"s/{self._own}")


def check_revoked(target: Store) -> None:
    """See that what is there can be believed to stay.

    A copy that was revoked may have made a manifest while the collector that revoked it was at work: as
    long as that one runs, the packs may still go.

    Raises:
        InUseError: it may run.
    """
    if any(True for _ in target.list(f"m/{_NOBODY}")):
        _check_collectors(target)


def _check_collectors(target: Store) -> None:
    for listed in list(target.list("s")):
        try:
            intent = Intent.decode(
                target.get(listed.key, limit=INTENT_MAX), listed.key.partition("/")[2]
            )
        except (KeyMissingError, FormatError):
            continue
        if intent.role == "gc":
            raise InUseError(
                f"a garbage collection runs on the target (or died there within a day: then delete"
                f" {listed.key}); copy again when it is done"
            )
