"""Copying what is damaged, and was stored anew by a later backup: the replica reads it too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import DamagedError
from nbdpull.repo.repository import Repository
from tests.ops.healing import History, make_history
from tests.ops.pulling import content


@pytest.fixture
def history(tmp_path: Path) -> History:
    """A full and an increment, their frames apart from each other."""
    return make_history(tmp_path, seed=1, frames=20, backups=2)


def damage(history: History, *, count: int, seed: int = 2) -> None:
    """Damage frames of the newest backup, and put that on record."""
    rng = random.Random(seed)
    for place, clen in rng.sample(history.whole_frames(history.manifests[-1]), count):
        history.damage(place, clen, rng)
    assert not history.verify().ok


def check(history: History, replica: Path) -> None:
    """The replica alone gives back every backup."""
    Path(history.repository.location).rename(replica.with_name("gone"))
    opened = Repository.open(str(replica))
    for manifest, expected in zip(history.manifests, history.contents, strict=True):
        assert content(opened, manifest) == expected
    assert nbdpull.verify(replica).ok


def test_healed_frames_are_read_from_the_replica_alone(history: History, tmp_path: Path) -> None:
    damage(history, count=6)
    assert history.back_up(parent=history.manifests[-1]) == 6
    nbdpull.copy(history.repository.location, tmp_path / "replica")
    # A collection there knows what the copies are for.
    nbdpull.forget(tmp_path / "replica", [history.manifests[-1].summary.backup])
    done = nbdpull.gc(tmp_path / "replica", undo_window_s=0)
    assert (done.packs, done.manifests) == (0, 1)
    del history.manifests[-1], history.contents[-1]
    check(history, tmp_path / "replica")


def test_copies_come_along_although_their_own_backup_does_not(
    history: History, tmp_path: Path
) -> None:
    damage(history, count=3)
    history.back_up(parent=history.manifests[-1])
    damage(history, count=2, seed=5)  # of the copies too: they are healed in turn
    history.back_up(parent=history.manifests[-1])
    del history.manifests[2:], history.contents[2:]
    chosen = [one.summary.backup for one in history.manifests]
    nbdpull.copy(history.repository.location, tmp_path / "replica", chosen)
    check(history, tmp_path / "replica")


@pytest.mark.parametrize("kind", ["missing", "half", "longer"])
def test_a_pack_that_is_lost_and_healed_stays_behind(
    history: History, tmp_path: Path, kind: str
) -> None:
    newest = history.manifests[-1]
    place = next(
        place
        for place, _ in history.whole_frames(newest)
        if place.session == history.manifests[0].summary.session
    )
    path = history.path(place)
    path.chmod(0o600)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if kind == "half" else raw + b"x")
    if kind == "missing":
        path.unlink()
    assert not history.verify().ok or kind == "longer"
    history.back_up(parent=None)
    backup = history.manifests[-1].summary.backup
    result = nbdpull.copy(history.repository.location, tmp_path / "replica", [backup])
    assert list(result.copied) == [backup]
    history.manifests, history.contents = history.manifests[-1:], history.contents[-1:]
    check(history, tmp_path / "replica")


def test_a_pack_that_the_replica_loses_comes_back_although_some_of_it_was_healed(
    history: History, tmp_path: Path
) -> None:
    damage(history, count=1)
    history.back_up(parent=history.manifests[-1])
    replica = tmp_path / "replica"
    nbdpull.copy(history.repository.location, replica)
    records = Repository.open(str(replica)).damage
    records._load()
    (place,) = records._copies
    lost = replica / "d" / place.session / f"{place.seq:08x}"
    lost.unlink()
    again = nbdpull.copy(history.repository.location, replica)
    # The damaged frame keeps the source's pack from being copied as it is: what is needed of it is not there.
    assert again.copied or lost.exists()
    check(history, replica)


def test_damage_that_nothing_healed_is_not_copied(history: History, tmp_path: Path) -> None:
    damage(history, count=2)
    history.source.write(
        dict.fromkeys(range(0, len(history.source.now) - 4096, 65536), b"\x07" * 4096)
    )
    history.back_up(parent=None)
    with pytest.raises(DamagedError):
        nbdpull.copy(history.repository.location, tmp_path / "replica")
    assert nbdpull.list_backups(tmp_path / "replica") == ()
    backup = history.manifests[-1].summary.backup
    nbdpull.copy(history.repository.location, tmp_path / "replica", [backup])
    history.manifests, history.contents = history.manifests[-1:], history.contents[-1:]
    check(history, tmp_path / "replica")


def test_a_pack_in_the_replica_is_read_again_for_each_backup_that_needs_what_was_healed(
    history: History, tmp_path: Path
) -> None:
    damage(history, count=4)
    history.back_up(parent=history.manifests[-1])
    replica = tmp_path / "replica"
    first = history.manifests[0].summary.backup
    nbdpull.copy(history.repository.location, replica, [first])
    # What carries the copies is lost there before the second backup comes.
    for path in replica.glob("b/*/*"):
        path.unlink()
    second = history.manifests[1].summary.backup
    nbdpull.copy(history.repository.location, replica, [second])
    del history.manifests[2:], history.contents[2:]
    check(history, replica)
