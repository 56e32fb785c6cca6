"""Stores that only pretend, as some gateways do, are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdpull.errors import StoreError
from nbdpull.repo.local import LocalStore
from nbdpull.repo.probe import probe
from nbdpull.repo.store import KeyExistsError, Listed


class Overwrites(LocalStore):
    """Ignores the condition, as rclone's S3 server does."""

    def create(self, key: str, data: bytes) -> None:
        self.delete(key)
        super().create(key, data)


class RefusesButOverwrites(LocalStore):
    def create(self, key: str, data: bytes) -> None:
        try:
            super().create(key, data)
        except KeyExistsError:
            self.path(key).write_bytes(data)
            raise


class IgnoresRanges(LocalStore):
    """Answers a ranged read with the whole object, as rclone's S3 server does."""

    def get_range(self, key: str, start: int, length: int) -> bytes:  # noqa: ARG002
        return super().get_range(key, 0, 1 << 20)


class ListsLate(LocalStore):
    def list(self, prefix: str) -> Iterator[Listed]:
        return iter(list(super().list(prefix))[1:])


class CheckThenWrite(LocalStore):
    """Checks first and writes then, so that two may win."""

    def create(self, key: str, data: bytes) -> None:
        if list(self.list("")) and any(
            entry.key == key and entry.size != 16 for entry in self.list("")
        ):
            raise KeyExistsError(key)
        self.path(key).write_bytes(data)


class NobodyWins(LocalStore):
    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        if key.endswith("race"):
            raise KeyExistsError(key)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Overwrites, "created twice"),
        (RefusesButOverwrites, "changed it"),
        (IgnoresRanges, "ranged read"),
        (ListsLate, "lists"),
        (CheckThenWrite, "were told that they made it"),
        (NobodyWins, "were told that they made it"),
    ],
)
def test_a_store_that_pretends_is_refused(
    kind: type[LocalStore], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=problem):
        probe(kind(tmp_path))
    assert list(tmp_path.iterdir()) == []
