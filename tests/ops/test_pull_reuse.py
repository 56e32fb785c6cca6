"""A disk that is read in full again: only what differs from the earlier backup is stored."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdpull.errors import StoreError
from nbdpull.model.grain import GRAIN
from nbdpull.model.manifest import Manifest
from nbdpull.repo.repository import Repository
from tests.ops.pulling import MIB, content, fill, full, summary_of, write

SIZE = 48 * MIB + 24 * 512
USED = 24 * MIB


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    Repository.create(str(tmp_path / "repo"))
    return Repository.open(str(tmp_path / "repo"), write=True)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Noise with holes, zeroes inside data, and data up to an end that is no grain's."""
    rng = random.Random(7)
    pieces = {at: rng.randbytes(MIB) for at in range(0, USED, MIB)}
    pieces[5 * MIB + 300_000] = bytes(200_000)
    pieces[9 * MIB] = bytes(GRAIN + 100)
    pieces[40 * MIB + 70_000] = rng.randbytes(100_000)
    pieces[SIZE - 30_000] = rng.randbytes(30_000)
    return write(tmp_path / "disk.raw", pieces, size=SIZE)


def packed(repository: Repository, manifest: Manifest) -> int:
    """Bytes of the backup's own packs."""
    listed = repository._store.list(f"d/{manifest.summary.session}")
    return sum(entry.size for entry in listed)


def test_an_unchanged_disk_read_again_stores_only_its_map(
    repository: Repository, raw: Path
) -> None:
    first = full(repository, raw)
    second = full(repository, raw, like=first)
    reader = repository.reader(first)
    data = sum(len(reader.read(one)) for one in reader.segment(0))
    assert packed(repository, first) > USED * 0.9
    assert packed(repository, second) < 5000
    assert second.summary.reused_bytes == data > USED * 0.9
    assert content(repository, second) == raw.read_bytes()


def test_a_third_full_refers_to_the_first_ones_frames(repository: Repository, raw: Path) -> None:
    first = full(repository, raw)
    third = full(repository, raw, like=full(repository, raw, like=first))
    assert packed(repository, third) < 5000
    assert {ref.sid for ref in third.sessions} == {first.summary.session, third.summary.session}


def test_scattered_changes_store_the_frames_around_them(repository: Repository, raw: Path) -> None:
    first = full(repository, raw)
    rng = random.Random(3)
    changed = sorted({rng.randrange(USED // MIB) for _ in range(6)})
    write(raw, {at * MIB + rng.randrange(MIB - 512): rng.randbytes(512) for at in changed})
    second = full(repository, raw, like=first)
    assert len(changed) * GRAIN < packed(repository, second) < len(changed) * 1.05 * MIB
    assert second.summary.reused_bytes > USED - (len(changed) + 1) * MIB
    assert content(repository, second) == raw.read_bytes()


def test_the_earlier_backup_may_go_once_the_later_is_there(
    repository: Repository, raw: Path
) -> None:
    first = full(repository, raw)
    second = full(repository, raw, like=first)
    repository._store.delete(f"m/{first.summary.disk_id}/{first.summary.session}")
    assert content(repository, second) == raw.read_bytes()


def test_data_that_grew_at_its_edges_keeps_the_frames_inside(
    repository: Repository, raw: Path
) -> None:
    write(raw, {30 * MIB + 4 * GRAIN: random.Random(1).randbytes(4 * GRAIN)})
    first = full(repository, raw)
    write(raw, {30 * MIB + 2 * GRAIN: b"a" * GRAIN, 30 * MIB + 8 * GRAIN: b"b" * 512})
    second = full(repository, raw, like=first)
    assert packed(repository, second) < 10_000
    assert content(repository, second) == raw.read_bytes()


@pytest.mark.parametrize("size", [SIZE + 5 * MIB, SIZE + 512, SIZE - 512, 30 * MIB])
def test_a_disk_of_another_size_is_compared_too(
    repository: Repository, raw: Path, size: int
) -> None:
    first = full(repository, raw)
    write(raw, {}, size=size)
    second = full(repository, raw, like=first)
    assert packed(repository, second) < 2 * GRAIN
    assert content(repository, second) == raw.read_bytes()


def test_random_states_are_restored_whatever_was_reused(repository: Repository, raw: Path) -> None:
    rng = random.Random(11)
    manifest = full(repository, raw)
    for _ in range(6):
        for _ in range(rng.randrange(1, 12)):
            at = rng.randrange(SIZE)
            length = min(rng.choice([1, 4096, GRAIN, 3 * GRAIN, MIB]), SIZE - at)
            new = bytes(length) if rng.random() < 0.3 else rng.randbytes(length)
            write(raw, {at: new})
        manifest = full(repository, raw, like=manifest)
        assert content(repository, manifest) == raw.read_bytes()


# -- what is not to be relied on ---------------------------------------------------------------------


def lose_pack(repository: Repository, first: Manifest) -> None:
    repository._store.delete(f"d/{first.summary.session}/00000000")


def cut_pack(repository: Repository, first: Manifest) -> None:
    path = repository._store.path(f"d/{first.summary.session}/00000000")  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1])


def lose_index(repository: Repository, first: Manifest) -> None:
    repository._store.delete(f"x/{first.summary.session}/0")


def flip_index(repository: Repository, first: Manifest) -> None:
    path = repository._store.path(f"x/{first.summary.session}/0")  # type: ignore[attr-defined]
    raw = bytearray(path.read_bytes())
    for at in range(32 + 48, len(raw), 48):
        raw[at + 20] ^= 1
    path.write_bytes(raw)


def forget(repository: Repository, first: Manifest) -> None:
    repository._store.create(f"t/{first.summary.disk_id}/{first.summary.session}", b"")


def remove(repository: Repository, first: Manifest) -> None:
    """What a collector leaves that is killed after it deleted a manifest: the intent is there still."""
    forget(repository, first)
    repository._store.delete(f"m/{first.summary.disk_id}/{first.summary.session}")


@pytest.mark.parametrize("harm", [lose_pack, cut_pack, lose_index, flip_index, forget, remove])
def test_what_can_not_be_relied_on_is_stored_again(
    repository: Repository, raw: Path, harm: Callable[[Repository, Manifest], None]
) -> None:
    first = full(repository, raw)
    harm(repository, first)
    second = full(repository, raw, like=first)
    assert packed(repository, second) > USED * 0.9
    assert second.summary.reused_bytes == 0
    assert content(repository, second) == raw.read_bytes()


def test_the_earlier_backup_is_pinned_before_it_is_seen_to_be_alive(
    repository: Repository, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = full(repository, raw)
    pin = f"{first.summary.disk_id}/{first.summary.session}"
    store = repository._store
    stat, seen = store.stat, list[str]()

    def look(key: str) -> object:
        seen.append(key)
        intents = [json.loads(store.get(one.key, limit=9999)) for one in store.list("s")]
        assert [pin] in [intent["pins"] for intent in intents]
        return stat(key)

    monkeypatch.setattr(store, "stat", look)
    session = repository.begin(vm="vm1", disk="vda", parent=None, like=first)
    assert set(seen) == {f"m/{pin}", f"t/{pin}"}
    session.abandon()


def test_a_single_writer_repository_shares_nothing_between_sessions(
    repository: Repository, raw: Path
) -> None:
    first = full(repository, raw)
    features = {**repository.config.features, "write": ("single_writer",)}
    object.__setattr__(repository.config, "features", features)
    second = full(repository, raw, like=first)
    assert packed(repository, second) > USED * 0.9


def test_frames_of_a_failed_session_are_not_referred_to_after_its_failure(
    repository: Repository, raw: Path
) -> None:
    first = full(repository, raw)
    session = repository.begin(vm="vm1", disk="vda", parent=None, like=first)
    fill(session, raw)
    session.abandon()
    with pytest.raises(StoreError):
        session.commit(summary_of(session, SIZE, vm="vm1", disk="vda"))
