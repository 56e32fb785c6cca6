"""What a store must do before a repository is put into it, tried at `init`.

The commit rests on `create` being atomic: of any number of writers exactly one makes an object. A store
that only pretends to (some gateways ignore the condition) can still hold a repository where nothing is
collected beside a writer: `single_writer`. One that reads or lists wrongly can't be trusted with anything.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nbdpull.errors import StoreError
from nbdpull.repo.store import AccessDeniedError, KeyExistsError, Store

__all__ = ["LISTED", "PROBE", "Probed", "probe"]

PROBE: Final = "probe"
"""What the names of its objects begin with."""
LISTED: Final = 1100
"""Objects of a trial listing: more than the 1,000 that one answer of S3 holds."""
_WRITERS: Final = 8
_THREADS: Final = 16
_OVERWRITES: Final = (
    "this store lets an object be overwritten although it is told not to, so the repository is made with"
    " the feature 'single_writer': collect garbage only while nothing else uses it, with 'gc --exclusive'"
)


@dataclass(frozen=True, slots=True)
class Probed:
    """What a store was found to do.

    Attributes:
        capabilities: ``create_only``, ``ranges``, ``list_after_write``.
        warnings: what follows for the user, where one is missing that a repository can do without.
    """

    capabilities: Mapping[str, bool]
    warnings: tuple[str, ...]


def probe(store: Store, *, keys: int = 0) -> Probed:
    """Try create refusal, a race of eight, ranges, and listing after writing; leaves nothing behind.

    `keys` objects are listed, too, when that is not 0.

    Raises:
        StoreError: the store can't hold a repository.
    """
    # No folder for them: a store of files would keep it.
    mark = f"{PROBE}{os.urandom(8).hex()}"
    first, race = f"{mark}first", f"{mark}race"
    many = [f"{mark}n{number}" for number in range(keys)]
    try:
        data = os.urandom(4096)
        store.create(first, data)
        _check_ranges(store, first, data)
        refuses = _refuses(store, first, data)
        wins_once = _race(store, race)
        _for_all(lambda key: store.create(key, b""), many)
        _check_listing(store, mark, {first: len(data), race: 16} | dict.fromkeys(many, 0))
    finally:
        _for_all(lambda key: _remove(store, key), [first, race, *many])
    create_only = refuses and wins_once
    return Probed(
        {"create_only": create_only, "ranges": True, "list_after_write": True},
        () if create_only else (_OVERWRITES,),
    )


def _for_all(work: Callable[[str], None], keys: Iterable[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(work, keys):
            pass


def _remove(store: Store, key: str) -> None:
    with suppress(StoreError):  # would hide what is wrong with the store
        store.delete(key)


def _check_ranges(store: Store, key: str, data: bytes) -> None:
    for start, length in ((100, 50), (4090, 50), (0, len(data)), (len(data), 10)):
        if store.get_range(key, start, length) != data[start : start + length]:
            raise StoreError(
                f"the store answers a read of {length} bytes from {start} of {len(data)} with other"
                " bytes; it can't hold a repository"
            )


def _check_listing(store: Store, mark: str, expected: Mapping[str, int]) -> None:
    try:
        listed = [entry for entry in store.list("") if entry.key.startswith(mark)]
    except AccessDeniedError:
        raise
    except StoreError as exc:
        raise StoreError(
            f"the store fails to list {len(expected)} objects, so it can't hold a repository: {exc}"
        ) from exc
    found = {entry.key: entry.size for entry in listed}
    if found == expected and len(listed) == len(found):
        return
    wrong = sorted(expected.items() ^ found.items())
    raise StoreError(
        f"the store lists {len(listed)} objects just after {len(expected)} were written, and"
        f" {len(wrong)} of the keys and sizes are wrong; it can't hold a repository"
    )


def _refuses(store: Store, key: str, data: bytes) -> bool:
    """Whether a key that is taken is refused."""
    try:
        store.create(key, b"other")
    except KeyExistsError:
        if store.get(key, limit=len(data)) != data:
            raise StoreError("the store refused to create an object twice but changed it") from None
        return True
    store.delete(key)
    store.create(key, data)
    return False


def _race(store: Store, key: str) -> bool:
    """Whether just one of many writers makes an object."""
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
    if not won:
        raise StoreError(f"none of {_WRITERS} writers could make an object")
    if store.get(key, limit=16) not in won:
        raise StoreError("an object holds other bytes than any of those who made it wrote")
    return len(won) == 1
