"""The QMP conversation with one QEMU or qemu-storage-daemon; the only importer of qemu.qmp."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from nbdpull.errors import CommandError, MonitorError, MonitorInUseError, SourceError
from nbdpull.source.address import MonitorAddress

__all__ = ["EventHandler", "Monitor", "open_monitor"]

log = logging.getLogger(__name__)
# qemu.qmp reports a lost connection through its logger as well as by exception: once is enough.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

MINIMUM = (7, 2)
"""copy-before-write's on-cbw-error and {node, name} bitmaps came in 7.1; 7.2 is what was tested."""

_GREETING_S = 5.0
_COMMAND_S = 60.0
_NO_GREETING = (
    "sent no greeting in {seconds:g} s: another client (libvirt, another backup) holds this monitor, or"
    " QEMU hangs; wait, or give nbdpull a monitor of its own (-qmp unix:PATH,server=on,wait=off)"
)

EventHandler = Callable[[str, Mapping[str, Any]], None]
"""Called in the event loop with an event's name and data."""


class Monitor:
    """An open QMP session.

    Attributes:
        address: where it is connected to.
        version: of QEMU, as (major, minor, micro).
        commands: names of the commands that this QEMU has.
        peer_uid, peer_gid: whom the QEMU process runs as; None over TCP.
    """

    def __init__(
        self,
        client: QMPClient,
        address: MonitorAddress,
        peer: tuple[int, int] | None,
    ) -> None:
        self._client = client
        self._handlers: list[EventHandler] = []
        self.address = address
        self.version: tuple[int, int, int] = (0, 0, 0)
        self.commands: frozenset[str] = frozenset()
        self.peer_uid = peer[0] if peer else None
        self.peer_gid = peer[1] if peer else None

    @property
    def storage_daemon(self) -> bool:
        """Whether this is a qemu-storage-daemon: it has disks but no machine."""
        return "query-status" not in self.commands

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = _COMMAND_S,
    ) -> Any:
        """Run one command and return what it returned.

        Raises:
            CommandError: QEMU refused it; nothing was done.
            MonitorError: the session broke or QEMU did not answer; whether it was done is unknown.
        """
        log.debug("-> %s %s", command, arguments or "")
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._client.execute(command, dict(arguments or {}))
        except ExecuteError as exc:
            raise CommandError(command, exc.error_class, str(exc)) from exc
        except TimeoutError as exc:
            raise MonitorError(
                f"QEMU did not answer '{command}' on {self.address} in {timeout_s:g} s; it may hang on"
                " its storage"
            ) from exc
        except (QMPError, OSError, EOFError) as exc:
            raise MonitorError(
                f"lost the QMP monitor {self.address} during '{command}': {exc}; QEMU may have ended"
            ) from exc
        log.debug("<- %s", reply)
        return reply

    async def ask(self, *queries: str | tuple[str, Mapping[str, object]]) -> list[Any]:
        """What several commands return that change nothing: QEMU runs them in this order, after one wait.

        Raises:
            CommandError: QEMU refused one.
            MonitorError: the session broke or QEMU did not answer.
        """
        pairs = [(one, None) if isinstance(one, str) else one for one in queries]
        # All end before the first failure is raised, so that no reply is left to nobody.
        replies = await asyncio.gather(
            *(self.execute(command, arguments) for command, arguments in pairs),
            return_exceptions=True,
        )
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies

    def on_event(self, handler: EventHandler) -> Callable[[], None]:
        """Call `handler` for every event from now on; returns what stops that."""
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    async def _pump(self, listener: EventListener) -> None:
        async for message in listener:
            name = str(message["event"])
            data = message.get("data") or {}  # STOP and RESUME have none
            log.debug("event %s %s", name, data)
            for handler in list(self._handlers):
                handler(name, data if isinstance(data, dict) else {})

    async def _learn(self) -> None:
        greeting, commands = await self.ask("query-version", "query-commands")
        numbers = greeting["qemu"]
        self.version = (numbers["major"], numbers["minor"], numbers["micro"])
        if self.version[:2] < MINIMUM:
            found = ".".join(map(str, self.version))
            raise SourceError(
                f"QEMU at {self.address} is {found}, expected 7.2 or later; upgrade QEMU (10 is best)"
            )
        self.commands = frozenset(entry["name"] for entry in commands)


def _connect_socket(address: MonitorAddress) -> tuple[socket.socket, tuple[int, int] | None]:
    """A connected socket, and (uid, gid) of the process that listens on it where known."""
    try:
        if address.path is None:
            return socket.create_connection((address.host, address.port), timeout=_GREETING_S), None
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(_GREETING_S)
            sock.connect(address.path)
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            _pid, uid, gid = struct.unpack("3i", raw)
        except BaseException:
            sock.close()
            raise
    except FileNotFoundError as exc:
        raise MonitorError(
            f"no QMP socket at {address.path}; start QEMU with -qmp unix:{address.path},server=on,wait=off"
        ) from exc
    except ConnectionRefusedError as exc:
        if address.path is not None and not Path(address.path).is_socket():
            raise MonitorError(
                f"{address.path} is no socket; expected the path of QEMU's -qmp unix:PATH"
            ) from exc
        raise MonitorError(f"nobody listens at {address}; is QEMU running?") from exc
    except PermissionError as exc:
        raise MonitorError(
            f"no permission for {address}; run as the user that QEMU runs as, or root"
        ) from exc
    except (TimeoutError, BlockingIOError) as exc:
        # A listen queue that is full: QEMU listens with a backlog of one while a client is there.
        raise MonitorInUseError(
            f"QMP monitor {address} {_NO_GREETING.format(seconds=_GREETING_S)}"
        ) from exc
    except OSError as exc:
        hint = "; expected a unix socket" if exc.errno in {errno.ENOTSOCK, errno.EPROTOTYPE} else ""
        raise MonitorError(f"can't connect to {address}: {exc.strerror or exc}{hint}") from exc
    else:
        return sock, (uid, gid)


@asynccontextmanager
async def open_monitor(
    address: MonitorAddress,
    *,
    reached_at: str | None = None,
    owner: tuple[int, int] | None = None,
) -> AsyncIterator[Monitor]:
    """Connect, negotiate, and check that this is a QEMU that can be backed up.

    Args:
        address: of the monitor.
        reached_at: the unix socket that it is reached by, where that is another than the address says.
        owner: user and group that QEMU runs as there.

    Raises:
        MonitorInUseError: no greeting came in 5 seconds: a monitor serves one client at a time and
            leaves a second one waiting.
        MonitorError: nobody there, no permission, or not QMP.
        SourceError: QEMU is older than 7.2.
    """
    if reached_at is None:
        sock, owner = await asyncio.to_thread(_connect_socket, address)
    else:
        sock, _ = await asyncio.to_thread(_connect_socket, MonitorAddress(path=reached_at))
    sock.settimeout(0)
    client = QMPClient("nbdpull")
    try:
        async with asyncio.timeout(_GREETING_S):
            await client.connect(sock)
    except TimeoutError as exc:
        raise MonitorInUseError(
            f"QMP monitor {address} {_NO_GREETING.format(seconds=_GREETING_S)}"
        ) from exc
    except ConnectError as exc:
        raise MonitorError(f"{address} does not speak QMP: {exc}") from exc
    monitor = Monitor(client, address, owner)
    listener = EventListener()
    client.register_listener(listener)
    pump = asyncio.create_task(monitor._pump(listener), name="qmp-events")  # noqa: SLF001
    try:
        await monitor._learn()  # noqa: SLF001
        yield monitor
    finally:
        pump.cancel()
        with suppress(asyncio.CancelledError):
            await pump
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_GREETING_S):
                await client.disconnect()
