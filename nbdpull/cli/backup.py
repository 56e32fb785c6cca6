"""nbdpull backup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import SIZE, repository_option, source_argument, tls_option, verb
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.progress import show_progress
from nbdpull.cli.run import EXIT_WARNINGS
from nbdpull.cli.tables import disk_table, table
from nbdpull.errors import UsageError
from nbdpull.model.results import BackupResult
from nbdpull.units import format_duration, parse_duration

__all__ = ["LEVELS", "Level", "chain_option", "command", "full_level"]

_ALIASES = {"inc": "incremental", "diff": "differential"}
Level = Literal["auto", "full", "incremental", "differential", "copy"]

LEVELS = ("auto", "full", "incremental", "inc", "differential", "diff", "copy")
_F = TypeVar("_F", bound=Callable[..., Any])


def full_level(level: str) -> str:
    """A level by its full name."""
    return _ALIASES.get(level, level)


def chain_option(function: _F) -> _F:
    """``--chain``."""
    return click.option(
        "--chain",
        default="default",
        show_default=True,
        metavar="NAME",
        help="The chain to go on with. Chains of one VM don't disturb each other.",
    )(function)


@click.command("backup", short_help="Back up a VM.")
@source_argument
@repository_option()
@click.option(
    "-l",
    "--level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="auto",
    metavar="LEVEL",
    help="What to read: everything (full), what changed since the chain's last backup (incremental,"
    " inc) or since its last full (differential, diff), everything outside the chain (copy), or"
    " incremental where possible, else full (auto, the default).",
)
@click.option("-i", "--include", multiple=True, metavar="DISK", help="Only this disk; repeatable.")
@click.option("-x", "--exclude", multiple=True, metavar="DISK", help="Not this disk; repeatable.")
@chain_option
@click.option(
    "--vm",
    metavar="NAME",
    help="What to call the VM; by default its name in QEMU or its UUID, or what images were backed up"
    " as before.",
)
@click.option(
    "--guest-first",
    is_flag=True,
    help="If the scratch space fails, end the backup instead of pausing the guest.",
)
@click.option("--nbd-address", metavar="URI", help="The NBD server that runs in this QEMU already.")
@click.option(
    "--scratch",
    metavar="FOLDER",
    help="Where the guest's overwritten data is kept while it is read.",
)
@click.option(
    "--trim-scratch",
    is_flag=True,
    help="Let go of each block once it is stored: less room is needed there, and the guest waits less.",
)
@click.option(
    "--force", is_flag=True, help="Also disks in an iothread, which QEMU below 9.0 can't detach."
)
@click.option(
    "--compression-level",
    type=click.IntRange(1, 19),
    default=1,
    show_default=True,
    help="Of zstd.",
)
@click.option(
    "--rate",
    type=SIZE,
    metavar="SIZE",
    help="Read at most so much a second, all disks together, for example 100M.",
)
@click.option(
    "--max-guest-delay",
    type=click.IntRange(1, 3600),
    metavar="SECONDS",
    help="With --guest-first: give the backup up when a write of the guest has waited so long for the"
    " scratch space (default 45).",
)
@tls_option
@click.option(
    "--bitmap",
    multiple=True,
    metavar="CONTEXT",
    help="Of an NBD export: qemu:dirty-bitmap:NAME with what changed since the chain's last backup (for"
    " -l differential: last full). DISK=CONTEXT where disks have different ones; repeatable.",
)
@click.option(
    "--since",
    metavar="BACKUP",
    help="The backup that --bitmap counts from; refuse if the chain's last one is another.",
)
@click.option(
    "--audit",
    type=click.IntRange(0),
    metavar="N",
    help="Read N frames again that the bitmap calls clean, and compare them (default 4).",
)
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="TAG",
    help="A word to find it by, for 'forget --keep-tag'; repeatable.",
)
@click.option(
    "--quiesce",
    is_flag=True,
    help="Let the guest's agent (qemu-ga) freeze the guest's file systems at the point in time.",
)
@click.option(
    "--agent",
    metavar="SOCKET",
    help="The agent's unix socket, for --quiesce; by default QEMU is asked.",
)
@click.option(
    "--base",
    metavar="BACKUP",
    help="A backup, of any VM, whose data is not stored again: that of a golden image.",
)
@click.option(
    "--digest-cache",
    envvar="NBDPULL_CACHE",
    show_envvar=True,
    metavar="FOLDER",
    help="Remember here where data of all VMs is, and store none of it again.",
)
@click.option(
    "--machine", is_flag=True, help="Also keep what the monitor tells of the VM's devices."
)
@click.option(
    "--definition",
    "definitions",
    multiple=True,
    metavar="FILE",
    help="Also keep this file, a libvirt XML or a script that starts the VM; repeatable. Implies --machine.",
)
@click.option(
    "--tpm-state",
    metavar="FOLDER",
    help="Also keep the TPM's state, as swtpm has it in this folder. Implies --machine.",
)
@click.option(
    "--resume-within",
    metavar="DURATION",
    default="12h",
    show_default=True,
    help="Go on at the point in time of a backup whose client died, where QEMU holds it and it is not older;"
    " 0s takes a new one always.",
)
@click.option("--profile", is_flag=True, help="Tell where the time went, after the result.")
@verb
def command(  # noqa: PLR0913, PLR0917 - an option is a parameter
    console: Console,
    source: tuple[str, ...],
    repository: str,
    level: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    chain: str,
    vm: str | None,
    guest_first: bool,
    nbd_address: str | None,
    scratch: str | None,
    trim_scratch: bool,
    force: bool,
    compression_level: int,
    rate: int | None,
    max_guest_delay: int | None,
    tls: str | None,
    bitmap: tuple[str, ...],
    since: str | None,
    audit: int | None,
    quiesce: bool,
    agent: str | None,
    tags: tuple[str, ...],
    base: str | None,
    digest_cache: str | None,
    machine: bool,
    definitions: tuple[str, ...],
    tpm_state: str | None,
    resume_within: str,
    profile: bool,
) -> int:
    """Back up the writable disks of a VM, all at one point in time.

    SOURCE of a running VM is its QMP monitor: qmp:/path/to/socket or qmp+tcp://host:port, or
    on another host qmp+ssh://[user@]host[:port]/path/to/socket. The monitor
    serves one client at a time, so give QEMU one for nbdpull alone:

      -qmp unix:/path/to/socket,server=on,wait=off

    SOURCE of a VM that is shut down is all its images: disk:NAME=/path/to/image, NAME as the disk is
    called while the VM runs. Without NAME= an image is known by the checkpoint that is in it.

    SOURCE can also be NBD exports that somebody else made: nbd://host/export.
    """
    try:
        resume_within_s = parse_duration(resume_within)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    with show_progress(console) as progress:
        result = api.backup(
            source,
            repository,
            level=cast("Level", full_level(level)),
            vm=vm,
            include=include,
            exclude=exclude,
            chain=chain,
            guest_first=guest_first,
            nbd_address=nbd_address,
            scratch=scratch,
            trim_scratch=trim_scratch,
            force=force,
            compression_level=compression_level,
            rate=rate,
            max_guest_delay_s=max_guest_delay,
            tls=tls,
            bitmaps=bitmap,
            since=since,
            audit=audit,
            quiesce=quiesce,
            agent=agent,
            tags=tags,
            keys=keys_of_user(),
            base=base,
            digest_cache=digest_cache or None,
            machine=machine,
            definitions=definitions,
            tpm_state=tpm_state,
            resume_within_s=resume_within_s,
            progress=progress,
        )
    for warning in result.warnings:
        console.warning(warning)
    console.result(result, lambda: _summary(result) + (f"\n{_profile(result)}" if profile else ""))
    return EXIT_WARNINGS if result.warnings else 0


def _profile(result: BackupResult) -> str:
    times = result.profile
    stages = [
        ("waiting for the disks", times.source_s),
        ("hashing", times.hash_s),
        ("compressing", times.compress_s),
        ("encrypting", times.encrypt_s),
        ("writing to the repository", times.store_s),
        ("waiting for what changed", times.idle_s),
    ]
    whole = sum(seconds for _, seconds in stages) or 1.0
    rows = [
        (f"{name}:", format_duration(seconds), f"{100 * seconds / whole:.0f} %")
        for name, seconds in stages
    ]
    return table((f"{times.workers} workers", ">time", ">share"), rows)


def _summary(result: BackupResult) -> str:
    count = len(result.disks)
    return (
        f"backup {result.backup} of {one_line(result.vm)}: {result.level}, {count}"
        f" {'disk' if count == 1 else 'disks'}, {format_duration(result.duration_s)}\n"
        + disk_table(result.disks)
    )
