"""Where a VM is reached: the SOURCE of a command, parsed."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from nbdpull.errors import UsageError

__all__ = [
    "DomainAddress",
    "ExportAddress",
    "ImageAddress",
    "MonitorAddress",
    "SourceAddress",
    "SshHost",
    "check_libvirt_uri",
    "parse_bitmaps",
    "parse_domain_address",
    "parse_source",
]

_FORMS: Final = (
    "qmp:/path/to/socket, qmp+ssh://host/path/to/socket, qmp+tcp://host:port, disk:/path/to/image,"
    " libvirt:DOMAIN or nbd://host/export"
)
_FORMATS: Final = frozenset({"qcow2", "raw", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"})
# disk:[NAME=]PATH; a name has no slash, so that a path with '=' in it can always be written.
_EXPORT: Final = re.compile(r"(?:([^/=:]*)=)?(nbds?(?:\+unix)?://.*)", re.DOTALL)
# [NAME=]CONTEXT, where a bitmap's name may hold anything.
_BITMAP: Final = re.compile(r"(?:([^:=]*)=)?(qemu:dirty-bitmap:.+)", re.DOTALL)
# What would be an option of ssh is no user or host.
_SSH: Final = re.compile(
    r"qmp\+ssh://(?:([^-@:/\s][^@:/\s]*)@)?([A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+(?:%\w+)?\])"
    r"(?::([0-9]{1,5}))?(/[^?#\n]+)"
)
_DISK: Final = re.compile(r"disk(?:\+([a-z0-9]+))?:(?:([^/=]*)=)?(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class SshHost:
    """A host as `ssh` is told it.

    Attributes:
        destination: ``host`` or ``user@host``, also a name of ~/.ssh/config.
        port: None is what that says, else 22.
    """

    destination: str
    port: int | None = None

    def __str__(self) -> str:
        """Host and port for a reader."""
        return self.destination if self.port is None else f"{self.destination} port {self.port}"


@dataclass(frozen=True, slots=True)
class MonitorAddress:
    """A QMP monitor: a unix socket's path, here or on another host, or a host and port."""

    path: str | None = None
    host: str | None = None
    port: int = 0
    ssh: SshHost | None = None

    @property
    def there(self) -> str:
        """What it is on the host that QEMU runs on."""
        return f"qmp:{self.path}" if self.path else str(self)

    def __str__(self) -> str:
        """The URI it was parsed from."""
        if self.ssh is not None:
            port = "" if self.ssh.port is None else f":{self.ssh.port}"
            return f"qmp+ssh://{self.ssh.destination}{port}{self.path}"
        return f"qmp:{self.path}" if self.path else f"qmp+tcp://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAddress:
    """A disk image that no QEMU has open.

    Attributes:
        path: absolute.
        format: as ``qemu-img -f`` takes it; None is told by the file's name.
        name: of the disk; None is found out.
    """

    path: str
    format: str | None
    name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportAddress:
    """An NBD export that somebody else made.

    Attributes:
        uri: as libnbd takes it.
        name: of the disk.
    """

    uri: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainAddress:
    """A domain of a libvirtd on this machine.

    Attributes:
        domain: its name or UUID.
        uri: of the libvirtd, as libvirt takes it; None for libvirt's default.
    """

    domain: str
    uri: str | None = None

    def __str__(self) -> str:
        """The URI it was parsed from."""
        return f"libvirt:{self.domain}" if self.uri is None else f"libvirt+{self.uri}#{self.domain}"


SourceAddress = (
    MonitorAddress | DomainAddress | tuple[ImageAddress, ...] | tuple[ExportAddress, ...]
)
"""What a whole SOURCE names: one monitor, or one domain, or the images of one VM, or exports of its disks."""


def parse_source(sources: Sequence[str]) -> SourceAddress:
    """Understand ``qmp:/path``, ``qmp:///path``, ``qmp+tcp://host:port``, ``libvirt:DOMAIN``, or one ``disk:`` or NBD URI or more.

    Raises:
        UsageError: any other form, several monitors, two disks of one name or file.
    """
    if not sources:
        raise UsageError(f"no source is given; expected {_FORMS}")
    disks = [source for source in sources if source.startswith(("disk:", "disk+"))]
    if len(disks) == len(sources):
        images = tuple(map(_image, sources))
        _check_twice("disk", [image.name for image in images if image.name is not None])
        _check_twice("image", [str(Path(image.path).resolve()) for image in images])
        return images
    if all(map(_EXPORT.fullmatch, sources)):
        exports = tuple(map(_export, sources))
        _check_twice("disk", [export.name for export in exports])
        return exports
    if len(sources) > 1:
        raise UsageError(
            f"{len(sources)} sources are given; a backup is of one VM: one monitor, or its images as"
            " several disk:NAME=/path/to/image, or its exports as several NAME=nbd://host/export"
        )
    if sources[0].startswith(("libvirt:", "libvirt+")):
        return parse_domain_address(sources[0])
    return _monitor(sources[0])


def _check_twice(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{what} '{name}' is given {names.count(name)} times; expected once")


def _image(source: str) -> ImageAddress:
    found = _DISK.fullmatch(source)
    if found is None or found[2] == "":
        raise UsageError(
            f"source '{source}' is not understood; expected disk:[NAME=]/path/to/image"
        )
    if found[3].startswith("rbd:"):
        raise UsageError(
            f"source '{source}' is no file; expected disk:[NAME=]/path/to/image: an image in Ceph that no VM"
            f" has open is read through 'qemu-nbd --read-only -t -e 20 -f raw -k /SOCKET {found[3]}', as"
            " NAME=nbd+unix:///?socket=/SOCKET"
        )
    image_format = found[1]
    if image_format is not None and image_format not in _FORMATS:
        raise UsageError(
            f"source '{source}' has the format '{image_format}'; expected one of"
            f" {', '.join(sorted(_FORMATS))}"
        )
    # Absolute: QEMU takes "json:..." and "nbd:..." as something else than a path, "/..." never. A
    # symbolic link stays: its name is the one that tells what the image is.
    return ImageAddress(path=str(Path(found[3]).absolute()), format=image_format, name=found[2])


def _export(source: str) -> ExportAddress:
    found = _EXPORT.fullmatch(source)
    if found is None or found[1] == "":
        raise UsageError(f"source '{source}' is not understood; expected [NAME=]nbd://host/export")
    try:
        named = unquote(urlsplit(found[2]).path.removeprefix("/"))
    except ValueError as exc:
        raise UsageError(f"source '{source}' is not a URI ({exc})") from exc
    return ExportAddress(uri=found[2], name=found[1] or named or "disk")


def parse_bitmaps(given: Sequence[str], exports: Sequence[ExportAddress]) -> dict[str, str]:
    """Meta contexts by disk name, of ``[NAME=]CONTEXT``: without a name it is every disk's.

    Raises:
        UsageError: no context of a dirty bitmap, or no disk of that name.
    """
    names = [export.name for export in exports]
    contexts: dict[str, str] = {}
    for text in given:
        found = _BITMAP.fullmatch(text)
        if found is None:
            raise UsageError(
                f"bitmap '{text}' is not understood; expected [NAME=]qemu:dirty-bitmap:BITMAP"
            )
        if found[1] is not None and found[1] not in names:
            raise UsageError(
                f"bitmap '{text}' is of disk '{found[1]}', which is not among {', '.join(names)}"
            )
        for name in names if found[1] is None else [found[1]]:
            if name in contexts:
                raise UsageError(f"disk '{name}' has two bitmaps; expected one")
            contexts[name] = found[2]
    return contexts


def parse_domain_address(source: str) -> DomainAddress:
    """Understand ``libvirt:DOMAIN`` and ``libvirt+URI#DOMAIN``.

    Raises:
        UsageError: any other form, or a libvirtd on another machine.
    """
    kind, _, rest = source.partition(":")
    if kind == "libvirt" and rest:
        return DomainAddress(domain=rest)
    uri, mark, domain = source.removeprefix("libvirt+").partition("#")
    if kind == "libvirt" or not mark or not domain or "://" not in uri:
        raise UsageError(
            f"source '{source}' is not understood; expected libvirt:DOMAIN or libvirt+URI#DOMAIN, as in"
            " libvirt+qemu:///system#web"
        )
    check_libvirt_uri(uri)
    return DomainAddress(domain=domain, uri=uri)


def check_libvirt_uri(uri: str) -> None:
    """See to it that a libvirtd is one of this machine.

    Raises:
        UsageError: it is not: QEMU's NBD socket and the scratch images are made where QEMU runs.
    """
    try:
        host = urlsplit(uri).hostname
    except ValueError as exc:
        raise UsageError(f"libvirt's URI '{uri}' is no URI ({exc})") from exc
    if host and not _is_loopback(host):
        raise UsageError(
            f"libvirt's URI '{uri}' is of another machine; run nbdpull there, because scratch images and"
            " the NBD socket are made where QEMU runs"
        )


def _monitor(source: str) -> MonitorAddress:
    """One monitor.

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
    if parts.scheme == "qmp+ssh":
        return _over_ssh(source)
    if parts.scheme == "qmp+tcp" and parts.hostname and port and parts.path in {"", "/"}:
        if not _is_loopback(parts.hostname):
            raise UsageError(
                f"source '{source}' is on another machine; nbdpull must run where QEMU runs,"
                " because scratch images and the NBD socket are made there; or use qmp+ssh://host/path/to/socket"
            )
        return MonitorAddress(host=parts.hostname, port=port)
    if not parts.scheme and source.startswith(("/", ".")):
        raise UsageError(
            f"source '{source}' has no scheme; write 'qmp:{source}' for a QMP socket, or"
            f" 'disk:{source}' for a disk image"
        )
    raise UsageError(f"source '{source}' is not understood; expected {_FORMS}")


def _over_ssh(source: str) -> MonitorAddress:
    found = _SSH.fullmatch(source)
    if found is None:
        # Not repeated: it may hold a password.
        raise UsageError(
            "a source over ssh is not understood; expected qmp+ssh://[user@]host[:port]/path/to/socket,"
            " without a password: ssh finds keys by itself"
        )
    user, host, port, path = found.groups()
    host = host.removeprefix("[").removesuffix("]")
    return MonitorAddress(
        path=unquote(path),
        ssh=SshHost(
            destination=host if user is None else f"{unquote(user)}@{host}",
            port=None if port is None else int(port),
        ),
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
