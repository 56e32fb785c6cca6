"""Long campaigns against the repository and against a VM; docs/reliability.md has their figures.

The tests run small ones of each kind. Every campaign ends with 1 when something is lost, and tells the
seed that shows it again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from tests.protocol.faults import Faults, Played
from tests.protocol.kills import OPERATIONS, KillPoints
from tests.protocol.model import Config, Mutant, search
from tests.protocol.powercut import PowerCut
from tests.protocol.scenario import play
from tests.protocol.soak import S3, Soak
from tests.protocol.world import memory_repositories
from tests.support.proxy import proxy
from tests.support.stores import seaweedfs
from tests.support.tools import QEMU_10, QEMU_72
from tests.support.torture import Torture

_ORDERS = [(a, b, c) for a, b, c in itertools.permutations(range(3))]


def _search(arguments: argparse.Namespace) -> str:
    states = 0
    orders = _ORDERS if arguments.all_orders else [(1, 2, 0)]
    for order in orders:
        found = search(
            Config(
                writers=arguments.writers,
                collectors=arguments.collectors,
                rounds=arguments.rounds,
                order=(*range(arguments.writers, 2, -1), *order),
                adoption=arguments.adoption,
                pins=not arguments.no_pins,
                idle=not arguments.no_idle,
                damage=arguments.damage,
                young=arguments.young,
                tombstones=arguments.tombstones,
                mutant=Mutant[arguments.mutant] if arguments.mutant else None,
            )
        )
        states += found.states
        if found.trace:
            raise AssertionError("\n  ".join(["lost after:", *found.trace]))
    return (
        f"{arguments.writers} writers, {arguments.collectors} collectors, {len(orders)} orders of"
        f" listing: {states} states"
    )


def _schedules(arguments: argparse.Namespace) -> str:
    calls = committed = 0
    played_seeds = 0
    end = time.monotonic() + arguments.seconds
    for seed in range(arguments.seed, arguments.seed + arguments.size):
        if time.monotonic() > end:
            break
        played_seeds += 1
        try:
            played = play(seed, kills=0.2 * (seed % 2))
        except AssertionError as exc:
            raise AssertionError(f"seed {seed}: {exc}") from exc
        calls += played.calls
        committed += played.committed
    return f"{played_seeds} schedules of {calls} calls, {committed} commits"


def _kill_points(arguments: argparse.Namespace) -> str:
    told = []
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        campaign = KillPoints(Path(folder) / "kills", arguments.seed)
        total = 0
        for operation in arguments.operation or OPERATIONS:
            points = list(campaign.points(operation))[:: arguments.every]
            random.Random(arguments.seed).shuffle(points)  # noqa: S311 - to be played again
            played = 0
            for point in points:
                if time.monotonic() > end:
                    break
                campaign.play(point)
                played += 1
            total += played
            told.append(f"{operation} {played} of {len(points)}")
    return f"{total} kill points ({', '.join(told)})"


def _soak(arguments: argparse.Namespace) -> str:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
        if arguments.store == "s3":
            server = stack.enter_context(seaweedfs())
            os.environ.update(server.env)
            soak = Soak(folder, arguments.seed, location=f"s3://{server.bucket()}/soak", pace=S3)
        else:
            soak = Soak(folder, arguments.seed)
        done = soak.run(
            writers=arguments.writers,
            collectors=arguments.collectors,
            forgetters=arguments.forgetters,
            kills=arguments.size,
            seconds=arguments.seconds,
        )
    return (
        f"{arguments.store}, {arguments.writers} writers, {arguments.collectors} collectors,"
        f" {arguments.forgetters} forgetting, 1 repacking:"
        f" {done.kills} kills, {done.stops} stops, {done.commits} commits, {done.collections}"
        f" collections, {done.refused} runs that failed loudly, {done.kept} backups left and restored"
    )


def _faults(arguments: argparse.Namespace) -> str:
    done = Played()
    played = 0
    end = time.monotonic() + arguments.seconds
    with seaweedfs() as server, proxy(server.endpoint) as front:
        campaign = Faults(server, front)
        for seed in range(arguments.seed, arguments.seed + arguments.size):
            if time.monotonic() > end:
                break
            try:
                done += campaign.play(seed)
            except AssertionError as exc:
                raise AssertionError(f"seed {seed}: {exc}") from exc
            played += 1
            front.exchanges.clear()
    return (
        f"{played} schedules, verbs that returned ({_counted(done.done)}), that failed loudly"
        f" ({_counted(done.failed)}), faults ({_counted(done.faults)}), {done.restored} backups restored"
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def _power_cuts(arguments: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        campaign = PowerCut(Path(folder), arguments.seed)
        cuts = campaign.run(arguments.size, seconds=arguments.seconds)
    return f"{cuts} power cuts in a log of {campaign.length} steps, {campaign.commits} commits"


def _machine(arguments: argparse.Namespace) -> str:
    tools = QEMU_10 if arguments.qemu == "10" else QEMU_72
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        torture = Torture(Path(folder), tools, arguments.seed)
        rounds = torture.run(arguments.size, seconds=arguments.seconds)
    return f"QEMU {arguments.qemu}, {rounds} rounds: {_counted(torture.done)}"


_CAMPAIGNS: Mapping[str, Callable[[argparse.Namespace], str]] = {
    "search": _search,
    "schedules": _schedules,
    "kill-points": _kill_points,
    "soak": _soak,
    "faults": _faults,
    "power-cuts": _power_cuts,
    "machine": _machine,
}


_MEMORY = Path("/dev/shm")  # noqa: S108
_IN_MEMORY = {"kill-points", "soak", "power-cuts"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    verbs = parser.add_subparsers(dest="campaign", required=True)
    for name, text, size in (
        ("search", "all interleavings of the model of the protocol", None),
        ("schedules", "the real code in random interleavings, on a store in memory", 1000),
        ("kill-points", "a process dies at each call of the store", None),
        ("soak", "processes that are killed at random; the size is in kills", 200),
        ("faults", "histories through a proxy that fails, on SeaweedFS", 100),
        ("power-cuts", "what a power cut can leave of a local repository", 500),
        ("machine", "a real Linux guest and all that can happen to it; the size is in rounds", 200),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--seed", type=int, default=1)
        verb.add_argument(
            "--seconds", type=float, default=float("inf"), help="end after so long; not for search"
        )
        verb.add_argument(
            "--folder",
            # Syncs cost nothing there; what they are for is tried by power-cuts.
            default=str(_MEMORY) if name in _IN_MEMORY and _MEMORY.is_dir() else None,
            help="where temporary repositories are made",
        )
        if size is not None:
            verb.add_argument("--size", type=int, default=size)
        if name in {"search", "soak"}:
            verb.add_argument("--writers", type=int, default=2 if name == "search" else 6)
            verb.add_argument("--collectors", type=int, default=2)
        if name == "soak":
            verb.add_argument("--forgetters", type=int, default=1)
            verb.add_argument(
                "--store", choices=["local", "s3"], default="local", help="s3 is a SeaweedFS"
            )
        if name == "search":
            verb.add_argument("--rounds", type=int, default=1, help="of each collector")
            verb.add_argument(
                "--all-orders", action="store_true", help="of listings, not one of six"
            )
            verb.add_argument(
                "--adoption", action="store_true", help="writers take over dead sessions"
            )
            verb.add_argument("--no-pins", action="store_true", help="no writer builds on another")
            verb.add_argument("--no-idle", action="store_true", help="no session is taken for idle")
            verb.add_argument("--damage", action="store_true", help="an intent may be damaged")
            verb.add_argument(
                "--young", action="store_true", help="collectors have undo windows of their own"
            )
            verb.add_argument("--tombstones", type=int, default=3, help="most that are made")
            verb.add_argument("--mutant", choices=[mutant.name for mutant in Mutant])
        if name == "machine":
            verb.add_argument("--qemu", choices=["7.2", "10"], default="7.2")
        if name == "kill-points":
            verb.add_argument("--operation", action="append", choices=list(OPERATIONS))
            verb.add_argument("--every", type=int, default=1, help="only each so many-th point")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one campaign and tell its figures; 1 when something is lost."""
    arguments = _parser().parse_args(argv)
    began = time.monotonic()
    try:
        # The others open repositories of their own making by the usual names.
        with nullcontext() if arguments.campaign == "machine" else memory_repositories():
            told = _CAMPAIGNS[arguments.campaign](arguments)
    except AssertionError as exc:
        notes = "; ".join(getattr(exc, "__notes__", ()))
        print(f"{arguments.campaign}, seed {arguments.seed}: LOST: {exc} {notes}")
        return 1
    print(f"{arguments.campaign}, seed {arguments.seed}: {told}; nothing lost;", end="")
    print(f" {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
