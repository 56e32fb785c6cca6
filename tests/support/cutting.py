"""A proxy in front of a server, on loopback or a unix socket, that loses all its connections when it is told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Cutter", "cutting"]


class Cutter:
    """The proxy.

    Attributes:
        port: on 127.0.0.1; 0 on a unix socket.
        every: bytes from the server after which all connections are lost; None for never.
        cuts: how often that is to happen still.
        lost: how often it did.
        connections: that were made.
        away: whether new ones are lost at once.
    """

    def __init__(self, server: str | tuple[str, int], listen: Path | None = None) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._passed = 0
        if listen is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
        else:
            self._listener = socket.create_server(str(listen), family=socket.AF_UNIX)
        self.port: int = self._listener.getsockname()[1] if listen is None else 0
        self.every: int | None = None
        self.cuts = 0
        self.lost = 0
        self.connections = 0
        self.away = False
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                if self.away:
                    client.close()
                    continue
                kind = socket.AF_UNIX if isinstance(self._server, str) else socket.AF_INET
                server = socket.socket(kind)
                with self._lock:
                    self.connections += 1
                    self._open += [client, server]
                server.connect(self._server)
                self._start(self._pass, client, server, False)
                self._start(self._pass, server, client, True)

    def _pass(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while raw := source.recv(65536):
                sink.sendall(raw)
                if counts:
                    self._count(len(raw))
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _count(self, passed: int) -> None:
        with self._lock:
            self._passed += passed
            due = self.every is not None and self._passed >= self.every and self.cuts > 0
            if due:
                self._passed = 0
                self.cuts -= 1
        if due:
            self.cut()

    def cut(self) -> None:
        """Lose all connections now."""
        with self._lock:
            self.lost += 1
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it, and all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for one in (self._listener, *self._open):
            one.close()


@contextmanager
def cutting(server: str | tuple[str, int], listen: Path | None = None) -> Iterator[Cutter]:
    """A proxy to a socket's address, a path, or host and port; on a unix socket at `listen`."""
    made = Cutter(server, listen)
    try:
        yield made
    finally:
        made.close()
