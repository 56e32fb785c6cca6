"""The verbs as coroutines. `nbdpull.api` has the same ones as blocking functions.

Cancelling the task of a running verb makes it clean up, in QEMU too, and only then end. Everything here
may be called from any event loop; blocking work runs in threads of its own, never in the loop's
executor.
"""
# A verb's modules are imported when it is first called: numpy, libnbd and qemu.qmp take longer to load
# than most verbs take to run.
# ruff: noqa: PLC0415, PLR0913

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from nbdpull.aio_keys import key_add, key_export, key_import, key_list, key_remove, key_rotate
from nbdpull.errors import UsageError

if TYPE_CHECKING:
    from nbdpull.model.config import Lock
    from nbdpull.model.keysource import KeySource
    from nbdpull.model.outcomes import (
        CleanupResult,
        CopyResult,
        DoctorResult,
        EstimateResult,
        ForgetResult,
        GcResult,
        InitResult,
        ProtectResult,
        RepackResult,
        RestoreResult,
        ShowResult,
        UndoResult,
        VerifyLevel,
        VerifyResult,
    )
    from nbdpull.model.results import BackupInfo, BackupResult, Level, ProgressCallback
    from nbdpull.model.retention import Policy

__all__ = [
    "backup",
    "cleanup",
    "copy",
    "doctor",
    "estimate",
    "forget",
    "gc",
    "init",
    "key_add",
    "key_export",
    "key_import",
    "key_list",
    "key_remove",
    "key_rotate",
    "list_backups",
    "protect",
    "repack",
    "restore",
    "show",
    "undo",
    "unprotect",
    "verify",
]

_COMPRESSION_LEVELS = range(1, 20)
_GUEST_DELAYS_S = range(1, 3601)


def _lock(lock_s: float | None, mode: str) -> Lock | None:
    from nbdpull.model.config import LOCK_MAX_S, LOCK_MODES, Lock

    if lock_s is None:
        return None
    if not 1 <= lock_s <= LOCK_MAX_S:
        raise UsageError(f"a lock of {lock_s:.0f} seconds can't be; expected 1 second to 10 years")
    if mode not in LOCK_MODES:
        raise UsageError(f"lock mode is '{mode}'; expected governance or compliance")
    return Lock(mode=mode, duration_s=int(lock_s))


async def init(
    repository: str | os.PathLike[str],
    *,
    encrypt: bool = False,
    kdf: Literal["argon2id", "scrypt"] = "argon2id",
    keys: KeySource | None = None,
    lock_s: float | None = None,
    lock_mode: Literal["governance", "compliance"] = "governance",
) -> InitResult:
    """Create an empty repository.

    Args:
        repository: a folder that is not there yet or is empty, or an empty ``s3://bucket/prefix``,
            ``gs://bucket/prefix`` or ``az://container/prefix``.
        encrypt: everything in it. Who loses the password and every other key loses the backups.
        kdf: what the password goes through.
        keys: the password; None looks in the environment.
        lock_s: seconds for which S3's object lock keeps what backups consist of, each object from
            when it is written; None is no lock. The bucket must have it.
        lock_mode: whether those with a special permission can end a lock, or nobody.

    Returns:
        The new repository; its `warnings` say what the store can't be trusted with.

    Raises:
        UsageError: there is one already, or the place holds something else.
        WrongKeyError: it is to be encrypted, and there is no password.
        StoreError: the storage refused, or can't hold a repository.
    """
    from nbdpull.aio_keys import kdf_name
    from nbdpull.ops import init as op

    lock = _lock(lock_s, lock_mode)
    return await op.init(
        op.InitOptions(
            repository=os.fspath(repository),
            encrypt=encrypt,
            kdf=kdf_name(kdf),
            keys=keys,
            lock=lock,
        )
    )


async def backup(
    source: str | Sequence[str],
    repository: str | os.PathLike[str],
    *,
    level: Level | Literal["auto", "full", "incremental", "differential", "copy"] = "auto",
    vm: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    chain: str = "default",
    guest_first: bool = False,
    nbd_address: str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    trim_scratch: bool = False,
    force: bool = False,
    compression_level: int = 1,
    rate: int | None = None,
    max_guest_delay_s: int | None = None,
    audit: int | None = None,
    bitmaps: Sequence[str] = (),
    tls: str | os.PathLike[str] | None = None,
    since: str | None = None,
    quiesce: bool = False,
    agent: str | os.PathLike[str] | None = None,
    tags: Sequence[str] = (),
    keys: KeySource | None = None,
    base: str | None = None,
    digest_cache: str | os.PathLike[str] | None = None,
    machine: bool = False,
    definitions: Sequence[str | os.PathLike[str]] = (),
    tpm_state: str | os.PathLike[str] | None = None,
    resume_within_s: float | None = None,
    progress: ProgressCallback | None = None,
) -> BackupResult:
    """Back up a running VM's disks at one point in time.

    Args:
        source: ``qmp:/path/to/socket`` or ``qmp+tcp://host:port`` of a running VM, or
            ``disk:[NAME=]/path/to/image`` of one that is shut down, or ``[NAME=]nbd://host/export``:
            several of these are one VM.
        repository: where it goes.
        level: what to read; ``auto`` is incremental where the chain allows it, else full.
        vm: what to call the VM; None asks QEMU for its name, else its UUID, and images for the VM that
            they were backed up as.
        include: names of the disks to back up; none means all writable ones.
        exclude: names of disks to leave out.
        chain: lineage to go on with; chains of one VM don't disturb each other.
        guest_first: when the scratch space fails, end the backup instead of pausing the guest.
        nbd_address: URI of the NBD server that runs in this QEMU already; None starts one.
        scratch: folder for scratch images; None is the system's temporary folder.
        trim_scratch: let go of each block once it is stored (with little room: read), or known not to be wanted: the
            scratch needs room only for what the guest overwrites ahead of that, and its other writes cost no copy.
        force: also back up disks that an aborted run could freeze.
        compression_level: of zstd, 1 (fast) to 19.
        rate: most bytes to read from QEMU in a second, all disks together; None for no limit.
        max_guest_delay_s: with `guest_first`, seconds that a guest's write may wait for the scratch space
            (default 45); then the backup is given up and the guest goes on. 1 to 3600.
        bitmaps: of NBD exports, ``[NAME=]qemu:dirty-bitmap:BITMAP``: it is believed to hold what changed
            since the chain's last backup, for a differential since its last full.
        tls: folder of X.509 certificates, or file of shared keys: QEMU serves over TCP with TLS instead of on
            a unix socket, and ``nbds://`` addresses are reached with it.
        since: id, or its beginning, of the backup that `bitmaps` count from; refused when it is another.
        quiesce: let the guest's agent (qemu-ga) freeze the guest's file systems at the point in time, for
            milliseconds. Without it a backup is what a power cut would leave.
        agent: the unix socket of the agent's port, for `quiesce`; None asks QEMU for it.
        audit: of each disk that is not read in full, how many frames that the bitmap calls clean, and how many
            zeroes, are read again and compared with the repository (default 4; 0 is none). One that differs
            makes the disk a full and is a warning. Not possible with `guest_first`.
        tags: words to find it by: a retention policy can keep what carries one.
        keys: what opens an encrypted repository; None looks in the environment.
        base: a backup, of this or another VM, whose data is not stored again: that of a golden image.
        digest_cache: folder that remembers where data of all VMs is, so that none of it is stored
            again; it may be lost or old. None is none.
        machine: also keep what the monitor tells of the VM's devices, for whoever starts it elsewhere.
        definitions: files to keep with the backup: a libvirt XML, a script. They imply `machine`.
        tpm_state: folder of the TPM's state (swtpm's) to keep with the backup; implies `machine`.
        resume_within_s: a backup of the chain whose client died is gone on with, at its point in time, where QEMU
            still holds it and it is less than so many seconds old (default 12 hours; 0 is never).
        progress: is told what happens, from other threads.

    Returns:
        The backup, committed and durable. Its `warnings` did not harm it.

    Raises:
        UsageError: the arguments can't be; nothing was touched.
        InUseError: the monitor or the chain is in use.
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        SourceError, RepositoryError: the backup failed; the next one misses nothing because of it.
    """
    if compression_level not in _COMPRESSION_LEVELS:
        raise UsageError(f"compression level is {compression_level}; expected 1 to 19")
    if rate is not None and rate < 1:
        raise UsageError(f"rate is {rate} bytes a second; expected 1 or more")
    if max_guest_delay_s is not None and not guest_first:
        raise UsageError(
            "a longest delay of the guest can be kept only with guest-first: else QEMU makes a write wait"
            " as long as it takes"
        )
    if max_guest_delay_s is not None and max_guest_delay_s not in _GUEST_DELAYS_S:
        raise UsageError(f"the guest's longest delay is {max_guest_delay_s} s; expected 1 to 3600")
    if agent is not None and not quiesce:
        raise UsageError(
            "an agent's socket is given, and not to quiesce the guest: nothing asks it"
        )
    if audit is not None and audit < 0:
        raise UsageError(f"audit is {audit}; expected how many frames to look at, 0 or more")
    if resume_within_s is not None and not 0 <= resume_within_s < float("inf"):
        raise UsageError(f"resume-within is {resume_within_s} s; expected 0 or more")
    wanted = _level(level)
    include = _names("include", include)
    exclude = _names("exclude", exclude)
    tags = _names("tags", tags)
    if not chain:
        raise UsageError("the chain has an empty name; leave it out, or give one")
    if vm is not None and not vm:
        raise UsageError("the VM has an empty name; leave it out, or give one")
    from nbdpull.ops import backup as op

    options = op.BackupOptions(
        source=_sources(source),
        repository=os.fspath(repository),
        level=wanted,
        vm=vm,
        include=include,
        exclude=exclude,
        chain=chain,
        guest_first=guest_first,
        nbd_address=nbd_address,
        scratch=None if scratch is None else os.fspath(scratch),
        trim_scratch=trim_scratch,
        force=force,
        compression_level=compression_level,
        rate=rate,
        max_guest_delay_s=max_guest_delay_s or op.GUEST_DELAY_S,
        audit=op.AUDIT if audit is None else audit,
        bitmaps=_names("bitmaps", bitmaps),
        tls=None if tls is None else os.fspath(tls),
        since=since,
        quiesce=quiesce,
        agent=None if agent is None else os.fspath(agent),
        tags=tags,
        keys=keys,
        base=base,
        digest_cache=None if digest_cache is None else os.fspath(digest_cache),
        machine=machine,
        definitions=_names(
            "definitions",
            definitions
            if isinstance(definitions, str)
            else [os.fspath(one) for one in definitions],
        ),
        tpm_state=None if tpm_state is None else os.fspath(tpm_state),
        resume_within_s=op.RESUME_WITHIN_S if resume_within_s is None else resume_within_s,
    )
    return await op.backup(options, progress=progress)


async def restore(
    repository: str | os.PathLike[str],
    backup: str,
    to: str | os.PathLike[str],
    *,
    vm: str | None = None,
    disk: str | None = None,
    format: Literal["raw", "qcow2"] = "raw",  # noqa: A002 - the option's name
    force: bool = False,
    salvage: bool = False,
    tls: str | os.PathLike[str] | None = None,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> RestoreResult:
    """Restore the disks of one backup; every byte is verified before it is written.

    Args:
        repository: where the backup is.
        backup: its id, a unique prefix of it, or ``latest``.
        to: a folder, ``-`` for standard output, an NBD URI, or a block device.
        vm: only look among the backups of this VM.
        disk: only this disk; None is all of them.
        format: of the files in a folder; everything else takes raw.
        tls: folder of X.509 certificates, or file of shared keys, for an ``nbds://`` target.
        force: replace files that exist, and write to a device in use.
        salvage: leave out what is lost, which reads as zeroes then; `RestoredDisk.lost` tells the ranges.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens, from other threads.

    Raises:
        UsageError: the target can't take it.
        WrongKeyError: the key does not open it, or is a writer's.
        BackupNotFoundError: no backup fits, or more than one.
        DamagedError: part of a disk is lost, and not `salvage`; nothing wrong was written.
        RepositoryError: the backup is incomplete.
        TargetError: the target failed.
    """
    if format not in {"raw", "qcow2"}:
        raise UsageError(f"format is '{format}'; expected raw or qcow2")
    from nbdpull.ops import restore as op

    options = op.RestoreOptions(
        repository=os.fspath(repository),
        backup=backup,
        to=os.fspath(to),
        vm=vm,
        disk=disk,
        format=format,
        force=force,
        salvage=salvage,
        tls=None if tls is None else os.fspath(tls),
        keys=keys,
    )
    return await op.restore(options, progress=progress)


async def list_backups(
    repository: str | os.PathLike[str],
    *,
    vm: str | None = None,
    chain: str | None = None,
    incomplete: bool = False,
    forgotten: bool = False,
    keys: KeySource | None = None,
) -> tuple[BackupInfo, ...]:
    """The committed backups, oldest first. A manifest that can't be read is logged as a warning.

    Args:
        repository: where they are.
        vm: only those of this VM.
        chain: only those of this chain.
        incomplete: also those that lack a disk because their run ended in the middle of its commit.
        forgotten: also those that are forgotten and can still be brought back.
        keys: what opens an encrypted repository; None looks in the environment.

    Raises:
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        StoreError: the storage can't be read.
    """
    from nbdpull.ops import list as op

    options = op.ListOptions(
        repository=os.fspath(repository),
        vm=vm,
        chain=chain,
        incomplete=incomplete,
        forgotten=forgotten,
        keys=keys,
    )
    return await op.list_backups(options)


async def show(
    repository: str | os.PathLike[str],
    backup: str,
    *,
    vm: str | None = None,
    keys: KeySource | None = None,
) -> ShowResult:
    """All about one backup: its disks, what they cost, and what it descends from.

    Args:
        repository: where it is.
        backup: its id, a unique prefix of it, or ``latest``.
        vm: only look among the backups of this VM.
        keys: what opens an encrypted repository; None looks in the environment.

    Raises:
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        BackupNotFoundError: no backup fits, or more than one.
    """
    from nbdpull.ops import show as op

    options = op.ShowOptions(repository=os.fspath(repository), backup=backup, vm=vm, keys=keys)
    return await op.show(options)


async def verify(
    repository: str | os.PathLike[str],
    backups: Sequence[str] = (),
    *,
    vm: str | None = None,
    level: VerifyLevel | Literal["list", "sample", "full"] = "full",
    share: float = 0.01,
    seed: int | None = None,
    record: bool = True,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyResult:
    """Look again at what backups refer to.

    Args:
        repository: where they are.
        backups: ids, unique prefixes or ``latest``; none means all.
        vm: only the backups of this VM.
        level: ``list`` compares the sizes of packs with what was written, ``sample`` also reads and
            hashes the maps and a share of the frames, ``full`` reads and hashes everything.
        share: of the frames, above 0 to 1, that a sample reads.
        seed: chooses the frames of a sample; None for a random one.
        record: put damage on record in the repository: the next backup then heals what it can.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens, from other threads.

    Returns:
        What was found. Damage is a result, not an error: look at `ok`.

    Raises:
        UsageError: the arguments can't be.
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        BackupNotFoundError: no backup fits one of `backups`, or more than one.
        StoreError: the storage can't be read.
    """
    from nbdpull.model.outcomes import VerifyLevel

    names = _names("backups", backups)
    try:
        wanted = VerifyLevel(level)
    except ValueError:
        raise UsageError(f"level is '{level}'; expected one of {', '.join(VerifyLevel)}") from None
    if not 0 < share <= 1:
        raise UsageError(f"share is {share}; expected more than 0 and at most 1")
    from nbdpull.ops import verify as op

    options = op.VerifyOptions(
        repository=os.fspath(repository),
        backups=names,
        vm=vm,
        level=wanted,
        share=share,
        seed=seed,
        record=record,
        keys=keys,
    )
    return await op.verify(options, progress=progress)


async def cleanup(
    source: str | Sequence[str],
    *,
    repository: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    force: bool = False,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> CleanupResult:
    """Remove from QEMU, or images, what a killed backup left there; what belongs to others stays.

    Args:
        source: as of `backup`.
        repository: when given, checkpoints of backups that are durable there stay, so that the next
            incremental can use them.
        scratch: folder that the backup was told to use.
        force: also take away what a run that is still alive uses.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens.

    Raises:
        UsageError: the arguments can't be; nothing was touched.
        InUseError: the monitor is in use.
        RepositoryNotFoundError: `repository` is given and there is none.
        SourceError: QEMU can't be reached.
    """
    from nbdpull.ops import cleanup as op

    options = op.CleanupOptions(
        source=_sources(source),
        repository=None if repository is None else os.fspath(repository),
        scratch=None if scratch is None else os.fspath(scratch),
        force=force,
        keys=keys,
    )
    return await op.cleanup(options, progress=progress)


async def forget(
    repository: str | os.PathLike[str],
    backups: Sequence[str] = (),
    *,
    policy: Policy | str | None = None,
    vm: str | None = None,
    chain: str | None = None,
    trust_store_time: bool = False,
    dry_run: bool = False,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> ForgetResult:
    """Hide backups; `gc` deletes them when the undo window is over, and until then `undo` helps.

    Args:
        repository: where they are.
        backups: ids or unique prefixes (or the keys of damaged manifests, as `verify` tells them); then
            no `policy`.
        policy: what to keep of each set of backups with the same VM, chain and disks, as a `Policy` or
            as rules: ``"keep-last=7 keep-daily=14 keep-within=2d keep-tag=gold min-keep=3"``.
        vm: only backups of this VM.
        chain: only backups of this chain.
        trust_store_time: also judge sets in which a backup was stored more than a day after it was taken,
            as is so after copying.
        dry_run: only tell.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens.

    Raises:
        UsageError: neither backups nor a policy, or both, or a policy that can't be.
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        BackupNotFoundError: no backup fits, or more than one.
        RepositoryError: a named backup is protected; nothing was forgotten.
    """
    from nbdpull.model.retention import Policy

    names = _names("backups", backups)
    if isinstance(policy, str):
        try:
            policy = Policy.parse(policy)
        except ValueError as exc:
            raise UsageError(str(exc)) from exc
    from nbdpull.ops import forget as op

    options = op.ForgetOptions(
        repository=os.fspath(repository),
        backups=names,
        policy=policy,
        vm=vm,
        chain=chain,
        trust_store_time=trust_store_time,
        dry_run=dry_run,
        keys=keys,
    )
    return await op.forget(options, progress=progress)


async def undo(
    repository: str | os.PathLike[str],
    backups: Sequence[str],
    *,
    vm: str | None = None,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> UndoResult:
    """Bring forgotten backups back.

    Args:
        repository: where they are.
        backups: ids or unique prefixes; see `list_backups` with `forgotten`.
        vm: only look among the backups of this VM.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens.

    Raises:
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        BackupNotFoundError: no backup fits, or more than one.
        RepositoryError: it is too late: the backup is being deleted.
    """
    names = _names("backups", backups)
    from nbdpull.ops import undo as op

    options = op.UndoOptions(repository=os.fspath(repository), backups=names, vm=vm, keys=keys)
    return await op.undo(options, progress=progress)


async def protect(
    repository: str | os.PathLike[str],
    backups: Sequence[str],
    *,
    vm: str | None = None,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> ProtectResult:
    """Keep backups from being forgotten, by a policy or by name, until `unprotect`.

    Args:
        repository: where they are.
        backups: ids, unique prefixes or ``latest``.
        vm: only look among the backups of this VM.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens.

    Raises:
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        BackupNotFoundError: no backup fits, or more than one, or it is forgotten.
    """
    names = _names("backups", backups)
    from nbdpull.ops import protect as op

    options = op.ProtectOptions(repository=os.fspath(repository), backups=names, vm=vm, keys=keys)
    return await op.protect(options, progress=progress)


async def unprotect(
    repository: str | os.PathLike[str],
    backups: Sequence[str],
    *,
    vm: str | None = None,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> ProtectResult:
    """Let protected backups be forgotten again.

    Args:
        repository: where they are.
        backups: ids, unique prefixes or ``latest``.
        vm: only look among the backups of this VM.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens.

    Raises:
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        BackupNotFoundError: no backup fits, or more than one.
    """
    names = _names("backups", backups)
    from nbdpull.ops import protect as op

    options = op.ProtectOptions(
        repository=os.fspath(repository), backups=names, vm=vm, protect=False, keys=keys
    )
    return await op.protect(options, progress=progress)


async def gc(
    repository: str | os.PathLike[str],
    *,
    undo_window_s: float | None = None,
    exclusive: bool = False,
    dry_run: bool = False,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> GcResult:
    """Delete what no backup needs: forgotten ones whose undo window is over, and what failed runs left.

    Any number of collections may run at once, beside backups and restores.

    Args:
        repository: where.
        undo_window_s: how long what was forgotten can be brought back; None is 7 days, 0 ends it now.
        exclusive: nothing else uses the repository; needed where the store can't tell two writers apart.
        dry_run: only tell.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens.

    Raises:
        UsageError: `exclusive` is needed.
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        DamagedError: what a manifest needs can't be told, so nothing was deleted.
        StoreError: the storage failed.
    """
    if undo_window_s is not None and not undo_window_s >= 0:
        raise UsageError(f"the undo window is {undo_window_s} s; expected 0 or more")
    from nbdpull.ops import gc as op

    options = op.GcOptions(
        repository=os.fspath(repository),
        undo_window_s=op.UNDO_WINDOW_S if undo_window_s is None else undo_window_s,
        exclusive=exclusive,
        dry_run=dry_run,
        keys=keys,
    )
    return await op.gc(options, progress=progress)


async def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    backups: Sequence[str] = (),
    *,
    rekey: bool = False,
    lock_s: float | None = None,
    lock_mode: Literal["governance", "compliance"] = "governance",
    keys: KeySource | None = None,
    target_keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> CopyResult:
    """Copy backups verbatim into a replica, or with other keys; what is there already is not copied again.

    Args:
        source: the repository.
        target: its replica, in any store; it is made where there is nothing.
        backups: ids, unique prefixes or ``latest``; none means all complete ones.
        rekey: the target is another repository, made by `init`, encrypted or not; what is copied is
            decrypted, and stored anew with its keys.
        lock_s: of a replica in S3 that is made now; see `init`.
        lock_mode: the same.
        keys: what opens an encrypted repository; None looks in the environment. A replica is opened
            with the same.
        target_keys: what opens the target of `rekey`; None looks for NBDPULL_NEW_KEY_FILE,
            NBDPULL_NEW_PASSWORD, _FILE or _COMMAND.
        progress: is told what happens, from other threads.

    Raises:
        UsageError: the target holds something else than a repository; with `rekey`, it is a replica or
            the source itself.
        RepositoryNotFoundError: there is no source, or, with `rekey`, no target.
        BackupNotFoundError: no backup fits one of `backups`, or more than one.
        RepositoryError: the target is another repository, or a backup is incomplete.
        WrongKeyError: the key does not open it.
        DamagedError: an object is not what was written; nothing wrong was copied.
        InUseError: a garbage collection runs on the target.
        StoreError: a store failed; another copy goes on where this one ended.
    """
    names = _names("backups", backups)
    from nbdpull.ops import copy as op

    options = op.CopyOptions(
        source=os.fspath(source),
        target=os.fspath(target),
        backups=names,
        rekey=rekey,
        lock=_lock(lock_s, lock_mode),
        keys=keys,
        target_keys=target_keys,
    )
    return await op.copy(options, progress=progress)


async def repack(
    repository: str | os.PathLike[str],
    *,
    vm: str | None = None,
    ratio: float = 1.4,
    dry_run: bool = False,
    keys: KeySource | None = None,
    progress: ProgressCallback | None = None,
) -> RepackResult:
    """Rewrite packs that are mostly no longer needed; later collections then delete the old ones.

    Args:
        repository: where.
        vm: only the backups of this VM.
        ratio: rewrite packs that have so many bytes for each byte needed, of disks that have so in all.
        dry_run: only tell.
        keys: what opens an encrypted repository; None looks in the environment.
        progress: is told what happens, from other threads.

    Raises:
        UsageError: a ratio of less than 1.
        RepositoryNotFoundError: there is no repository.
        WrongKeyError: the key does not open it.
        DamagedError: what is to be rewritten is damaged; no backup was changed.
        StoreError: the storage failed.
    """
    if not ratio >= 1:
        raise UsageError(f"the ratio is {ratio}; expected 1 or more")
    from nbdpull.ops import repack as op

    options = op.RepackOptions(
        repository=os.fspath(repository), vm=vm, ratio=ratio, dry_run=dry_run, keys=keys
    )
    return await op.repack(options, progress=progress)


async def estimate(
    source: str | Sequence[str],
    repository: str | os.PathLike[str],
    *,
    level: Level | Literal["auto", "full", "incremental", "differential", "copy"] = "auto",
    vm: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    chain: str = "default",
    keys: KeySource | None = None,
) -> EstimateResult:
    """Tell what a backup would read now; nothing is changed anywhere.

    Args:
        source: as for `backup`.
        repository: where its earlier backups are.
        level: as for `backup`.
        vm: as for `backup`.
        include: as for `backup`.
        exclude: as for `backup`.
        chain: as for `backup`.
        keys: as for `backup`.

    Raises:
        UsageError: the arguments can't be.
        InUseError: the monitor is in use.
        RepositoryNotFoundError: there is no repository.
        SourceError: QEMU can't be reached.
    """
    include = _names("include", include)
    exclude = _names("exclude", exclude)
    from nbdpull.ops import estimate as op

    options = op.EstimateOptions(
        source=_sources(source),
        repository=os.fspath(repository),
        level=_level(level),
        vm=vm,
        include=include,
        exclude=exclude,
        chain=chain,
        keys=keys,
    )
    return await op.estimate(options)


async def doctor(
    source: str | Sequence[str],
    repository: str | os.PathLike[str] | None = None,
    *,
    vm: str | None = None,
    chain: str = "default",
    guest_first: bool = False,
    nbd_address: str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    keys: KeySource | None = None,
) -> DoctorResult:
    """Tell what a backup would stumble over, before it does.

    Args:
        source: as for `backup`.
        repository: where it would go; None looks at the source only.
        vm: as for `backup`.
        chain: as for `backup`.
        guest_first: as for `backup`.
        nbd_address: as for `backup`.
        scratch: as for `backup`.
        keys: as for `backup`.

    Returns:
        What was found. That the source or the repository can't be reached is a finding, not an error.

    Raises:
        UsageError: the arguments can't be.
    """
    from nbdpull.ops import doctor as op

    options = op.DoctorOptions(
        source=_sources(source),
        repository=None if repository is None else os.fspath(repository),
        vm=vm,
        chain=chain,
        guest_first=guest_first,
        nbd_address=nbd_address,
        scratch=None if scratch is None else os.fspath(scratch),
        keys=keys,
    )
    return await op.doctor(options)


def _level(level: str) -> Level | None:
    from nbdpull.model.results import Level

    if level == "auto":
        return None
    try:
        return Level(level)
    except ValueError:
        expected = ", ".join(("auto", *Level))
        raise UsageError(f"level is '{level}'; expected one of {expected}") from None


def _sources(source: str | Sequence[str]) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else tuple(source)


def _names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    # A string is a sequence of strings too, and its letters are hardly meant.
    if isinstance(names, str):
        raise UsageError(f"{what} is the string '{names}'; expected a list of names")
    return tuple(names)
