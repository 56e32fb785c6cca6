"""A session says that it lives.

A collector takes a session for dead that made no object for a day. But a backup that reads terabytes of what
the repository has already stores nothing for longer than that, and a disk may have to wait for its turn. So
each session makes a small object every few hours, `a/<sid>/<n>`, as long as its process runs.

And a session says in its intent which process it is of, so that one that died is known for dead at once,
on the same host: a backup that is run again takes over what it had stored (`repo.adopt`).

    <boot>-<pid>-<start>     boot: of this boot of this host, and of the process's space of pids
                             start: of the process, in clock ticks since the boot; a pid may come again
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from blake3 import blake3

from nbdpull.errors import StoreError
from nbdpull.model.ids import SessionId
from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo.store import Store

__all__ = ["IDLE_S", "KeepAlive", "clocks", "has_died", "here", "process_token"]

_log = logging.getLogger(__name__)

IDLE_S: Final = 24 * 3600.0
"""A session that made no object for so long is taken for dead."""

EVERY_S: Final = 6 * 3600.0
"""A quarter of the time after which a session counts as dead: a store may be away for hours."""
_AGAIN_S: Final = 600.0

_here: set[SessionId] = set()
"""Sessions of this very process that go on."""


@contextmanager
def here(sid: SessionId) -> Iterator[None]:
    """Have a session of this process count as one that has not died."""
    _here.add(sid)
    try:
        yield
    finally:
        _here.discard(sid)


class KeepAlive:
    """Makes the objects, from a thread of its own, until `stop`, or until nobody refers to it any more."""

    def __init__(self, store: Store, sid: SessionId) -> None:
        self._stopped = threading.Event()
        self._sid = sid
        _here.add(sid)
        weakref.finalize(self, _ended, sid, self._stopped)
        # The thread must not refer to `self`: then somebody always would.
        threading.Thread(
            target=_run, args=(store, sid, self._stopped), name="nbdpull-alive", daemon=True
        ).start()

    def stop(self) -> None:
        """End it; does not wait for an object that is being made. A second call does nothing."""
        _ended(self._sid, self._stopped)


def _ended(sid: SessionId, stopped: threading.Event) -> None:
    _here.discard(sid)
    stopped.set()


def _run(store: Store, sid: SessionId, stopped: threading.Event) -> None:
    number = 1  # 0 is made where the store's clock is asked for
    wait_s = EVERY_S
    while not stopped.wait(wait_s):
        try:
            store.create(f"a/{sid}/{number}", b"")
        except StoreError as exc:
            _log.debug("session %s could not say that it lives: %s", sid, exc)
            wait_s = _AGAIN_S
        except Cancelled:
            return
        else:
            wait_s = EVERY_S
        number += 1


def clocks() -> tuple[float, float]:
    """Seconds by two clocks: the first stands still while a VM is paused, the second may be set.

    Of what has passed by each the longer time is to be believed.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


# -- whether its process lives -----------------------------------------------------------------------


def process_token() -> str:
    """What names this process, on this host, for `has_died`; empty where the system does not tell."""
    try:
        return f"{_boot()}-{os.getpid()}-{_start(os.getpid())}"
    except (OSError, ValueError):
        return ""


def has_died(token: str, sid: SessionId) -> bool:
    """Whether the process with that token, or its session `sid`, is known to have ended.

    False whenever that can't be told: of another host, or of before this host was booted.
    """
    try:
        boot, pid_text, start_text = token.split("-")
        pid, start = int(pid_text), int(start_text)
        if boot != _boot() or pid <= 0:
            return False
        if pid == os.getpid() and start == _start(pid):
            return sid not in _here
        os.kill(pid, 0)  # also where /proc hides the processes of others
        return _start(pid) != start or _is_zombie(pid)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False


def _boot() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    space = Path("/proc/self/ns/pid").stat().st_ino
    return blake3(boot + str(space).encode()).hexdigest()[:16]


def _fields(pid: int) -> list[bytes]:
    """Of ``/proc/<pid>/stat``, see proc(5), from the state on: a name may hold anything before."""
    raw = Path(f"/proc/{pid}/stat").read_bytes()
    return raw[raw.rindex(b")") + 2 :].split()


def _start(pid: int) -> int:
    return int(_fields(pid)[19])


def _is_zombie(pid: int) -> bool:
    """Whether it only waits to be asked for its exit code, and none of its threads runs."""
    fields = _fields(pid)
    return fields[0] in {b"Z", b"X"} and int(fields[17]) <= 1
