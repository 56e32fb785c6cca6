"""How long an object store is waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["PATIENCE", "Patience"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a store.

    Attributes:
        connect_s: for a connection.
        small_s: for a request with at most 1 MiB, from its first byte to its last.
        bulk_s: for a larger one; a pack of 32 MiB gets through at 110 KiB/s.
        retry_s: how long a failing call is tried again, once the store has answered at all.
        first_s: the same before its first answer: a wrong endpoint should be told soon.
        pause_s, pause_max_s: between two tries; doubled each time.
    """

    connect_s: float = 10.0
    small_s: float = 60.0
    bulk_s: float = 300.0
    retry_s: float = 300.0
    first_s: float = 10.0
    pause_s: float = 0.2
    pause_max_s: float = 15.0


PATIENCE: Final = Patience()
