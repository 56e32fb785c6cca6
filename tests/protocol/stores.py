"""Stores that stand between the code and what is kept: in memory, watched, killed."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from nbdpull.errors import StoreError
from nbdpull.repo.store import KeyExistsError, KeyMissingError, Listed, Store, Upload

__all__ = ["Gate", "Killed", "MemoryStore", "WatchedStore"]

Gate = Callable[[str, str], AbstractContextManager[None]]
"""Called with the call's name and key; surrounds the call's effect."""


class Killed(BaseException):
    """The process is dead: whatever it still tries has no effect."""


class MemoryStore:
    """Objects in a dictionary. A listing finds one key after the other, as they are by then.

    Attributes:
        age_s: how much older than now an object looks, by its key.
        same_is_own: `create` returns where the very same bytes are there, as object stores do.
    """

    def __init__(self, *, same_is_own: bool = False) -> None:
        self.same_is_own = same_is_own
        self._lock = threading.Lock()
        self._objects: dict[str, bytes] = {}
        self.age_s: Callable[[str], float] = lambda _key: 0.0

    def create(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self._objects:
                if self.same_is_own and self._objects[key] == data:
                    return
                raise KeyExistsError(f"{key} exists already")
            self._objects[key] = bytes(data)

    def begin(self, key: str) -> Upload:
        return _MemoryUpload(self, key)

    def get(self, key: str, *, limit: int) -> bytes:
        raw = self.get_range(key, 0, limit + 1)
        if len(raw) > limit:
            raise StoreError(f"{key} has more than {limit} bytes")
        return raw

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._lock:
            if key not in self._objects:
                raise KeyMissingError(f"{key} is missing")
            return self._objects[key][start : start + length]

    def stat(self, key: str) -> Listed:
        return Listed(key, len(self.get_range(key, 0, 1 << 40)), 1e9 - self.age_s(key))

    def next_after(self, prefix: str, last: str) -> Listed | None:
        """The first object below `prefix` whose key comes after `last`."""
        with self._lock:
            keys = sorted(key for key in self._objects if key.startswith(f"{prefix}/"))
            at = bisect_right(keys, last)
            if at == len(keys):
                return None
            return Listed(keys[at], len(self._objects[keys[at]]), 1e9 - self.age_s(keys[at]))

    def list(self, prefix: str) -> Iterator[Listed]:
        last = ""
        while (found := self.next_after(prefix, last)) is not None:
            yield found
            last = found.key

    def sync(self, prefix: str) -> None:
        pass

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)


class _MemoryUpload:
    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store = store
        self._key = key
        self._data = bytearray()
        self._lock = threading.Lock()

    def write(self, offset: int, *parts: bytes | bytearray | memoryview) -> None:
        raw = b"".join(parts)
        with self._lock:
            self._data.extend(bytes(max(0, offset + len(raw) - len(self._data))))
            self._data[offset : offset + len(raw)] = raw

    def commit(self) -> None:
        self._store.create(self._key, bytes(self._data))

    def abort(self) -> None:
        pass


class WatchedStore:
    """Another store, with a gate around each call; of a listing around each key."""

    def __init__(self, inner: Store, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate

    def create(self, key: str, data: bytes) -> None:
        with self._gate("create", key):
            self._inner.create(key, data)

    def begin(self, key: str) -> Upload:
        return _WatchedUpload(self._inner.begin(key), key, self._gate)

    def get(self, key: str, *, limit: int) -> bytes:
        with self._gate("get", key):
            return self._inner.get(key, limit=limit)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._gate("get", key):
            return self._inner.get_range(key, start, length)

    def stat(self, key: str) -> Listed:
        with self._gate("stat", key):
            return self._inner.stat(key)

    def list(self, prefix: str) -> Iterator[Listed]:
        found = self._inner.list(prefix)
        while True:
            with self._gate("list", prefix):
                listed = next(found, None)
            if listed is None:
                return
            yield listed

    def sync(self, prefix: str) -> None:
        with self._gate("sync", prefix):
            self._inner.sync(prefix)

    def delete(self, key: str) -> None:
        with self._gate("delete", key):
            self._inner.delete(key)


class _WatchedUpload:
    def __init__(self, inner: Upload, key: str, gate: Gate) -> None:
        self._inner = inner
        self._key = key
        self._gate = gate

    def write(self, offset: int, *parts: bytes | bytearray | memoryview) -> None:
        self._inner.write(offset, *parts)

    def commit(self) -> None:
        with self._gate("commit", self._key):
            self._inner.commit()

    def abort(self) -> None:
        self._inner.abort()
