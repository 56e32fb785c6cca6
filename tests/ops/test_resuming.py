"""Pulling on where a run that died had come to, and what keeps a run from being gone on with."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from nbdpull.model.grain import GRAIN
from nbdpull.model.results import Level
from nbdpull.ops.pull import DiskPull, pull
from nbdpull.ops.resuming import check_files, check_same
from nbdpull.repo.repository import Repository, Session
from nbdpull.source.base import CannotGoOnError
from nbdpull.source.journal import FileHere, Journal
from nbdpull.source.unfinished import UnfinishedDisk
from tests.ops.pulling import MIB, content, served, summary_of, write
from tests.source.test_unfinished import RECORD

BACKUP = "0123456789abcdef"
SIZE = 48 * MIB + 24 * 512
USED = 24 * MIB


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    Repository.create(str(tmp_path / "repo"))
    return Repository.open(str(tmp_path / "repo"), write=True)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Noise, zeroes that take room, and data up to an end that is no grain's."""
    rng = random.Random(7)
    pieces = {at: rng.randbytes(MIB) for at in range(0, USED, MIB)}
    pieces[5 * MIB + 300_000] = bytes(200_000)
    pieces[9 * MIB - 2 * GRAIN] = bytes(2 * MIB)
    pieces[SIZE - 30_000] = rng.randbytes(30_000)
    return write(tmp_path / "disk.raw", pieces, size=SIZE)


def read(
    repository: Repository, raw: Path, journal: Path, *, backup: str = BACKUP
) -> tuple[Session, int]:
    """A full that notes what it reads, and how much that was."""
    session = repository.begin(vm="vm1", disk="vda", parent=None)
    log = Journal(FileHere(os.open(journal, os.O_RDWR | os.O_CREAT, 0o600)), backup)
    with served(raw) as uri:
        one = DiskPull(
            name="vda",
            size=SIZE,
            uri=uri,
            context=None,
            parent=None,
            session=session,
            journal=log.disk(0, SIZE),
        )
        asyncio.run(pull([one]))
    log.close()
    return session, one.counts.read


def finished(repository: Repository, session: Session) -> bytes:
    session.seal()
    return content(repository, session.commit(summary_of(session, SIZE, vm="vm1", disk="vda")))


def test_what_is_durable_is_not_read_again_nor_are_its_zeroes(
    repository: Repository, raw: Path, tmp_path: Path
) -> None:
    dead, first = read(repository, raw, tmp_path / "j")
    dead.seal()
    dead.abandon()
    assert first > USED
    session, again = read(repository, raw, tmp_path / "j")
    assert again == 0
    assert session.stored_bytes < 5000
    assert finished(repository, session) == raw.read_bytes()


def test_what_never_became_durable_is_read_again(
    repository: Repository, raw: Path, tmp_path: Path
) -> None:
    dead, first = read(repository, raw, tmp_path / "j")
    dead.abandon()  # the one pack was still open
    session, again = read(repository, raw, tmp_path / "j")
    zeroes = 2 * MIB + 3 * GRAIN
    assert first - zeroes <= again < first
    assert finished(repository, session) == raw.read_bytes()


def test_half_a_journal_spares_half_the_reading(
    repository: Repository, raw: Path, tmp_path: Path
) -> None:
    dead, first = read(repository, raw, tmp_path / "j")
    dead.seal()
    dead.abandon()
    os.truncate(tmp_path / "j", 20 + 16 * 48)  # the first block of some
    second, again = read(repository, raw, tmp_path / "j")
    assert 0 < again < first
    second.seal()
    second.abandon()
    third, last = read(repository, raw, tmp_path / "j")
    assert last == 0
    assert finished(repository, third) == raw.read_bytes()


def test_frames_of_others_are_never_referred_to_on_a_journals_word(
    repository: Repository, raw: Path, tmp_path: Path
) -> None:
    """Whoever could write a journal would else read another VM's data out of his own backup."""
    secret = random.Random(5).randbytes(MIB)
    other = repository.begin(vm="vm2", disk="vda", parent=None)
    _, digest = other.put_named(memoryview(secret))
    other.seal()
    other.abandon()
    log = Journal(FileHere(os.open(tmp_path / "j", os.O_RDWR | os.O_CREAT, 0o600)), BACKUP)
    log.note(0, 0, MIB, digest)
    log.close()
    session, again = read(repository, raw, tmp_path / "j")
    assert again > USED
    assert finished(repository, session) == raw.read_bytes()


def test_a_damaged_frame_is_read_again(repository: Repository, raw: Path, tmp_path: Path) -> None:
    dead, first = read(repository, raw, tmp_path / "j")
    dead.seal()
    dead.abandon()
    session = repository.begin(vm="vm1", disk="vda", parent=None)
    session.lost = frozenset([session.digest(raw.read_bytes()[:MIB])])
    log = Journal(FileHere(os.open(tmp_path / "j", os.O_RDWR)), BACKUP)
    with served(raw) as uri:
        one = DiskPull(
            name="vda",
            size=SIZE,
            uri=uri,
            context=None,
            parent=None,
            session=session,
            journal=log.disk(0, SIZE),
        )
        asyncio.run(pull([one]))
    log.close()
    assert one.counts.read == MIB < first
    assert finished(repository, session) == raw.read_bytes()


DISKS = RECORD.disks


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (DISKS[:1], "other disks"),
        ((*DISKS, replace(DISKS[0], name="vdc")), "other disks"),
        ((replace(DISKS[0], size=5), DISKS[1]), "another size"),
        ((replace(DISKS[0], base=None), DISKS[1]), "otherwise"),
        ((replace(DISKS[0], level=Level.FULL), DISKS[1]), "otherwise"),
        ((replace(DISKS[0], checkpoint=None), DISKS[1]), "otherwise"),
    ],
)
def test_another_plan_is_not_gone_on_with(now: tuple[UnfinishedDisk, ...], why: str) -> None:
    with pytest.raises(CannotGoOnError, match=why):
        check_same(RECORD, now)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ([], ["qemu.json"]),
        (["qemu.json"], []),
        (["qemu.json", "tpm/state"], ["qemu.json"]),
        (["qemu.json", "definition/1-a"], ["qemu.json", "definition/1-b"]),
    ],
)
def test_other_files_are_not_gone_on_with(then: list[str], now: list[str]) -> None:
    with pytest.raises(CannotGoOnError, match="other files"):
        check_files(then, now)


def test_which_files_a_tpm_has_is_no_difference() -> None:
    check_files(["qemu.json", "tpm/a", "tpm/b"], ["tpm/", "qemu.json"])
    check_files([], [])


def test_the_same_plan_is_gone_on_with_in_whatever_order(tmp_path: Path) -> None:
    check_same(RECORD, DISKS[::-1])
