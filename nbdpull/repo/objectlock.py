"""S3's object lock: which objects, until when, and how S3 is told. See docs/decisions/0012-object-lock.md."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from nbdpull.model.config import Lock

__all__ = ["lock_headers", "lockable", "locked_until"]

_LOCKED: Final = {"d", "x", "m", "key"}


def lockable(key: str) -> bool:
    """Whether it is of what backups consist of: packs, indexes, manifests, key slots."""
    return key.partition("/")[0] in _LOCKED


def locked_until(made: float, lock: Lock) -> float:
    """When the lock of an object ends that was made at `made`: counted from the end of that hour."""
    return (made // 3600 + 1) * 3600 + lock.duration_s


def lock_headers(mode: str, until: float) -> Mapping[str, str]:
    """The headers of a PUT that locks."""
    return {
        "x-amz-object-lock-mode": mode.upper(),
        "x-amz-object-lock-retain-until-date": time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(until)
        ),
    }
