"""Give changed bytes to every decoder of stored bytes.

A decoder may take them or raise FormatError. Anything else, more than 64 MiB of memory beyond what the
process had, or more than two seconds for one input ends it with 1 and writes the input to a file.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from pathlib import Path

from tests.support.fuzzing import TARGETS, change, run

_MEMORY_MIB = 64
_SLOW_S = 2.0


def rss_mib() -> int:
    """The most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20_000, help="inputs for each decoder (20000)")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    options = parser.parse_args()
    for name in TARGETS:
        run(name, TARGETS[name].samples[0], sealed=False)
    base = rss_mib()
    for name in options.target or TARGETS:
        rng = random.Random(f"{options.seed}/{name}")  # noqa: S311
        taken = 0
        pool = list(TARGETS[name].samples)
        began = time.monotonic()
        for _ in range(options.runs):
            raw = change(rng.choice(pool), rng)
            before = time.monotonic()
            try:
                good = run(name, raw, sealed=rng.random() < 0.8)
                problem = ""
            except Exception as exc:  # noqa: BLE001 - that is what is looked for
                good, problem = False, repr(exc)
            if time.monotonic() - before > _SLOW_S:
                problem = problem or "slow"
            if rss_mib() - base > _MEMORY_MIB:
                problem = problem or f"memory: {rss_mib() - base} MiB"
            if problem:
                path = Path(f"fuzz-{name}.bin")
                path.write_bytes(raw)
                print(f"{name}: {problem}; the input is in {path}", file=sys.stderr)
                return 1
            taken += good
            if good and len(pool) < 200:
                pool.append(raw)  # what is taken is worth changing further
        figures = {"target": name, "inputs": options.runs, "taken": taken}
        print(json.dumps(figures | {"s": round(time.monotonic() - began, 1)}), flush=True)
    print(json.dumps({"seed": options.seed, "memory_mib": rss_mib() - base}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
