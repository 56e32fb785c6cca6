"""QEMU's NBD server on TCP, on a port of this machine alone or where the user says."""

from __future__ import annotations

import socket
from typing import Final
from urllib.parse import urlsplit

from nbdpull.errors import CommandError, SourceError
from nbdpull.source.qmp import Monitor

__all__ = ["LOOPBACK", "start_at", "start_on_loopback"]

LOOPBACK: Final = "127.0.0.1"
_TRIES: Final = 5
_PORT: Final = 10809
"""Of NBD, registered with IANA."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


async def _start(monitor: Monitor, host: str, port: int, creds: str) -> None:
    address = {"type": "inet", "data": {"host": host, "port": str(port)}}
    await monitor.execute("nbd-server-start", {"addr": address, "tls-creds": creds})


async def start_at(monitor: Monitor, uri: str, creds: str) -> None:
    """Start QEMU's NBD server at the host and port of `uri`, secured with the object `creds`.

    Raises:
        CommandError: QEMU refused, for example because it runs one already.
    """
    parts = urlsplit(uri)
    await _start(monitor, parts.hostname or LOOPBACK, parts.port or _PORT, creds)


async def start_on_loopback(monitor: Monitor, creds: str) -> int:
    """Start QEMU's NBD server, secured with the object `creds`; returns its port.

    QEMU does not tell which port it was given, so one is chosen; if somebody takes it first, another.

    Raises:
        CommandError, SourceError: QEMU refused.
    """
    for attempt in range(_TRIES):
        port = _free_port()
        try:
            await _start(monitor, LOOPBACK, port, creds)
        except CommandError as exc:
            if "already running" in exc.description:
                raise SourceError(
                    "this QEMU has an NBD server already; name its address with --nbd-address"
                    " (nbds://HOST:PORT), or end it with nbd-server-stop if nobody uses it"
                ) from exc
            if "in use" not in exc.description or attempt == _TRIES - 1:
                raise
        else:
            return port
    raise AssertionError
