"""TLS for NBD connections: where certificates or shared keys lie.

Only paths are handed on, never what is in the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

from nbdpull.errors import UsageError

__all__ = ["SERVER_PSK", "Tls", "look_at_tls", "with_tls"]

_CLIENT: Final = ("ca-cert.pem", "client-cert.pem", "client-key.pem")
_SERVER: Final = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
SERVER_PSK: Final = "keys.psk"
"""What QEMU calls the file of shared keys in its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """What a connection is secured with.

    Attributes:
        path: absolute: a folder of X.509 certificates, or a file of shared keys (PSK).
        user: whose shared key it is, the first in the file; None with certificates.
    """

    path: str
    user: str | None

    @property
    def folder(self) -> str:
        """Where QEMU looks for its own files."""
        return self.path if self.user is None else str(Path(self.path).parent)

    def serves(self) -> bool:
        """Whether a QEMU server has all that it needs there."""
        if self.user is not None:
            return Path(self.path).name == SERVER_PSK
        return all((Path(self.path) / name).is_file() for name in _SERVER)


def look_at_tls(path: str, *, server: bool) -> Tls:
    """What is at `path`, as the client uses it, and a QEMU server on this machine too where `server`.

    Raises:
        UsageError: files are missing.
    """
    place = Path(path).absolute()
    if place.is_dir():
        for name in (*_CLIENT, *(_SERVER if server else ())):
            if not (place / name).is_file():
                raise UsageError(
                    f"TLS folder '{path}' has no {name}; it needs {', '.join(_CLIENT)}"
                    + (f" and, for QEMU's side, {', '.join(_SERVER[1:])}" if server else "")
                )
        return Tls(path=str(place), user=None)
    try:
        with place.open(encoding="utf-8") as file:
            user, colon, _ = file.readline(4096).partition(":")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(
            f"'{path}' is neither a folder of certificates nor a readable file of shared keys"
        ) from exc
    if not colon or not user:
        raise UsageError(
            f"file '{path}' holds no shared key; expected a line NAME:KEY (psktool makes it)"
        )
    if server and place.name != SERVER_PSK:
        raise UsageError(
            f"QEMU wants the file of shared keys to be called {SERVER_PSK}, got '{path}'"
        )
    return Tls(path=str(place), user=user)


def with_tls(uri: str, tls: Tls) -> str:
    """The same NBD address (``nbds://``, ``nbds+unix://``) with where the secrets lie.

    Raises:
        UsageError: an address without TLS, or certificates where none can be checked.
    """
    parts = urlsplit(uri)
    if not parts.scheme.startswith("nbds"):
        raise UsageError(f"NBD address '{uri}' has no TLS, and --tls is given; expected nbds://...")
    if parts.scheme == "nbds+unix" and tls.user is None:
        raise UsageError(
            f"no certificate can be checked over a unix socket, as '{uri}' is; use a shared key (PSK), or"
            " nbds://HOST:PORT"
        )
    given = [parts.query] if parts.query else []
    kind = "tls-certificates" if tls.user is None else "tls-psk-file"
    query = "&".join([*given, f"{kind}={quote(tls.path, safe='/')}"])
    place = parts.netloc
    if tls.user is not None and "@" not in place:
        place = f"{quote(tls.user, safe='')}@{place}"
    return f"{parts.scheme}://{place}{parts.path}?{query}"
