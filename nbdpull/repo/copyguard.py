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
from nbdpull.model.intent import Intent
from nbdpull.repo.alive import KeepAlive, has_died
from nbdpull.repo.intents import read_intent
from nbdpull.repo.marks import there
from nbdpull.repo.store import AccessDeniedError, KeyMissingError, Store

__all__ = ["CopyGuard", "check_revoked"]

_NOBODY: Final = "0" * 32
_BRINGS_MAX: Final = 16_384
"""Sessions that one intent names, in 600 KiB; with more there are several."""


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
        self._alive: dict[SessionId, KeepAlive] = {}
        brings = sorted(sids)
        try:
            for at in range(0, max(len(brings), 1), _BRINGS_MAX):
                self._begin(tuple(brings[at : at + _BRINGS_MAX]))
            _check_collectors(target)
        except BaseException:
            self.end()
            raise

    def _begin(self, brings: tuple[SessionId, ...]) -> None:
        own = make_session_id(time.time_ns() // 1_000_000, os.urandom(10))
        intent = Intent(role="copy", disk=_NOBODY, brings=brings, time=time.time())
        self._alive[own] = KeepAlive(self._target, own)
        self._target.create(f"s/{own}", intent.encode(own))

    def check(self) -> None:
        """Call it when the manifests are there.

        Raises:
            StoreError: a collector took the copy for dead meanwhile.
        """
        if not any(there(self._target, f"m/{_NOBODY}/{own}") for own in self._alive):
            return
        self.stop()
        raise StoreError(
            "the copy stood still for more than a day, and a garbage collection of the target took it for"
            " dead; copy again"
        )

    def stop(self) -> None:
        """Let the intents grow old."""
        for alive in self._alive.values():
            alive.stop()

    def end(self) -> None:
        """Take the intents back: the manifests hold the packs now."""
        self.stop()
        for own in self._alive:
            with suppress(AccessDeniedError):  # a collector takes it away some day
                self._target.delete(f"s/{own}")


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
        sid = listed.key.partition("/")[2]
        try:
            intent = read_intent(target, sid)
        except (KeyMissingError, FormatError):
            continue
        if intent.role == "gc" and not has_died(intent.process, SessionId(sid)):
            raise InUseError(
                f"a garbage collection runs on the target (or died on another host: then run 'nbdpull gc' there,"
                f" or delete {listed.key}); copy again when it is done"
            )
