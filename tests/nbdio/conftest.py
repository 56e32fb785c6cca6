"""Real NBD servers for the tests of connections."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.process import spawn, stop
from tests.target.helpers import wait_for_socket


@dataclass(frozen=True, slots=True)
class Server:
    """A server behind a unix socket."""

    path: Path
    process: subprocess.Popen[bytes]

    @property
    def uri(self) -> str:
        """Where its default export is."""
        return f"nbd+unix:///?socket={self.path}"


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a program that serves NBD on the unix socket SOCKET; all are ended at the end."""
    servers: list[Server] = []

    def start(*command: str | Path) -> Server:
        path = tmp_path / f"s{len(servers)}"
        argv = [str(part).replace("SOCKET", str(path)) for part in command]
        server = Server(path, spawn(argv))
        servers.append(server)
        wait_for_socket(path, server.process)
        return server

    yield start
    for server in servers:
        stop(server.process)


@pytest.fixture
def nbdkit(serve: Serve) -> Serve:
    """As `serve`, with the rest of an nbdkit command line."""

    def start(*arguments: str | Path) -> Server:
        return serve("nbdkit", "-f", "-U", "SOCKET", *arguments)

    return start
