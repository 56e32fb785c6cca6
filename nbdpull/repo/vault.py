"""An open ring: makes the keys of new sessions, and opens those of old ones."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from typing import Final

from nbdpull.model.crypto import KEY_SIZE
from nbdpull.model.ids import SessionId
from nbdpull.model.keyring import Ring
from nbdpull.model.sealing import (
    SALT_SIZE,
    KeyOpener,
    PackKeys,
    SessionKeys,
    open_envelope,
    seal_envelope,
)

__all__ = ["Vault", "new_pack_keys"]

_KEPT: Final = 1024


class Vault:
    """The keys of an open repository. All methods may be called by many threads.

    Attributes:
        ring: the long-lived keys.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._kept: OrderedDict[tuple[SessionId, bytes], SessionKeys] = OrderedDict()
        self._lock = threading.Lock()

    def new_session(self, sid: SessionId) -> SessionKeys:
        """Random keys for a new session, sealed to the newest generation."""
        ring = self.ring
        meta, data = os.urandom(KEY_SIZE), os.urandom(KEY_SIZE)
        envelope = seal_envelope(
            repository=ring.repository,
            sid=sid,
            meta=meta,
            data=data,
            recipients=ring.generations[-1:],
            salt=os.urandom(SALT_SIZE),
        )
        return SessionKeys(
            repository=ring.repository,
            sid=sid,
            meta=meta,
            data=data,
            digest_key=ring.digest_key,
            envelope=envelope,
        )

    def opener(self, sid: SessionId) -> KeyOpener:
        """Opens the envelope of an object of session `sid`."""
        return functools.partial(self._open, sid)

    def _open(self, sid: SessionId, envelope: bytes) -> SessionKeys:
        with self._lock:
            found = self._kept.get((sid, envelope))
            if found is not None:
                return found
        keys = open_envelope(
            envelope,
            repository=self.ring.repository,
            sid=sid,
            recipients=self.ring.generations,
            digest_key=self.ring.digest_key,
        )
        with self._lock:
            self._kept[sid, envelope] = keys
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return keys


def new_pack_keys(keys: SessionKeys, seq: int) -> PackKeys:
    """The keys of a new pack: no other pack has its salt, so no nonce is ever used twice."""
    return keys.pack(seq, os.urandom(SALT_SIZE))
