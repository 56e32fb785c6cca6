#!/usr/bin/env python3
"""Damage the objects of a tiny encrypted repository in every way, and see that each damage is found.

    PYTHONPATH=. .venv/bin/python scripts/tamper.py [--seed N] [--cases N] [--exhaustive]

Each case flips, overwrites, cuts, extends, swaps or splices objects that a restore reads, then reads all of
every backup with the right keys. It must be told of, and no wrong byte be handed out: else the case is printed
with its seed, and the exit code is 1. --exhaustive then also flips one bit of every byte, cuts every object
at every length, and puts every object in the place of every other one.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.repo.tampering import DAMAGES, Damage, Objects, Tiny, read_all, readable


def exhaustive(objects: Objects) -> Iterator[Damage]:
    """Every byte, every length, every pair."""
    for key in readable(objects):
        raw = objects[key]
        for at in range(len(raw)):
            changed = raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :]
            yield f"flip {key}:{at}", {**objects, key: changed}
            yield f"truncate {key} to {at}", {**objects, key: raw[:at]}
        yield f"delete {key}", {name: raw for name, raw in objects.items() if name != key}
    for one, other in itertools.permutations(readable(objects), 2):
        yield f"replace {one} by {other}", {**objects, one: objects[other]}


def chosen(objects: Objects, seed: int, cases: int) -> Iterator[Damage]:
    """Random ones, of each kind as many."""
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")  # noqa: S311 - a seed makes it again
        what, damaged = DAMAGES[number % len(DAMAGES)](objects, rng)
        if damaged != objects:
            yield what, damaged


def main() -> int:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--exhaustive", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    kinds: Counter[str] = Counter()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tiny = Tiny.make(Path(folder) / "repo")
    if read_all(tiny, tiny.objects):
        raise SystemExit("the repository is not sound to begin with")
    every = chosen(tiny.objects, options.seed, options.cases)
    if options.exhaustive:
        every = itertools.chain(every, exhaustive(tiny.objects))
    for what, objects in every:
        kinds[what.partition(" ")[0]] += 1
        try:
            found = bool(read_all(tiny, objects))
        except Exception as exc:  # noqa: BLE001 - a crash or a wrong byte, and what made it
            print(f"seed {options.seed}: {what}: {type(exc).__name__}: {exc}")
            missed += 1
            continue
        if not found:
            print(f"seed {options.seed}: {what}: not found")
            missed += 1
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{kinds.total()} damages ({told}): {missed} missed, {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
