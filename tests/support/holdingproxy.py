"""A proxy before a server that holds back what the server sends, to measure how much that gets."""

from __future__ import annotations

import itertools
import select
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

__all__ = ["HoldingProxy"]

_QUIET_S = 0.05
_numbers = itertools.count()


class HoldingProxy:
    """Hands on all that a client sends, and what the server sends only once it has fallen silent.

    A server falls silent when it has answered everything that it was asked: what came together until then
    is what the client had in flight. Serves any number of connections inside a `with` block.

    Attributes:
        bursts: bytes that came together, of each time and all connections.
    """

    def __init__(self, folder: Path, upstream: Path | int) -> None:
        self.bursts: list[int] = []
        self._upstream = upstream
        self._listener: socket.socket
        if isinstance(upstream, int):
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.uri = f"nbd://127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            path = folder / f"proxy{next(_numbers)}"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(16)
            self.uri = f"nbd+unix:///?socket={path}"
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_exc: object) -> None:
        for one in (self._listener, *self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in (self._listener, *self._sockets):
            one.close()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if isinstance(self._upstream, int):
                    server = socket.create_connection(("127.0.0.1", self._upstream))
                else:
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(str(self._upstream))
                self._sockets += [client, server]
                self._start(_hand_on, client, server)
                self._start(self._hold, server, client)

    def _hold(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while True:
                held = server.recv(1 << 20)
                if not held:
                    break
                while select.select([server], [], [], _QUIET_S)[0]:
                    more = server.recv(1 << 20)
                    if not more:
                        break
                    held += more
                self.bursts.append(len(held))
                client.sendall(held)
            client.shutdown(socket.SHUT_WR)


def _hand_on(client: socket.socket, server: socket.socket) -> None:
    with suppress(OSError):
        while data := client.recv(1 << 16):
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)
