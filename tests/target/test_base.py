from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.target.base import runs


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=12),
    st.sampled_from([8, 512, 4096]),
)
def test_runs_cover_everything_and_call_zero_only_what_is(
    parts: list[tuple[bool, int]], block: int
) -> None:
    data = b"".join((b"\0" if zero else b"\1") * length for zero, length in parts)
    position = 0
    previous = None
    for start, end, zero in runs(data, block):
        assert start == position
        assert start < end
        assert end % block == 0 or end == len(data)
        assert zero != previous, "neighbours of one kind are joined"
        if zero:
            assert not any(data[start:end])
        else:
            assert all(any(data[at : at + block]) for at in range(start, end, block))
        position, previous = end, zero
    assert position == len(data)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4095, 4096, 4097])
def test_short_buffers_are_one_run(size: int) -> None:
    assert list(runs(bytes(size), 4096)) == ([(0, size, True)] if size else [])
    assert list(runs(b"\0" * (size - 1) + b"x", 4096))[-1][2] is False


def test_a_block_that_only_begins_with_zeroes_is_data() -> None:
    assert list(runs(bytes(4095) + b"x", 4096)) == [(0, 4096, False)]
