"""A session says that it lives.

A collector takes a session for dead that made no object for a day. But a backup that reads terabytes of what
the repository has already stores nothing for longer than that, and a disk may have to wait for its turn. So
each session makes a small object every few hours, `a/<sid>/<n>`, as long as its process runs.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Final

from nbdpull.errors import StoreError
from nbdpull.model.ids import SessionId
from nbdpull.repo.store import Store

__all__ = ["KeepAlive"]

_log = logging.getLogger(__name__)

EVERY_S: Final = 6 * 3600.0
"""A quarter of the time after which a session counts as dead: a store may be away for hours."""
_AGAIN_S: Final = 600.0


class KeepAlive:
    """Makes the objects, from a thread of its own, until `stop`, or until nobody refers to it any more."""

    def __init__(self, store: Store, sid: SessionId) -> None:
        self._stopped = threading.Event()
        weakref.finalize(self, self._stopped.set)
        # The thread must not refer to `self`: then somebody always would.
        threading.Thread(
            target=_run, args=(store, sid, self._stopped), name="nbdpull-alive", daemon=True
        ).start()

    def stop(self) -> None:
        """End it; does not wait for an object that is being made. A second call does nothing."""
        self._stopped.set()


def _run(store: Store, sid: SessionId, stopped: threading.Event) -> None:
    number = 0
    wait_s = EVERY_S
    while not stopped.wait(wait_s):
        try:
            store.create(f"a/{sid}/{number}", b"")
        except StoreError as exc:
            _log.debug("session %s could not say that it lives: %s", sid, exc)
            wait_s = _AGAIN_S
        else:
            wait_s = EVERY_S
        number += 1
