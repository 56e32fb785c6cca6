"""nbdpull verify."""

from __future__ import annotations

from typing import Literal

import click

from nbdpull import api
from nbdpull.cli.console import Console, one_line
from nbdpull.cli.options import repository_option, verb, vm_option
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.progress import show_progress
from nbdpull.cli.run import EXIT_FAILURE
from nbdpull.model.outcomes import Damage, VerifyLevel, VerifyResult
from nbdpull.units import format_duration, format_size

__all__ = ["command"]


@click.command("verify", short_help="Read and hash again everything backups refer to.")
@click.argument("backups", metavar="[BACKUP]...", nargs=-1)
@repository_option()
@vm_option
@click.option(
    "-l",
    "--level",
    type=click.Choice(["list", "sample", "full"]),
    default="full",
    show_default=True,
    help="list: only compare the sizes of packs. sample: also read all maps and a share of the frames."
    " full: read everything.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help="With --level sample: how much of it.  [default: 1]",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    help="With --level sample: read the same frames as the run that told this seed.",
)
@click.option(
    "--no-record",
    "record",
    flag_value=False,
    default=True,
    help="Don't put damage on record in the repository. What is on record the next backup heals.",
)
@verb
def command(
    console: Console,
    backups: tuple[str, ...],
    repository: str,
    vm: str | None,
    level: Literal["list", "sample", "full"],
    share: float | None,
    seed: int | None,
    record: bool,
) -> int:
    """Verify the named backups, or all: read what they refer to and compare its hashes.

    Ends with 1 when anything is damaged, and tells what is lost.
    """
    if level != "sample" and (share is not None or seed is not None):
        raise click.UsageError(
            "--share and --seed are for --level sample", click.get_current_context()
        )
    with show_progress(console) as progress:
        result = api.verify(
            repository,
            backups,
            vm=vm,
            level=level,
            share=(1 if share is None else share) / 100,
            seed=seed,
            record=record,
            keys=keys_of_user(),
            progress=progress,
        )
    console.result(result, lambda: _text(result), needed=not result.ok)
    return 0 if result.ok else EXIT_FAILURE


def _text(result: VerifyResult) -> str:
    lines = [_damage(damage) for damage in result.damaged]
    found = len(result.damaged)
    damaged = (
        f"{found} {'thing is' if found == 1 else 'things are'} damaged" if found else "no damage"
    )
    lines.append(f"verified {_read(result)}: {damaged}")
    if result.healed:
        lines.append(
            f"{result.healed} damaged frames were read from their copies: nothing is lost with them"
        )
    if result.recorded:
        lines.append(
            f"{result.recorded} damaged frames were put on record: the next backup heals those that it builds on,"
            " a full all that its disks still hold"
        )
    return "\n".join(lines)


def _read(result: VerifyResult) -> str:
    count = len(result.backups)
    read = f"{count} {'backup' if count == 1 else 'backups'}, "
    if result.level is VerifyLevel.LIST:
        read += "the sizes of their packs"
    else:
        read += f"{result.frames} frames, {format_size(result.read_bytes)}"
    if result.share is not None:
        read += f" (a sample of {result.share:.3%} of the data, seed {result.seed})"
    return f"{read} in {format_duration(result.duration_s)}"


def _damage(damage: Damage) -> str:
    line = f"damaged: {damage.key}: {damage.problem}"
    if damage.backup is not None:
        line += f"; backup {damage.backup}"
    if damage.disk is not None:
        line += f", disk {damage.disk}"
    if damage.ranges:
        lost = sum(end - start for start, end in damage.ranges)
        where = ", ".join(f"{start}-{end}" for start, end in damage.ranges)
        line += f": {format_size(lost)} lost, bytes {where}"
    return one_line(line)
