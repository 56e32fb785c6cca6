"""The same as `fuzz_decoders.py`, guided by coverage: with atheris.

fuzz_coverage.py TARGET SECONDS [SEED]
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["nbdpull.model"]):
    from tests.support import fuzzing


def main() -> None:
    """Run libFuzzer; it ends the process, with 77 when it found something."""
    name, seconds, *seed = sys.argv[1:]
    target = fuzzing.TARGETS[name]

    def one(data: bytes) -> None:
        fuzzing.run(name, data, sealed=True)
        # libFuzzer starts from nothing: the samples are near when the input is laid over one of them.
        for sample in target.samples:
            fuzzing.run(name, data + sample[len(data) :], sealed=True)

    options = ["-rss_limit_mb=512", "-max_len=8192", f"-max_total_time={seconds}", "-timeout=10"]
    atheris.Setup([sys.argv[0], *options, f"-seed={seed[0] if seed else 1}"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
