"""A small NBD server that says of block status whatever a test wants, and notes what it was asked.

nbdkit joins neighbours of one type and never sends an empty extent, so it can't play every server. Made
from the NBD specification alone: fixed newstyle handshake, structured replies, one connection at a time.
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["FakeNbd", "Request"]

_OPTION = 0x49484156454F5054
_OPTION_REPLY = 0x3E889045565A9
_REQUEST = 0x25609513
_STRUCTURED = 0x668E33EF
_GO, _STRUCTURED_REPLY, _SET_META_CONTEXT = 7, 8, 10
_ACK, _INFO, _META_CONTEXT, _UNSUPPORTED = 1, 3, 4, (1 << 31) + 1
_CMD_READ, _CMD_DISC, _CMD_BLOCK_STATUS = 0, 2, 7
_CONTEXT_ID = 17
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Request:
    """One block status request."""

    offset: int
    length: int
    one: bool


Extents = Callable[[Request], Sequence[tuple[int, int]]]
"""What to answer: (length, flags) of each extent."""


class FakeNbd:
    """Serves an export of `size` zero bytes behind a unix socket, inside a `with` block.

    Attributes:
        requests: block status requests so far, oldest first.
        replies: bytes of each reply to them.
    """

    def __init__(self, folder: Path, size: int, extents: Extents, *, deaf: bool = False) -> None:
        self.size = size
        self.requests: list[Request] = []
        self.replies: list[int] = []
        self._extents = extents
        self._deaf = deaf
        self._path = folder / f"fake{next(_numbers)}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen(8)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def uri(self) -> str:
        """Where it is."""
        return f"nbd+unix:///?socket={self._path}"

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
        self._path.unlink()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._client = client
                with client, suppress(EOFError, ConnectionError):
                    self._handshake(client)
                    self._transmit(client)

    def _handshake(self, client: socket.socket) -> None:
        client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        _take(client, 4)
        while True:
            _magic, option, length = struct.unpack(">QII", _take(client, 16))
            data = _take(client, length)

            def reply(kind: int, payload: bytes = b"", option: int = option) -> None:
                head = struct.pack(">QIII", _OPTION_REPLY, option, kind, len(payload))
                client.sendall(head + payload)

            if option == _STRUCTURED_REPLY:
                reply(_ACK)
            elif option == _SET_META_CONTEXT:
                name_length = int.from_bytes(data[:4], "big")
                at = 4 + name_length + 4
                query_length = int.from_bytes(data[at : at + 4], "big")
                query = data[at + 4 : at + 4 + query_length]
                reply(_META_CONTEXT, struct.pack(">I", _CONTEXT_ID) + query)
                reply(_ACK)
            elif option == _GO:
                reply(_INFO, struct.pack(">HQH", 0, self.size, 3))  # flags: HAS_FLAGS, READ_ONLY
                reply(_ACK)
                return
            else:
                reply(_UNSUPPORTED)

    def _transmit(self, client: socket.socket) -> None:
        while True:
            _magic, flags, kind, cookie, offset, length = struct.unpack(
                ">IHHQQI", _take(client, 28)
            )
            if kind == _CMD_DISC:
                return
            if self._deaf:
                continue
            if kind == _CMD_READ:
                payload, chunk = struct.pack(">Q", offset) + bytes(length), 1
            else:
                request = Request(offset, length, bool(flags & 8))
                self.requests.append(request)
                payload = struct.pack(">I", _CONTEXT_ID)
                for extent in self._extents(request):
                    payload += struct.pack(">II", *extent)
                chunk = 5
                self.replies.append(len(payload))
            head = struct.pack(">IHHQI", _STRUCTURED, 1, chunk, cookie, len(payload))
            client.sendall(head + payload)


def _take(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = client.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data
