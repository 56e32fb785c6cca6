"""Which backup the changes of a foreign bitmap are counted from, and when that can't be told."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import UsageError
from nbdpull.model.chain import Decision
from nbdpull.model.results import Level
from nbdpull.ops.disknames import check_names
from nbdpull.ops.lineage import Chain
from nbdpull.repo.repository import Repository
from nbdpull.source.base import Disk
from tests.ops.builder import VM, add_backup
from tests.ops.retained import DAY, SIZE, Retained

CONTEXT = "qemu:dirty-bitmap:b"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Retained:
    """A full and two incrementals: some days old, as are their objects."""
    path = tmp_path_factory.mktemp("made") / "repo"
    Repository.create(str(path))
    made = Retained(path, Repository.open(str(path), write=True))
    for number in range(3):
        days = 3 - number
        made.add(taken=time.time() - days * DAY)
        for manifest in made.manifests[-1].values():
            key = f"m/{manifest.summary.disk_id}/{manifest.summary.session}"
            then = time.time() - days * DAY + 1
            os.utime(made.store.path(key), (then, then))
    return made


@pytest.fixture
def repo(made: Retained, tmp_path: Path) -> Retained:
    """A copy of it, the times too."""
    path = shutil.copytree(made.path, tmp_path / "repo")
    opened = Repository.open(str(path), write=True)
    return Retained(path, opened, list(made.ids), list(made.states), list(made.manifests))


def choose(repo: Retained, level: Level | None = None, since: str | None = None) -> Decision:
    chain = Chain(Repository.open(str(repo.path)), VM, "default", sees_changes_only=False)
    disk = Disk(name="vda", size=SIZE, records=False, told=CONTEXT)
    return chain.choose(disk, level, since)[0]


def base_of(decision: Decision) -> str | None:
    return None if decision.base is None else decision.base.backup


def test_the_last_backup_is_the_base(repo: Retained) -> None:
    assert base_of(choose(repo)) == repo.ids[2]
    assert base_of(choose(repo, Level.DIFFERENTIAL)) == repo.ids[0]


def test_a_forgotten_last_backup_makes_a_full(repo: Retained) -> None:
    nbdpull.forget(repo.path, [repo.ids[2]])
    decision = choose(repo)
    assert (decision.level, base_of(decision)) == (Level.FULL, None)
    assert f"{repo.ids[2]} is later, and is forgotten" in decision.reason
    assert "--since" in decision.reason
    assert base_of(choose(repo, since=repo.ids[1])) == repo.ids[1]
    # The last full is another matter.
    assert base_of(choose(repo, Level.DIFFERENTIAL)) == repo.ids[0]


def test_an_earlier_one_that_was_forgotten_changes_nothing(repo: Retained) -> None:
    nbdpull.forget(repo.path, [repo.ids[1]])
    assert base_of(choose(repo)) == repo.ids[2]
    nbdpull.gc(repo.path, undo_window_s=0)
    # Its session began when this test did, long after the last backup: as in life it would not.
    assert choose(repo).level is Level.FULL


def test_a_last_backup_that_was_collected_makes_a_full(repo: Retained) -> None:
    nbdpull.forget(repo.path, [repo.ids[2]])
    nbdpull.gc(repo.path, undo_window_s=0)
    assert repo.ids[2] not in [
        one.backup for one in nbdpull.list_backups(repo.path, forgotten=True)
    ]
    decision = choose(repo)
    assert decision.level is Level.FULL
    assert "was forgotten and is gone" in decision.reason
    assert base_of(choose(repo, since=repo.ids[1])) == repo.ids[1]


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_manifest_that_can_not_be_read_makes_a_full(repo: Retained, *, forgotten: bool) -> None:
    summary = repo.manifests[2]["vda"].summary
    key = f"m/{summary.disk_id}/{summary.session}"
    path = repo.store.path(key)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 0xFF
    path.write_bytes(raw)
    if forgotten:
        nbdpull.forget(repo.path, [key])
    decision = choose(repo)
    assert decision.level is Level.FULL
    assert key in decision.reason or "incomplete" in decision.reason
    assert base_of(choose(repo, since=repo.ids[1])) == repo.ids[1]


def test_a_later_incomplete_backup_makes_a_full(repo: Retained) -> None:
    made = add_backup(
        repo.repository, repo.states[2], commit=frozenset({"vdb"}), time=time.time() - DAY / 2
    )
    decision = choose(repo)
    assert decision.level is Level.FULL
    assert f"{made['vdb'].summary.backup} is later, and is incomplete" in decision.reason


def test_a_backup_of_a_clock_that_ran_ahead_makes_a_full(repo: Retained) -> None:
    repo.add(full=True, taken=time.time() + DAY)
    decision = choose(repo)
    assert decision.level is Level.FULL
    assert "clocks were set" in decision.reason


def test_a_backup_of_a_clock_that_ran_behind_makes_a_full(repo: Retained) -> None:
    last = repo.add(full=True, taken=time.time() - 9 * DAY)
    decision = choose(repo)
    assert decision.level is Level.FULL
    assert f"{last} was stored later" in decision.reason
    # Whoever knows says so; here that is refused, because the chain's order is another one.
    with pytest.raises(UsageError, match="can't be read since"):
        choose(repo, since=last)


def test_guest_first_reads_in_full_what_has_a_map_that_can_not_be_read(repo: Retained) -> None:
    manifest = repo.manifests[2]["vda"]
    ref = manifest.segments[0]
    assert ref is not None
    path = repo.store.path(f"d/{manifest.sessions[ref.session].sid}/{ref.seq:08x}")
    raw = bytearray(path.read_bytes())
    raw[ref.offset + 64 + ref.clen // 2] ^= 0xFF
    path.write_bytes(raw)
    disk = Disk(name="vda", size=SIZE, told=CONTEXT)
    decisions = []
    for changes_only in (False, True):
        chain = Chain(
            Repository.open(str(repo.path)), VM, "default", sees_changes_only=changes_only
        )
        decision, _ = chain.choose(disk, None, repo.ids[2])
        decisions.append(decision)
    assert [one.level for one in decisions] == [Level.INCREMENTAL, Level.FULL]
    assert path.name in decisions[1].reason
    assert "--guest-first shows only changes" in decisions[1].reason


def test_names_that_are_no_text_are_refused() -> None:
    check_names("disk", ["vda", "d\u00efsk", None])
    with pytest.raises(UsageError, match=r"disk 'v\\udcffda' is no text .* at character 1"):
        check_names("disk", ["vda", "v\udcffda"])


def test_a_list_of_a_vm_that_is_not_there_says_which_are(
    repo: Retained, caplog: pytest.LogCaptureFixture
) -> None:
    assert nbdpull.list_backups(repo.path, vm="web") == ()
    assert f"no backup is of a VM 'web'; there are backups of '{VM}'" in caplog.text
