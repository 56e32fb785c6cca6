"""How much a repository stores of many clones of one template, with and without a digest cache.

    PYTHONPATH=. .venv/bin/python scripts/clones.py [--clones 100] [--mib 32] [--own 64] [--seed 1]

Each clone is a raw disk of the template with `own` KiB of its own, served by qemu-nbd and pulled in full as
a VM of its own. Prints bytes and seconds, and restores three clones to compare every byte.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from nbdpull.repo.digestcache import DigestCache
from nbdpull.repo.repository import Repository
from tests.ops.pulling import MIB, content, fill, summary_of, write


def run(folder: Path, options: argparse.Namespace, *, cached: bool) -> None:
    """Back all clones up into a new repository, and tell what that came to."""
    Repository.create(str(folder / "repo"))
    repository = Repository.open(str(folder / "repo"), write=True)
    cache = DigestCache(folder / "cache", repository.id) if cached else None
    rng = random.Random(options.seed)  # noqa: S311 - data that is the same each time
    template = {at * MIB: rng.randbytes(MIB) for at in range(options.mib)}
    size = (options.mib + 8) * MIB
    raw = folder / "clone.raw"
    began = time.monotonic()
    wrong = 0
    for number in range(options.clones):
        own = random.Random(number).randbytes(options.own * 1024)  # noqa: S311
        raw.unlink(missing_ok=True)
        write(raw, template | {(options.mib + 2) * MIB: own}, size=size)
        session = repository.begin(vm=f"vm{number}", disk="vda", parent=None, cache=cache)
        fill(session, raw)
        session.seal()
        manifest = session.commit(summary_of(session, size, vm=f"vm{number}", disk="vda"))
        if cache is not None:
            repository.learn(cache, manifest)
        if number in {0, options.clones // 2, options.clones - 1}:
            wrong += content(repository, manifest) != raw.read_bytes()
    seconds = time.monotonic() - began
    stored = sum(path.stat().st_size for path in (folder / "repo").rglob("*") if path.is_file())
    read = options.clones * (options.mib * MIB + options.own * 1024)
    if cache is not None:
        cache.close()
    file = cache.path.stat().st_size if cache is not None else 0
    print(
        f"{'with' if cached else 'without'} a cache: {options.clones} clones, {read} bytes of data,"
        f" {stored} stored ({read / stored:.1f} to 1), cache {file} bytes, {seconds:.1f} s,"
        f" {wrong} restored wrong"
    )


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("clones", 100), ("mib", 32), ("own", 64), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    for cached in (True, False):
        with tempfile.TemporaryDirectory(prefix="np-clones-") as folder:
            run(Path(folder), options, cached=cached)


if __name__ == "__main__":
    main()
