"""What a store must do before a repository is put into it, tried at `init`.

The commit rests on `create` being atomic: of any number of writers exactly one makes an object. A store
that only pretends to (some gateways ignore the condition) would lose backups, so it is refused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from nbdpull.errors import StoreError
from nbdpull.repo.store import KeyExistsError, Store

__all__ = ["PROBE", "probe"]

PROBE: Final = "probe"
"""What the names of its objects begin with."""
_WRITERS: Final = 8


def probe(store: Store) -> Mapping[str, bool]:
    """Try create refusal, a race of eight, ranges, and listing after writing; leaves nothing behind.

    Raises:
        StoreError: the store can't hold a repository.
    """
    # No folder for them: a store of files would keep it.
    mark = f"{PROBE}{os.urandom(8).hex()}"
    first, race = f"{mark}first", f"{mark}race"
    try:
        data = os.urandom(4096)
        store.create(first, data)
        _refuses(store, first, data)
        if store.get_range(first, 100, 50) != data[100:150]:
            raise StoreError("the store answers a ranged read with other bytes")
        if store.get_range(first, 4090, 50) != data[4090:]:
            raise StoreError("the store answers a ranged read past the end with other bytes")
        _race(store, race)
        listed = {entry.key: entry.size for entry in store.list("") if entry.key.startswith(mark)}
        if listed != {first: len(data), race: 16}:
            raise StoreError(f"the store lists {listed} just after writing {first} and {race}")
    finally:
        for key in (first, race):
            with suppress(StoreError):  # would hide what is wrong with the store
                store.delete(key)
    return {"create_only": True, "ranges": True, "list_after_write": True}


def _refuses(store: Store, key: str, data: bytes) -> None:
    try:
        store.create(key, b"other")
    except KeyExistsError:
        if store.get(key, limit=len(data)) != data:
            raise StoreError("the store refused to create an object twice but changed it") from None
        return
    raise StoreError(
        "the store lets an object be created twice: backups could overwrite each other"
    )


def _race(store: Store, key: str) -> None:
    start = threading.Barrier(_WRITERS)

    def write() -> bytes | None:
        mine = os.urandom(16)
        start.wait()
        try:
            store.create(key, mine)
        except KeyExistsError:
            return None
        return mine

    with ThreadPoolExecutor(_WRITERS) as threads:
        results = [threads.submit(write) for _ in range(_WRITERS)]
    won = [result.result() for result in results if result.result() is not None]
    if len(won) != 1:
        raise StoreError(
            f"of {_WRITERS} writers of one object {len(won)} were told that they made it, expected 1"
        )
    if store.get(key, limit=16) != won[0]:
        raise StoreError("an object holds another writer's bytes than of the one who made it")
