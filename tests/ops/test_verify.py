"""Verify against repositories that were damaged on purpose."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from nbdpull.errors import BackupNotFoundError
from nbdpull.model.grain import GRAIN
from nbdpull.model.results import Progress, ProgressKind, VerifyResult
from nbdpull.model.segment import Interval
from nbdpull.ops.verify import VerifyOptions, verify
from nbdpull.repo.repository import DiskReader, Repository
from tests.ops.builder import VM, Disk, add_backup
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

    def counted(self: DiskReader, interval: Interval) -> bytes:
        seen[self.manifest.sessions[interval.session].sid, interval.seq, interval.offset] += 1
        return read(self, interval)

    monkeypatch.setattr(DiskReader, "read", counted)
    assert run(repository).ok
    assert len(seen) >= 9
    assert set(seen.values()) == {1}


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
    assert run(repository, vm="other").ok
    assert not run(repository, vm=VM).ok


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
