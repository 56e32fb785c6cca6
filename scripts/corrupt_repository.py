"""Damage a small repository, one case after the other, and restore all its backups each time.

Prints figures as JSON. Ends with 1 when one wrong byte was written, or a restore broke off in a way that
is no error of nbdpull.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from nbdpull.model.crypto import Kdf, KdfName
from nbdpull.ops import push
from nbdpull.repo.repository import Repository
from tests.repo.helpers import small_history
from tests.support.corrupting import Counts, cases, objects, try_case


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/corrupt", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=1000, help="at most (1000)")
    parser.add_argument("--encrypted", action="store_true", help="an encrypted repository")
    parser.add_argument("--skip", type=int, default=0, help="go on where an earlier run ended")
    parser.add_argument("--seconds", type=float, help="end after so long")
    options = parser.parse_args()
    began = time.monotonic()
    logging.disable()
    setattr(push, "worker_count", lambda: 1)  # noqa: B010 - threads take longer than these restores
    counts = Counts()
    # In memory: files are written some hundred thousand times.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        root = Path(folder) / "repo"
        password = None
        if options.encrypted:
            # A password that costs nothing: it goes through the key's derivation once a restore.
            password = b"secret"
            os.environ["NBDPULL_PASSWORD"] = password.decode()
        Repository.create(str(root), password=password, kdf=Kdf(KdfName.ARGON2ID, 8, 1, 1))
        history = small_history(Repository.open(str(root), write=True))
        contents: dict[str, bytes] = {
            str(manifest.summary.backup): content
            for manifest, content in zip(history.manifests, history.contents, strict=True)
        }
        stored = objects(root)
        every = cases(stored, random.Random(options.seed))  # noqa: S311
        for case in itertools.islice(every, options.skip, options.skip + options.cases):
            if options.seconds is not None and time.monotonic() - began > options.seconds:
                break
            try_case(root, case, contents, counts)
    figures = {
        "seed": options.seed,
        "encrypted": options.encrypted,
        "objects": len(stored),
        "bytes": sum(map(len, stored.values())),
        "skipped": options.skip,
        "cases": counts.cases,
        "restores_right": counts.right,
        "restores_loud": counts.loud,
        "restores_wrong": len(counts.wrong),
        "duration_s": round(time.monotonic() - began, 1),
    }
    print(json.dumps(figures))
    for line in counts.wrong[:20]:
        print(line, file=sys.stderr)
    return 1 if counts.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
