"""Processes that kill -9 takes at random lose nothing; `scripts/torture soak` goes on for long."""

from __future__ import annotations

from pathlib import Path

from tests.protocol.soak import Soak
from tests.protocol.world import memory_repositories


def test_what_was_acknowledged_is_there_after_many_kills(folder: Path) -> None:
    with memory_repositories():
        done = Soak(folder, 11).run(writers=3, collectors=1, kills=25)
    assert done.kills == 25
