"""A small blocking QMP client on the standard library alone.

It shares no code with the product, so that a fault there can't hide itself in its own tests.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Event", "QmpClient", "QmpError"]

Event: TypeAlias = dict[str, Any]
"""One QMP event as QEMU sent it: ``event``, ``timestamp`` and mostly ``data``."""


class QmpError(Exception):
    """QEMU refused a command.

    Attributes:
        error_class: nearly always ``GenericError``.
        description: QEMU's own words.
    """

    def __init__(self, command: str, error: dict[str, str]) -> None:
        super().__init__(f"{command}: {error['desc']}")
        self.error_class = error["class"]
        self.description = error["desc"]


class QmpClient:
    """One connection to one monitor; its methods may be called from any thread, one at a time."""

    def __init__(self, path: Path, *, timeout_s: float = 20.0) -> None:
        self.events: list[Event] = []
        """Every event so far, oldest first."""
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._buffer = b""
        self._next_id = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(path))
            self.greeting = self._receive(time.monotonic() + timeout_s)["QMP"]
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: str, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Run `command` and return what QEMU returns.

        An underscore in an argument's name stands for a minus sign.

        Raises:
            QmpError: QEMU refused it.
            TimeoutError: no answer in time.
            ConnectionError: QEMU is gone.
        """
        with self._lock:
            self._next_id += 1
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            message = {"execute": command, "arguments": named, "id": self._next_id}
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            deadline = time.monotonic() + (timeout_s or self._timeout_s)
            while True:
                reply = self._receive(deadline)
                if "event" in reply:
                    self.events.append(reply)
                elif reply.get("id") == self._next_id:
                    if "error" in reply:
                        raise QmpError(command, reply["error"])
                    return reply["return"]

    def wait_event(self, name: str, *, since: int = 0, timeout_s: float | None = None) -> Event:
        """The first event called `name` at index `since` of `events` or later.

        Raises:
            TimeoutError: none came in time.
        """
        with self._lock:
            deadline = time.monotonic() + (timeout_s or self._timeout_s)
            while True:
                for event in self.events[since:]:
                    if event["event"] == name:
                        return event
                since = len(self.events)
                reply = self._receive(deadline)
                if "event" in reply:
                    self.events.append(reply)

    def close(self) -> None:
        """Close the connection; the monitor is free for the next client."""
        self._socket.close()

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("no answer from QEMU in time")
            self._socket.settimeout(left_s)
            more = self._socket.recv(1 << 16)
            if not more:
                raise ConnectionResetError("QEMU closed its monitor")
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message
