"""Verify against repositories that were damaged on purpose."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import BackupNotFoundError, StoreError
from nbdpull.model.frame import HEADER_SIZE
from nbdpull.model.grain import GRAIN
from nbdpull.model.outcomes import VerifyLevel, VerifyResult
from nbdpull.model.results import Progress, ProgressKind
from nbdpull.model.segment import Interval
from nbdpull.ops.verify import VerifyOptions, verify
from nbdpull.repo import session as session_module
from nbdpull.repo.local import LocalStore
from nbdpull.repo.ranges import Fetched
from nbdpull.repo.repository import DiskReader, Repository
from tests.ops.builder import VM, Disk, add_backup
from tests.ops.retained import retained
from tests.ops.test_restore import flip, packs
from tests.target.helpers import MIB, disk_bytes


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(str(tmp_path / "repo"))


def run(repository: Repository, *backups: str, vm: str | None = None) -> VerifyResult:
    options = VerifyOptions(repository=repository.location, backups=backups, vm=vm)
    return asyncio.run(verify(options))


def random_disk(size: int, seed: int = 1) -> Disk:
    """Incompressible and without zeroes: frames are whole MiBs, stored as they are."""
    return Disk.of(random.Random(seed).randbytes(size))


def chain(repository: Repository, *, count: int = 3) -> list[str]:
    """A full and increments; in each some grains of 'd' are replaced."""
    state = {"d": random_disk(8 * MIB), "e": random_disk(MIB, 2)}
    manifests = add_backup(repository, state)
    ids: list[str] = [manifests["d"].summary.backup]
    for number in range(count - 1):
        after = {name: disk.changed(number, count=3) for name, disk in state.items()}
        manifests = add_backup(
            repository, after, before=state, parents=manifests, time=2000.0 + number
        )
        state = after
        ids.append(manifests["d"].summary.backup)
    return ids


def test_sound_repository_is_ok(repository: Repository) -> None:
    ids = chain(repository)
    result = run(repository)
    assert result.ok
    assert result.damaged == ()
    assert list(result.backups) == ids
    assert result.read_bytes > 9 * MIB


def test_empty_repository_is_ok(repository: Repository) -> None:
    result = run(repository)
    assert result.ok
    assert result.backups == ()
    assert result.frames == 0


def test_each_frame_is_read_once_however_many_backups_share_it(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(repository, count=5)
    seen: Counter[tuple[str, int, int]] = Counter()
    read = DiskReader.read

    def counted(self: DiskReader, interval: Interval, fetched: Fetched | None = None) -> bytes:
        seen[self.manifest.sessions[interval.session].sid, interval.seq, interval.offset] += 1
        return read(self, interval, fetched)

    monkeypatch.setattr(DiskReader, "read", counted)
    assert run(repository).ok
    assert len(seen) >= 9
    assert set(seen.values()) == {1}


def test_frames_side_by_side_are_read_together(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backup(repository, {"d": random_disk(24 * MIB)})
    lengths: list[int] = []
    get_range = LocalStore.get_range

    def noted(self: LocalStore, key: str, start: int, length: int) -> bytes:
        if key.startswith("d/"):
            lengths.append(length)
        return get_range(self, key, start, length)

    monkeypatch.setattr(LocalStore, "get_range", noted)
    assert run(repository).ok
    data = [length for length in lengths if length > MIB // 2]
    # 24 frames of 1 MiB in one pack, four of which fit one request.
    assert len(data) == 6
    assert sum(data) == 24 * (MIB + HEADER_SIZE)


def test_flipped_byte_is_told_with_every_backup_and_range_that_needs_it(
    repository: Repository,
) -> None:
    first = {"d": random_disk(4 * MIB)}
    old = add_backup(repository, first)
    (pack,) = packs(repository)
    # The second frame's middle is overwritten, its last grain zeroed; so the later backup needs the rest.
    grains = dict(first["d"].grains)
    grains[20] = b"x" * GRAIN
    del grains[31]
    second = {"d": Disk(4 * MIB, grains)}
    new = add_backup(repository, second, before=first, parents=old, time=2000.0)
    flip(pack, 128 + 64 + MIB + 64 + 1000)
    result = run(repository)
    assert not result.ok
    assert {damage.key for damage in result.damaged} == {str(pack.relative_to(repository.location))}
    found = {(damage.backup, damage.disk): damage for damage in result.damaged}
    assert found[old["d"].summary.backup, "d"].ranges == ((16 * GRAIN, 32 * GRAIN),)
    assert found[new["d"].summary.backup, "d"].ranges == (
        (16 * GRAIN, 20 * GRAIN),
        (21 * GRAIN, 31 * GRAIN),
    )
    assert len(found) == 2
    assert "expected" in result.damaged[0].problem or "says" in result.damaged[0].problem


def test_only_the_chosen_backups_are_read(repository: Repository) -> None:
    ids = chain(repository)
    newest = max(packs(repository), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    assert run(repository, ids[0]).ok
    assert not run(repository, ids[-1]).ok
    assert not run(repository).ok
    assert run(repository, ids[0]).backups == (ids[0],)
    with pytest.raises(BackupNotFoundError):
        run(repository, "zz")


def test_other_vms_are_left_out(repository: Repository) -> None:
    chain(repository, count=1)
    packs(repository)[0].unlink()
    add_backup(repository, {"d": Disk.of(disk_bytes(MIB, 4))}, vm="other")
    assert run(repository, vm="other").ok
    assert not run(repository, vm=VM).ok
    with pytest.raises(BackupNotFoundError, match=f"of a VM 'othre'; there are .*'other', '{VM}'"):
        run(repository, vm="othre")


def test_missing_pack_is_one_damage_with_all_its_ranges(repository: Repository) -> None:
    disk = Disk.of(disk_bytes(6 * MIB, 4))
    backup = add_backup(repository, {"d": disk})["d"].summary.backup
    (pack,) = packs(repository)
    pack.unlink()
    (damage,) = run(repository).damaged
    assert (damage.key, damage.backup, damage.disk) == (
        str(pack.relative_to(repository.location)),
        backup,
        "d",
    )
    # The map lies in the same pack: nothing of the segment can be told apart any more.
    assert damage.ranges == ((0, 6 * MIB),)


@pytest.mark.parametrize("keep", ["all but one byte", "half", "nothing"])
def test_cut_pack_is_damage(repository: Repository, keep: str) -> None:
    add_backup(repository, {"d": random_disk(4 * MIB)})
    (pack,) = packs(repository)
    pack.chmod(0o600)
    size = pack.stat().st_size
    os.truncate(pack, {"all but one byte": size - 1, "half": size // 2, "nothing": 0}[keep])
    result = run(repository)
    assert not result.ok
    assert {damage.key for damage in result.damaged} == {str(pack.relative_to(repository.location))}


def test_damaged_manifest_is_damage(repository: Repository) -> None:
    ids = chain(repository)
    victim = max(
        (path for path in (Path(repository.location) / "m").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_mtime_ns,
    )
    flip(victim, victim.stat().st_size - 40)
    result = run(repository)
    assert not result.ok
    assert str(victim.relative_to(repository.location)) in {d.key for d in result.damaged}
    assert run(repository, ids[0]).ok


def test_every_object_that_backups_need_is_looked_at(repository: Repository) -> None:
    """Any flipped byte of a pack, index or manifest is found."""
    chain(repository, count=2)
    rng = random.Random(3)
    root = Path(repository.location)
    for folder in ("d", "m", "x"):
        files = [path for path in (root / folder).rglob("*") if path.is_file()]
        assert files
        for path in rng.sample(files, min(3, len(files))):
            # Not the first bytes of a pack: its header is only needed to find frames without the index.
            at = (
                rng.randrange(200, path.stat().st_size - 100)
                if folder == "d"
                else rng.randrange(path.stat().st_size)
            )
            flip(path, at)
            assert not run(repository).ok, (path, at)
            flip(path, at)
    assert run(repository).ok


def test_incomplete_backup_is_damage(repository: Repository) -> None:
    disks = {"d": random_disk(MIB), "e": random_disk(MIB, 2)}
    manifests = add_backup(repository, disks, commit=frozenset({"d"}))
    result = run(repository)
    assert not result.ok
    (damage,) = result.damaged
    assert damage.backup == manifests["d"].summary.backup
    assert "incomplete" in damage.problem
    assert damage.ranges == ()


def test_progress_counts_stored_bytes_of_each_disk(repository: Repository) -> None:
    ids = chain(repository, count=2)
    events: list[Progress] = []
    options = VerifyOptions(repository=repository.location)
    result = asyncio.run(verify(options, progress=events.append))
    ends = [event for event in events if event.kind is ProgressKind.DISK_END]
    assert {event.disk for event in ends} == {f"{name}/{disk}" for name in ids for disk in "de"}
    assert 0 < sum(event.done for event in ends) <= result.read_bytes
    assert all(event.verb == "verify" for event in events)


# -- levels ------------------------------------------------------------------------------------------


def leveled(repository: Repository, level: VerifyLevel, **more: object) -> VerifyResult:
    options = VerifyOptions(repository=repository.location, level=level, **more)  # type: ignore[arg-type]
    return asyncio.run(verify(options))


class Egress:
    """Counts what is read of packs, by the store's ranged gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        read = LocalStore.get_range

        def counted(store: LocalStore, key: str, start: int, length: int) -> bytes:
            raw = read(store, key, start, length)
            self.bytes += len(raw) if key.startswith("d/") else 0
            return raw

        monkeypatch.setattr(LocalStore, "get_range", counted)


def test_level_list_reads_no_byte_of_any_pack(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = chain(repository)
    egress = Egress(monkeypatch)
    result = leveled(repository, VerifyLevel.LIST)
    assert (result.ok, result.level, result.frames) == (True, VerifyLevel.LIST, 0)
    assert list(result.backups) == ids
    assert egress.bytes == 0


@pytest.mark.parametrize("keep", ["all but one byte", "half", "nothing", "more"])
@pytest.mark.parametrize("level", list(VerifyLevel))
def test_every_level_finds_a_pack_of_another_size(
    repository: Repository, keep: str, level: VerifyLevel
) -> None:
    add_backup(repository, {"d": random_disk(4 * MIB)})
    (pack,) = packs(repository)
    pack.chmod(0o600)
    size = pack.stat().st_size
    sizes = {"all but one byte": size - 1, "half": size // 2, "nothing": 0, "more": size + 1}
    os.truncate(pack, sizes[keep])
    result = leveled(repository, level)
    assert not result.ok
    assert {damage.key for damage in result.damaged} == {str(pack.relative_to(repository.location))}
    lost = [lost for damage in result.damaged for lost in damage.ranges]
    # Where the map, which comes last, is cut off nothing of the segment can be found any more.
    assert lost == ([(0, 4 * MIB)] if keep in {"half", "nothing"} else [])


@pytest.mark.parametrize("level", list(VerifyLevel))
def test_every_level_finds_a_missing_index(repository: Repository, level: VerifyLevel) -> None:
    add_backup(repository, {"d": random_disk(MIB)})
    (index,) = (path for path in (Path(repository.location) / "x").rglob("*") if path.is_file())
    index.unlink()
    result = leveled(repository, level)
    assert str(index.relative_to(repository.location)) in {one.key for one in result.damaged}


def test_level_list_tells_the_ranges_that_a_lost_pack_costs(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "FRAMES_PER_PACK", 4)
    disk = random_disk(8 * MIB)
    add_backup(repository, {"d": disk})
    packs(repository)[0].unlink()
    (damage,) = leveled(repository, VerifyLevel.LIST).damaged
    assert damage.ranges == ((0, 4 * MIB),)


def test_a_sample_is_about_its_share_and_the_same_for_the_same_seed(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    grains = {number: bytes([number % 255 + 1]) * GRAIN for number in range(0, 4000, 2)}
    add_backup(repository, {"d": Disk(4000 * GRAIN, grains)})
    seen: list[set[int]] = []
    read = DiskReader.read

    def noted(self: DiskReader, interval: Interval, fetched: Fetched | None = None) -> bytes:
        seen[-1].add(interval.offset)
        return read(self, interval, fetched)

    monkeypatch.setattr(DiskReader, "read", noted)
    for seed in (7, 7, 8):
        seen.append(set())
        result = leveled(repository, VerifyLevel.SAMPLE, share=0.25, seed=seed)
        assert (result.ok, result.share, result.seed) == (True, 0.25, seed)
        assert 400 < len(seen[-1]) < 600
    assert seen[0] == seen[1] != seen[2]
    seen.append(set())
    assert leveled(repository, VerifyLevel.SAMPLE, share=1.0).ok
    assert len(seen[-1]) == 2000


def test_samples_with_many_seeds_find_a_damaged_frame(repository: Repository) -> None:
    add_backup(repository, {"d": random_disk(16 * MIB)})
    (pack,) = packs(repository)
    flip(pack, 128 + 64 + 1000)
    found = [
        not leveled(repository, VerifyLevel.SAMPLE, share=0.2, seed=seed).ok for seed in range(40)
    ]
    assert 1 <= sum(found) < 25


@pytest.mark.parametrize("at", [5, 70, -3, -60, -100])
def test_a_full_verify_looks_around_the_frames_too(repository: Repository, at: int) -> None:
    """A pack's header, directory and footer: nothing is lost with them but the way to rescan it."""
    add_backup(repository, {"d": random_disk(2 * MIB)})
    (pack,) = packs(repository)
    flip(pack, at if at >= 0 else pack.stat().st_size + at)
    (damage,) = run(repository).damaged
    assert damage.key == str(pack.relative_to(repository.location))
    assert damage.ranges == ()
    assert "no frame in it is lost" in damage.problem
    assert leveled(repository, VerifyLevel.LIST).ok


def test_a_repository_that_cannot_be_written_is_verified_all_the_same(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_backup(repository, {"d": random_disk(MIB)})
    (pack,) = packs(repository)
    flip(pack, 128 + 64 + 1000)

    def refuse(store: LocalStore, key: str, data: bytes) -> None:
        raise StoreError("can't write: read-only file system")

    monkeypatch.setattr(LocalStore, "create", refuse)
    result = run(repository)
    assert (result.ok, result.recorded) == (False, 0)
    assert "the damage can't be recorded" in caplog.text


def test_an_index_that_is_gone_is_told_and_put_back(repository: Repository) -> None:
    chain(repository)
    store = LocalStore(Path(repository.location))
    key = next(store.list("x")).key
    before = store.path(key).read_bytes()
    store.delete(key)
    result = run(repository)
    assert not result.ok
    assert [(one.key, one.ranges) for one in result.damaged] == [(key, ())]
    assert result.damaged[0].problem.endswith("its packs say the same; it is put back")
    assert store.path(key).read_bytes() == before
    assert run(repository).ok


def test_an_index_that_is_damaged_is_told_and_costs_no_frame(repository: Repository) -> None:
    chain(repository)
    store = LocalStore(Path(repository.location))
    key = next(store.list("x")).key
    before = store.path(key).read_bytes()
    store.path(key).write_bytes(before[:40])
    result = run(repository)
    assert [(one.key, one.ranges) for one in result.damaged] == [(key, ())]
    assert "delete it and verify again" in result.damaged[0].problem
    store.delete(key)
    assert not run(repository).ok
    assert run(repository).ok
    assert store.path(key).read_bytes() == before


@pytest.mark.parametrize("level", VerifyLevel)
def test_what_is_no_pack_is_passed_over_and_stands_for_none(
    tmp_path: Path, level: VerifyLevel
) -> None:
    repo = retained(tmp_path / "repo")
    pack = repo.store.path(repo.objects("d")[0])
    (pack.parent / "old").write_bytes(b"x")
    assert nbdpull.verify(repo.path, level=level).ok
    pack.rename(pack.parent / "0")
    assert not nbdpull.verify(repo.path, level=level, record=False).ok
