"""The object stores: what every store does, on real servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdpull.errors import RepositoryNotFoundError, StoreError, UsageError
from nbdpull.model.config import Lock
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


@pytest.fixture
def locked(weed: SeaweedFs, s3: str) -> str:
    """A place in a bucket with object lock."""
    del s3  # for the environment
    return f"s3://{weed.bucket(lock=True)}/locked"


def versions(weed: SeaweedFs, location: str, key: str) -> tuple[str, str]:
    """The path of an object, and the id of its version."""
    path = f"{location.removeprefix('s3:/')}/{key}"
    headers = weed.client.request("GET", path).headers
    return path, {name.lower(): value for name, value in headers.items()}["x-amz-version-id"]


@pytest.mark.parametrize("mode", ["compliance", "governance"])
def test_what_backups_consist_of_is_locked_for_as_long_as_was_asked(
    weed: SeaweedFs, locked: str, mode: str
) -> None:
    Repository.create(locked, lock=Lock(mode=mode, duration_s=30 * 86400))
    small_history(Repository.open(locked, write=True))
    found = {"s": 0, "d": 0, "x": 0, "m": 0}
    for entry in open_store(locked).list(""):
        kind = entry.key.partition("/")[0]
        if kind not in found:
            continue
        found[kind] += 1
        path, version = versions(weed, locked, entry.key)
        answer = weed.client.request("GET", path, "retention=").body.decode()
        if kind == "s":
            assert "RetainUntilDate" not in answer
            continue
        assert f"<Mode>{mode.upper()}</Mode>" in answer
        until = answer.partition("<RetainUntilDate>")[2].partition("<")[0]
        left = datetime.fromisoformat(until) - datetime.now(UTC)
        assert timedelta(days=30) - timedelta(minutes=1) < left <= timedelta(days=30, hours=1)
        assert weed.client.request("DELETE", path, f"versionId={version}").status == 403
    assert min(found.values()) >= 3
    # A plain delete only hides it: the version stays, and can be read.
    path, version = versions(weed, locked, entry_of(locked, "d"))
    open_store(locked).delete(entry_of(locked, "d"))
    assert weed.client.request("GET", path).status == 404
    assert weed.client.request("GET", path, f"versionId={version}").status == 200


def test_a_locked_object_is_not_deleted_before_its_lock_ends(
    locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Repository.create(locked, lock=Lock(mode="governance", duration_s=86400))
    repository = Repository.open(locked, write=True)
    small_history(repository)
    kept = {prefix: entry_of(locked, prefix) for prefix in ("d", "x", "m")}
    for key in kept.values():
        with pytest.raises(
            AccessDeniedError, match=r"is locked until 20\d\d-\d\d-\d\d \d\d:00 UTC"
        ):
            repository._store.delete(key)
    repository._store.delete("d/nosuch")
    repository._store.delete(entry_of(locked, "s"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400 + 3600)
    repository._store.delete(kept["d"])
    assert kept["d"] not in {entry.key for entry in repository._store.list("d")}


def test_a_copy_of_a_locked_repository_in_a_folder_can_still_be_read(
    locked: str, tmp_path: Path
) -> None:
    Repository.create(locked, lock=Lock(mode="governance", duration_s=86400))
    history = small_history(Repository.open(locked, write=True))
    store, folder = open_store(locked), open_store(str(tmp_path))
    for entry in store.list(""):
        folder.create(entry.key, store.get(entry.key, limit=1 << 20))
    repository = Repository.open(str(tmp_path))
    assert restore(repository.reader(history.manifests[-1])) == history.contents[-1]
    with pytest.raises(StoreError, match="ask for locks, which only S3 has"):
        Repository.open(str(tmp_path), write=True)


def entry_of(location: str, prefix: str) -> str:
    return min(entry.key for entry in open_store(location).list(prefix))


def test_a_bucket_or_a_folder_without_locks_is_refused(s3: str, tmp_path: Path) -> None:
    lock = Lock(mode="governance", duration_s=60)
    with pytest.raises(StoreError, match=r"bucket bucket0 locks no objects .*make one with object"):
        Repository.create(s3, lock=lock)
    with pytest.raises(UsageError, match="only a repository in S3 can be locked"):
        Repository.create(str(tmp_path / "repo"), lock=lock)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RepositoryNotFoundError):
        Repository.open(s3)
