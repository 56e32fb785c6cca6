"""Where a VM is reached: the SOURCE of a command, parsed."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from nbdpull.errors import UsageError

__all__ = ["MonitorAddress", "parse_source"]

_FORMS = "qmp:/path/to/socket or qmp+tcp://host:port"


@dataclass(frozen=True, slots=True)
class MonitorAddress:
    """A QMP monitor: a unix socket's path, or a host and port."""

    path: str | None = None
    host: str | None = None
    port: int = 0

    def __str__(self) -> str:
        """The URI it was parsed from."""
        return f"qmp:{self.path}" if self.path else f"qmp+tcp://{self.host}:{self.port}"


def parse_source(source: str) -> MonitorAddress:
    """Understand ``qmp:/path``, ``qmp:///path`` or ``qmp+tcp://host:port``.

    Raises:
        UsageError: any other form, or a host that is not this machine. The scratch images and the NBD
            socket are made on the machine that runs nbdpull, so QEMU must run there too.
    """
    try:
        parts = urlsplit(source)
        port = parts.port
    except ValueError as exc:
        raise UsageError(f"source '{source}' is not a URI ({exc}); expected {_FORMS}") from exc
    if parts.scheme == "qmp" and parts.path and not parts.netloc:
        return MonitorAddress(path=unquote(parts.path))
    if parts.scheme == "qmp+tcp" and parts.hostname and port and parts.path in {"", "/"}:
        if not _is_loopback(parts.hostname):
            raise UsageError(
                f"source '{source}' is on another machine; nbdpull must run where QEMU runs,"
                " because scratch images and the NBD socket are made there"
            )
        return MonitorAddress(host=parts.hostname, port=port)
    if not parts.scheme and source.startswith(("/", ".")):
        raise UsageError(f"source '{source}' has no scheme; write 'qmp:{source}' for a QMP socket")
    raise UsageError(f"source '{source}' is not understood; expected {_FORMS}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
