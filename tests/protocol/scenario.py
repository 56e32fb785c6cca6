"""A few processes that get in each other's way, one schedule a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nbdpull.repo.store import Store
from tests.protocol.schedule import Schedule
from tests.protocol.stores import MemoryStore
from tests.protocol.world import Work, World, memory_repositories

__all__ = ["Outcome", "play"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule came to."""

    calls: int
    committed: int
    restored: int


def play(seed: int, *, kills: float = 0.0) -> Outcome:  # noqa: C901 - a case is a choice
    """Writers and collectors that end every undo window, a forget, and now and then an undo or a repack.

    Some writers died before, or die and run again: their sessions are taken over.

    By the store's clock some of the sessions look as if they idled for two days.

    Raises:
        AssertionError: something that was acknowledged is lost.
    """
    rng = random.Random(seed)
    world, store = World(), MemoryStore(same_is_own=rng.random() < 0.5)
    first = world.back_up(store, random.Random(rng.random()))
    if rng.random() < 0.3:
        world.back_up(store, random.Random(rng.random()))
    world.collect(store)
    for _ in range(rng.randrange(3)):
        world.die(store, random.Random(rng.random()))
    idle = random.Random(rng.random())
    old: dict[str, bool] = {}

    def age_s(key: str) -> float:
        sid = key.split("/")[1] if key[0] in "sdx" else ""
        return 2 * 86400.0 if sid and old.setdefault(sid, idle.random() < 0.4) else 0.0

    store.age_s = age_s

    def writer(seed: float) -> Work:
        return lambda store: world.back_up(store, random.Random(seed))

    def forget_and_collect(store: Store) -> None:
        world.forget(store, first)
        world.collect(store)

    def again(seed: float) -> Work:
        def work(store: Store) -> None:
            world.die(store, random.Random(seed))
            world.back_up(store, random.Random(seed))

        return work

    works: list[Work] = [writer(rng.random()), forget_and_collect, world.collect]
    if rng.random() < 0.5:
        works.append(writer(rng.random()))
    if rng.random() < 0.5:
        works.append(again(rng.random()))
    if rng.random() < 0.3:
        works.append(world.collect)
    if rng.random() < 0.2:
        works.append(lambda store: world.undo(store, first))
    if rng.random() < 0.2:
        works.append(world.repack)
    with memory_repositories():
        schedule = Schedule(store, seed, changes=rng.choice([10.0, 20.0, 40.0]), kills=kills)
        schedule.run(works)
        store.age_s = lambda _key: 0.0
        restored = world.check(store)
        # And the next runs find their way.
        world.back_up(store, random.Random(seed))
        world.collect(store)
        world.check(store)
    return Outcome(schedule.calls, len(world.committed), restored)
