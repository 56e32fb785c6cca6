"""What a backup is told to do."""

from __future__ import annotations

from dataclasses import dataclass

from nbdpull.model.keysource import KeySource
from nbdpull.model.results import Level
from nbdpull.ops.resuming import RESUME_WITHIN_S
from nbdpull.source.fleecing import GUEST_DELAY_S

__all__ = ["AUDIT", "BackupOptions"]

AUDIT = 4
"""Frames: a few milliseconds a disk; 30 incrementals find a bitmap that misses 2 % of the disk with 90 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupOptions:
    """What to back up, where to, and how.

    Attributes:
        source: URIs: one monitor, or the images of one VM; see docs/sources.md.
        repository: its location.
        level: None is incremental where the chain allows it, else full.
        vm: what to call the VM; None asks QEMU for its name, else its UUID.
        include, exclude: names of disks; an empty `include` is all.
        chain: lineage to go on with. Chains don't disturb each other.
        guest_first: a scratch error ends the backup instead of pausing the guest (mode C).
        nbd_address: URI of the NBD server that this QEMU runs already.
        scratch: folder for scratch images; None for the system's temporary one.
        trim_scratch: give the scratch back what is read, and what needs no reading.
        force: also back up disks whose iothread makes a disconnect dangerous.
        compression_level: of zstd, 1 to 19.
        rate: most bytes to read in a second; None for no limit.
        max_guest_delay_s: with `guest_first`, longest wait of a guest's write for the scratch.
        tls: folder of certificates, or file of shared keys, for NBD over TCP.
        bitmaps: of NBD exports, ``[NAME=]CONTEXT``: what changed since the chain's last backup (for a
            differential: last full), by whoever made them.
        since: id, or its beginning, of the backup that `bitmaps` count from; any other is refused.
        quiesce: the guest's agent freezes its file systems at the point in time.
        agent: the agent's socket; None asks QEMU for it.
        audit: of each incremental disk, how many frames that the bitmap calls clean are looked at.
        tags: words to find it by, for `forget --keep-tag`.
        keys: what opens an encrypted repository; None looks in the environment.
        base: a backup, of any VM, whose frames are not stored again.
        digest_cache: folder of what is known of all backups' frames; None for none.
        machine: keep what the monitor tells of the VM's devices; `definitions` and `tpm_state` do so, too.
        definitions: files to keep with it.
        tpm_state: folder of the TPM's state to keep with it.
        resume_within_s: how old the point in time of a run that died may be to be gone on with; 0 for never.
    """

    source: tuple[str, ...]
    repository: str
    level: Level | None = None
    vm: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    chain: str = "default"
    guest_first: bool = False
    nbd_address: str | None = None
    scratch: str | None = None
    trim_scratch: bool = False
    force: bool = False
    compression_level: int = 1
    rate: int | None = None
    max_guest_delay_s: int = GUEST_DELAY_S
    audit: int = AUDIT
    bitmaps: tuple[str, ...] = ()
    tls: str | None = None
    since: str | None = None
    quiesce: bool = False
    agent: str | None = None
    tags: tuple[str, ...] = ()
    keys: KeySource | None = None
    base: str | None = None
    digest_cache: str | None = None
    machine: bool = False
    definitions: tuple[str, ...] = ()
    tpm_state: str | None = None
    resume_within_s: float = RESUME_WITHIN_S

    @property
    def keeps_machine(self) -> bool:
        """Whether what the monitor tells of the VM is kept."""
        return self.machine or bool(self.definitions) or self.tpm_state is not None
