"""A power cut at any moment loses nothing; `scripts/torture power-cuts` tries hundreds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdpull.errors import StoreError
from nbdpull.model.grain import GRAIN
from nbdpull.repo.local import LocalStore
from tests.protocol.oslog import Event, OsLog, Survivors, dropping
from tests.protocol.powercut import PowerCut
from tests.protocol.world import World, memory_repositories
from tests.repo.helpers import store_changes, summary_for


@pytest.fixture(autouse=True)
def opened() -> Iterator[None]:
    with memory_repositories():
        yield


def test_what_was_acknowledged_survives(folder: Path) -> None:
    campaign = PowerCut(folder, 5, rounds=2)
    assert campaign.length > 500
    assert campaign.run(15) == 15


@pytest.mark.parametrize("left_out", ["the file's data", "the folder's entry"])
def test_a_store_that_does_not_sync_is_caught(
    left_out: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if left_out == "the file's data":
        monkeypatch.setattr(OsLog, "recording", _without("fdatasync", OsLog.recording))
    else:
        monkeypatch.setattr(OsLog, "recording", _without("fsync", OsLog.recording))
    campaign = PowerCut(folder, 5, rounds=1)
    with pytest.raises(AssertionError, match="cut after"):
        campaign.run(40)


def _without(name: str, recording: object) -> object:
    """Records, but the code's calls of that function do nothing."""

    @contextmanager
    def record(self: OsLog) -> Iterator[None]:
        with recording(self):  # type: ignore[operator]
            setattr(os, name, lambda _fd: None)
            yield

    return record


def test_what_a_killed_run_had_not_synced_is_synced_by_who_builds_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between giving a pack its name and syncing the folder; the next run takes the pack over."""
    root = tmp_path / "repo"
    root.mkdir()
    world, log = World(), OsLog(root)
    size = 64 * GRAIN
    changes = {at: random.Random(at).randbytes(GRAIN) for at in (0, 3, 17)}

    class Died(Exception):
        pass

    with log.recording():
        repository = world.repository(LocalStore(root))
        session = repository.begin(vm="vm", disk="vda", parent=None)
        store_changes(session, None, size, changes)
        fsync = os.fsync

        def dying(fd: int) -> None:
            if Path(f"/proc/self/fd/{fd}").readlink().name == session.id:
                raise Died
            fsync(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying)
            with pytest.raises((Died, StoreError)):
                session.seal()
        session.abandon()
        repository = world.repository(LocalStore(root))
        after = repository.begin(vm="vm", disk="vda", parent=None)
        assert after.adopted.packs == 1
        store_changes(after, None, size, changes)
        manifest = after.commit(summary_for(after, size=size, backup="ab" * 8))
    survivors = Survivors()
    for event in log.events:
        survivors.add(event)
    survivors.write_to(tmp_path / "after", lambda: False)
    left = world.repository(LocalStore(tmp_path / "after"))
    assert [one.id for one in left.backups()] == ["ab" * 8]
    assert left.reader(left.manifest(manifest.summary)).missing_packs(indexes=True) == []


# -- the log itself --------------------------------------------------------------------------------


def test_the_log_of_one_object_is_what_the_store_promises(tmp_path: Path) -> None:
    log = OsLog(tmp_path)
    before = os.fsync
    with log.recording():
        LocalStore(tmp_path).create("m/" + "a" * 32, b"data")
    assert os.fsync is before
    kinds = [event.kind for event in log.events]
    # The object's folder first, then the one that has its entry: nothing is told to be there before both.
    assert kinds == ["write", "sync-file", "mkdir", "link", "sync-folder", "sync-folder"]
    assert [event.path for event in log.events[4:]] == ["m", "."]
    assert log.events[0].data == b"data"
    assert log.events[3].path == "m/" + "a" * 32


def left(root: Path, events: list[Event], *, keep: bool = False) -> dict[str, bytes]:
    survivors = Survivors()
    for event in events:
        survivors.add(event)
    survivors.write_to(root, lambda: keep)
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


MADE = [
    Event("mkdir", "d"),
    Event("sync-folder", ".", covers=1),
    Event("write", inode=1, offset=2, data=b"xy"),
    Event("sync-file", inode=1, covers=3),
    Event("link", "d/a", inode=1),
    Event("sync-folder", "d", covers=5),
]


def test_only_what_was_synced_survives(tmp_path: Path) -> None:
    assert left(tmp_path / "1", MADE) == {"d/a": b"\0\0xy"}
    assert left(tmp_path / "2", MADE[:5]) == {}
    assert left(tmp_path / "3", MADE[:5], keep=True) == {"d/a": b"\0\0xy"}
    no_data = [event for event in MADE if event.kind != "sync-file"]
    assert left(tmp_path / "4", no_data) == {"d/a": b""}
    no_folder = [MADE[0], *MADE[2:]]
    assert left(tmp_path / "5", no_folder) == {}
    assert left(tmp_path / "6", [*MADE, Event("unlink", "d/a")]) == {"d/a": b"\0\0xy"}
    gone = [*MADE, Event("unlink", "d/a"), Event("sync-folder", "d", covers=7)]
    assert left(tmp_path / "7", gone) == {}


def test_a_sync_covers_only_what_was_there_when_it_began(tmp_path: Path) -> None:
    late = [*MADE[:5], Event("sync-folder", "d", covers=4)]
    assert left(tmp_path / "1", late) == {}


def test_some_cuts_drop_all_and_some_keep_a_part() -> None:
    kept = []
    for seed in range(40):
        keep = dropping(random.Random(seed))
        kept.append(sum(keep() for _ in range(100)))
    assert 0 in kept
    assert 100 in kept
    assert any(0 < count < 100 for count in kept)
