"""The real code in interleavings: random ones, and for each rule one in which it matters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import pytest

from nbdpull.errors import Error, InUseError, RepositoryError, StoreError
from nbdpull.model.damage import HealedFrame, Place
from nbdpull.model.ids import SessionId
from nbdpull.model.manifest import Manifest
from nbdpull.repo.repository import Repository, Session
from nbdpull.repo.store import Listed
from tests.protocol.mutants import MUTANTS
from tests.protocol.scenario import play
from tests.protocol.stores import Killed, MemoryStore, WatchedStore
from tests.protocol.world import World, memory_repositories
from tests.repo.helpers import store_changes, summary_for

DAY = 86400.0


@pytest.mark.parametrize("seed", range(0, 60, 12))
def test_nothing_is_lost_in_random_schedules(seed: int) -> None:
    """`scripts/torture schedules` plays thousands."""
    for one in range(seed, seed + 12):
        played = play(one, kills=0.2 * (one % 2))
        assert played.calls > 50


@dataclass
class Scene:
    """A repository with one backup, and a collector whose calls can be broken in upon."""

    world: World
    store: MemoryStore
    first: str

    def collect(self, when: tuple[str, str], act: Callable[[], object]) -> None:
        """Collect, and do something once, before the first call of that name and kind of key."""
        done = False

        @contextmanager
        def gate(name: str, key: str) -> Iterator[None]:
            nonlocal done
            if not done and name == when[0] and key.startswith(when[1]):
                done = True
                act()
            yield

        self.world.collect(WatchedStore(self.store, gate))
        assert done

    def session(self, *, parent: bool) -> Callable[[], None]:
        """A session with a durable pack; call to commit. Raises when its pin is gone."""
        repository = self.world.repository(self.store)
        base = self.manifest() if parent else None
        return self.begin(repository, base)

    def manifest(self) -> Manifest:
        repository = self.world.repository(self.store)
        return repository.manifest(repository.find(self.first).disks[0])

    def dead(self) -> SessionId:
        """A session of which durable packs are left."""
        session, _ = self._session(self.world.repository(self.store), None)
        session.abandon()
        return session.id

    def begin(self, repository: Repository, parent: Manifest | None) -> Callable[[], None]:
        session, content = self._session(repository, parent)

        def commit() -> None:
            session.commit(summary_for(session, size=len(content), disk="vd0", backup="f" * 16))
            self.world.committed["f" * 16] = content

        return commit

    def _session(self, repository: Repository, parent: Manifest | None) -> tuple[Session, bytes]:
        session = repository.begin(vm="vm", disk="vd0", parent=parent)
        content = bytearray(self.world.committed[self.first] if parent else bytes(6 << 16))
        content[:4] = b"new!"
        raw = bytes(content[: 1 << 16])
        reader = repository.reader(parent) if parent else None
        store_changes(session, reader, len(content), {0: raw})
        session.seal()
        return session, bytes(content)

    def check(self) -> None:
        self.store.age_s = lambda _key: 0.0
        self.world.check(self.store)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with memory_repositories():
        world, store = World(), MemoryStore()
        first = world.back_up(store, random.Random(1))
        world.collect(store)  # its intent goes, which would be one protection more
        yield Scene(world, store, first)


def late_commit_of_an_idle_session(scene: Scene) -> None:
    """While the collector deletes, a session that it took for dead commits."""
    commit = scene.session(parent=False)
    scene.store.age_s = lambda key: 0.0 if key.startswith("s/") and key > "s/g" else 2 * DAY
    now = scene.store.stat

    def stat(key: str) -> object:
        scene.store.age_s, aged = (lambda _key: 0.0), scene.store.age_s
        try:
            return now(key)
        finally:
            scene.store.age_s = aged

    scene.store.stat = stat  # type: ignore[assignment,method-assign]

    def act() -> None:
        with suppress(Error):
            commit()

    scene.collect(("delete", "d/"), act)


def begin_on_what_is_being_deleted(scene: Scene) -> None:
    """A writer chose its parent; then that is forgotten; it begins while the collector deletes."""
    parent = scene.manifest()
    repository = scene.world.repository(scene.store)

    def act() -> None:
        with suppress(Error):
            scene.begin(repository, parent)()

    scene.world.forget(scene.store, scene.first)
    scene.collect(("delete", "d/"), act)


def begin_before_the_packs_are_listed(scene: Scene) -> None:
    """A session begins and stores packs before the collector lists packs, and commits late."""
    commits: list[Callable[[], None]] = []
    scene.collect(("list", "d"), lambda: commits.append(scene.session(parent=False)))
    commits[0]()


def commit_behind_the_listing(scene: Scene) -> None:
    """While one collector lists manifests, a backup is made on another, which a second one deletes."""
    before = scene.store.next_after
    frozen: list[object] = []

    def act() -> None:
        # What the listing has passed already: the new manifest comes before the old one.
        commit = scene.session(parent=True)
        commit()
        new = {f"m/{pin}" for pin in _pins(scene, "f" * 16)}
        scene.world.forget(scene.store, scene.first)
        scene.world.collect(scene.store)

        def hide(prefix: str, last: str) -> object:
            found = before(prefix, last)
            if prefix == "m" and len(frozen) < 1:
                while found is not None and found.key in new:
                    found = before(prefix, found.key)
                if found is None:
                    frozen.append(True)  # only this listing
            return found

        scene.store.next_after = hide  # type: ignore[assignment,method-assign]

    scene.collect(("list", "m"), act)


def adopt_what_is_being_revoked(scene: Scene) -> None:
    """A collector is about to revoke a dead session, when another one wants what it stored."""
    scene.dead()
    commits: list[Callable[[], None]] = []
    ages = scene.store.age_s
    scene.store.age_s = lambda key: 2 * DAY if key[0] in "sdx" else 0.0
    now = scene.store.stat

    def stat(key: str) -> object:
        scene.store.age_s, aged = ages, scene.store.age_s
        try:
            return now(key)
        finally:
            scene.store.age_s = aged

    scene.store.stat = stat  # type: ignore[assignment,method-assign]
    scene.collect(("create", "m/"), lambda: commits.append(scene.session(parent=False)))
    commits[0]()


def adopt_what_was_committed(scene: Scene) -> None:
    """A collector died after it deleted a manifest; another deletes the packs, when somebody wants them."""
    session, _ = scene._session(scene.world.repository(scene.store), None)
    session.commit(summary_for(session, size=6 << 16, disk="vd0", backup="e" * 16))
    scene.store.create(f"t/{session.disk_id}/{session.id}", b"")
    scene.store.delete(f"m/{session.disk_id}/{session.id}")
    scene.store.age_s = lambda key: 2 * DAY if key[0] in "sdx" and session.id in key else 0.0
    commits: list[Callable[[], None]] = []

    def begin() -> None:
        scene.store.delete(f"m/{session.disk_id}/{session.id}")  # what this collector revoked
        commits.append(scene.session(parent=False))

    scene.collect(("delete", "d/"), begin)
    commits[0]()


def collect_beside_an_adopter(scene: Scene) -> None:
    """A collector comes while a session lives that has taken over another one."""
    scene.dead()
    commit = scene.session(parent=False)
    scene.world.collect(scene.store)
    commit()


def adopt_behind_the_listing(scene: Scene) -> None:
    """A session begins and takes over another one between a collector's listings."""
    scene.dead()
    commits: list[Callable[[], None]] = []
    scene.collect(("list", "m"), lambda: commits.append(scene.session(parent=False)))
    commits[0]()


def _pins(scene: Scene, backup: str) -> tuple[str, ...]:
    return scene.world.repository(scene.store).find(backup).pins


SCENES = {
    "no register": late_commit_of_an_idle_session,
    "no recheck": begin_on_what_is_being_deleted,
    "sessions before packs": begin_before_the_packs_are_listed,
    "no second look": commit_behind_the_listing,
    "adopts without a register": adopt_what_is_being_revoked,
    "no look at what is adopted": adopt_what_was_committed,
    "adopted is ended": collect_beside_an_adopter,
    "no look for an adopter": adopt_behind_the_listing,
}


@pytest.mark.parametrize("rule", SCENES)
def test_the_rule_holds(rule: str, scene: Scene) -> None:
    SCENES[rule](scene)
    scene.check()


@pytest.mark.parametrize("rule", SCENES)
def test_without_the_rule_something_is_lost(
    rule: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTANTS[rule](monkeypatch)
    SCENES[rule](scene)
    with pytest.raises(AssertionError):
        scene.check()


class Lagging(WatchedStore):
    """Another store, whose listings show what was there when this one was made."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner, lambda _name, _key: nullcontext())
        self._seen = {kind: list(inner.list(kind)) for kind in "abdfmopstx"}

    def list(self, prefix: str) -> Iterator[Listed]:
        return (one for one in self._seen[prefix[0]] if f"{one.key}/".startswith(f"{prefix}/"))


def test_a_listing_that_lags_is_told_by_writers_and_collectors() -> None:
    world, store = World(), MemoryStore()
    world.back_up(store, random.Random(1))
    late = Lagging(store)
    world.back_up(store, random.Random(2))
    with pytest.raises(StoreError, match="the store lists 0 packs"):
        world.back_up(late, random.Random(3))
    with pytest.raises(RepositoryError, match="its listings lag"):
        world.collect(late)
    world.check(store)


# -- what is made while a collector is at work ---------------------------------------------------------


def test_what_is_forgotten_while_a_collector_works_stays_forgotten(scene: Scene) -> None:
    """The collector has listed the manifests when the backup is made that is forgotten."""
    repository = scene.world.repository(scene.store)
    seen = []

    def act() -> None:
        scene.session(parent=False)()
        repository.forget(repository.find("f" * 16).pins, "asked for")
        seen.append([one.id for one in repository.backups()])

    scene.collect(("list", "b"), act)
    assert seen
    assert [one.id for one in repository.backups()] == seen[0] == [scene.first]


def test_what_is_healed_while_a_collector_works_stays_on_record(scene: Scene) -> None:
    made: list[str] = []

    def act() -> None:
        scene.session(parent=False)()
        repository = scene.world.repository(scene.store)
        summary = repository.find("f" * 16).disks[0]
        sid = SessionId("cd" * 16)
        row = HealedFrame(
            damaged=Place(summary.session, 0, 128),
            copy=Place(sid, 0, 128),
            clen=10,
            rlen=100,
            digest=bytes(32),
            index=bytes(32),
        )
        repository.damage.add_healed(sid, [row])
        made.extend(one.key for one in scene.store.list("b"))

    scene.collect(("list", "b"), act)
    assert made
    assert [one.key for one in scene.store.list("b")] == made


def test_a_collector_that_stands_still_for_days_is_seen_by_copies() -> None:
    """A copy brings keys back that a collector has listed for deletion: the only writer that does so."""
    with memory_repositories():
        world, store, replica = World(), MemoryStore(), MemoryStore()
        replica.create("replica.json", b"{}")
        replica.create("nbdpull.json", world.config.encode())
        world.back_up(store, random.Random(1))

        @contextmanager
        def dies(name: str, key: str) -> Iterator[None]:
            if name == "create" and key.startswith("m/"):
                raise Killed
            yield

        with suppress(Killed):
            world.copy(store, WatchedStore(replica, dies))
        assert list(replica.list("d"))
        replica.age_s = lambda key: 2 * DAY if key < "s/g" else 0.0
        now = replica.stat
        refused: list[str] = []

        def stat(key: str) -> Listed:
            """Of the collector's own intent: the store's clock."""
            found = now(key)
            return Listed(key, found.size, 1e9) if key.startswith("s/") else found

        replica.stat = stat  # type: ignore[method-assign]

        @contextmanager
        def gate(name: str, key: str) -> Iterator[None]:
            if not refused and name == "delete" and key.startswith("d/"):
                world.collect(replica)  # another one, by whose clock the first idles for two days
                with pytest.raises(InUseError) as told:
                    world.copy(store, replica)
                refused.append(str(told.value))
            yield

        world.collect(WatchedStore(replica, gate))
        assert refused
        world.copy(store, replica)
        world.check(replica)


def test_protecting_beside_a_repack_leaves_what_is_protected_so() -> None:
    world, store = World(), MemoryStore(same_is_own=True)
    name = world.back_up(store, random.Random(1))
    repository = world.repository(store)
    backup = repository.find(name)
    repository.protect(backup)
    repository.forget_replaced(backup.pins)
    repository.protect(backup)
    assert [one.key for one in store.list("p")] == [f"p/{name}"]
    store.delete(f"p/{name}")
    repository.protect(backup)
    assert [one.key for one in store.list("p")] == [f"p/{name}"]
