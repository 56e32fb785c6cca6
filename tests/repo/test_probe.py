"""Stores that only pretend, as some gateways do, are refused or trusted with less."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdpull.errors import StoreError
from nbdpull.model.config import Config
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

    between = threading.Barrier(8, timeout=60)

    def create(self, key: str, data: bytes) -> None:
        there = self.path(key).exists()
        if key.endswith("race"):
            self.between.wait()  # else one could be through before the others look
        if there:
            raise KeyExistsError(key)
        self.path(key).write_bytes(data)


class NobodyWins(LocalStore):
    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        if key.endswith("race"):
            raise KeyExistsError(key)


class ListsOnePage(LocalStore):
    """Stops a listing where S3 would begin another answer."""

    def list(self, prefix: str) -> Iterator[Listed]:
        return itertools.islice(super().list(prefix), 1000)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (RefusesButOverwrites, "changed it"),
        (IgnoresRanges, "answers a read of"),
        (ListsLate, "lists"),
        (ListsOnePage, "lists 1000 objects just after 1102"),
        (NobodyWins, "none of 8 writers"),
    ],
)
def test_a_store_that_would_lose_backups_is_refused(
    kind: type[LocalStore], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=problem):
        probe(kind(tmp_path), keys=1100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [Overwrites, CheckThenWrite])
def test_a_store_that_overwrites_is_trusted_with_one_writer_beside_a_collector(
    kind: type[LocalStore], tmp_path: Path
) -> None:
    probed = probe(kind(tmp_path))
    assert probed.capabilities == {"create_only": False, "ranges": True, "list_after_write": True}
    assert len(probed.warnings) == 1
    assert "gc --exclusive" in probed.warnings[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encrypted", [False, True])
def test_such_a_store_gives_the_repository_the_feature(*, encrypted: bool) -> None:
    for create_only in (False, True):
        config = Config.new("0f" * 16, {"create_only": create_only}, encrypted=encrypted)
        again = Config.decode(config.encode())
        assert again.single_writer is not create_only
        assert again.features["write"] == again.features["gc"]
        assert again.unknown("write") is None
        assert again.unknown("gc") is None
