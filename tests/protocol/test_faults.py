"""A few histories through a store that fails; `scripts/torture faults` plays thousands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.protocol.faults import Faults
from tests.protocol.world import memory_repositories
from tests.support.proxy import proxy
from tests.support.stores import SeaweedFs


@pytest.fixture
def faults(weed: SeaweedFs, s3: str) -> Iterator[Faults]:
    prefix = s3.removeprefix("s3://bucket0/")
    with proxy(weed.endpoint) as front, memory_repositories():
        yield Faults(weed, front, prefix=prefix)


@pytest.mark.parametrize("seed", range(0, 24, 6))
def test_what_is_told_is_right_or_the_error_is_loud(faults: Faults, seed: int) -> None:
    for one in range(seed, seed + 6):
        assert faults.play(one).restored
