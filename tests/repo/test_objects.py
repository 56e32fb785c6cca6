"""The object stores: what every store does, on real servers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from nbdpull.errors import RepositoryNotFoundError, StoreError, UsageError
from nbdpull.repo.buffer import Budget
from nbdpull.repo.location import open_store
from nbdpull.repo.objects import ObjectStore
from nbdpull.repo.repository import Repository
from nbdpull.repo.store import AccessDeniedError, Store
from tests.repo.conformance import StoreConformance
from tests.repo.helpers import restore, small_history
from tests.support.stores import READER_KEY, SeaweedFs, rclone


class TestSeaweedFs(StoreConformance):
    @pytest.fixture
    def store(self, s3: str) -> Store:
        return open_store(s3)


class TestThroughTheSession:
    """What the packs' way through memory costs."""

    def test_packs_that_are_being_sent_bound_what_is_held(self) -> None:
        budget = Budget(limit=100)
        sent = threading.Event()
        budget.add(150)
        budget.wait_for_room()  # nothing is being sent: waiting would last for ever
        budget.send(1)

        def wait() -> None:
            budget.wait_for_room()
            sent.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not sent.wait(0.2)
        budget.add(-100)
        assert sent.wait(20)
        waiter.join()

    def test_an_upload_gives_back_what_it_held(self, s3: str) -> None:
        store = open_store(s3)
        assert isinstance(store, ObjectStore)
        one, other = store.begin("d/a/0"), store.begin("d/a/1")
        one.write(0, b"x" * 1000)
        one.write(500, b"y" * 1000)
        other.write(10, b"z")
        assert store._budget.held == 1511
        one.commit()
        assert store._budget.held == 11
        other.abort()
        other.abort()
        assert (store._budget.held, store._budget.sending) == (0, 0)
        with pytest.raises(StoreError, match="given up"):
            other.write(0, b"x")

    def test_an_upload_larger_than_a_pack_grows(self, s3: str) -> None:
        store = open_store(s3)
        upload = store.begin("d/a/0")
        upload.write(0, b"begin")
        upload.write(40 << 20, b"end")
        upload.commit()
        assert store.stat("d/a/0").size == (40 << 20) + 3
        assert store.get_range("d/a/0", 0, 6) == b"begin\0"


def test_a_prefix_sees_nothing_of_its_neighbours(s3: str, weed: SeaweedFs) -> None:
    store, longer = open_store(s3), open_store(f"{s3}0")
    longer.create("m/a/b", b"x")
    assert list(store.list("")) == []
    path = s3.removeprefix("s3:/")
    for key in ("m/UPPER", "m/a%b", "notes.txt", "d//odd?"):
        assert weed.client.request("PUT", f"{path}/{key}", body=b"x").status == 200
    assert list(store.list("m")) == []


def test_keys_are_as_the_format_has_them(s3: str, weed: SeaweedFs) -> None:
    open_store(s3).create("d/0f/00000001", b"frames")
    answer = weed.client.request("GET", f"{s3.removeprefix('s3:/')}/d/0f/00000001")
    assert (answer.status, answer.body) == (200, b"frames")


def test_a_history_comes_back_from_a_bucket(s3: str) -> None:
    Repository.create(s3)
    history = small_history(Repository.open(s3, write=True))
    repository = Repository.open(s3)
    for manifest, content in zip(history.manifests, history.contents, strict=True):
        assert restore(repository.reader(repository.manifest(manifest.summary))) == content


def test_a_place_that_holds_something_is_refused(s3: str, weed: SeaweedFs) -> None:
    Repository.create(s3)
    with pytest.raises(UsageError, match=f"{s3} is a repository already"):
        Repository.create(s3)
    with pytest.raises(UsageError, match="not empty"):
        Repository.create(s3.rpartition("/")[0])
    path = s3.removeprefix("s3:/")
    assert weed.client.request("PUT", f"{path}/other/Holiday photo.jpg", body=b"x").status == 200
    with pytest.raises(UsageError, match="not empty"):
        Repository.create(f"{s3}/other")


def test_what_a_killed_init_left_is_no_obstacle(s3: str) -> None:
    open_store(s3).create(f"probe{'0f' * 8}race", b"x")
    Repository.create(s3)


def test_an_empty_prefix_is_no_repository(s3: str) -> None:
    with pytest.raises(RepositoryNotFoundError, match="nbdpull init -r s3://"):
        Repository.open(s3)


@pytest.mark.parametrize("call", [Repository.create, Repository.open])
def test_a_bucket_that_is_not_there_is_told(s3: str, call: Callable[[str], Repository]) -> None:
    with pytest.raises(StoreError, match=r"has no bucket 'nosuch'.*create it"):
        call("s3://nosuch/prefix")


@pytest.mark.parametrize("call", [Repository.create, Repository.open])
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_and_not_shown(
    s3: str, monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[[str], Repository]
) -> None:
    monkeypatch.setenv(name, "wrongwrong")
    with pytest.raises(
        AccessDeniedError, match="the credentials are wrong; set AWS_ACCESS"
    ) as caught:
        call(s3)
    assert "wrongwrong" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_may_only_read_is_told_so_at_the_first_write(
    weed: SeaweedFs, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del weed
    Repository.create(s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    store = open_store(s3)
    assert len(list(store.list(""))) == 1
    with pytest.raises(AccessDeniedError, match="may not do that"):
        store.create("m/a/b", b"x")
    with pytest.raises(AccessDeniedError, match="may not do that"):
        store.delete("nbdpull.json")


def test_a_store_that_ignores_conditions_and_ranges_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with rclone() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StoreError, match="ranged read with something else"):
            Repository.create("s3://bucket0/prefix")
