"""What is read from libvirt's XML, and written for it."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from nbdpull.errors import SourceError
from nbdpull.source.base import Skipped
from nbdpull.source.domainxml import (
    BackupDisk,
    DomainDisk,
    backup_xml,
    checkpoint_xml,
    job_disks,
    job_socket,
    parse_domain,
    sound_disks,
)


def parsed(xml: str) -> ET.Element:
    return ET.fromstring(xml)  # noqa: S314 - our own


DOMAIN = """
<domain type='kvm' id='3'>
  <name>web</name>
  <devices>
    <controller type='scsi' index='0' model='virtio-scsi'/>
    <controller type='scsi' index='1' model='virtio-scsi'><driver iothread='2'/></controller>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='/images/a &amp; b.qcow2'/>
      <backingStore type='file'><format type='raw'/><source file='/images/base'/></backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw' iothread='1'/><source dev='/dev/vg/web'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/><source protocol='rbd' name='pool/web'/>
      <target dev='sda' bus='scsi'/><address type='drive' controller='1' bus='0' target='0' unit='0'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='/images/sdb.qcow2'/>
      <target dev='sdb' bus='scsi'/><address type='drive' controller='0' bus='0' target='0' unit='1'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'><iothreads><iothread id='3'/><iothread id='4'/></iothreads></driver>
      <source file='/images/vdc.qcow2'/><target dev='vdc' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='hda'/><readonly/></disk>
    <disk type='file' device='disk'><source file='/x'/><target dev='vdd'/><readonly/></disk>
    <disk type='file' device='disk'><source file='/x'/><target dev='vde'/><transient/></disk>
    <disk type='block' device='lun'><source dev='/x'/><target dev='sdc'/></disk>
    <disk type='file' device='disk'><target dev='vdf'/></disk>
    <disk type='vhostuser' device='disk'><source type='unix' path='/x'/><target dev='vdg'/></disk>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-1</label></seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+108</label></seclabel>
</domain>
"""


def test_disks_are_found_with_what_a_backup_needs_to_know() -> None:
    found = parse_domain(DOMAIN)
    assert found.disks == (
        DomainDisk(
            target="vda",
            format="qcow2",
            path="/images/a & b.qcow2",
            images=frozenset({"/images/a & b.qcow2", "/images/base"}),
            iothread=None,
        ),
        DomainDisk(
            target="vdb",
            format="raw",
            path="/dev/vg/web",
            images=frozenset({"/dev/vg/web"}),
            iothread="1",
        ),
        DomainDisk(
            target="sda", format="raw", path=None, images=frozenset({"rbd:pool/web"}), iothread="2"
        ),
        DomainDisk(
            target="sdb",
            format="qcow2",
            path="/images/sdb.qcow2",
            images=frozenset({"/images/sdb.qcow2"}),
            iothread=None,
        ),
        DomainDisk(
            target="vdc",
            format="qcow2",
            path="/images/vdc.qcow2",
            images=frozenset({"/images/vdc.qcow2"}),
            iothread="3, 4",
        ),
    )
    assert found.owner == (64055, 108)


def test_what_is_no_disk_to_back_up_is_told_with_the_reason() -> None:
    assert parse_domain(DOMAIN).skipped == (
        Skipped(name="hda", reason="removable medium (cdrom)"),
        Skipped(name="vdd", reason="read-only"),
        Skipped(name="vde", reason="transient"),
        Skipped(name="sdc", reason="a lun device, which libvirt can't back up"),
        Skipped(name="vdf", reason="it has no medium"),
        Skipped(name="vdg", reason="vhostuser: QEMU does not see its data"),
    )


@pytest.mark.parametrize(
    ("label", "owner"), [("root:root", (0, 0)), ("+5:root", (5, 0)), ("", None)]
)
def test_the_user_of_qemu_is_read_from_the_dac_label(
    label: str, owner: tuple[int, int] | None
) -> None:
    xml = f"<domain><seclabel model='dac'><label>{label}</label></seclabel></domain>"
    assert parse_domain(xml).owner == owner


def test_a_user_that_is_not_known_is_told() -> None:
    xml = "<domain><seclabel model='dac'><label>nosuchuser:+0</label></seclabel></domain>"
    with pytest.raises(SourceError, match="'nosuchuser:"):
        parse_domain(xml)


def test_what_is_no_xml_is_told() -> None:
    with pytest.raises(SourceError, match="can't be read"):
        parse_domain("<domain>")


def test_a_backup_names_each_disk_and_leaves_nothing_to_libvirts_choice() -> None:
    xml = backup_xml(
        "/tmp/a&b/nbd.sock",
        [
            BackupDisk(target="vda", scratch="/tmp/a&b/disk0.qcow2", incremental="cp-1"),
            BackupDisk(target="vdb", scratch="/tmp/a&b/disk1.qcow2", incremental=None),
        ],
        ["vdc"],
    )
    root = parsed(xml)
    assert root.get("mode") == "pull"
    assert job_socket(xml) == "/tmp/a&b/nbd.sock"
    assert [disk.attrib for disk in root.iterfind("./disks/disk")] == [
        {
            "name": "vda",
            "backup": "yes",
            "type": "file",
            "exportname": "vda",
            "backupmode": "incremental",
            "incremental": "cp-1",
            "exportbitmap": "backup-vda",
        },
        {
            "name": "vdb",
            "backup": "yes",
            "type": "file",
            "exportname": "vdb",
            "backupmode": "full",
        },
        {"name": "vdc", "backup": "no"},
    ]
    scratch = [one.get("file") for one in root.iterfind("./disks/disk/scratch")]
    assert scratch == ["/tmp/a&b/disk0.qcow2", "/tmp/a&b/disk1.qcow2"]


def test_the_disks_of_a_job_are_those_that_it_serves_as_was_asked_for() -> None:
    asked = [
        BackupDisk(target="vda", scratch="/tmp/disk0.qcow2", incremental="cp-1"),
        BackupDisk(target="vdb", scratch="/tmp/disk1.qcow2", incremental=None),
    ]
    xml = backup_xml("/tmp/nbd.sock", asked, ["vdc"])
    assert job_disks(xml) == asked
    assert job_disks(xml.replace('mode="pull"', 'mode="push"')) == []
    # Under another name, with another bitmap, with none, in another image.
    assert job_disks(xml.replace('exportname="vdb"', 'exportname="other"')) == asked[:1]
    assert job_disks(xml.replace('"backup-vda"', '"other"')) == asked[1:]
    assert job_disks(xml.replace('exportbitmap="backup-vda"', "")) == asked[1:]
    assert job_disks(xml.replace("/tmp/disk0.qcow2", "/tmp/disk9.qcow2")) != asked
    assert [one.scratch for one in job_disks(xml.replace("scratch file", "other file"))] == ["", ""]


def test_a_job_without_a_unix_socket_has_none() -> None:
    assert job_socket("<domainbackup><server transport='tcp' port='10809'/></domainbackup>") is None
    assert job_socket("<domainbackup mode='push'/>") is None


def test_a_checkpoint_names_each_disk() -> None:
    new = parsed(checkpoint_xml("cp", ["vda"], ["vdb"]))
    assert new.findtext("name") == "cp"
    assert new.find("creationTime") is None
    assert [disk.attrib for disk in new.iterfind("./disks/disk")] == [
        {"name": "vda", "checkpoint": "bitmap"},
        {"name": "vdb", "checkpoint": "no"},
    ]


def test_a_checkpoint_that_is_told_again_has_its_time_and_bitmaps() -> None:
    again = parsed(checkpoint_xml("cp", ["vda"], [], created=1795643929))
    assert again.findtext("creationTime") == "1795643929"
    assert [disk.attrib for disk in again.iterfind("./disks/disk")] == [
        {"name": "vda", "checkpoint": "bitmap", "bitmap": "cp"}
    ]


CHECKPOINT = (
    "<domaincheckpoint><name>cp</name><disks>"
    "<disk name='vda' checkpoint='bitmap' bitmap='cp' size='65536'/>"
    "<disk name='vdb' checkpoint='bitmap' bitmap='cp'/>"
    "<disk name='vdc' checkpoint='no' size='1'/>"
    "<disk name='gone' checkpoint='bitmap' bitmap='cp' size='1'/>"
    "</disks>{}</domaincheckpoint>"
)


def test_a_bitmap_whose_size_libvirt_does_not_tell_is_not_sound() -> None:
    assert sound_disks(CHECKPOINT.format(""), parse_domain(DOMAIN).disks) == {"vda": 65536}


@pytest.mark.parametrize(
    ("then", "sound"),
    [("/images/a &amp; b.qcow2", True), ("/images/base", True), ("/images/vdc.qcow2", False)],
)
def test_a_bitmap_of_a_disk_that_had_another_image_is_not_sound(then: str, *, sound: bool) -> None:
    domain = f"<domain><devices><disk><source file='{then}'/><target dev='vda'/></disk></devices></domain>"
    found = sound_disks(CHECKPOINT.format(domain), parse_domain(DOMAIN).disks)
    assert found == ({"vda": 65536} if sound else {})
