"""Locks of what a backup refers to are extended; a collection respects them, and says when the first ends."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import StoreError
from nbdpull.model.config import Lock
from nbdpull.model.manifest import Manifest
from nbdpull.repo import location as location_module
from nbdpull.repo import objects
from nbdpull.repo.location import open_store
from nbdpull.repo.objects import ObjectStore
from nbdpull.repo.repository import Repository
from nbdpull.repo.retention import Retention
from nbdpull.repo.store import AccessDeniedError, KeyMissingError
from tests.ops.builder import Disk, add_backup
from tests.support.stores import SeaweedFs

DAY = 86400.0
GRAINS = {number: bytes([number]) * 65536 for number in range(1, 8)}


@pytest.fixture
def locked(weed: SeaweedFs, s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository whose objects are locked for 30 days."""
    del s3  # for the environment
    monkeypatch.setattr(location_module, "LISTED", 0)  # the trial listing has tests of its own
    location = f"s3://{weed.bucket(lock=True)}/locked"
    Repository.create(location, lock=Lock(mode="compliance", duration_s=int(30 * DAY)))
    return location


def later(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Move this machine's clock, which the locks go by; the store's stays."""
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + days * DAY)


def increment(location: str, manifests: dict[str, Manifest], number: int) -> dict[str, Manifest]:
    """One more backup, that refers to what is there."""
    before = Disk(40 * 65536, GRAINS)
    after = Disk(before.size, {**before.grains, 20 + number: b"x" * 65536})
    return add_backup(
        Repository.open(location, write=True),
        {"vda": after},
        before={"vda": before},
        parents=manifests,
        time=float(number),
    )


def until(weed: SeaweedFs, location: str, key: str) -> float:
    """When the lock ends, asked by another client."""
    path = f"{location.removeprefix('s3:/')}/{key}"
    answer = weed.client.request("GET", path, "retention=").body.decode()
    assert "<Mode>COMPLIANCE</Mode>" in answer
    return datetime.fromisoformat(
        answer.partition("<RetainUntilDate>")[2].partition("<")[0]
    ).timestamp()


def needed(location: str, manifest: Manifest) -> set[str]:
    """The packs and indexes of a backup."""
    sids = [ref.sid for ref in manifest.sessions]
    packs = {f"d/{sids[session]}/{seq:08x}" for session, seq in manifest.packs()}
    return packs | {f"x/{ref.sid}/{number}" for ref in manifest.sessions for number, _ in ref.index}


def test_what_an_incremental_needs_is_locked_as_long_as_itself(
    weed: SeaweedFs, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add_backup(
        Repository.open(locked, write=True), {"vda": Disk(40 * 65536, GRAINS)}, time=0.0
    )
    old = needed(locked, first["vda"])
    before = {key: until(weed, locked, key) for key in old}
    later(monkeypatch, 10)
    second = increment(locked, first, 1)["vda"]
    keys = needed(locked, second)
    assert old & keys
    assert keys - old
    ends = until(weed, locked, f"m/{second.summary.disk_id}/{second.summary.session}")
    assert ends > min(before.values()) + 9 * DAY
    for key in keys:
        assert until(weed, locked, key) >= ends
    assert nbdpull.show(locked, "latest").locked_until == ends
    # What is extended goes on for a quarter more: the next backups find it so.
    reached = {key: until(weed, locked, key) for key in old}
    assert min(reached.values()) > ends + 7 * DAY
    later(monkeypatch, 5)
    third = increment(locked, {"vda": second}, 2)["vda"]
    assert {key: until(weed, locked, key) for key in old} == reached
    ends = until(weed, locked, f"m/{third.summary.disk_id}/{third.summary.session}")
    assert min(reached.values()) >= ends


def test_a_collection_leaves_what_is_locked_longer_and_says_until_when(
    weed: SeaweedFs, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add_backup(
        Repository.open(locked, write=True), {"vda": Disk(40 * 65536, GRAINS)}, time=0.0
    )
    with monkeypatch.context() as patched:
        later(patched, 10)
        increment(locked, first, 1)
    nbdpull.forget(locked, [backup.backup for backup in nbdpull.list_backups(locked)])
    done = nbdpull.gc(locked, undo_window_s=0)
    assert done.packs == 0
    assert done.unlock is not None
    assert 29.9 * DAY < done.unlock - time.time() < 30.1 * DAY
    later(monkeypatch, 35)  # the first lock of the old packs is over, and the extended one is not
    done = nbdpull.gc(locked, undo_window_s=0)
    assert done.packs == 0
    assert done.unlock is not None
    assert done.unlock == min(until(weed, locked, key) for key in done.refused)
    assert {key[0] for key in done.refused} >= {"d", "x"}
    later(monkeypatch, 25)
    assert nbdpull.gc(locked, undo_window_s=0).packs == 2


def test_without_botocore_or_the_right_to_it_the_backup_is_made_and_the_user_told(
    locked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = add_backup(
        Repository.open(locked, write=True), {"vda": Disk(40 * 65536, GRAINS)}, time=0.0
    )
    later(monkeypatch, 10)

    def refuse(_self: Retention, key: str, _mode: str, _until: float) -> None:
        raise AccessDeniedError(f"not {key}")

    with monkeypatch.context() as patched:
        patched.setattr(Retention, "extend", refuse)
        second = increment(locked, first, 1)
    assert "are not extended: not " in caplog.text
    monkeypatch.setattr(objects, "load", lambda _cloud: None)
    increment(locked, second, 2)
    assert "install 'nbdpull[lock]'" in caplog.text
    assert len(nbdpull.list_backups(locked)) == 3


def test_a_backup_is_locked_until_its_first_object_is_free(
    weed: SeaweedFs, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add_backup(
        Repository.open(locked, write=True), {"vda": Disk(40 * 65536, GRAINS)}, time=0.0
    )
    before = {key: until(weed, locked, key) for key in needed(locked, first["vda"])}
    with monkeypatch.context() as patched:
        later(patched, 10)
        patched.setattr(objects, "load", lambda _cloud: None)  # no lock is extended
        last = increment(locked, first, 1)["vda"]
    own = until(weed, locked, f"m/{last.summary.disk_id}/{last.summary.session}")
    assert own > max(before.values()) + 9 * DAY
    assert nbdpull.show(locked, "latest").locked_until == min(before.values())
    # Whoever can't ask goes by the time at which each object was written.
    monkeypatch.setattr(objects, "load", lambda _cloud: None)
    told = nbdpull.show(locked, "latest").locked_until
    assert told is not None
    assert abs(told - min(before.values())) <= 3600
    path = f"{locked.removeprefix('s3:/')}/m/{last.summary.disk_id}/{last.summary.session}"
    raw = bytearray(weed.client.request("GET", path).body)
    raw[-40] ^= 1  # a new version, in its body: what it refers to can't be told
    assert weed.client.request("PUT", path, body=bytes(raw)).status == 200
    assert nbdpull.show(locked, "latest").locked_until is None


def test_a_profiles_credentials_extend_locks_too(
    weed: SeaweedFs, locked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}  # fmt: skip
    lines = [f"{name} = {weed.env[variable]}" for name, variable in names.items()]
    (tmp_path / "credentials").write_text("\n".join(["[backup]", *lines, ""]))
    first = add_backup(
        Repository.open(locked, write=True), {"vda": Disk(40 * 65536, GRAINS)}, time=0.0
    )
    for variable in names.values():
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    later(monkeypatch, 10)
    increment(f"{locked}?profile=backup", first, 1)
    assert until(weed, locked, min(needed(locked, first["vda"]))) > time.time() + 30 * DAY


def test_trouble_is_told_without_secrets(
    weed: SeaweedFs, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(locked)
    assert isinstance(store, ObjectStore)
    store.lock(Lock(mode="compliance", duration_s=60))
    with pytest.raises(KeyMissingError):
        store.hold(["d/nosuch"], time.time(), time.time() + 60)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    wrong = open_store(locked)
    assert isinstance(wrong, ObjectStore)
    wrong.lock(Lock(mode="compliance", duration_s=60))
    with pytest.raises(StoreError) as caught:
        wrong.hold(["nbdpull.json"], time.time(), time.time() + 60)
    assert "wrong-secret" not in str(caught.value)


def test_a_replica_may_be_locked_too(
    weed: SeaweedFs, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = locked.replace("/locked", "/replica")
    first = add_backup(
        Repository.open(locked, write=True), {"vda": Disk(40 * 65536, GRAINS)}, time=0.0
    )
    for lock_s, told in ((None, "does not"), (30 * DAY, "")):
        target = replica if lock_s else replica + "2"
        done = nbdpull.copy(locked, target, lock_s=lock_s, lock_mode="compliance")
        assert told in "".join(done.warnings)
        assert bool(done.warnings) is bool(told)
    key = f"m/{first['vda'].summary.disk_id}/{first['vda'].summary.session}"
    assert 29.9 * DAY < until(weed, replica, key) - time.time() < 30.1 * DAY
    later(monkeypatch, 20)
    second = increment(locked, first, 1)["vda"]
    nbdpull.copy(locked, replica)
    ends = until(weed, replica, f"m/{second.summary.disk_id}/{second.summary.session}")
    for one in needed(replica, second):
        assert until(weed, replica, one) >= ends
    with pytest.raises(nbdpull.UsageError, match="is a replica already, with other locks"):
        nbdpull.copy(locked, replica, lock_s=9 * DAY)
