"""Death at any call of the store loses nothing; `scripts/torture kill-points` tries all calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.protocol.kills import OPERATIONS, KillPoints
from tests.protocol.world import memory_repositories

EVERY = {
    "full": 23,
    "incremental": 31,
    "differential": 31,
    "forget": 47,
    "undo": 23,
    "gc": 61,
    "repack": 97,
    "copy": 97,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_lost_and_the_next_runs_succeed(operation: str, folder: Path) -> None:
    with memory_repositories():
        campaign = KillPoints(folder / "kills", 7)
        points = list(campaign.points(operation))
        assert len(points) > 40
        for point in points[:: EVERY[operation]]:
            campaign.play(point)
