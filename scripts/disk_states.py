"""Run sequences of writes, resizes and backups of all levels against a plain bytearray."""

from __future__ import annotations

import argparse
import json
import sys
import time

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.states import DiskStates


def main() -> int:
    """Run it; a failing sequence is printed, and ends it."""
    parser = argparse.ArgumentParser(prog="scripts/states", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--steps", type=int, default=15, help="in each at most (15)")
    options = parser.parse_args()
    began = time.monotonic()
    counts = {"sequences": 0, "backups": 0}

    class Counted(DiskStates):
        def teardown(self) -> None:
            counts["sequences"] += 1
            counts["backups"] += len(self.taken)
            super().teardown()

    run_state_machine_as_test(
        seed(options.seed)(Counted),
        settings=settings(
            max_examples=options.sequences,
            stateful_step_count=options.steps,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(json.dumps({"seed": options.seed, **counts, "s": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
