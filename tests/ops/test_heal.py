"""Damage is found, put on record, and healed by the next backup: in the older backups too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from blake3 import blake3

from nbdpull.errors import DamagedError, StoreError
from nbdpull.model.damage import DamagedFrame, HealedFrame, Place
from nbdpull.model.frame import HEADER_SIZE, FrameKind
from nbdpull.model.grain import GRAIN
from nbdpull.model.ids import SessionId
from nbdpull.repo.damage import kept_packs, stale_records
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import Repository
from tests.ops.healing import History, campaign, make_history, noise
from tests.ops.pulling import content
from tests.ops.test_restore import run as run_restore


@pytest.fixture
def history(tmp_path: Path) -> History:
    """A full and two increments, their frames apart from each other."""
    return make_history(tmp_path, seed=1, frames=30, backups=3)


def test_every_damaged_frame_of_an_unchanged_source_is_healed_in_every_backup(
    tmp_path: Path,
) -> None:
    found = campaign(tmp_path, seed=5, frames=40, backups=4)
    assert found["damaged"] == found["healed"] == found["read_from_copies"] == 40
    assert found["found_by_verify"]
    assert found["verify_ok_after"]
    assert found["wrong_backups_after"] == []


def test_damage_is_recorded_once(history: History) -> None:
    rng = random.Random(1)
    for place, clen in history.whole_frames(history.manifests[-1])[:3]:
        history.damage(place, clen, rng)
    assert history.verify(record=False).recorded == 0
    assert not list(Path(history.repository.location).glob("b/*/*"))
    assert history.verify().recorded == 3
    assert history.verify().recorded == 0
    assert len(list(Path(history.repository.location).glob("b/*/*"))) == 1


def test_what_the_source_has_overwritten_stays_lost_but_the_new_backup_is_whole(
    history: History,
) -> None:
    rng = random.Random(2)
    frames = history.whole_frames(history.manifests[-1])
    reader = history.repository.reader(history.manifests[-1])
    two = next(one for one in reader.segment(0) if one.n == one.flen == 2)
    place = Place(history.manifests[-1].sessions[two.session].sid, two.seq, two.offset)
    history.damage(place, two.clen, rng)
    (other, clen) = next(one for one in frames if one[0] != place)
    history.damage(other, clen, rng)
    assert history.verify().recorded == 2
    # One of the frame's two grains: the other one is clean for the bitmap, and lost in the repository.
    history.source.write({two.start * GRAIN: noise(rng, 1)})
    assert history.back_up(parent=history.manifests[-1]) == 1
    assert content(history.repository, history.manifests[-1]) == history.contents[-1]
    result = history.verify()
    assert not result.ok
    assert {damage.ranges for damage in result.damaged} == {
        ((two.start * GRAIN, (two.start + 2) * GRAIN),)
    }
    assert history.manifests[-1].summary.backup not in {one.backup for one in result.damaged}
    # The next one has nothing left to do: what can't be healed is not read again each time.
    assert history.back_up(parent=history.manifests[-1]) == 0
    assert history.manifests[-1].summary.read_bytes == history.manifests[-1].summary.size
    assert history.verify(backups=(f"{4:016x}",)).ok


def test_a_full_heals_older_backups_too_and_stores_what_it_heals_once(history: History) -> None:
    rng = random.Random(3)
    history.back_up(parent=None)  # stores anew what was partly overwritten
    damaged = rng.sample(history.whole_frames(history.manifests[-1]), 8)
    for place, clen in damaged:
        history.damage(place, clen, rng)
    history.verify()
    assert history.back_up(parent=None) == 8
    assert history.wrong() == []
    assert history.verify().ok
    packs = Path(history.repository.location) / "d" / history.manifests[-1].summary.session
    stored = sum(path.stat().st_size for path in packs.iterdir())
    assert stored < sum(clen + 64 for _, clen in damaged) + 10_000


@pytest.mark.parametrize("kind", ["missing", "empty", "half"])
def test_a_lost_pack_is_healed_by_the_full_that_follows(history: History, kind: str) -> None:
    frames = history.whole_frames(history.manifests[-1])
    path = history.path(next(place for place, _ in frames))
    path.chmod(0o600)
    if kind == "missing":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(0 if kind == "empty" else path.stat().st_size // 2)
    assert not history.verify().ok
    assert history.back_up(parent=None) > 0
    newest = history.repository.reader(history.manifests[-1])
    assert newest.missing_packs(copies=False) == []
    assert content(history.repository, history.manifests[-1]) == history.contents[-1]
    # In an older backup, whose own map lies elsewhere, only what is left of frames that were partly
    # overwritten stays lost: nobody has all of their bytes any more.
    result = history.verify(backups=(f"{2:016x}",))
    parts = [
        (one.start * GRAIN, (one.start + one.n) * GRAIN)
        for one in history.repository.reader(history.manifests[2]).segment(0)
        if one.n < one.flen
    ]
    lost = [lost for damage in result.damaged for lost in damage.ranges]
    assert all(any(a <= start and end <= b for a, b in parts) for start, end in lost)
    # How many that are depends on which worker came first: on what lay in the half that is gone.
    left = path.stat().st_size if path.exists() else 0
    gone = {
        place
        for place, clen in history.whole_frames(history.manifests[2])
        if history.path(place) == path and place.offset + HEADER_SIZE + clen > left
    }
    assert result.healed >= len(gone) > 5


@pytest.mark.parametrize("audit", [0, 8])
def test_a_lost_map_of_the_parent_makes_its_segment_be_read_again(
    history: History, audit: int
) -> None:
    parent = history.manifests[-1]
    ref = parent.segments[0]
    assert ref is not None
    place = Place(parent.sessions[ref.session].sid, ref.seq, ref.offset)
    history.damage(place, ref.clen, random.Random(4))
    assert not history.verify(backups=(parent.summary.backup,)).ok
    history.back_up(parent=parent, audit=audit)
    assert content(history.repository, history.manifests[-1]) == history.contents[-1]


@pytest.mark.parametrize("audit", [0, 8])
def test_a_lost_map_that_nobody_noticed_does_not_stop_the_next_backup(
    history: History, audit: int
) -> None:
    parent = history.manifests[-1]
    ref = parent.segments[0]
    assert ref is not None
    history.damage(
        Place(parent.sessions[ref.session].sid, ref.seq, ref.offset), ref.clen, random.Random(4)
    )
    history.source.write({GRAIN: noise(random.Random(4), 1)})
    history.back_up(parent=parent, audit=audit)
    assert content(history.repository, history.manifests[-1]) == history.contents[-1]


def test_a_copy_that_is_damaged_in_turn_is_healed_again(history: History) -> None:
    rng = random.Random(6)
    place, clen = history.whole_frames(history.manifests[-1])[5]
    history.damage(place, clen, rng)
    history.verify()
    assert history.back_up(parent=history.manifests[-1]) == 1
    (healed,) = Repository.open(history.repository.location).damage.copies(place)
    history.damage(healed.copy, healed.clen, rng)
    result = history.verify()
    assert not result.ok
    assert result.recorded > 0
    assert history.back_up(parent=history.manifests[-1]) == 1
    assert history.verify().ok
    assert history.wrong() == []


def test_a_failed_restore_puts_on_record_what_it_found(history: History, tmp_path: Path) -> None:
    rng = random.Random(7)
    place, clen = history.whole_frames(history.manifests[-1])[3]
    history.damage(place, clen, rng)
    backup = history.manifests[-1].summary.backup
    with pytest.raises(DamagedError):
        run_restore(history.repository, backup, tmp_path / "out")
    assert set(Repository.open(history.repository.location).damage.lost()) == {place}
    assert history.back_up(parent=history.manifests[-1]) == 1
    run_restore(history.repository, backup, tmp_path / "out")
    assert (tmp_path / "out" / "vda.raw").read_bytes() == history.contents[-2]


def test_a_record_that_lies_about_a_copy_does_no_harm(history: History) -> None:
    """It names another frame, one that is not there, or has another digest."""
    frames = history.whole_frames(history.manifests[-1])
    (victim, clen), (other, other_clen) = frames[0], frames[1]
    manifest = history.manifests[-1]
    reader = history.repository.reader(manifest)
    number = next(n for n, ref in enumerate(manifest.sessions) if ref.sid == victim.session)
    written = reader.written(number, victim.seq, victim.offset)
    index = dict(manifest.sessions[number].index)[0]
    history.damage(victim, clen, random.Random(8))
    lies = [
        (other, other_clen, index),
        (Place(other.session, other.seq, other.offset + 1), other_clen, index),
        (Place(manifest.summary.session, 99, 128), other_clen, index),
        (other, other_clen, bytes(32)),
        (victim, clen, index),
    ]
    for place, length, digest in lies:
        row = HealedFrame(
            damaged=victim,
            copy=place,
            clen=length,
            rlen=written.rlen,
            digest=written.digest,
            index=digest,
        )
        records = Repository.open(history.repository.location, write=True).damage
        records.add_healed(SessionId(f"{lies.index((place, length, digest)):032x}"), [row])
    repository = Repository.open(history.repository.location)
    with pytest.raises(DamagedError):
        content(repository, history.manifests[-1])
    assert not history.verify().ok
    # And what really heals it still does; the frame that was named as a copy may be stored again too.
    assert history.back_up(parent=history.manifests[-1]) >= 1
    assert history.wrong() == []


def test_damaged_records_are_passed_over(history: History) -> None:
    rng = random.Random(9)
    for place, clen in history.whole_frames(history.manifests[-1])[:2]:
        history.damage(place, clen, rng)
    history.verify()
    (record,) = Path(history.repository.location).glob("b/*/*")
    record.chmod(0o600)
    raw = record.read_bytes()
    record.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    assert Repository.open(history.repository.location).damage.lost() == {}
    assert history.verify().recorded == 2


def test_a_collector_spares_copies_of_what_is_needed_and_nothing_else(history: History) -> None:
    rng = random.Random(10)
    place, clen = history.whole_frames(history.manifests[-1])[5]
    history.damage(place, clen, rng)
    history.verify()
    history.back_up(parent=history.manifests[-1])
    repository = Repository.open(history.repository.location)
    (healed,) = repository.damage.copies(place)
    old, new = place[:2], healed.copy[:2]
    store = repository._store
    assert kept_packs(store, repository.id, {old}) == ({new}, set())
    assert kept_packs(store, repository.id, {old, new}) == (set(), set())
    assert kept_packs(store, repository.id, {(SessionId("ab" * 16), 0)}) == (set(), set())
    records = sorted(entry.key for entry in store.list("b"))
    assert stale_records(store, repository.id, {old, new}) == []
    assert sorted(one.key for one in stale_records(store, repository.id, set())) == records


def test_gc_keeps_the_copies_and_drops_them_with_what_they_stand_for(history: History) -> None:
    # One that the disk holds still: which place in the pack that is depends on which worker came first.
    first, newest = (history.whole_frames(history.manifests[n]) for n in (0, -1))
    place, clen = sorted({*first} & {*newest})[5]
    history.damage(place, clen, random.Random(11))
    history.verify()
    # A full: nothing but the record says that its own frame is needed by an older backup.
    history.back_up(parent=None)
    repository = Repository.open(history.repository.location, write=True)
    (healed,) = repository.damage.copies(place)
    last = history.manifests[-1].summary
    repository.forget([f"{last.disk_id}/{last.session}"], "test")
    repository.collector(undo_window_s=0.0).run()
    assert [found.id for found in repository.backups()] == [f"{n:016x}" for n in range(3)]
    assert history.verify().healed == 1
    assert history.path(healed.copy).exists()
    history.manifests.pop()
    history.contents.pop()
    assert history.wrong() == []
    # With the backups that need the damaged frame the copy goes, and the records.
    for manifest in history.manifests:
        one = manifest.summary
        repository.forget([f"{one.disk_id}/{one.session}"], "test")
    repository.collector(undo_window_s=0.0).run()
    assert not history.path(healed.copy).exists()
    assert not [path for path in Path(repository.location).glob("b/*/*") if path.is_file()]


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_gc_keeps_the_copies_of_a_record_that_is_damaged(history: History, how: str) -> None:
    first, newest = (history.whole_frames(history.manifests[n]) for n in (0, -1))
    place, clen = sorted({*first} & {*newest})[5]
    history.damage(place, clen, random.Random(11))
    history.verify()
    history.back_up(parent=None)
    repository = Repository.open(history.repository.location, write=True)
    (healed,) = repository.damage.copies(place)
    last = history.manifests.pop().summary
    history.contents.pop()
    record = Path(repository.location, "b", healed.copy.session, "0")
    raw = record.read_bytes()
    record.chmod(0o600)
    record.write_bytes(
        {"flipped": raw[:70] + bytes([raw[70] ^ 1]) + raw[71:], "cut": raw[:-1]}[how]
    )
    repository.forget([f"{last.disk_id}/{last.session}"], "test")
    repository.collector(undo_window_s=0.0).run()
    assert history.path(healed.copy).exists()
    # Once the record is what it was, so are the older backups.
    record.write_bytes(raw)
    assert history.wrong() == []


class Unread(LocalStore):
    """Records can't be read just now."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if key.startswith("b/"):
            raise StoreError(f"can't read {key}: it answers 503")
        return super().get_range(key, start, length)


def test_gc_deletes_nothing_while_a_record_can_not_be_read(history: History) -> None:
    place, clen = history.whole_frames(history.manifests[0])[5]
    history.damage(place, clen, random.Random(11))
    history.verify()
    repository = Repository.open(history.repository.location, write=True)
    last = history.manifests[-1].summary
    repository.forget([f"{last.disk_id}/{last.session}"], "test")
    before = [one.key for one in repository._store.list("d")]
    repository._store = Unread(Path(repository.location))
    with pytest.raises(StoreError, match="503"):
        repository.collector(undo_window_s=0.0).run()
    assert [one.key for one in repository._store.list("d")] == before


def test_an_encrypted_repository_heals_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDPULL_PASSWORD", "secret")
    found = campaign(tmp_path, seed=6, frames=10, backups=3, password=b"secret")
    assert found["damaged"] == found["healed"] == found["read_from_copies"] == 10
    assert found["verify_ok_after"]
    assert found["wrong_backups_after"] == []


@pytest.mark.parametrize("full", [False, True])
def test_records_of_damage_that_lie_make_no_backup_wrong(history: History, *, full: bool) -> None:
    """They are believed only as far as the source's bytes, and the parent's index, bear them out."""
    rng = random.Random(12)
    manifest = history.manifests[-1]
    disk = manifest.summary.disk_id
    size = len(history.source.now)
    places = [place for place, _ in history.whole_frames(manifest)]
    rows = []
    for number, place in enumerate(places[:12]):
        start, length = rng.choice(
            [
                (number * 3 * GRAIN + 512, GRAIN),  # between two grains
                (number * 3 * GRAIN, 1000),  # ends inside one
                (15 * GRAIN, 2 * GRAIN),  # across the border of a MiB
                (number * 3 * GRAIN, 2 * GRAIN),  # perhaps longer than it is
                (size - 100, 100),
                (size - 100, GRAIN),  # beyond the end
                ((1 << 62) // GRAIN * GRAIN, GRAIN),
            ]
        )
        raw = bytes(history.source.now[start : start + length])
        rows.append(
            DamagedFrame(
                place=place,
                clen=100,
                rlen=length,
                digest=blake3(raw).digest(),
                kind=FrameKind.DATA,
                disk=disk,
                start=start,
            )
        )
    Repository.open(history.repository.location, write=True).damage.add_damage(rows)
    history.source.write({5 * GRAIN: noise(rng, 1)})
    history.back_up(parent=None if full else manifest)
    assert history.wrong() == []
    assert history.verify().ok
