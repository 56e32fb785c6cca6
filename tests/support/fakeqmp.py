"""A small QMP server that answers what a test wants: for monitors that a real QEMU can't be made to be."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

__all__ = ["FakeQmp"]

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 9, "micro": 9}}, "capabilities": []}}

Answers = Mapping[str, Any]
"""What each command returns; a string is an error's text, None closes the connection."""


class FakeQmp:
    """Listens on a unix socket and serves one client after the other, inside a `with` block.

    Attributes:
        commands: names of what it was asked to do, oldest first.
    """

    def __init__(self, folder: Path, answers: Answers, *, greeting: bytes | None = None) -> None:
        self.path = folder / "fakeqmp"
        self.commands: list[str] = []
        self._answers = dict(answers)
        self._greeting = json.dumps(GREETING).encode() + b"\n" if greeting is None else greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def uri(self) -> str:
        """The product's SOURCE."""
        return f"qmp:{self.path}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        if self._client is not None:
            with suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                self._client, _ = self._listener.accept()
                with self._client, suppress(ConnectionError):
                    self._client.sendall(self._greeting)
                    _talk(self._client, self._answer)

    def _answer(self, command: str) -> dict[str, Any] | None:
        self.commands.append(command)
        if command == "qmp_capabilities":
            return {"return": {}}
        answer = self._answers.get(command, f"The command {command} has not been found")
        if answer is None:
            return None
        if isinstance(answer, str):
            return {"error": {"class": "GenericError", "desc": answer}}
        return {"return": answer}


def _talk(client: socket.socket, answer: Callable[[str], dict[str, Any] | None]) -> None:
    # Messages are JSON values one after the other: qemu.qmp sends nothing between them.
    text = ""
    while more := client.recv(1 << 16):
        text += more.decode()
        while True:
            try:
                message, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break  # not all of it is here
            text = text[end:].lstrip()
            reply = answer(message.get("execute", ""))
            if reply is None:
                return
            client.sendall(json.dumps({**reply, "id": message.get("id")}).encode() + b"\n")
