"""Seconds that the threads of a session spent in each of its stages."""

from __future__ import annotations

import threading

__all__ = ["Stages"]


class Stages:
    """Sums over all threads; any of them may add.

    Attributes:
        hash_s: taking digests, and looking them up.
        compress_s: compressing.
        encrypt_s: encrypting.
        store_s: writing to the store, and waiting for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.hash_s = 0.0
        self.compress_s = 0.0
        self.encrypt_s = 0.0
        self.store_s = 0.0

    def add(
        self,
        *,
        hash_s: float,
        compress_s: float = 0.0,
        encrypt_s: float = 0.0,
        store_s: float = 0.0,
    ) -> None:
        """Count more of any stage: one call a frame, so that it costs next to nothing."""
        with self._lock:
            self.hash_s += hash_s
            self.compress_s += compress_s
            self.encrypt_s += encrypt_s
            self.store_s += store_s
