"""Neighbouring frames are read with one request, and only those."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.errors import StoreError
from nbdpull.model.frame import HEADER_SIZE
from nbdpull.model.segment import Interval
from nbdpull.repo.local import LocalStore
from nbdpull.repo.ranges import Fetched, joined

KIB = 1 << 10
MIB = 1 << 20
SID = "00" * 8
KEYS = {(0, 0): f"d/{SID}/00000000", (0, 1): f"d/{SID}/00000001"}


@given(
    st.lists(
        st.tuples(st.integers(0, 64 * MIB), st.integers(1, MIB)).map(lambda f: (f[0], sum(f))),
        max_size=60,
    )
)
def test_each_frame_is_whole_in_one_range_and_no_range_is_longer_than_asked(
    frames: list[tuple[int, int]],
) -> None:
    ranges = joined(frames, limit=2 * MIB)
    assert all(any(a <= start and end <= b for a, b in ranges) for start, end in frames)
    assert all(0 < b - a <= 2 * MIB for a, b in ranges)
    assert {a for a, _ in ranges} <= {start for start, _ in frames}
    assert {b for _, b in ranges} <= {end for _, end in frames}


def test_a_small_gap_is_read_along_a_large_one_is_not() -> None:
    assert joined([(0, 100), (100 + 64 * KIB, 70000)]) == [(0, 70000)]
    assert joined([(0, 100), (101 + 64 * KIB, 70000)]) == [(0, 100), (101 + 64 * KIB, 70000)]


def interval(seq: int, offset: int, clen: int) -> Interval:
    return Interval(start=0, n=1, session=0, seq=seq, offset=offset, clen=clen, skip=0, flen=1)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(tmp_path)
    made.create(KEYS[0, 0], random.Random(1).randbytes(MIB))
    return made


def test_what_was_fetched_is_what_is_stored(store: LocalStore) -> None:
    wanted = [interval(0, at, 1000) for at in (500_000, 128, 2000, 900_000)]
    fetched = Fetched(store, wanted, KEYS)
    assert fetched.find(0, 0, wanted[0].offset, 1064) is None
    fetched.load(wanted)
    whole = store.get(KEYS[0, 0], limit=MIB)
    for one in wanted:
        end = one.offset + HEADER_SIZE + one.clen
        found = fetched.find(0, 0, one.offset, HEADER_SIZE + one.clen)
        assert found is not None
        assert bytes(found) == whole[one.offset : end]
    assert fetched.find(0, 0, 0, 10) is None
    assert fetched.find(0, 0, 300_000, 10) is None
    assert fetched.find(0, 1, 128, 10) is None


def test_frames_behind_the_end_of_a_cut_pack_or_in_a_missing_one_are_not_among_it(
    store: LocalStore,
) -> None:
    wanted = [interval(0, MIB - 3000, 1000), interval(0, MIB - 1000, 1000), interval(1, 128, 1000)]
    fetched = Fetched(store, wanted, KEYS)
    assert fetched.find(0, 0, wanted[0].offset, 1064) is None
    fetched.load(wanted)
    assert fetched.find(0, 0, MIB - 3000, 1064) is not None
    assert fetched.find(0, 0, MIB - 1000, 1064) is None
    assert fetched.find(0, 1, 128, 1064) is None


def test_threads_that_need_the_same_ranges_read_each_once_and_a_failed_one_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [interval(0, at, 1000) for at in range(128, MIB - 2000, 100_000)]
    read: list[int] = []
    get_range = LocalStore.get_range

    def noted(self: LocalStore, key: str, start: int, length: int) -> bytes:
        read.append(start)
        if len(read) == 1:
            raise StoreError("the store fails for a moment")
        return get_range(self, key, start, length)

    monkeypatch.setattr(LocalStore, "get_range", noted)
    fetched = Fetched(store, wanted, KEYS)
    with pytest.raises(StoreError):
        fetched.load(wanted[:1])
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(fetched.load, wanted) for _ in range(4)]:
            done.result()
    assert read[0] == 128
    assert sorted(read[1:]) == [one.offset for one in wanted]
