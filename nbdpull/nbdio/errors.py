"""How a call on an NBD connection can end, besides well."""

from __future__ import annotations

from nbdpull.errors import NbdError

__all__ = ["Cancelled", "DroppedError", "RefusedError", "ReplyError", "TlsError"]


class Cancelled(Exception):
    """The owner asked this thread to stop."""


class DroppedError(NbdError):
    """The server ended the connection in the middle of the handshake."""


class RefusedError(NbdError):
    """Nobody listens at that address."""


class TlsError(NbdError):
    """The server wants TLS and gets none, or one side does not trust the other."""


class ReplyError(NbdError):
    """The server answered one request with an error; the connection can be used on.

    Attributes:
        errnum: the errno that the server sent.
    """

    def __init__(self, message: str, *, errnum: int) -> None:
        super().__init__(message)
        self.errnum = errnum
