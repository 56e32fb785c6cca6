"""Counting what is needed of frames, and keeping where they went."""

from __future__ import annotations

import random
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.grain import GRAIN
from nbdpull.model.ids import SessionId
from nbdpull.ops import usage as usage_module
from nbdpull.ops.usage import HELD, Frames, PackCounts, Piece, Pieces
from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup

SIDS = [SessionId(f"{number:032x}") for number in range(3)]


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Intervals in few frames, so that these come often; a frame's lengths are the same each time."""
    made: list[tuple[int, ...]] = []
    for start in range(draw(st.integers(0, 12))):
        session, seq, offset = (draw(st.integers(0, 2)) for _ in range(3))
        flen = 1 + (session + 5 * seq + 7 * offset) % 16
        n = draw(st.integers(1, flen))
        skip = draw(st.integers(0, flen - n))
        made.append((start, n, session, seq, offset, 1000 * flen, skip, flen))
    return made


@given(st.lists(rows(), max_size=6), st.sampled_from([0, 5, 1000]))
def test_frames_count_as_a_dictionary_would(maps: list[list[tuple[int, ...]]], loose: int) -> None:
    frames = Frames()
    grains: dict[tuple[int, int, int], int] = defaultdict(int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage_module, "_LOOSE_MAX", loose)
        for one in maps:
            frames.add(SIDS, np.array(one, dtype=np.int64).reshape(-1, 8))
            for _start, n, session, seq, offset, _clen, skip, _flen in one:
                grains[session, seq, offset] |= ((1 << n) - 1) << skip
    needed: dict[tuple[str, int], float] = defaultdict(float)
    count: dict[tuple[str, int], int] = defaultdict(int)
    for (session, seq, _offset), mask in grains.items():
        needed[SIDS[session], seq] += 1000 * mask.bit_count()
        count[SIDS[session], seq] += 1
    assert len(frames) == len(grains)
    assert {pack: number for pack, _, number in frames.by_pack()} == count
    assert {pack: amount for pack, amount, _ in frames.by_pack()} == pytest.approx(needed)
    every = np.array([row for one in maps for row in one], dtype=np.int64).reshape(-1, 8)
    for at, row in zip(frames.find(SIDS, every), every.tolist(), strict=True):
        assert frames.grains(at) == grains[row[2], row[3], row[4]]


def test_frames_of_other_packs_are_passed_over() -> None:
    frames = Frames([(SIDS[1], 7)])
    table = np.array([(0, 1, 0, 7, 128, 5, 0, 1), (1, 1, 1, 7, 128, 5, 0, 1)], dtype=np.int64)
    frames.add(SIDS, table)
    assert len(frames) == 1
    assert frames.find(SIDS, table) == [-1, 0]
    assert frames.find(SIDS, table + np.array([0, 0, 0, 0, 1, 0, 0, 0])) == [-1, -1]


def test_a_pack_has_one_user_or_is_held() -> None:
    users = PackCounts()
    users.use(SIDS, np.array([(0, 1), (0, 5), (2, 4_000_000_000)], dtype=np.uint32), 0)
    users.use(SIDS, np.array([(0, 3), (0, 5), (1, 0)], dtype=np.uint32), 1)
    users.use(SIDS, np.array([(0, 3), (1, 0)], dtype=np.uint32), 1)
    users.use(SIDS, np.array([(1, 0)], dtype=np.uint32), HELD)
    packs = [(0, 1), (0, 3), (0, 5), (1, 0), (2, 4_000_000_000)]
    assert [users.user((SIDS[at], seq)) for at, seq in packs] == [0, 1, HELD, HELD, 0]


def test_pieces_are_found_where_their_frame_is() -> None:
    pieces = Pieces(3)
    first = [Piece(0, 2, SIDS[0], 1, 128, 9), Piece(5, 1, SIDS[0], 1, 200, 7)]
    second = [Piece(0, 16, SIDS[1], 0, 128, 4_000_000_000)]
    pieces.put(2, first)
    pieces.put(0, second)
    assert [pieces.get(at) for at in range(3)] == [second, [], first]


def test_a_million_frames_take_some_megabytes() -> None:
    table = np.zeros((1 << 14, 8), dtype=np.int64)
    table[:, 1] = table[:, 7] = 1
    tracemalloc.start()
    frames = Frames()
    for seq in range(64):
        table[:, 3], table[:, 4] = seq, np.arange(1 << 14)
        frames.add(SIDS, table)
    assert len(frames) == 1 << 20
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 24 << 20
    assert peak < 128 << 20


def test_scattered_small_changes_are_stored_in_little_more_than_they_take(tmp_path: Path) -> None:
    """64 KiB changed in each 4 MiB: fixed chunks of 4 MiB would store sixty times as much."""
    repository = Repository.create(str(tmp_path / "repo"))
    rng = random.Random(5)
    words = [rng.randbytes(6) for _ in range(200)]
    grains = {
        number: b"".join(rng.choices(words, k=GRAIN // 6 + 1))[:GRAIN] for number in range(512)
    }
    before = Disk(512 * GRAIN, grains)
    changed = {
        number: b"".join(rng.choices(words, k=GRAIN // 6 + 1))[:GRAIN]
        for number in range(0, 512, 64)
    }
    first = add_backup(repository, {"vda": before})
    size = stored(tmp_path)
    add_backup(
        repository,
        {"vda": Disk(before.size, grains | changed)},
        before={"vda": before},
        parents=first,
    )
    compressor = zstandard.ZstdCompressor(level=1)
    least = sum(len(compressor.compress(grain)) for grain in changed.values())
    assert least < stored(tmp_path) - size < 1.1 * least


def stored(folder: Path) -> int:
    """Bytes of all packs, indexes and manifests."""
    return sum(path.stat().st_size for kind in "dxm" for path in folder.glob(f"repo/{kind}/*/*"))
