"""Disks to restore and servers to restore into."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.target.helpers import wait_for_socket

Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts an NBD server on a private socket and gives its URI; all are stopped at the end."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str | Path) -> str:
        socket = tmp_path / f"s{len(processes)}"
        full = [str(part).replace("SOCKET", str(socket)) for part in command]
        processes.append(subprocess.Popen(full, stdin=subprocess.DEVNULL))
        wait_for_socket(socket, processes[-1])
        return f"nbd+unix:///?socket={socket}"

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(10)
