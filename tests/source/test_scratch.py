"""The room of a scratch folder, on a file system that says what it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdpull.errors import ScratchFullError
from nbdpull.source.rundir import RunDir
from nbdpull.source.scratch import ScratchGuard

MIB = 1 << 20


class Room(RunDir):
    """A run's folder with as much room as the test says."""

    free = 80 * MIB

    def room(self) -> tuple[int, int]:
        return self.free, 0

    def hold_back(self, size: int) -> None:
        self.free -= size

    def let_go(self) -> None:
        self.free += 20 * MIB


@pytest.fixture
def room(tmp_path: Path) -> Room:
    made = RunDir.create(str(tmp_path), "0123abcd", source="qmp:/x", chain="c", owner=None)
    return Room(made.path, made._lock)


def guard_of(room: Room) -> ScratchGuard:
    told: list[ScratchFullError] = []
    return ScratchGuard(room, told.append)


def test_a_scratch_with_room_is_not_why_a_write_found_none(room: Room) -> None:
    guard = guard_of(room)
    room.free = 40 * MIB
    assert guard.check() is None
    assert not guard.pressed


def test_room_that_a_trim_made_does_not_hide_that_there_was_little(room: Room) -> None:
    guard = guard_of(room)
    room.free = 11 * MIB
    assert guard.check() is None
    room.free = 60 * MIB
    assert guard.check() is None
    assert guard.pressed


def test_what_was_let_go_does_not_hide_it_either(room: Room) -> None:
    guard = guard_of(room)
    room.free = 9 * MIB
    assert guard.check() is not None
    assert room.free == 29 * MIB
    assert guard.pressed
