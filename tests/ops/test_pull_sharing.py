"""Disks of different VMs that hold the same: through a base, and through a digest cache."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdpull.model.manifest import Manifest
from nbdpull.repo import digestindex
from nbdpull.repo.digestcache import DigestCache
from nbdpull.repo.digestindex import DigestIndex
from nbdpull.repo.repository import Repository
from tests.ops.pulling import MIB, content, fill, summary_of, write

SIZE = 16 * MIB
USED = 10 * MIB


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    Repository.create(str(tmp_path / "repo"))
    return Repository.open(str(tmp_path / "repo"), write=True)


@pytest.fixture
def cache(tmp_path: Path, repository: Repository) -> Iterator[DigestCache]:
    cache = DigestCache(tmp_path / "cache", repository.id)
    yield cache
    cache.close()


def template(tmp_path: Path) -> dict[int, bytes]:
    rng = random.Random(5)
    return {at * MIB: rng.randbytes(MIB) for at in range(USED // MIB)}


def clone(tmp_path: Path, number: int) -> Path:
    """A disk of the template with a little of its own."""
    own = {12 * MIB: random.Random(number).randbytes(200_000)}
    return write(tmp_path / f"clone{number}.raw", template(tmp_path) | own, size=SIZE)


def take(
    repository: Repository,
    raw: Path,
    vm: str,
    *,
    base: DigestIndex | None = None,
    cache: DigestCache | None = None,
) -> Manifest:
    session = repository.begin(vm=vm, disk="vda", parent=None, base=base, cache=cache)
    fill(session, raw)
    session.seal()
    manifest = session.commit(summary_of(session, raw.stat().st_size, vm=vm, disk="vda"))
    if cache is not None:
        repository.learn(cache, manifest)
    return manifest


def packed(repository: Repository, manifest: Manifest | None = None) -> int:
    prefix = "d" if manifest is None else f"d/{manifest.summary.session}"
    return sum(entry.size for entry in repository._store.list(prefix))


def index_of(repository: Repository, manifest: Manifest) -> DigestIndex:
    return repository.digest_index(repository.find(manifest.summary.backup))


# -- base --------------------------------------------------------------------------------------------


def test_a_clone_stores_only_its_own_data_beside_its_base(
    repository: Repository, tmp_path: Path
) -> None:
    golden = take(repository, clone(tmp_path, 0), "golden")
    index = index_of(repository, golden)
    raw = clone(tmp_path, 1)
    one = take(repository, raw, "one", base=index)
    assert packed(repository, one) < 250_000
    assert one.summary.reused_bytes == USED
    assert content(repository, one) == raw.read_bytes()
    intents = [
        json.loads(repository._store.get(e.key, limit=9999)) for e in repository._store.list("s")
    ]
    pin = f"{golden.summary.disk_id}/{golden.summary.session}"
    assert [pin] in [intent["pins"] for intent in intents]


def test_data_is_found_at_another_place_of_the_disk(repository: Repository, tmp_path: Path) -> None:
    index = index_of(repository, take(repository, clone(tmp_path, 0), "golden"))
    moved = {at + 3 * MIB: data for at, data in template(tmp_path).items()}
    raw = write(tmp_path / "moved.raw", moved, size=SIZE)
    one = take(repository, raw, "one", base=index)
    assert packed(repository, one) < 10_000
    assert content(repository, one) == raw.read_bytes()


def test_an_index_takes_sixteen_bytes_a_frame_and_is_bounded(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = take(repository, clone(tmp_path, 0), "golden")
    index = index_of(repository, golden)
    assert index.whole
    assert index.nbytes == 16 * (USED // MIB + 1)
    monkeypatch.setattr(digestindex, "FRAMES_MAX", 6)
    part = index_of(repository, golden)
    assert not part.whole
    assert part.nbytes == 96
    one = take(repository, clone(tmp_path, 1), "one", base=part)
    assert 5 * MIB <= one.summary.reused_bytes <= 6 * MIB


def test_a_base_that_is_being_forgotten_is_not_relied_on(
    repository: Repository, tmp_path: Path
) -> None:
    golden = take(repository, clone(tmp_path, 0), "golden")
    index = index_of(repository, golden)
    repository._store.create(f"t/{golden.summary.disk_id}/{golden.summary.session}", b"")
    raw = clone(tmp_path, 1)
    one = take(repository, raw, "one", base=index)
    assert one.summary.reused_bytes == 0
    assert packed(repository, one) > USED


# -- cache -------------------------------------------------------------------------------------------


def test_clones_of_a_template_store_it_once(
    repository: Repository, cache: DigestCache, tmp_path: Path
) -> None:
    raws = [clone(tmp_path, number) for number in range(5)]
    manifests = [
        take(repository, raw, f"vm{number}", cache=cache) for number, raw in enumerate(raws)
    ]
    assert packed(repository) < USED + 5 * 250_000
    for manifest, raw in zip(manifests, raws, strict=True):
        assert content(repository, manifest) == raw.read_bytes()


def test_what_was_shared_stays_shared_when_the_first_backup_is_gone(
    repository: Repository, cache: DigestCache, tmp_path: Path
) -> None:
    first = take(repository, clone(tmp_path, 0), "vm0", cache=cache)
    take(repository, clone(tmp_path, 1), "vm1", cache=cache)
    repository._store.delete(f"m/{first.summary.disk_id}/{first.summary.session}")
    third = take(repository, clone(tmp_path, 2), "vm2", cache=cache)
    assert packed(repository, third) < 250_000


def test_a_repository_does_without_a_cache_that_was_lost(
    repository: Repository, cache: DigestCache, tmp_path: Path
) -> None:
    raw = clone(tmp_path, 0)
    first = take(repository, raw, "vm0", cache=cache)
    empty = DigestCache(tmp_path / "other", repository.id)
    second = take(repository, clone(tmp_path, 1), "vm1", cache=empty)
    empty.close()
    assert packed(repository, second) > USED
    assert content(repository, first) == raw.read_bytes()


def gone(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    repository._store.delete(f"m/{first.summary.disk_id}/{first.summary.session}")
    for prefix in ("d", "x"):
        for entry in list(repository._store.list(f"{prefix}/{first.summary.session}")):
            repository._store.delete(entry.key)


def forgotten(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    repository._store.create(f"t/{first.summary.disk_id}/{first.summary.session}", b"")


def pack_lost(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    repository._store.delete(f"d/{first.summary.session}/00000000")


def index_lost(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    repository._store.delete(f"x/{first.summary.session}/0")


def index_cut(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    path = repository._store.path(f"x/{first.summary.session}/0")  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:50])


def manifest_cut(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    path = repository._store.path(  # type: ignore[attr-defined]
        f"m/{first.summary.disk_id}/{first.summary.session}"
    )
    path.write_bytes(path.read_bytes()[:-1])


def change(cache: DigestCache, *statements: str) -> None:
    db = sqlite3.connect(cache.path)
    with db:
        for statement in statements:
            assert db.execute(statement).rowcount > 0
    db.close()


def other_place(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    change(cache, "UPDATE frames SET offset = offset + 64")


def other_frames(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    change(
        cache,
        "UPDATE frames SET offset = (SELECT MIN(f.offset) FROM frames f)",
        "UPDATE frames SET digest = zeroblob(16) WHERE digest = (SELECT MIN(digest) FROM frames)",
    )


def other_types(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    change(cache, "UPDATE frames SET offset = 'x'", "UPDATE packs SET sid = 7")


def other_pack(repository: Repository, first: Manifest, cache: DigestCache) -> None:
    change(cache, "UPDATE packs SET seq = 99999999999999")


@pytest.mark.parametrize(
    "harm",
    [
        gone,
        forgotten,
        pack_lost,
        index_lost,
        index_cut,
        manifest_cut,
        other_place,
        other_types,
        other_pack,
    ],
)
def test_a_stale_or_wrong_cache_costs_storing_again_and_nothing_else(
    repository: Repository,
    cache: DigestCache,
    tmp_path: Path,
    harm: Callable[[Repository, Manifest, DigestCache], None],
) -> None:
    first = take(repository, clone(tmp_path, 0), "vm0", cache=cache)
    harm(repository, first, cache)
    raw = clone(tmp_path, 1)
    second = take(repository, raw, "vm1", cache=cache)
    assert second.summary.reused_bytes == 0
    assert content(repository, second) == raw.read_bytes()


def test_a_cache_that_swaps_frames_restores_the_right_ones(
    repository: Repository, cache: DigestCache, tmp_path: Path
) -> None:
    first = take(repository, clone(tmp_path, 0), "vm0", cache=cache)
    other_frames(repository, first, cache)
    raw = clone(tmp_path, 1)
    second = take(repository, raw, "vm1", cache=cache)
    assert second.summary.reused_bytes <= MIB
    assert content(repository, second) == raw.read_bytes()


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_damaged_file_is_not_used_and_replaced_later(
    repository: Repository, tmp_path: Path, keep: int
) -> None:
    folder = tmp_path / "cache"
    cache = DigestCache(folder, repository.id)
    take(repository, clone(tmp_path, 0), "vm0", cache=cache)
    cache.close()
    raw = cache.path.read_bytes()
    cache.path.write_bytes(raw[:keep] + random.Random(1).randbytes(len(raw) - keep))
    stored = []
    for number in (1, 2, 3):
        again = DigestCache(folder, repository.id)
        disk = clone(tmp_path, number)
        manifest = take(repository, disk, f"vm{number}", cache=again)
        again.close()
        assert content(repository, manifest) == disk.read_bytes()
        stored.append(packed(repository, manifest))
    assert stored[-1] < 250_000


def test_a_folder_that_can_not_be_used_is_no_failure(
    repository: Repository, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    cache = DigestCache(tmp_path / "file" / "x", repository.id)
    raw = clone(tmp_path, 0)
    assert content(repository, take(repository, raw, "vm0", cache=cache)) == raw.read_bytes()


def test_two_repositories_share_a_folder_and_no_frames(
    repository: Repository, cache: DigestCache, tmp_path: Path
) -> None:
    take(repository, clone(tmp_path, 0), "vm0", cache=cache)
    Repository.create(str(tmp_path / "second"))
    second = Repository.open(str(tmp_path / "second"), write=True)
    its = DigestCache(tmp_path / "cache", second.id)
    raw = clone(tmp_path, 1)
    manifest = take(second, raw, "vm1", cache=its)
    its.close()
    assert manifest.summary.reused_bytes == 0
    assert content(second, manifest) == raw.read_bytes()


def test_everything_the_cache_may_lead_to_is_pinned(
    repository: Repository, cache: DigestCache, tmp_path: Path
) -> None:
    taken = [take(repository, clone(tmp_path, n), f"vm{n}", cache=cache) for n in range(3)]
    session = repository.begin(vm="vm3", disk="vda", parent=None, cache=cache)
    intent = json.loads(repository._store.get(f"s/{session.id}", limit=9999))
    session.abandon()
    # The first one's only pack is vouched for by the last one too.
    used = {f"{one.summary.disk_id}/{one.summary.session}" for one in taken[1:]}
    assert set(intent["pins"]) == used
