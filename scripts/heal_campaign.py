"""Damage frames of a history of backups and let the next backup heal them: prints figures as JSON.

Every backup is then compared with what the disk held. Ends with 1 when one frame was not healed, or one
byte of one backup is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.ops.healing import campaign


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/heal", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=1000, help="to damage (1000)")
    parser.add_argument("--backups", type=int, default=5, help="before the one that heals (5)")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(
            Path(folder), seed=options.seed, frames=options.frames, backups=options.backups
        )
    print(json.dumps(found | {"duration_s": round(time.monotonic() - began, 1)}, indent=2))
    good = found["healed"] == found["read_from_copies"] == options.frames
    return 0 if good and found["verify_ok_after"] and not found["wrong_backups_after"] else 1


if __name__ == "__main__":
    sys.exit(main())
