"""Bytes that nobody wrote: every decoder refuses them clearly, and no restore makes anything of them.

`scripts/fuzz` and `scripts/corrupt` do the same at length; what they found is kept below.
"""

from __future__ import annotations

import itertools
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from nbdpull.model.frame import FormatError
from nbdpull.model.index import Directory, PackPlace
from nbdpull.repo.repository import Repository
from tests.model.samples import directory
from tests.repo.helpers import small_history
from tests.support.corrupting import Case, Counts, cases, objects, try_case
from tests.support.fuzzing import TARGETS, change, run


@pytest.mark.parametrize("name", TARGETS)
def test_the_samples_are_taken(name: str) -> None:
    assert all(run(name, raw, sealed=False) for raw in TARGETS[name].samples)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_bytes_are_taken_or_refused_clearly_in_bounded_memory(name: str) -> None:
    rng = random.Random(name)
    pool = TARGETS[name].samples
    tracemalloc.start()
    for _ in range(400):
        run(name, change(rng.choice(pool), rng), sealed=rng.random() < 0.8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize(
    "payload",
    [
        zstandard.compress(bytes(1 << 30)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 22)),
        zstandard.compress(b"a" * 65536) * 2,
        zstandard.compress(b"a" * 65536) + b"\0" * 9,
        b"\x28\xb5\x2f\xfd" + b"\xff" * 60,
    ],
)
def test_a_frame_that_unpacks_to_something_else_takes_no_memory(payload: bytes) -> None:
    header = TARGETS["frame"].samples[0][:64]
    tracemalloc.start()
    assert not run("frame", header + payload, sealed=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_directory_that_is_no_whole_number_of_entries_is_refused() -> None:
    """Found by scripts/fuzz: numpy's own error got out."""
    raw = directory([(50, 90)]).encode() + b"x"
    with pytest.raises(FormatError, match="whole number"):
        Directory.decode(raw, PackPlace(1000, 0, len(raw), blake3(raw).digest()))


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A repository of three backups, and what they hold."""
    Repository.create(str(tmp_path / "repo"))
    history = small_history(Repository.open(str(tmp_path / "repo"), write=True))
    contents = {
        str(manifest.summary.backup): content
        for manifest, content in zip(history.manifests, history.contents, strict=True)
    }
    return tmp_path / "repo", contents


def test_a_damaged_repository_restores_right_or_loudly(
    small: tuple[Path, dict[str, bytes]],
) -> None:
    root, contents = small
    counts = Counts()
    for case in itertools.islice(cases(objects(root), random.Random(1)), 150):
        try_case(root, case, contents, counts)
    assert counts.wrong == []
    # What the settings say of the store's abilities is for people.
    assert counts.unseen.keys() <= {"nbdpull.json"}
    assert counts.verified > 0
    assert counts.cases == 150
    assert counts.right > 50
    assert counts.loud > 50


def test_every_object_deleted_or_swapped_restores_right_or_loudly(
    small: tuple[Path, dict[str, bytes]],
) -> None:
    root, contents = small
    stored = objects(root)
    counts = Counts()
    for key, raw in stored.items():
        try_case(root, Case(f"delete {key}", {key: None}), contents, counts)
        try_case(root, Case(f"empty {key}", {key: b""}), contents, counts)
        for other in stored:
            if other < key and other[0] == key[0]:
                swapped = {key: stored[other], other: raw}
                try_case(root, Case(f"swap {key} {other}", swapped), contents, counts)
    assert counts.wrong == []
    assert counts.loud > 2 * len(stored)
