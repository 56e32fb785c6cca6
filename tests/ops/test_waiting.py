"""What is let go is found again by whoever goes on, or nobody goes on."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from nbdpull.model.grain import GRAIN, SEGMENT, Kind
from nbdpull.nbdio.status import Allocation, StatusReader
from nbdpull.ops import waiting as waiting_module
from nbdpull.ops.extents import zero_where_known
from nbdpull.ops.waiting import Waiting
from nbdpull.repo.repository import Found, Repository, Session
from nbdpull.source.journal import ZEROES, FileHere, Journal

MIB = 1 << 20
BACKUP = "0123456789abcdef"
SIZE = 3 * SEGMENT


@pytest.fixture
def session(tmp_path: Path) -> Session:
    Repository.create(str(tmp_path / "repo"))
    repository = Repository.open(str(tmp_path / "repo"), write=True)
    return repository.begin(vm="vm1", disk="vda", parent=None)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    (tmp_path / "resume").touch()
    fd = os.open(tmp_path / "j", os.O_RDWR | os.O_CREAT, 0o600)
    return Journal(FileHere(fd), BACKUP, tmp_path / "resume")


@pytest.fixture
def waiting(session: Session, journal: Journal) -> Waiting:
    return Waiting(journal.disk(0, SIZE), session)


def seen(tmp_path: Path) -> list[tuple[int, int, bytes]]:
    """What a process that comes now finds noted."""
    again = Journal(FileHere(os.open(tmp_path / "j", os.O_RDWR)), BACKUP)
    part = again.disk(0, SIZE)
    found = [one for index in range(SIZE // SEGMENT) for one in part.segment(index)]
    again.close()
    return found


def put(session: Session, journal: Journal, waiting: Waiting, place: int) -> Found:
    """Store a MiB, as a puller does."""
    found, digest = session.put_named(random.Random(place).randbytes(MIB))
    journal.note(0, place * MIB, MIB, digest)
    waiting.add(place * MIB, (place + 1) * MIB, found)
    return found


def test_a_frame_waits_for_its_pack_and_is_on_record_when_it_is_let_go(
    session: Session, journal: Journal, waiting: Waiting, tmp_path: Path
) -> None:
    packs = [put(session, journal, waiting, place).seq for place in range(40)]
    first = packs.count(0)
    assert 0 < first < 40
    while not session.is_durable(0):
        assert waiting.take() in ([], [(0, first * MIB)])
    assert waiting.take() in ([], [(0, first * MIB)])
    assert [start for start, _, _ in seen(tmp_path)[:first]] == [at * MIB for at in range(first)]
    assert not session.is_durable(1)
    session.seal()
    assert waiting.take() == [(first * MIB, 40 * MIB)]
    assert len(seen(tmp_path)) == 40
    assert waiting.take() == []
    assert (tmp_path / "resume").exists()


def test_zeroes_and_what_an_earlier_backup_has_there_wait_for_the_journal_only(
    journal: Journal, waiting: Waiting, tmp_path: Path
) -> None:
    journal.note(0, MIB, MIB, ZEROES)
    waiting.add(MIB, 2 * MIB, None)
    waiting.add(0, MIB, None)
    waiting.add(5 * MIB, 6 * MIB, None)
    assert waiting.take() == [(0, 2 * MIB), (5 * MIB, 6 * MIB)]
    assert seen(tmp_path) == [(MIB, MIB, ZEROES)]
    waiting.note_zeroes([(SEGMENT, 2 * SEGMENT)])
    assert seen(tmp_path)[1:] == [(SEGMENT, SEGMENT, ZEROES)]


def test_a_frame_of_others_is_not_let_go_as_long_as_somebody_may_go_on(
    session: Session, journal: Journal, waiting: Waiting, tmp_path: Path
) -> None:
    """Its digest in a journal would not be enough to refer to it."""
    waiting.add(0, MIB, Found(session.index + 1, 0, 64, 100, 16))
    session.seal()
    assert waiting.take() == []
    journal.give_up("a test")
    assert waiting.ended
    assert waiting.take() == [(0, MIB)]
    assert not (tmp_path / "resume").exists()


@pytest.mark.parametrize("when", ["at first", "later"])
def test_where_room_is_scarce_nobody_goes_on_and_all_is_let_go(
    session: Session, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    if when == "at first":
        monkeypatch.setattr(waiting_module, "LITTLE_ROOM", 1 << 62)
    waiting = Waiting(journal.disk(0, SIZE), session)
    assert waiting.ended is (when == "at first")
    monkeypatch.setattr(waiting_module, "LITTLE_ROOM", 1 << 62)
    put(session, journal, waiting, 3)
    assert waiting.take() == [(3 * MIB, 4 * MIB)]
    assert waiting.ended
    assert not (tmp_path / "resume").exists()


def test_where_nothing_can_be_noted_nobody_goes_on_and_all_is_let_go(
    session: Session, tmp_path: Path
) -> None:
    (tmp_path / "resume").touch()
    journal = Journal(FileHere(os.open("/dev/full", os.O_RDWR)), BACKUP, tmp_path / "resume")
    journal.room = lambda: 1 << 62  # type: ignore[method-assign]
    waiting = Waiting(journal.disk(0, SIZE), session)
    put(session, journal, waiting, 3)
    assert waiting.take() == []
    waiting.note_audited()
    assert waiting.ended
    assert not (tmp_path / "resume").exists()
    assert waiting.take() == [(3 * MIB, 4 * MIB)]


class _Status(StatusReader):
    """Says zero, refuses what is trimmed, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.asked.append((start, end))
        whole = (np.array([start]), np.array([end]), np.array([int(Allocation.ZERO)]))
        return whole[0], whole[1], whole[2]


def test_what_may_be_trimmed_is_not_asked_about() -> None:
    end = SEGMENT + 10 * GRAIN - 512
    kinds = np.full(10, Kind.DATA, dtype=np.uint8)
    told = np.zeros(10, dtype=np.bool_)
    told[[0, 1, 4]] = True
    status = _Status()
    zero_where_known(kinds, status, SEGMENT, SEGMENT, end, None, told)
    assert status.asked == [
        (SEGMENT + 2 * GRAIN, SEGMENT + 4 * GRAIN),
        (SEGMENT + 5 * GRAIN, end),
    ]
    assert (kinds == Kind.DATA).nonzero()[0].tolist() == [0, 1, 4]
    status.asked.clear()
    zero_where_known(kinds, status, SEGMENT, SEGMENT + GRAIN, SEGMENT + 3 * GRAIN, None, told)
    assert status.asked == [(SEGMENT + 2 * GRAIN, SEGMENT + 3 * GRAIN)]
