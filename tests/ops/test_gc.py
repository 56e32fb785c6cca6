"""What a collection deletes, what it spares, and when it refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import DamagedError, RepositoryError
from nbdpull.model.config import Config
from nbdpull.model.grain import GRAIN
from nbdpull.model.ids import SessionId
from nbdpull.model.intent import Intent
from nbdpull.model.manifest import Manifest
from nbdpull.repo import alive as alive_module
from nbdpull.repo import collect as collect_module
from nbdpull.repo.alive import KeepAlive
from nbdpull.repo.collect import Collector
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import ParentGoneError, Repository
from nbdpull.repo.session import Session
from nbdpull.repo.store import AccessDeniedError, Listed
from tests.ops.builder import VM, Disk, add_backup
from tests.ops.retained import DAY, Retained, retained
from tests.protocol.stores import MemoryStore


@pytest.fixture
def repo(tmp_path: Path) -> Retained:
    return retained(tmp_path / "repo")


def collect(repo: Retained, *, undo_window_s: float = 0, **options: object) -> nbdpull.GcResult:
    return nbdpull.gc(repo.path, undo_window_s=undo_window_s, **options)  # type: ignore[arg-type]


def test_a_repository_without_garbage_loses_only_finished_intents(
    repo: Retained, tmp_path: Path
) -> None:
    before = {key for key in repo.objects() if not key.startswith("s/")}
    done = collect(repo)
    assert (done.packs, done.indexes, done.manifests, done.others) == (0, 0, 0, 6)
    assert set(repo.objects()) == before
    for number in range(3):
        repo.check(number, tmp_path / "out")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_backup_can_be_forgotten_and_no_other_one_suffers(
    repo: Retained, tmp_path: Path, number: int
) -> None:
    nbdpull.forget(repo.path, [repo.ids[number]])
    done = collect(repo)
    assert done.manifests == 2
    for other in {0, 1, 2} - {number}:
        repo.check(other, tmp_path / "out")
    assert nbdpull.verify(repo.path).ok
    assert set(repo.objects("m")).isdisjoint(f"m/{pin}" for pin in repo.pins(number))
    # Once more: the marks go, the tombstones stay, and there is nothing else to do.
    collect(repo)
    assert repo.objects("f") == []
    assert {key[2:] for key in repo.objects("t")} == repo.pins(number)
    assert collect(repo).others == 0


def test_all_of_a_repository_can_be_forgotten(repo: Retained) -> None:
    nbdpull.forget(repo.path, repo.ids)
    done = collect(repo)
    assert done.packs == 6
    collect(repo)
    assert [key for key in repo.objects() if not key.startswith("t/")] == ["nbdpull.json"]
    repo.age("t", 400 * DAY)
    collect(repo)
    assert repo.objects() == ["nbdpull.json"]
    assert not any((repo.path / "d").iterdir())


def test_the_undo_window_counts_by_the_stores_clock(repo: Retained, tmp_path: Path) -> None:
    nbdpull.forget(repo.path, [repo.ids[0]])
    done = nbdpull.gc(repo.path)
    assert (done.packs, done.manifests, repo.objects("t")) == (0, 0, [])
    repo.age("f", 6.9 * DAY)
    assert nbdpull.gc(repo.path).manifests == 0
    nbdpull.undo(repo.path, [repo.ids[0]])
    repo.age("f", 0.2 * DAY)
    assert nbdpull.gc(repo.path).manifests == 2
    for number in range(3):
        repo.check(number, tmp_path / "out")


def test_a_dry_run_changes_nothing_and_tells_the_same(repo: Retained) -> None:
    nbdpull.forget(repo.path, [repo.ids[0]])
    before = repo.objects()
    told = collect(repo, dry_run=True)
    assert repo.objects() == before
    done = collect(repo)
    for name in ("packs", "indexes", "manifests", "others", "freed_bytes"):
        assert getattr(told, name) == getattr(done, name), name


def test_a_backup_whose_forgetting_was_killed_halfway_goes_as_a_whole(repo: Retained) -> None:
    pin = min(repo.pins(1))
    repo.repository.forget([pin], "killed")
    assert [info.backup for info in nbdpull.list_backups(repo.path)] == [repo.ids[0], repo.ids[2]]
    assert collect(repo).manifests == 2


def test_a_protected_backup_stays_whatever_was_marked(repo: Retained, tmp_path: Path) -> None:
    nbdpull.protect(repo.path, [repo.ids[1]])
    # Both at the same moment: forget looked for the protection before it was there.
    repo.repository.forget(sorted(repo.pins(1)), "raced")
    assert collect(repo).manifests == 0
    nbdpull.undo(repo.path, [repo.ids[1]])
    repo.check(1, tmp_path / "out")


# -- sessions ------------------------------------------------------------------------------------


def running(repo: Retained, parent: Manifest | None, name: str = "vda") -> Callable[[], Manifest]:
    """A session of a disk that has durable packs and has not committed; call to commit."""
    state = repo.states[-1][name] if parent else Disk(10 * GRAIN)
    found: list[Callable[[], Manifest]] = []

    real = Session.commit

    def hold(session: Session, summary: object) -> Manifest:
        found.append(lambda: real(session, summary))  # type: ignore[arg-type]
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "commit", hold)
        with pytest.raises(InterruptedError):
            add_backup(
                repo.repository,
                {name: state.changed(77)},
                before={name: state} if parent else None,
                parents={name: parent} if parent else None,
            )
    return found[0]


def test_a_running_session_is_spared_and_so_is_what_it_pins(repo: Retained, tmp_path: Path) -> None:
    commit = running(repo, repo.manifests[2]["vda"])
    nbdpull.forget(repo.path, repo.ids)
    done = collect(repo)
    assert len(done.live) == 1
    assert done.packs > 0
    # Its parent's manifest is needed to know what it pins.
    assert [key[2:] for key in repo.objects("m")] == [
        pin
        for pin in sorted(repo.pins(2))
        if pin.startswith(repo.manifests[2]["vda"].summary.disk_id)
    ]
    made = commit()
    collect(repo)
    assert repo.objects("m") == [f"m/{made.summary.disk_id}/{made.summary.session}"]
    assert nbdpull.verify(repo.path).ok
    nbdpull.restore(repo.path, made.summary.backup, tmp_path / "out")
    expected = repo.states[2]["vda"].changed(77).content()
    assert (tmp_path / "out" / "vda.raw").read_bytes() == expected


def test_a_session_that_idles_a_day_is_revoked_and_its_commit_fails(repo: Retained) -> None:
    commit = running(repo, None)
    assert collect(repo).revoked == ()
    for prefix in ("s", "d", "x"):
        repo.age(prefix, 1.1 * DAY)
    assert len(collect(repo, dry_run=True).revoked) == 1
    done = collect(repo)
    assert len(done.revoked) == 1
    assert done.packs == 1
    with pytest.raises(RepositoryError, match="revoked"):
        commit()
    assert [info.backup for info in nbdpull.list_backups(repo.path, incomplete=True)] == repo.ids


def test_a_pack_that_a_revoked_writer_still_makes_goes_too(repo: Retained) -> None:
    running(repo, None)
    for prefix in ("s", "d", "x"):
        repo.age(prefix, 1.1 * DAY)
    sid = collect(repo).revoked[0]
    # The collector removed the session's folder, which the writer believes to be there.
    repo.store.create(f"d/{sid}/00000005", b"late")
    assert collect(repo).packs == 1
    assert repo.objects(f"d/{sid}") == []


def test_a_session_that_goes_on_making_packs_is_not_idle(repo: Retained) -> None:
    running(repo, None)
    for prefix in ("s", "x"):
        repo.age(prefix, 9 * DAY)
    assert collect(repo).revoked == ()


def test_a_session_that_stores_nothing_says_that_it_lives(
    repo: Retained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alive_module, "EVERY_S", 0.02)
    before = set(threading.enumerate())
    commit = running(repo, None)
    while len(repo.objects("a")) < 2:
        time.sleep(0.01)
    for prefix in ("s", "d", "x"):
        repo.age(prefix, 9 * DAY)
    done = collect(repo)
    assert (done.revoked, len(done.live)) == ((), 1)
    assert len(repo.objects("a")) >= 2
    commit()
    while set(threading.enumerate()) - before:
        time.sleep(0.01)
    collect(repo)
    assert repo.objects("a") == []
    assert not any(key.startswith("s/") for key in repo.objects())


def test_a_store_that_is_away_does_not_end_the_saying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive_module, "EVERY_S", 0.01)
    monkeypatch.setattr(alive_module, "_AGAIN_S", 0.01)
    store = MemoryStore()
    made: list[str] = []

    def create(key: str, _data: bytes) -> None:
        made.append(key)
        if len(made) < 3:
            raise nbdpull.StoreError("away")

    store.create = create  # type: ignore[method-assign,assignment]
    alive = KeepAlive(store, SessionId("ab" * 16))
    while len(made) < 5:
        time.sleep(0.01)
    alive.stop()
    assert made[:3] == [f"a/{'ab' * 16}/{number}" for number in range(1, 4)]


def test_a_session_that_nobody_ends_falls_silent_when_it_is_gone() -> None:
    before = set(threading.enumerate())
    alive = KeepAlive(MemoryStore(), SessionId("ab" * 16))
    assert len(set(threading.enumerate()) - before) == 1
    del alive
    while set(threading.enumerate()) - before:
        time.sleep(0.01)


def test_a_revoked_mark_goes_after_a_year(repo: Retained) -> None:
    running(repo, None)
    for prefix in ("s", "d", "x"):
        repo.age(prefix, 2 * DAY)
    sid = collect(repo).revoked[0]
    mark = next(key for key in repo.objects("m") if key.endswith(sid))
    assert collect(repo).others == 0
    repo.age("m", 370 * DAY)
    collect(repo)
    assert mark not in repo.objects("m")


def test_a_writer_that_began_before_the_tombstone_wins_and_one_after_is_refused(
    repo: Retained,
) -> None:
    parent = repo.manifests[2]["vda"]
    running(repo, parent)
    nbdpull.forget(repo.path, [repo.ids[2]])
    collect(repo)
    with pytest.raises(ParentGoneError):
        repo.repository.begin(vm=VM, disk="vda", parent=parent)


def test_intents_of_collectors_go_when_they_are_known_to_have_died_or_may_delete_no_more(
    repo: Retained,
) -> None:
    """One that stands still may go on to delete what it has listed: a copy must see it as long as that."""
    collect(repo)
    repo.store.create("s/" + "ab" * 16, Intent(role="gc", disk="").encode("ab" * 16))
    repo.age("s", 30 * DAY)
    assert collect(repo).others == 0
    repo.age("s", 1.1 * DAY)
    assert collect(repo).others == 1
    dead = subprocess.run(
        [sys.executable, "-c", "from nbdpull.repo.alive import process_token as t; print(t())"],
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()
    intent = Intent(role="gc", disk="", process=dead)
    repo.store.create("s/" + "cd" * 16, intent.encode("cd" * 16))
    assert collect(repo).others == 1
    assert repo.objects("s") == []


def test_a_collector_that_stood_still_for_a_month_deletes_nothing_any_more(
    repo: Retained, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbdpull.forget(repo.path, repo.ids)
    before = repo.objects("d")
    real = alive_module.clocks
    late = iter([0.0, *(31 * DAY for _ in range(10_000))])

    def clocks() -> tuple[float, float]:
        ahead = next(late)
        return real()[0], real()[1] + ahead

    monkeypatch.setattr(alive_module, "clocks", clocks)
    one = Collector(repo.store, decode=repo.repository._decode, undo_window_s=0, workers=1)
    with pytest.raises(RepositoryError, match="began 31 days ago, at most 30 may pass"):
        one.run()
    assert repo.objects("d") == before


# -- what can't be read --------------------------------------------------------------------------


def damage(repo: Retained, key: str, at: int = -40) -> None:
    path = repo.store.path(key)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0xFF
    path.write_bytes(raw)


def test_a_damaged_manifest_stops_all_deleting(repo: Retained, tmp_path: Path) -> None:
    running(repo, None)
    nbdpull.forget(repo.path, [repo.ids[0]])
    key = f"m/{min(repo.pins(1))}"
    damage(repo, key)
    before = repo.objects("d")
    with pytest.raises(DamagedError, match=r"nothing was collected.*nbdpull forget m/"):
        collect(repo)
    assert repo.objects("d") == before
    damage(repo, key, 100)
    nbdpull.forget(repo.path, [key])
    assert collect(repo).manifests == 3
    repo.check(2, tmp_path / "out")


def test_a_damaged_intent_stops_all_deleting_for_a_month(repo: Retained) -> None:
    collect(repo)
    repo.store.create("s/" + "ab" * 16, b"{")
    with pytest.raises(DamagedError, match="intent s/abab"):
        collect(repo)
    repo.age("s", 32 * DAY)
    collect(repo)
    assert repo.objects("s") == []


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_a_damaged_intent_of_a_session_that_has_ended_stops_nothing(
    repo: Retained, tmp_path: Path, how: str
) -> None:
    nbdpull.forget(repo.path, [repo.ids[2]])
    for pin in (*repo.pins(1), *repo.pins(2)):
        path = repo.store.path(f"s/{pin.partition('/')[2]}")
        raw = path.read_bytes()
        path.write_bytes({"flipped": b"\x7f" + raw[1:], "cut": raw[:-20], "emptied": b""}[how])
    would = collect(repo, dry_run=True)
    done = collect(repo)
    assert (done.packs, done.manifests, done.others) == (
        would.packs,
        would.manifests,
        would.others,
    )
    assert done.packs > 0
    assert done.manifests == 2
    assert repo.objects("s") == []
    for number in (0, 1):
        repo.check(number, tmp_path / "out")


def test_a_damaged_intent_of_a_session_that_may_commit_stops_all_until_it_has(
    repo: Retained, tmp_path: Path
) -> None:
    collect(repo)
    commit = running(repo, repo.manifests[2]["vda"])
    (intent,) = repo.objects("s")
    damage(repo, intent, 0)
    # What the session refers to is forgotten: only its intent says that it is needed.
    nbdpull.forget(repo.path, repo.ids)
    repo.age("s", 3 * DAY)
    before = [*repo.objects("d"), *repo.objects("m")]
    for dry_run in (True, False):
        with pytest.raises(
            DamagedError, match=f"intent {intent} is damaged.*nothing was collected"
        ):
            collect(repo, dry_run=dry_run)
    assert [*repo.objects("d"), *repo.objects("m")] == before
    made = commit()
    done = collect(repo)
    assert done.packs > 0
    assert repo.objects("s") == []
    assert repo.repository.reader(made).missing_packs(indexes=True) == []


def test_intents_in_each_others_place_stop_all_deleting(repo: Retained) -> None:
    collect(repo)
    commits = [running(repo, repo.manifests[2][disk], disk) for disk in ("vda", "vdb")]
    paths = [repo.store.path(key) for key in repo.objects("s")]
    raw = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(raw), strict=True):
        path.write_bytes(other)
    nbdpull.forget(repo.path, repo.ids)
    # Taken for the session's own, each would have it revoked under the other's disk, where nobody commits.
    repo.age("s", 3 * DAY)
    before = [*repo.objects("d"), *repo.objects("m")]
    with pytest.raises(DamagedError, match=r"as the intent of this session.*nothing was collected"):
        collect(repo)
    assert [*repo.objects("d"), *repo.objects("m")] == before
    for made in [commit() for commit in commits]:
        assert repo.repository.reader(made).missing_packs(indexes=True) == []


@pytest.mark.parametrize("marks", ["t", "ft"])
def test_marks_that_a_stolen_host_makes_delete_nothing_before_the_undo_window_is_over(
    repo: Retained, tmp_path: Path, marks: str
) -> None:
    for mark in marks:
        for key in repo.objects("m"):
            repo.store.create(f"{mark}/{key.partition('/')[2]}", b"")
    packs = repo.objects("d")
    repo.age("f", 6 * DAY)
    repo.age("t", 6 * DAY)
    for dry_run in (True, False):
        done = collect(repo, dry_run=dry_run, undo_window_s=7 * DAY)
        assert (done.packs, done.manifests) == (0, 0)
    assert repo.objects("d") == packs
    # Whoever may delete takes the marks away, and all is as it was.
    for key in [*repo.objects("f"), *repo.objects("t")]:
        repo.store.delete(key)
    for number in range(3):
        repo.check(number, tmp_path / "out")


def test_marks_are_followed_once_the_undo_window_is_over(repo: Retained) -> None:
    for key in repo.objects("m"):
        repo.store.create(f"t/{key.partition('/')[2]}", b"")
    repo.age("t", 8 * DAY)
    done = collect(repo, undo_window_s=7 * DAY)
    assert done.manifests == 6
    assert repo.objects("d") == []


@pytest.mark.parametrize("key", ["f/x", "o/abc", f"f/{'ab' * 16}", f"o/{'ab' * 16}/{'cd' * 16}"])
def test_what_is_no_mark_of_ours_stops_nothing(repo: Retained, key: str) -> None:
    repo.store.create(key, b"")
    for dry_run in (True, False):
        collect(repo, dry_run=dry_run)
    assert key not in repo.objects()


def test_a_record_that_is_longer_than_any_is_damage_and_no_end(repo: Retained) -> None:
    repo.store.create(f"b/{'ab' * 16}/0", bytes(2 << 20))
    collect(repo)
    assert repo.objects("b")


class Locked(LocalStore):
    """Refuses to delete packs."""

    def delete(self, key: str) -> None:
        if key.startswith("d/"):
            raise AccessDeniedError("locked")
        super().delete(key)


def collector(repo: Retained, store: LocalStore) -> Collector:
    return Collector(store, decode=repo.repository._decode, undo_window_s=0, workers=1)


def test_what_is_locked_is_left_and_told(repo: Retained) -> None:
    nbdpull.forget(repo.path, repo.ids)
    packs = repo.objects("d")
    done = collector(repo, Locked(repo.path)).run()
    assert done.refused == packs
    assert repo.objects("d") == packs
    assert repo.objects("m") == []
    assert collect(repo).packs == 6


def test_a_store_that_cannot_tell_writers_apart_needs_to_be_told(
    repo: Retained, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = Config(
        id=repo.repository.id, features={"read": (), "write": (), "gc": ("single_writer",)}
    )
    repository = Repository(repo.store, str(repo.path), only)
    monkeypatch.setattr(Repository, "open", lambda *_args, **_kwargs: repository)
    with pytest.raises(nbdpull.UsageError, match="--exclusive"):
        collect(repo)
    collect(repo, exclusive=True)


class Replaces(LocalStore):
    """Lets an object be created twice, as the stores do that only one may write to at a time."""

    def create(self, key: str, data: bytes) -> None:
        super().delete(key)
        super().create(key, data)


def test_where_creating_replaces_no_committed_manifest_is_revoked(
    repo: Retained, tmp_path: Path
) -> None:
    for prefix in ("s", "d", "x"):
        repo.age(prefix, 2 * DAY)
    assert collector(repo, Replaces(repo.path)).run().revoked == []
    for number in range(3):
        repo.check(number, tmp_path / "out")


# -- other collectors in between --------------------------------------------------------------------


class Between(LocalStore):
    """Does something once, in the middle of the listing of manifests."""

    def __init__(self, root: Path, act: Callable[[], None]) -> None:
        super().__init__(root)
        self._act: Callable[[], None] | None = act

    def list(self, prefix: str) -> Iterator[Listed]:
        act = self._act
        if prefix != "m" or act is None:
            yield from super().list(prefix)
            return
        self._act = None
        # A listing in pages: the first page is from before, the others from after.
        before = list(super().list(prefix))
        act()
        after = {entry.key for entry in super().list(prefix)}
        yield from (entry for entry in before if entry.key in after)


def test_a_manifest_that_moves_behind_the_listings_back_costs_another_round(
    repo: Retained, tmp_path: Path
) -> None:
    """While one collector lists, a backup is committed on another one, which a second one deletes."""
    made: list[Manifest] = []

    def act() -> None:
        commit = running(repo, repo.manifests[2]["vda"])
        made.append(commit())
        nbdpull.forget(repo.path, repo.ids)
        collect(repo)

    collector(repo, Between(repo.path, act)).run()
    assert nbdpull.verify(repo.path).ok
    nbdpull.restore(repo.path, made[0].summary.backup, tmp_path / "out")
    expected = repo.states[2]["vda"].changed(77).content()
    assert (tmp_path / "out" / "vda.raw").read_bytes() == expected


def test_a_session_that_commits_behind_the_listings_back_keeps_its_pins(
    repo: Retained, tmp_path: Path
) -> None:
    commit = running(repo, repo.manifests[2]["vda"])
    nbdpull.forget(repo.path, repo.ids)
    collect(repo)  # has the tombstones made
    made: list[Manifest] = []

    def act() -> None:
        made.append(commit())
        collect(repo)

    collector(repo, Between(repo.path, act)).run()
    assert nbdpull.verify(repo.path).ok
    nbdpull.restore(repo.path, made[0].summary.backup, tmp_path / "out")


def test_a_collector_that_others_keep_overtaking_gives_up_and_deletes_nothing(
    repo: Retained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect_module, "_ROUNDS", 3)
    running(repo, None)
    store = LocalStore(repo.path)
    real = store.list
    count = 0

    def listing(prefix: str) -> Iterator[Listed]:
        nonlocal count
        if prefix == "m":
            count += 1
            store.create(f"t/{'ab' * 16}/{count:032x}", b"")
        return real(prefix)

    monkeypatch.setattr(store, "list", listing)
    before = repo.objects("d")
    with pytest.raises(RepositoryError, match="were ahead 3 times"):
        collector(repo, store).run()
    assert repo.objects("d") == before
