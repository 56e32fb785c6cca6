"""What nbdpull reads from libvirt's XML, and writes for it.

Formats: libvirt.org/formatdomain, formatbackup, formatcheckpoint.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from nbdpull.errors import SourceError
from nbdpull.source.base import Skipped

__all__ = [
    "BackupDisk",
    "DomainDefinition",
    "DomainDisk",
    "backup_xml",
    "checkpoint_xml",
    "exported_bitmap",
    "job_disks",
    "job_socket",
    "parse_domain",
    "sound_disks",
]

_MEDIA: Final = frozenset({"cdrom", "floppy"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDisk:
    """A disk of a domain.

    Attributes:
        target: ``vda``: by it libvirt knows the disk.
        format: of its image: ``qcow2``, ``raw`` ...
        path: of its image, where that is a file or a block device of this machine.
        images: its image and those below it, by path or by name on the network.
        iothread: the iothreads it runs in, as libvirt numbers them, or None.
    """

    target: str
    format: str
    path: str | None
    images: frozenset[str]
    iothread: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDefinition:
    """What a backup needs to know of a domain.

    Attributes:
        disks: those that can be backed up.
        skipped: the others.
        owner: user and group that its QEMU runs as; None where libvirt does not tell, because it runs as
            the same user.
    """

    disks: tuple[DomainDisk, ...]
    skipped: tuple[Skipped, ...]
    owner: tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupDisk:
    """A disk in a backup job.

    Attributes:
        scratch: path of the image that libvirt makes for what the guest overwrites.
        incremental: the checkpoint that changes are counted from; None for all of the disk.
    """

    target: str
    scratch: str
    incremental: str | None


def _parse(xml: str) -> ET.Element:
    try:
        return ET.fromstring(xml)  # noqa: S314 - see above
    except ET.ParseError as exc:
        raise SourceError(f"libvirt's XML can't be read: {exc}") from exc


def parse_domain(xml: str) -> DomainDefinition:
    """Understand a domain's XML.

    Raises:
        SourceError: it is none.
    """
    root = _parse(xml)
    controllers = {
        controller.get("index", "0"): threads
        for controller in root.iterfind("./devices/controller[@type='scsi']")
        if (threads := _threads(controller))
    }
    disks = []
    skipped = []
    for disk in root.iterfind("./devices/disk"):
        target = disk.find("target")
        name = "" if target is None else target.get("dev", "")
        reason = _unfit(disk)
        if reason is not None:
            skipped.append(Skipped(name=name, reason=reason))
            continue
        driver, source = disk.find("driver"), disk.find("source")
        on_scsi = target is not None and target.get("bus") == "scsi"
        address = disk.find("address[@type='drive']")
        controller = "0" if address is None else address.get("controller", "0")
        path = None if source is None else source.get("file") or source.get("dev")
        disks.append(
            DomainDisk(
                target=name,
                format="raw" if driver is None else driver.get("type", "raw"),
                path=path if disk.get("type") in {"file", "block"} else None,
                images=frozenset(filter(None, map(_image, disk.iter("source")))),
                iothread=_threads(disk) or (controllers.get(controller) if on_scsi else None),
            )
        )
    return DomainDefinition(disks=tuple(disks), skipped=tuple(skipped), owner=_owner(root))


def _image(source: ET.Element) -> str | None:
    """What a ``<source>`` names."""
    path = source.get("file") or source.get("dev") or source.get("volume")
    if path is None and source.get("name") is not None:
        path = f"{source.get('protocol')}:{source.get('name')}"
    return path


def _unfit(disk: ET.Element) -> str | None:
    device = disk.get("device", "disk")
    if device in _MEDIA:
        return f"removable medium ({device})"
    reasons = {
        f"a {device} device, which libvirt can't back up": device != "disk",
        "read-only": disk.find("readonly") is not None,
        "transient": disk.find("transient") is not None,
        "it has no medium": disk.find("source") is None,
        "vhostuser: QEMU does not see its data": disk.get("type") == "vhostuser",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _threads(element: ET.Element) -> str | None:
    """The iothreads in a device's ``<driver>``."""
    driver = element.find("driver")
    if driver is None:
        return None
    found = [driver.get("iothread"), *(one.get("id") for one in driver.iter("iothread"))]
    return ", ".join(one for one in found if one) or None


def _owner(root: ET.Element) -> tuple[int, int] | None:
    """The ids in the DAC label of a domain that runs: ``+64055:+64055``, or names."""
    label = root.findtext("./seclabel[@model='dac']/label")
    if not label:
        return None
    user, _, group = label.partition(":")
    try:
        uid = int(user) if user.startswith("+") else pwd.getpwnam(user).pw_uid
        gid = int(group) if group.startswith("+") else grp.getgrnam(group).gr_gid
    except (ValueError, KeyError) as exc:
        raise SourceError(
            f"libvirt says that QEMU runs as '{label}', which this machine does not know"
        ) from exc
    return uid, gid


def exported_bitmap(target: str) -> str:
    """What the bitmap of a disk's changes is called among its export's contexts."""
    return f"backup-{target}"


def backup_xml(socket: str, disks: Sequence[BackupDisk], others: Collection[str]) -> str:
    """A ``<domainbackup>`` in pull mode.

    Args:
        socket: where QEMU's NBD server is to listen.
        disks: to back up.
        others: targets of all others.
    """
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=socket)
    inner = ET.SubElement(root, "disks")
    for disk in disks:
        entry = ET.SubElement(
            inner, "disk", name=disk.target, backup="yes", type="file", exportname=disk.target
        )
        if disk.incremental is None:
            entry.set("backupmode", "full")
        else:
            entry.set("backupmode", "incremental")
            entry.set("incremental", disk.incremental)
            entry.set("exportbitmap", exported_bitmap(disk.target))
        ET.SubElement(entry, "driver", type="qcow2")
        ET.SubElement(entry, "scratch", file=disk.scratch)
    for target in others:
        ET.SubElement(inner, "disk", name=target, backup="no")
    return ET.tostring(root, encoding="unicode")


def checkpoint_xml(
    name: str,
    recorded: Collection[str],
    others: Collection[str],
    *,
    created: int | None = None,
    domain: str | None = None,
) -> str:
    """A ``<domaincheckpoint>``.

    Args:
        name: its name, and that of its bitmaps.
        recorded: targets of the disks that it has a bitmap on.
        others: targets of all others.
        created: seconds since 1970, of one that is made known again.
        domain: the domain's XML, to be kept in it.
    """
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    if created is not None:
        ET.SubElement(root, "creationTime").text = str(created)
    inner = ET.SubElement(root, "disks")
    for target in recorded:
        entry = ET.SubElement(inner, "disk", name=target, checkpoint="bitmap")
        if created is not None:
            entry.set("bitmap", name)
    for target in others:
        ET.SubElement(inner, "disk", name=target, checkpoint="no")
    if domain is not None:
        root.append(_parse(domain))
    return ET.tostring(root, encoding="unicode")


def sound_disks(checkpoint: str, disks: Sequence[DomainDisk]) -> Mapping[str, int]:
    """Of a checkpoint described with sizes: bytes that changed since, by the targets whose bitmap is sound.

    libvirt leaves the size out where a bitmap is missing, inconsistent or not recording. It goes by targets and
    names, and so does not see when two disks have changed their images: that is told by the domain's
    definition which it keeps in the checkpoint.
    """
    root = _parse(checkpoint)
    then = {
        target.get("dev", ""): _image(source)
        for disk in root.iterfind("./domain/devices/disk")
        if (target := disk.find("target")) is not None
        and (source := disk.find("source")) is not None
    }
    images = {disk.target: disk.images for disk in disks}
    return {
        name: int(disk.get("size", "0"))
        for disk in root.iterfind("./disks/disk[@checkpoint='bitmap']")
        if disk.get("size") is not None
        and (name := disk.get("name", "")) in images
        and (then.get(name) is None or then[name] in images[name])
    }


def job_socket(job: str) -> str | None:
    """The unix socket of a backup job, by its XML; None where it has none."""
    server = _parse(job).find("./server[@transport='unix']")
    return None if server is None else server.get("socket")


def job_disks(job: str) -> list[BackupDisk]:
    """The disks of a backup job in pull mode, by its XML; only those that it serves as `backup_xml` asks for."""
    root = _parse(job)
    found = []
    for disk in root.iterfind("./disks/disk[@backup='yes']"):
        target, scratch = disk.get("name", ""), disk.find("scratch")
        one = BackupDisk(
            target=target,
            scratch="" if scratch is None else scratch.get("file", ""),
            incremental=disk.get("incremental"),
        )
        bitmap = None if one.incremental is None else exported_bitmap(target)
        if root.get("mode") == "pull" and (disk.get("exportname"), disk.get("exportbitmap")) == (
            target,
            bitmap,
        ):
            found.append(one)
    return found
