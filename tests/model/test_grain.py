from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.grain import (
    FRAME_GRAINS,
    GRAIN,
    SEGMENT,
    SEGMENT_GRAINS,
    Kind,
    frame_runs,
    segment_count,
    segment_grains,
)


@pytest.mark.parametrize(
    ("size", "grains"),
    [
        (0, []),
        (1, [1]),
        (GRAIN, [1]),
        (GRAIN + 512, [2]),
        (SEGMENT, [SEGMENT_GRAINS]),
        (SEGMENT + 1, [SEGMENT_GRAINS, 1]),
        (3 * SEGMENT - GRAIN, [SEGMENT_GRAINS, SEGMENT_GRAINS, SEGMENT_GRAINS - 1]),
    ],
)
def test_a_disk_has_as_many_grains_as_cover_it(size: int, grains: list[int]) -> None:
    assert [segment_grains(size, index) for index in range(segment_count(size))] == grains


@given(st.lists(st.sampled_from(list(Kind)), min_size=1, max_size=80))
def test_frames_cover_just_the_data_and_never_cross_a_mebibyte(kinds: list[Kind]) -> None:
    covered: list[int] = []
    for first, count in frame_runs(np.array(kinds, dtype=np.uint8)):
        assert count >= 1
        assert first // FRAME_GRAINS == (first + count - 1) // FRAME_GRAINS
        covered += range(first, first + count)
    assert covered == [grain for grain, kind in enumerate(kinds) if kind is Kind.DATA]


def test_frames_are_as_long_as_they_can_be() -> None:
    assert frame_runs(np.full(40, Kind.DATA, dtype=np.uint8)) == [(0, 16), (16, 16), (32, 8)]
