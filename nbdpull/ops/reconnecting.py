"""A backup whose connection to another host was lost altogether is run again, and goes on where it was.

    attempt -- host lost --> pause --> attempt -- not reached, or looks in use --> longer pause --> attempt ...

Each attempt is a backup as any other: that it goes on at the point in time of the one before is `ops.resuming`'s
business. What the host still shows of the lost connection makes it look alive for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from nbdpull.errors import InUseError, MonitorError
from nbdpull.source.base import HostLostError

__all__ = ["reconnecting"]

log = logging.getLogger(__name__)

_PAUSES_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""Four minutes: longer than a switch or a firewall takes to start again."""
_WELL_S: Final = 60.0
"""After an attempt that lasted so long the pauses begin anew."""

_T = TypeVar("_T")


async def reconnecting(attempt: Callable[[], Awaitable[_T]]) -> _T:
    """What `attempt` returns, run again while the host that it works on is lost.

    Raises:
        HostLostError: it stays lost.
        InUseError: it is there, and something holds what is to be gone on with.
    """
    lost: HostLostError | None = None
    pauses = iter(_PAUSES_S)
    while True:
        began = time.monotonic()
        try:
            return await attempt()
        except HostLostError as exc:
            lost = exc
            if time.monotonic() - began > _WELL_S:
                pauses = iter(_PAUSES_S)
            failure: Exception = exc
        except (MonitorError, InUseError) as exc:
            if lost is None:
                raise
            failure = exc
        pause_s = next(pauses, None)
        if pause_s is None:
            if isinstance(failure, InUseError) or failure is lost:
                raise failure
            raise lost from failure
        log.warning("the backup goes on in %g s, if it can: %s", pause_s, failure)
        await asyncio.sleep(pause_s)
