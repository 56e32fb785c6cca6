"""A store with some objects in memory, so that what was fetched is checked before it is passed on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nbdpull.errors import StoreError
from nbdpull.repo.store import Listed, Store, Upload

__all__ = ["Held"]


class Held:
    """Reads from another store, but for the objects that are `held`."""

    def __init__(self, below: Store) -> None:
        self._below = below
        self.held: dict[str, bytes] = {}

    @contextmanager
    def holding(self, key: str, raw: bytes) -> Iterator[None]:
        """Read `raw` where `key` is asked for."""
        self.held[key] = raw
        try:
            yield
        finally:
            self.held.pop(key, None)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        raw = self.held.get(key)
        return (
            self._below.get_range(key, start, length)
            if raw is None
            else raw[start : start + length]
        )

    def get(self, key: str, *, limit: int) -> bytes:
        """See `Store.get`."""
        return self._below.get(key, limit=limit)

    def stat(self, key: str) -> Listed:
        """See `Store.stat`."""
        return self._below.stat(key)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See `Store.list`."""
        return self._below.list(prefix)

    def create(self, key: str, data: bytes) -> None:  # noqa: ARG002
        """Nothing is written to what is copied from."""
        raise StoreError(f"{key} is not written here")

    def begin(self, key: str) -> Upload:
        """Nothing is written to what is copied from."""
        raise StoreError(f"{key} is not written here")

    def sync(self, prefix: str) -> None:
        """See `Store.sync`."""
        self._below.sync(prefix)

    def delete(self, key: str) -> None:
        """Nothing is written to what is copied from."""
        raise StoreError(f"{key} is not deleted here")
