"""QEMU's NBD server on a TCP port of this machine alone."""

from __future__ import annotations

import socket
from typing import Final

from nbdpull.errors import CommandError, SourceError
from nbdpull.source.qmp import Monitor

__all__ = ["LOOPBACK", "start_on_loopback"]

LOOPBACK: Final = "127.0.0.1"
_TRIES: Final = 5


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


async def start_on_loopback(monitor: Monitor, creds: str) -> int:
    """Start QEMU's NBD server, secured with the object `creds`; returns its port.

    QEMU does not tell which port it was given, so one is chosen; if somebody takes it first, another.

    Raises:
        CommandError, SourceError: QEMU refused.
    """
    for attempt in range(_TRIES):
        port = _free_port()
        address = {"type": "inet", "data": {"host": LOOPBACK, "port": str(port)}}
        try:
            await monitor.execute("nbd-server-start", {"addr": address, "tls-creds": creds})
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
