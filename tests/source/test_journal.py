"""The journal of what was read: what it gives back was noted by the same run, whole, and can be."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbdpull.source.journal
from nbdpull.model.grain import FRAME_MAX, GRAIN, SEGMENT
from nbdpull.source.journal import ZEROES, FileHere, Journal

BACKUP = "0123456789abcdef"
SIZE = 2 * SEGMENT + 5 * GRAIN + 512

Entry = tuple[int, int, bytes]


def opened(path: Path, backup: str = BACKUP) -> Journal:
    return Journal(FileHere(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)), backup)


def entries(count: int) -> list[Entry]:
    rng = random.Random(count)
    places = rng.sample(range(SIZE // FRAME_MAX), count)
    return [(place * FRAME_MAX, FRAME_MAX, rng.randbytes(32)) for place in places]


def write(path: Path, made: list[Entry], *, disk: int = 1, backup: str = BACKUP) -> None:
    journal = opened(path, backup)
    part = journal.disk(disk, SIZE)
    for entry in made:
        part.note(*entry)
    journal.close()
    journal.close()


def read(path: Path, *, disk: int = 1, size: int = SIZE, backup: str = BACKUP) -> list[Entry]:
    journal = opened(path, backup)
    try:
        part = journal.disk(disk, size)
        return [one for index in range(-(-size // SEGMENT)) for one in part.segment(index)]
    finally:
        journal.close()


def test_what_was_noted_comes_back_by_place(tmp_path: Path) -> None:
    made = [*entries(1000), (SIZE - 512 - GRAIN, GRAIN + 512, ZEROES)]
    write(tmp_path / "j", made)
    write(tmp_path / "j", entries(3), disk=0)
    assert read(tmp_path / "j") == sorted(made)
    assert read(tmp_path / "j", disk=0) == sorted(entries(3))
    assert read(tmp_path / "j", disk=2) == []


def test_a_run_that_goes_on_adds_to_it(tmp_path: Path) -> None:
    made = entries(90)
    for begin in range(0, 90, 30):
        write(tmp_path / "j", made[begin : begin + 30])
    assert read(tmp_path / "j") == sorted(made)


@pytest.mark.parametrize("cut", [1, 19, 20, 21, 500, 787])
def test_a_block_that_was_cut_short_does_not_count_and_the_next_run_goes_on_behind_the_last_whole_one(
    tmp_path: Path, cut: int
) -> None:
    made = entries(32)  # two blocks of 20 + 16 * 48 bytes
    write(tmp_path / "j", made)
    os.truncate(tmp_path / "j", 788 + cut)
    assert read(tmp_path / "j") == sorted(made[:16])
    more = [(0, GRAIN, ZEROES)]
    write(tmp_path / "j", more)
    assert read(tmp_path / "j") == sorted([*made[:16], *more])


@pytest.mark.parametrize("at", [0, 2, 5, 19, 20, 27, 40, 787])
def test_no_block_counts_from_a_changed_bit_on(tmp_path: Path, at: int) -> None:
    made = entries(48)
    write(tmp_path / "j", made)
    raw = bytearray((tmp_path / "j").read_bytes())
    raw[788 + at] ^= 4
    (tmp_path / "j").write_bytes(raw)
    assert read(tmp_path / "j") == sorted(made[:16])


def test_blocks_of_another_backup_or_in_another_order_do_not_count(tmp_path: Path) -> None:
    write(tmp_path / "j", entries(48))
    raw = (tmp_path / "j").read_bytes()
    (tmp_path / "other").write_bytes(raw)
    assert read(tmp_path / "other", backup="0123456789abcdee") == []
    (tmp_path / "turned").write_bytes(raw[788 : 2 * 788] + raw[:788] + raw[2 * 788 :])
    assert read(tmp_path / "turned") == []


@pytest.mark.parametrize(
    "entry",
    [
        (512, GRAIN, ZEROES),
        (0, 0, ZEROES),
        (0, GRAIN - 1, ZEROES),
        (0, 2 * FRAME_MAX, b"1" * 32),
        (FRAME_MAX - GRAIN, 2 * GRAIN, b"1" * 32),
        (0, SEGMENT + GRAIN, ZEROES),
        (SEGMENT - GRAIN, 2 * GRAIN, ZEROES),
        (SIZE - 512, GRAIN, ZEROES),
        (SIZE - 512 + 2 * GRAIN, GRAIN, ZEROES),
        ((1 << 64) - GRAIN, GRAIN, ZEROES),
    ],
)
def test_places_that_no_frame_can_have_do_not_count(tmp_path: Path, entry: Entry) -> None:
    write(tmp_path / "j", [entry, (0, GRAIN, ZEROES)])
    assert read(tmp_path / "j") == [(0, GRAIN, ZEROES)]


def test_zeroes_may_be_longer_than_a_frame(tmp_path: Path) -> None:
    made = [(0, SEGMENT, ZEROES), (SEGMENT + GRAIN, SEGMENT - GRAIN, ZEROES)]
    write(tmp_path / "j", made)
    assert read(tmp_path / "j") == made


def test_that_a_disk_was_audited_comes_back_and_is_no_place(tmp_path: Path) -> None:
    write(tmp_path / "j", [(0, GRAIN, b"1" * 32)])
    journal = opened(tmp_path / "j")
    assert not journal.disk(1, SIZE).audited
    assert journal.disk(1, SIZE).began_before
    assert not journal.disk(0, SIZE).began_before
    journal.disk(1, SIZE).note_audited()
    assert journal.flush()
    # Of a process that is killed now.
    again = opened(tmp_path / "j")
    assert again.disk(1, SIZE).audited
    assert not again.disk(0, SIZE).audited
    again.close()
    assert read(tmp_path / "j") == [(0, GRAIN, b"1" * 32)]
    journal.give_up("a test")


def test_what_is_flushed_outlives_the_process_and_what_could_not_be_noted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdpull.source.journal, "ENTRIES_MAX", 3)
    journal = opened(tmp_path / "j")
    made = entries(4)
    for entry in made[:3]:
        journal.note(1, *entry)
    assert journal.flush()
    assert read(tmp_path / "j") == sorted(made[:3])
    journal.note(1, *made[3])
    assert not journal.flush()
    journal.close()


@given(raw=st.binary(max_size=3000))
def test_any_bytes_are_a_journal_of_nothing(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    path.write_bytes(raw)
    assert read(path) == []


def test_a_full_folder_ends_it_silently(tmp_path: Path) -> None:
    journal = Journal(FileHere(os.open("/dev/full", os.O_RDWR)), BACKUP)
    part = journal.disk(0, SIZE)
    for entry in entries(100):
        part.note(*entry)
    assert not journal.flush()
    journal.close()


def test_a_file_that_fails_when_it_is_let_go_is_no_error(tmp_path: Path) -> None:
    """As one on NFS does when what was written does not fit."""

    class Failing(FileHere):
        def close(self) -> None:
            super().close()
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    made = entries(5)
    journal = Journal(Failing(os.open(tmp_path / "journal", os.O_RDWR | os.O_CREAT, 0o600)), BACKUP)
    for entry in made:
        journal.disk(1, SIZE).note(*entry)
    journal.close()
    assert sorted(read(tmp_path / "journal")) == sorted(made)
