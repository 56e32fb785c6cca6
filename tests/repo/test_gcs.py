"""gs://, in front of a real store: no account of Google's is at hand (see docs/object-stores.md)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import StoreError
from nbdpull.repo.location import open_store
from nbdpull.repo.repository import Repository
from nbdpull.repo.store import Store
from tests.ops.copying import World
from tests.repo.conformance import StoreConformance
from tests.repo.helpers import restore, small_history
from tests.support.gcs import gcs_front
from tests.support.stores import SeaweedFs

_prefixes = itertools.count()


@pytest.fixture
def gs(weed: SeaweedFs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with gcs_front(weed.client) as url:
        account = tmp_path / "account.json"
        account.write_text(
            json.dumps(
                {
                    "gcs_base_url": url,
                    "disable_oauth": True,
                    "client_email": "",
                    "private_key": "",
                    "private_key_id": "",
                }
            )
        )
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
        monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
        yield f"gs://bucket0/gcs/{next(_prefixes)}"


class TestGcs(StoreConformance):
    @pytest.fixture
    def store(self, gs: str) -> Store:
        return open_store(gs)


def test_a_history_comes_back(gs: str) -> None:
    Repository.create(gs)
    history = small_history(Repository.open(gs, write=True))
    repository = Repository.open(gs)
    for manifest, content in zip(history.manifests, history.contents, strict=True):
        assert restore(repository.reader(repository.manifest(manifest.summary))) == content
    nbdpull.forget(gs, [history.manifests[0].summary.backup])
    assert nbdpull.gc(gs, undo_window_s=0).manifests == 1
    assert nbdpull.verify(gs).ok


def test_a_replica_in_it_restores(gs: str, tmp_path: Path) -> None:
    world = World(tmp_path, target=gs)
    world.copy()
    for backup in world.ids:
        world.check(backup, tmp_path / backup)


def test_a_missing_bucket_is_told(gs: str) -> None:
    del gs
    with pytest.raises(StoreError, match="Google Cloud Storage has no bucket 'nothere'"):
        Repository.open("gs://nothere/x")
