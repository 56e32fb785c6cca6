"""A connection that each run keeps to QEMU, by which QEMU itself tells whether the run lives.

    run ---- life (unix socket in the run's folder) ---- chardev np-<run>-life-<chain>[-nbd] in QEMU

`query-chardev` says whether somebody is connected. The kernel ends the connection with the process, however
that ends, and keeps it while the process is stopped. So whoever reaches a monitor of this QEMU can tell a
live run from a dead one, also where the run's folder and pid can't be seen: from another mount namespace, a
container, another user or another host. It is the first thing that a run makes in QEMU and the last that it
takes away. Nothing is ever sent on it. (QAPI: chardev-add, query-chardev.)
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nbdpull.errors import CommandError, Error, SourceError
from nbdpull.source.names import life_parts
from nbdpull.source.qmp import Monitor

__all__ = ["Life", "Lifeline", "can_tell", "lives"]

log = logging.getLogger(__name__)

_WAIT_S: Final = 10.0
_POLL_S: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What QEMU tells of one run.

    Attributes:
        name: of the chardev.
        chain: the id of the chain that it backs up.
        server: whether it starts QEMU's NBD server.
        alive: whether its process is connected.
    """

    name: str
    chain: str
    server: bool
    alive: bool


def can_tell(monitor: Monitor) -> bool:
    """Whether this QEMU has what it takes, so that a run without a lifeline is one that is over."""
    return "chardev-add" in monitor.commands


async def lives(monitor: Monitor) -> Mapping[str, Life]:
    """What this QEMU tells of runs, by run."""
    if not can_tell(monitor):
        return {}
    found = {}
    for entry in await monitor.execute("query-chardev"):
        parts = life_parts(str(entry["label"]))
        if parts is not None:
            # "unix:PATH,server=on", with this before it where nobody is connected (chardev/char-socket.c).
            alive = not str(entry["filename"]).startswith("disconnected:")
            found[parts[0]] = Life(
                name=entry["label"], chain=parts[1], server=parts[2], alive=alive
            )
    return found


class Lifeline:
    """The lifeline of this run, from `tie` to `cut`."""

    def __init__(self, monitor: Monitor, name: str) -> None:
        self._monitor = monitor
        self._name = name
        self._socket = socket.socket(socket.AF_UNIX)
        self._made = False

    async def tie(self, path: str, reached_at: str) -> None:
        """Make it, and wait until QEMU sees it.

        Args:
            path: of the socket, as QEMU is to make it.
            reached_at: where that socket is for this process.

        Raises:
            SourceError: QEMU can't make it, or it can't be reached.
        """
        if not can_tell(self._monitor):
            return
        address = {"type": "unix", "data": {"path": path}}
        backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
        self._made = True
        try:
            await self._monitor.execute("chardev-add", {"id": self._name, "backend": backend})
        except CommandError as exc:
            if "Permission denied" not in exc.description:
                raise
            uid = self._monitor.peer_uid
            user = "" if uid is None else f", which runs as user {uid},"
            raise SourceError(
                f"QEMU{user} may not make a socket at {path}; run nbdpull as the user that QEMU runs as,"
                " or as root (AppArmor or SELinux may forbid it, too: then choose a folder that QEMU"
                " may use with --scratch)"
            ) from exc
        await self._connect(path, reached_at)

    async def tie_again(self, path: str, reached_at: str) -> None:
        """Connect to the one that a run left which died, and wait until QEMU sees it.

        Raises:
            SourceError: it can't be reached.
        """
        if can_tell(self._monitor):
            await self._connect(path, reached_at)
            self._made = True

    async def _connect(self, path: str, reached_at: str) -> None:
        try:
            self._socket.setblocking(False)  # noqa: FBT003 - its only argument
            async with asyncio.timeout(_WAIT_S):
                await asyncio.get_running_loop().sock_connect(self._socket, reached_at)
                await self._until_seen(alive=True)
        except (OSError, TimeoutError) as exc:
            why = exc.strerror or "no answer"
            raise SourceError(
                f"can't connect to the socket that QEMU made at {path} ({why}); the folder must be the same"
                " for QEMU and nbdpull (containers?): choose one with --scratch"
            ) from exc

    async def _until_seen(self, *, alive: bool) -> None:
        while True:
            found = await lives(self._monitor)
            if any(life.name == self._name and life.alive for life in found.values()) is alive:
                return
            await asyncio.sleep(_POLL_S)

    async def drop(self) -> None:
        """Let it go without taking it away, as if this process had died. Never raises."""
        self._made = False
        self._socket.close()
        with suppress(Error, TimeoutError):
            async with asyncio.timeout(_WAIT_S):
                await self._until_seen(alive=False)

    async def cut(self) -> None:
        """Take it away: from here on the run is over. Never raises; a second call does nothing."""
        made, self._made = self._made, False
        if made:
            try:
                await self._monitor.execute("chardev-remove", {"id": self._name})
            except Error as exc:
                log.debug("%s", exc)
        self._socket.close()
