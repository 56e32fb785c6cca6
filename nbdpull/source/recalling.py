"""Checkpoints that libvirt has forgotten, told to it again.

libvirt keeps checkpoints as files of its own: they go with `undefine`, with a transient domain, with its state
folder, and it never hears of those that were made while the VM was shut down. The bitmaps are in the images
all the same. The repository knows their names; whether they are there and sound, libvirt itself checks when it is
told of a checkpoint again, so a wrong guess costs one question.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from nbdpull.source.base import KnownCheckpoint
from nbdpull.source.domainxml import checkpoint_xml
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.names import checkpoint_parts

__all__ = ["recall_checkpoints"]

_TRIED: Final = 8
"""Of each chain, newest first: older ones are removed by the backups that follow them."""


def recall_checkpoints(
    domain: LibvirtDomain,
    lost: Sequence[KnownCheckpoint],
    known: Mapping[str, Collection[str]],
    targets: Sequence[str],
) -> bool:
    """Tell libvirt of the checkpoints that the next backups could be counted from.

    Args:
        domain: that runs.
        lost: what the repository has of the VM, newest first.
        known: by the name of each that libvirt has, the disks on which it is sound, if any.
        targets: the domain's disks that keep checkpoints.

    Returns:
        Whether there was one.
    """
    chains: dict[str, list[KnownCheckpoint]] = {}
    for one in lost:
        parts = checkpoint_parts(one.name)
        if parts is not None:
            chains.setdefault(parts[0], []).append(one)
    found = False
    for chain in chains.values():
        found |= _recall_chain(domain, chain, known, targets)
    return found


def _recall_chain(
    domain: LibvirtDomain,
    chain: Sequence[KnownCheckpoint],
    known: Mapping[str, Collection[str]],
    targets: Sequence[str],
) -> bool:
    """The newest that is there, which an incremental needs, and the last full's, for a differential."""
    found = False
    for one in chain[:_TRIED]:
        if known.get(one.name):
            break
        # One that libvirt has, and that is sound nowhere, is not lost: told again it would get the images of now.
        if one.name not in known and _recall(domain, one, targets):
            found = True
            break
    full = next((one for one in chain if one.full), None)
    if full is not None and full.name not in known:
        found |= _recall(domain, full, targets)
    return found


def _recall(domain: LibvirtDomain, one: KnownCheckpoint, targets: Sequence[str]) -> bool:
    disks = [name for name in one.disks if name in targets]
    if not disks:
        return False

    definition = domain.xml()

    def tell(recorded: Sequence[str]) -> bool:
        xml = checkpoint_xml(one.name, recorded, (), created=int(one.time), domain=definition)
        return domain.redefine(xml, validate=True)

    if tell(disks):
        return True
    sound = []
    for disk in disks:
        if tell([disk]):
            sound.append(disk)
            domain.delete_checkpoint(one.name, metadata_only=True)
    return bool(sound) and tell(sound)
