"""Checkpoints in libvirt: which of them a backup makes needless, and their removal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nbdpull.errors import Error, LibvirtError
from nbdpull.source.domainxml import checkpoint_xml
from nbdpull.source.libvirtapi import LibvirtDomain
from nbdpull.source.whole import whole

__all__ = ["Checkpoints", "remove_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """What libvirt has on a domain, before a backup.

    Attributes:
        targets: of all disks.
        sound: by the name of each checkpoint of ours, the targets whose bitmap is sound.
        chain: the id of the chain that is backed up.
    """

    targets: Collection[str]
    sound: Mapping[str, Collection[str]]
    chain: str

    def doomed(self, obsolete: Mapping[str, Sequence[str]]) -> list[str]:
        """Those to remove once a backup is durable, after which `obsolete` is not needed by each target.

        A checkpoint is one of several disks: it goes when none of them needs it any more. So does one of this
        chain that has no sound bitmap left.
        """
        doomed = []
        for name, sound in self.sound.items():
            needed = [target for target in sound if name not in obsolete.get(target, ())]
            named = any(name in names for names in obsolete.values())
            lost = not sound and name.startswith(f"nbdpull-{self.chain}-")
            if (named and not needed) or lost:
                doomed.append(name)
        return doomed

    async def remove(self, domain: LibvirtDomain, doomed: Collection[str]) -> tuple[str, ...]:
        """Remove them; what could not be is told, and no error."""
        problems = []
        for name in doomed:
            try:
                await whole(remove_checkpoint, domain, name, self.targets)
            except Error as exc:
                problems.append(f"checkpoint '{name}' stays: {exc}")
        return tuple(problems)


def remove_checkpoint(domain: LibvirtDomain, name: str, targets: Collection[str]) -> None:
    """Remove a checkpoint, with what there is of its bitmaps.

    libvirt refuses to remove one as soon as a single bitmap of it is missing. So it is told of a checkpoint of
    each disk alone then, of which it can be rid.

    Raises:
        LibvirtError: it could not be done.
    """
    try:
        domain.delete_checkpoint(name)
    except LibvirtError:
        if not domain.active():
            raise
    else:
        return
    domain.delete_checkpoint(name, metadata_only=True)
    for target in targets:
        others = [one for one in targets if one != target]
        if domain.redefine(checkpoint_xml(name, [target], others, created=1), validate=False):
            try:
                domain.delete_checkpoint(name)
            except LibvirtError:
                domain.delete_checkpoint(name, metadata_only=True)
