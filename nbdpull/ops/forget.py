"""forget: hide backups that a policy does not keep, or that are named; a collector deletes them later."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nbdpull.errors import RepositoryError, UsageError
from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import ForgetResult, Forgotten
from nbdpull.model.results import Level, ProgressCallback
from nbdpull.model.retention import Candidate, Policy, judge
from nbdpull.ops.threads import call
from nbdpull.repo.finding import check_there
from nbdpull.repo.repository import Backup, Repository

__all__ = ["ForgetOptions", "forget"]

_KEY = re.compile(r"m/([0-9a-f]{32}/[0-9a-f]{32})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetOptions:
    """What to forget.

    Attributes:
        backups: ids or unique prefixes, or keys ``m/<disk>/<sid>`` of damaged manifests; then no policy.
        policy: what to keep of each set of backups; then no `backups`.
        vm, chain: only backups of this VM, of this chain; None for any.
        trust_store_time: also judge sets in which backups were stored long after they were taken.
        dry_run: only tell.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    backups: tuple[str, ...] = ()
    policy: Policy | None = None
    vm: str | None = None
    chain: str | None = None
    trust_store_time: bool = False
    dry_run: bool = False
    keys: KeySource | None = None


async def forget(
    options: ForgetOptions,
    *,
    progress: ProgressCallback | None = None,  # noqa: ARG001 - every verb takes one
) -> ForgetResult:
    """Forget backups; `undo` brings them back until a collector ends the undo window.

    Raises:
        UsageError: neither backups nor a policy, or both.
        BackupNotFoundError: no such backup.
        RepositoryError: a named backup is protected; nothing was forgotten.
    """
    if (options.policy is None) == (not options.backups):
        raise UsageError(
            "name either the backups to forget, or what to keep of all (such as keep-daily=14)"
        )
    return await call(_forget, options)


def _forget(options: ForgetOptions) -> ForgetResult:
    repository = Repository.open(options.repository, write=not options.dry_run, keys=options.keys)
    if options.policy is None:
        return _forget_named(repository, options)
    return _forget_by_policy(repository, options, options.policy)


def _forget_named(repository: Repository, options: ForgetOptions) -> ForgetResult:
    damaged = {one.key for one in repository.unreadable()}
    keys: list[str] = []
    chosen: dict[str, Backup] = {}
    for name in options.backups:
        match = _KEY.fullmatch(name)
        if match is None:
            found = repository.find(name, vm=options.vm)
            chosen[found.id] = found
        elif name in damaged:
            keys.append(match[1])
        else:
            raise UsageError(
                f"{name} is not the key of a damaged manifest; give the id of its backup instead"
            )
    for backup in chosen.values():
        if backup.protected:
            raise RepositoryError(
                f"backup {backup.id} is protected; 'nbdpull unprotect {backup.id}' lets it be forgotten"
            )
    if not options.dry_run:
        repository.forget(keys, "asked for")
        for backup in chosen.values():
            _forget_one(repository, backup, "asked for")
    return ForgetResult(
        dropped=tuple(
            _told(backup, ("asked for",), repository.stored(backup)) for backup in chosen.values()
        ),
        damaged=tuple(f"m/{key}" for key in keys),
        dry_run=options.dry_run,
    )


def _forget_by_policy(
    repository: Repository, options: ForgetOptions, policy: Policy
) -> ForgetResult:
    everything, unreadable = repository.everything()
    check_there(everything, unreadable, vm=options.vm, chain=options.chain)
    there = [one for one in everything if one.forgotten is None]
    backups = {
        backup.id: backup
        for backup in there
        if options.vm in {None, backup.vm} and options.chain in {None, backup.chain}
    }
    verdicts = judge(
        policy,
        [_candidate(one, repository.stored(one)) for one in backups.values()],
        trust_store_time=options.trust_store_time,
    )
    kept: list[Forgotten] = []
    dropped: list[Forgotten] = []
    for verdict in verdicts:
        backup = next(found for name, found in backups.items() if name == verdict.backup)
        told = _told(backup, verdict.reasons, repository.stored(backup))
        if verdict.keep:
            kept.append(told)
            continue
        dropped.append(told)
        if not options.dry_run:
            _forget_one(repository, backup, "policy")
    warnings = _warnings(kept)
    return ForgetResult(
        kept=tuple(kept), dropped=tuple(dropped), dry_run=options.dry_run, warnings=warnings
    )


def _forget_one(repository: Repository, backup: Backup, reason: str) -> None:
    """Mark a backup's manifests, those that are not shown too: else they would be shown instead."""
    rest = [entry.pin for entry in backup.superseded]
    repository.forget([*rest, *backup.pins], reason)


def _candidate(backup: Backup, stored: float) -> Candidate:
    disks = sorted({disk for summary in backup.disks for disk, _ in summary.siblings})
    return Candidate(
        backup=backup.id,
        group=(backup.vm, backup.chain, *disks),
        stored=stored,
        taken=backup.time + backup.duration_s,
        level=backup.level,
        full=any(summary.disk_level is Level.FULL for summary in backup.disks),
        tags=frozenset(backup.tags),
        protected=backup.protected,
        complete=backup.complete,
    )


def _told(backup: Backup, reasons: tuple[str, ...], stored: float) -> Forgotten:
    return Forgotten(
        backup=backup.id,
        vm=backup.vm,
        chain=backup.chain,
        level=backup.level,
        time=backup.time,
        stored_time=stored,
        reasons=reasons,
    )


def _warnings(kept: Sequence[Forgotten]) -> tuple[str, ...]:
    held = sorted(
        {one.vm for one in kept if any("stored long after" in why for why in one.reasons)}
    )
    return tuple(
        f"all backups of VM '{vm}' in a set were kept: one was stored more than a day after it was taken,"
        " so they were probably copied here, or a clock was wrong; --trust-store-time judges them"
        for vm in held
    )
