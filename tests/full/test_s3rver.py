"""A store that ignores the condition of a PUT, and fails to list many keys: npm's s3rver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdpull.errors import StoreError
from nbdpull.repo.cloud import parse_cloud
from nbdpull.repo.objects import ObjectStore
from nbdpull.repo.patience import Patience
from nbdpull.repo.probe import probe
from tests.support.stores import s3rver


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    with s3rver() as server:
        yield ObjectStore(
            parse_cloud("s3://bucket0/prefix", server.env), patience=Patience(retry_s=3.0)
        )


def test_it_is_seen_to_overwrite(store: ObjectStore) -> None:
    assert not probe(store).capabilities["create_only"]


def test_it_is_refused_for_its_listings(store: ObjectStore) -> None:
    with pytest.raises(StoreError, match="fails to list 1102 objects"):
        probe(store, keys=1100)
