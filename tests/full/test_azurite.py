"""Azure Blob Storage, as Azurite does it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from nbdpull.errors import StoreError
from nbdpull.repo.location import open_store
from nbdpull.repo.repository import Repository
from nbdpull.repo.store import AccessDeniedError, Store
from tests.repo.conformance import StoreConformance
from tests.repo.helpers import restore, small_history
from tests.support.stores import Azurite, azurite

_prefixes = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Azurite]:
    with azurite() as running:
        running.make_container("container0")
        yield running


@pytest.fixture
def az(server: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return f"az://container0/test/{next(_prefixes)}"


class TestAzurite(StoreConformance):
    @pytest.fixture
    def store(self, az: str) -> Store:
        return open_store(az)


def test_a_history_comes_back(az: str) -> None:
    Repository.create(az)
    history = small_history(Repository.open(az, write=True))
    repository = Repository.open(az)
    for manifest, content in zip(history.manifests, history.contents, strict=True):
        assert restore(repository.reader(repository.manifest(manifest.summary))) == content


def test_a_missing_container_is_told(az: str) -> None:
    with pytest.raises(StoreError, match="has no container 'nothere'"):
        Repository.open("az://nothere/x")


def test_a_wrong_key_is_told_and_not_shown(az: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "c2VjcmV0LXdyb25n")
    with pytest.raises(AccessDeniedError, match="answers 403") as caught:
        Repository.open(az)
    assert "c2VjcmV0" not in f"{caught.value} {caught.value.__cause__}"


def test_a_connection_string_is_enough(
    az: str, server: Azurite, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in server.env:
        monkeypatch.delenv(name)
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"DefaultEndpointsProtocol=http;AccountName={server.env['AZURE_STORAGE_ACCOUNT']};"
        f"AccountKey={server.env['AZURE_STORAGE_KEY']};BlobEndpoint={server.endpoint};",
    )
    made = Repository.create(az)
    assert Repository.open(az).id == made.id


def test_a_signature_in_the_urls_is_never_shown(az: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=2023-11-03&sp=r&sr=c&sig=verysecret")
    with pytest.raises(StoreError) as caught:
        Repository.open(az)
    shown = f"{caught.value} {caught.value.__cause__} {caught.value.__context__}"
    assert "verysecret" not in shown
