"""Bases for changes that somebody else keeps."""

from __future__ import annotations

import pytest

from nbdpull.model.chain import Base, choose_told
from nbdpull.model.results import Level

CONTEXT = "qemu:dirty-bitmap:b"


def base(backup: str, level: Level = Level.INCREMENTAL, size: int = 10) -> Base:
    return Base(backup=backup, level=level, size=size, checkpoint=None)


HISTORY = [base("c"), base("b", Level.FULL), base("a", Level.FULL)]


@pytest.mark.parametrize(
    ("wanted", "level", "found"),
    [
        (None, Level.INCREMENTAL, "c"),
        (Level.INCREMENTAL, Level.INCREMENTAL, "c"),
        (Level.DIFFERENTIAL, Level.DIFFERENTIAL, "b"),
        (Level.FULL, Level.FULL, None),
        (Level.COPY, Level.COPY, None),
    ],
)
def test_the_one_base_that_it_is_said_of(
    wanted: Level | None, level: Level, found: str | None
) -> None:
    decision = choose_told(wanted, CONTEXT, size=10, newest="c", history=HISTORY)
    assert (decision.level, decision.base and decision.base.backup) == (level, found)
    assert (CONTEXT in decision.reason) is (found is not None)


@pytest.mark.parametrize(
    ("history", "newest", "size", "words"),
    [
        ([], None, 10, "no earlier backup"),
        (HISTORY, "d", 10, "d, has not this disk"),
        (HISTORY, "c", 11, "had 10 bytes in backup c and has 11 now"),
        ([base("x"), *HISTORY], "x", 10, "backup x can't be built on: lost"),
    ],
)
def test_no_older_backup_stands_in_for_it(
    history: list[Base], newest: str | None, size: int, words: str
) -> None:
    decision = choose_told(
        None,
        CONTEXT,
        size=size,
        newest=newest,
        history=history,
        unreadable=lambda one: "lost" if one.backup == "x" else None,
    )
    assert (decision.level, decision.base) == (Level.FULL, None)
    assert words in decision.reason
