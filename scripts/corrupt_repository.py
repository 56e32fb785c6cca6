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
import shutil
import sys
import tempfile
import time
from pathlib import Path

from nbdpull.model.crypto import Kdf, KdfName
from nbdpull.ops import push
from nbdpull.repo.repository import Repository
from tests.repo.helpers import small_history
from tests.support.corrupting import Counts, cases, objects, try_case


def prepare(root: Path, keep: Path | None, *, encrypted: bool) -> dict[str, bytes]:
    """Make the repository, or take the one that an earlier run kept; what each backup holds."""
    if encrypted:
        os.environ["NBDPULL_PASSWORD"] = "secret"  # noqa: S105
    if keep is not None and keep.exists():
        shutil.copytree(keep / "repo", root)
        return {path.name: path.read_bytes() for path in (keep / "contents").iterdir()}
    # A password that costs nothing: it goes through the key's derivation once a case.
    kdf = Kdf(KdfName.ARGON2ID, 8, 1, 1)
    Repository.create(str(root), password=b"secret" if encrypted else None, kdf=kdf)
    history = small_history(Repository.open(str(root), write=True))
    contents = {
        str(manifest.summary.backup): content
        for manifest, content in zip(history.manifests, history.contents, strict=True)
    }
    if keep is not None:
        shutil.copytree(root, keep / "repo")
        (keep / "contents").mkdir()
        for backup, content in contents.items():
            (keep / "contents" / backup).write_bytes(content)
    return contents


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/corrupt", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=1000, help="at most (1000)")
    parser.add_argument("--encrypted", action="store_true", help="an encrypted repository")
    parser.add_argument("--skip", type=int, default=0, help="go on where an earlier run ended")
    parser.add_argument("--keep", type=Path, help="folder to keep the repository in for later runs")
    parser.add_argument("--seconds", type=float, help="end after so long")
    options = parser.parse_args()
    began = time.monotonic()
    logging.disable()
    # Starting threads takes longer than these restores.
    setattr(push, "run_all", lambda workers, _cancel: workers[0]())  # noqa: B010
    counts = Counts()
    # In memory: files are written some hundred thousand times.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        root = Path(folder) / "repo"
        contents = prepare(root, options.keep, encrypted=options.encrypted)
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
        "manifests_gone": counts.absent,
        "latest_loud": counts.latest_loud,
        "seen_by_verify_alone": counts.verified,
        "seen_by_nothing": dict(counts.unseen),
        "duration_s": round(time.monotonic() - began, 1),
    }
    print(json.dumps(figures))
    for line in counts.wrong[:20]:
        print(line, file=sys.stderr)
    return 1 if counts.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
