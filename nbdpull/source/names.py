"""The names that nbdpull gives to what it makes in QEMU: by them it knows its own again.

    np-<run>-scr0, -cbw0, -acc0, -bk0, -e0     nodes, jobs and exports of one run; gone when it ends
    np-<run>-tls                               object: what the NBD server is secured with
    np-<run>-life-<chain>[-nbd]                chardev: there and connected while the run lives, see `lifeline`;
                                               with -nbd the run starts the NBD server
    np-<run>-exp                               bitmap: what this run exports; gone when it ends
    nbdpull-<chain>-<backup>-<disk>            bitmap: a checkpoint; records what changed since a backup
    nbdpull-<chain>-<backup>                   the same, of libvirt

`run` is the first 8 hex digits of the backup's id, so that a run and its checkpoint find each other.
`disk` is of the disk's name: when images are swapped between two disks, neither finds its own checkpoint.
Node names have at most 31 characters (QEMU's limit).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

__all__ = [
    "ChainId",
    "RunNames",
    "chain_id",
    "checkpoint_name",
    "checkpoint_parts",
    "life_parts",
    "run_of",
]

_RUN: Final = re.compile(r"np-([0-9a-f]{8})-[a-z]+[0-9]*")
_LIFE: Final = re.compile(r"np-([0-9a-f]{8})-life-([0-9a-f]{12})(-nbd)?")
# Those of libvirt have no disk in their names; nor had earlier ones, which are there as long as their chains.
_CHECKPOINT: Final = re.compile(r"nbdpull-([0-9a-f]{12})-([0-9a-f]{16})(-[0-9a-f]{12})?")

ChainId = str
"""12 hex digits that stand for a chain in bitmap names."""


def chain_id(repository: str, vm: str, chain: str) -> ChainId:
    """The id of a chain: one of a VM in one repository, so that two repositories never share a bitmap."""
    digest = blake3()
    for part in (repository, vm, chain):
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "little"))
        digest.update(raw)
    return digest.hexdigest()[:12]


def checkpoint_name(chain: ChainId, backup: str, disk: str | None) -> str:
    """Name of the bitmap that records from `backup` on what changes on the disk of that name.

    None: one name for all disks, which libvirt wants.
    """
    if disk is None:
        return f"nbdpull-{chain}-{backup}"
    return f"nbdpull-{chain}-{backup}-{blake3(disk.encode()).hexdigest()[:12]}"


def checkpoint_parts(name: str) -> tuple[ChainId, str] | None:
    """The chain's and the backup's id in a bitmap's name, or None when it is not ours."""
    found = _CHECKPOINT.fullmatch(name)
    return (found[1], found[2]) if found else None


def run_of(name: str) -> str | None:
    """The run that a node, job, export or bitmap belongs to, or None when it is not ours."""
    found = _RUN.fullmatch(name)
    return found[1] if found else None


def life_parts(name: str) -> tuple[str, ChainId, bool] | None:
    """Of a lifeline's name the run, the chain's id, and whether the run starts the NBD server; else None."""
    found = _LIFE.fullmatch(name)
    return (found[1], found[2], found[3] is not None) if found else None


@dataclass(frozen=True, slots=True)
class RunNames:
    """Names of one run's things, by number of disk."""

    run: str

    @property
    def bitmap(self) -> str:
        """The bitmap that is exported; one on each disk."""
        return f"np-{self.run}-exp"

    def scratch(self, index: int) -> str:
        """The node that holds what the guest overwrites."""
        return f"np-{self.run}-scr{index}"

    def filter(self, index: int) -> str:
        """The copy-before-write filter above the disk."""
        return f"np-{self.run}-cbw{index}"

    def access(self, index: int) -> str:
        """The node that shows the point in time."""
        return f"np-{self.run}-acc{index}"

    def job(self, index: int) -> str:
        """The backup job that owns the filter."""
        return f"np-{self.run}-bk{index}"

    def scratch_export(self, index: int) -> str:
        """The export that tells what lies in the scratch image."""
        return f"np-{self.run}-se{index}"

    @property
    def tls(self) -> str:
        """The object that holds the NBD server's certificates or keys."""
        return f"np-{self.run}-tls"

    def life(self, chain: ChainId, *, server: bool) -> str:
        """The chardev that tells whether the run lives, and whether it starts the NBD server."""
        return f"np-{self.run}-life-{chain}{'-nbd' if server else ''}"

    def export(self, index: int) -> str:
        """The NBD export: its id in QEMU, and its name for clients."""
        return f"np-{self.run}-e{index}"
