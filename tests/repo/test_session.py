"""Writing one disk: what is stored, by how many threads, and what happens when it goes wrong."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nbdpull.errors import DamagedError, RepositoryError, StoreError
from nbdpull.model.frame import FrameHeader
from nbdpull.model.grain import GRAIN, SEGMENT
from nbdpull.model.segment import Packs, Segment
from nbdpull.repo import session as session_module
from nbdpull.repo.local import LocalStore
from nbdpull.repo.repository import ParentGoneError, Repository, Session
from nbdpull.repo.store import KeyExistsError, Listed, Upload
from tests.repo.helpers import (
    backup,
    encrypted,
    grain,
    interval,
    restore,
    small_history,
    summary_for,
)

SIZE = 64 * GRAIN


@pytest.fixture(params=["plain", "encrypted"])
def repository(tmp_path: Path, request: pytest.FixtureRequest) -> Repository:
    if request.param == "plain":
        Repository.create(str(tmp_path / "repo"))
        return Repository.open(str(tmp_path / "repo"), write=True)
    return encrypted(tmp_path / "repo")


def keys(repository: Repository, prefix: str = "") -> list[str]:
    return [entry.key for entry in repository._store.list(prefix)]


def begin(repository: Repository) -> Session:
    return repository.begin(vm="vm", disk="vda", parent=None)


def test_a_small_backup_makes_four_objects(repository: Repository) -> None:
    manifest = backup(repository, SIZE, {3: grain(1)})
    sid, disk = manifest.summary.session, manifest.summary.disk_id
    assert [key for key in keys(repository) if not key.startswith("key/")] == [
        f"d/{sid}/00000000",
        f"m/{disk}/{sid}",
        "nbdpull.json",
        f"s/{sid}",
        f"x/{sid}/0",
    ]


def test_a_backup_of_an_unchanged_disk_makes_no_pack(repository: Repository) -> None:
    first = backup(repository, SIZE, {3: grain(1)})
    session = repository.begin(vm="vm", disk="vda", parent=first)
    second = session.commit(summary_for(session, size=SIZE))
    assert keys(repository, f"d/{session.id}") == []
    assert restore(repository.reader(second)) == restore(repository.reader(first))
    assert second.sessions[1].sid == ""


def test_stored_bytes_are_the_bytes_of_the_objects(repository: Repository) -> None:
    session = begin(repository)
    rows = [interval(session, i * 2, grain(i)) for i in range(9)]
    session.put_segment(0, Segment.of(rows))
    session.seal()
    listed = [
        *repository._store.list(f"d/{session.id}"),
        *repository._store.list(f"x/{session.id}"),
    ]
    assert session.stored_bytes == sum(entry.size for entry in listed)


def test_every_backup_of_a_history_restores_from_its_own_manifest(repository: Repository) -> None:
    history = small_history(repository)
    for manifest, content in zip(history.manifests, history.contents, strict=True):
        reader = repository.reader(repository.manifest(manifest.summary))
        assert restore(reader) == content
        assert reader.missing_packs() == []
        for session, seq in reader.packs():
            reader.check_pack(session, seq)


def test_what_does_not_pack_is_stored_as_it_is(repository: Repository) -> None:
    session = begin(repository)
    noise = np.random.default_rng(1).bytes(GRAIN)
    ref = session.put(noise)
    assert ref.clen == GRAIN
    assert session.put(b"a" * GRAIN).clen < 100


@pytest.mark.parametrize("length", [0, (1 << 20) + 1])
def test_a_frame_of_a_size_that_cannot_be_is_a_bug(repository: Repository, length: int) -> None:
    with pytest.raises(ValueError, match="frame"):
        begin(repository).put(bytes(length))


def test_the_buffer_may_be_reused_at_once(repository: Repository) -> None:
    session = begin(repository)
    buffer = bytearray(np.random.default_rng(1).bytes(GRAIN))
    rows = []
    contents = []
    for i in range(20):
        buffer[0] = i
        contents.append(bytes(buffer))
        rows.append(interval(session, i, memoryview(buffer)))  # type: ignore[arg-type]
    session.put_segment(0, Segment.of(rows))
    reader = repository.reader(session.commit(summary_for(session, size=SIZE)))
    assert [reader.read(row) for row in rows] == contents


@pytest.mark.parametrize(("pack", "frames"), [(300_000, 4096), (1 << 20, 7)])
def test_four_threads_fill_many_packs(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, pack: int, frames: int
) -> None:
    monkeypatch.setattr(session_module, "PACK_SIZE", pack)
    monkeypatch.setattr(session_module, "FRAMES_PER_PACK", frames)
    session = begin(repository)
    count = 1200
    contents = {i: random.Random(i).randbytes(16_384) + bytes(GRAIN - 16_384) for i in range(count)}
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda i: interval(session, i, contents[i]), range(count)))
    session.put_segment(0, Segment.of(rows))
    session.seal()
    manifest = session.commit(summary_for(session, size=count * GRAIN))
    packs = keys(repository, f"d/{session.id}")
    assert len(packs) > 64
    assert keys(repository, f"x/{session.id}") == [
        f"x/{session.id}/{n}" for n in range((len(packs) + 63) // 64)
    ]
    reader = repository.reader(manifest)
    for i, row in enumerate(rows):
        assert reader.read(row) == contents[i]
    for number, seq in reader.packs():
        reader.check_pack(number, seq)
    assert reader.missing_packs() == []


def test_a_pack_holds_its_frames_back_to_back_as_the_format_says(repository: Repository) -> None:
    manifest = backup(repository, SIZE, {3: grain(1), 9: grain(2)})
    raw = repository._store.get(f"d/{manifest.summary.session}/00000000", limit=1 << 20)
    at = 128
    for number in range(3):  # two of data, one map
        header = FrameHeader.decode(raw[at : at + 64])
        assert header.number == number
        at += 64 + header.clen
    tag = 0 if repository.vault is None else 16
    assert len(raw) == at + 3 * 48 + tag + 64


# -- lineage ---------------------------------------------------------------------------------------


def test_a_session_nobody_refers_to_any_more_leaves_only_its_place(repository: Repository) -> None:
    first = backup(repository, SIZE, {3: grain(1)})
    second = backup(repository, SIZE, {3: grain(2)}, first)
    third = backup(repository, SIZE, {5: grain(3)}, second)
    assert [ref.sid for ref in second.sessions] == ["", second.summary.session]
    assert [ref.sid for ref in third.sessions] == [
        "",
        second.summary.session,
        third.summary.session,
    ]
    assert third.packs() == Packs.of([(1, 0), (2, 0)])
    assert restore(repository.reader(third))[3 * GRAIN : 4 * GRAIN] == grain(2)


def test_a_parent_of_another_size_is_never_built_on(repository: Repository) -> None:
    first = backup(repository, SIZE, {3: grain(1)})
    session = repository.begin(vm="vm", disk="vda", parent=first)
    with pytest.raises(ValueError, match="had 4194304 bytes"):
        session.commit(summary_for(session, size=SIZE + GRAIN))


@pytest.mark.parametrize("gone", ["tombstone", "manifest"])
def test_a_parent_that_is_being_forgotten_is_refused_after_the_intent_is_on_record(
    repository: Repository, gone: str
) -> None:
    first = backup(repository, SIZE, {3: grain(1)})
    pin = f"{first.summary.disk_id}/{first.summary.session}"
    if gone == "tombstone":
        repository._store.create(f"t/{pin}", b"")
    else:
        repository._store.delete(f"m/{pin}")
    with pytest.raises(ParentGoneError, match=pin):
        repository.begin(vm="vm", disk="vda", parent=first)
    assert len(keys(repository, "s")) == 2
    begin(repository)


# -- the commit ------------------------------------------------------------------------------------


def full(repository: Repository) -> Session:
    session = begin(repository)
    session.put_segment(0, Segment.of([interval(session, 0, grain(1))]))
    return session


def test_nothing_is_listed_before_the_commit(repository: Repository) -> None:
    session = full(repository)
    session.seal()
    assert repository.scan() == ([], [])
    session.commit(summary_for(session, size=SIZE))
    assert len(repository.summaries()) == 1


def test_committing_the_same_again_succeeds(repository: Repository) -> None:
    session = full(repository)
    summary = summary_for(session, size=SIZE)
    assert session.commit(summary) == session.commit(summary)


def test_another_manifest_under_the_key_is_an_error(repository: Repository) -> None:
    session = full(repository)
    session.commit(summary_for(session, size=SIZE))
    with pytest.raises(StoreError, match="something else"):
        session.commit(summary_for(session, size=SIZE, reason="another"))


def test_a_revoked_session_is_not_committed(repository: Repository) -> None:
    session = full(repository)
    repository._store.create(f"m/{session.disk_id}/{session.id}", b"NBDPREV1")
    with pytest.raises(RepositoryError, match="revoked"):
        session.commit(summary_for(session, size=SIZE))
    assert repository.scan() == ([], [])


def test_a_session_of_more_than_thirty_days_is_not_committed(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = full(repository)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 31 * 86400)
    with pytest.raises(RepositoryError, match="31 days ago"):
        session.commit(summary_for(session, size=SIZE))


def test_a_summary_of_another_disk_is_a_bug(repository: Repository) -> None:
    session = full(repository)
    with pytest.raises(ValueError, match="another disk"):
        session.commit(summary_for(session, size=SIZE, disk_id="00" * 16))


class Lists(LocalStore):
    """Lists a pack with another size, or not at all."""

    change: int | None = None

    def list(self, prefix: str) -> Iterator[Listed]:
        for entry in super().list(prefix):
            if not entry.key.startswith("d/"):
                yield entry
            elif self.change is not None:
                yield Listed(entry.key, entry.size + self.change, entry.modified)


@pytest.mark.parametrize("change", [None, -1, 1])
def test_a_store_that_lost_or_cut_a_pack_is_found_out_before_the_commit(
    repository: Repository, change: int | None
) -> None:
    repository._store = store = Lists(repository._store.root)  # type: ignore[attr-defined]
    store.change = change
    session = full(repository)
    with pytest.raises(StoreError, match="can't be trusted"):
        session.seal()
    with pytest.raises(StoreError):
        session.commit(summary_for(session, size=SIZE))
    assert repository.scan() == ([], [])


# -- failures --------------------------------------------------------------------------------------


class Fails(LocalStore):
    """Fails to make objects whose keys begin with `prefix`."""

    prefix = "-"

    def begin(self, key: str) -> Upload:  # type: ignore[override]
        upload = super().begin(key)
        if key.startswith(self.prefix):

            def fail() -> None:
                upload.abort()
                raise StoreError("no room")

            upload.commit = fail  # type: ignore[method-assign]
        return upload


@pytest.mark.parametrize("prefix", ["d/", "x/", "m/"])
def test_a_failed_write_is_told_and_nothing_is_committed(
    repository: Repository, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PACK_SIZE", 100_000)
    store = Fails(repository._store.root)  # type: ignore[attr-defined]
    repository._store = store
    session = begin(repository)
    store.prefix = prefix

    def write() -> None:
        rows = [interval(session, i, grain(i)) for i in range(60)]
        session.put_segment(0, Segment.of(rows))
        session.commit(summary_for(session, size=SIZE))

    with pytest.raises(StoreError, match="no room"):
        write()
    session.abandon()
    assert repository.scan() == ([], [])


def test_a_failed_session_says_so_at_every_call(repository: Repository) -> None:
    store = Fails(repository._store.root)  # type: ignore[attr-defined]
    repository._store = store
    store.prefix = "d/"
    session = full(repository)
    for _ in range(2):
        with pytest.raises(StoreError, match="no room"):
            session.seal()
    with pytest.raises(StoreError, match=r"failed before: .*no room"):
        session.put(b"x")


def test_a_manifest_that_was_stored_although_create_failed_is_found(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = full(repository)
    session.seal()
    real = repository._store.create

    def create(key: str, data: bytes) -> None:
        real(key, data)
        raise KeyExistsError("a retry found it")

    monkeypatch.setattr(repository._store, "create", create)
    session.commit(summary_for(session, size=SIZE))
    assert len(repository.summaries()) == 1


class Slow(LocalStore):
    """Its pack writes wait until they are let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()
        self.waiting = threading.Semaphore(0)

    def begin(self, key: str) -> Upload:  # type: ignore[override]
        upload = super().begin(key)
        write = upload.write

        def slow(offset: int, *parts: bytes | bytearray | memoryview) -> None:
            if offset > 0 and key.startswith("d/"):
                self.waiting.release()
                assert self.go.wait(20)
            write(offset, *parts)

        upload.write = slow  # type: ignore[method-assign]
        return upload


def test_abandon_returns_while_threads_are_stuck_and_they_end_cleanly(
    repository: Repository,
) -> None:
    store = Slow(repository._store.root)  # type: ignore[attr-defined]
    repository._store = store
    session = begin(repository)
    with ThreadPoolExecutor(3) as pool:
        puts = [pool.submit(session.put, grain(i)) for i in range(3)]
        for _ in puts:
            assert store.waiting.acquire(timeout=20)
        session.abandon()
        session.abandon()
        with pytest.raises(StoreError, match="given up"):
            session.put(b"late")
        # A file closed under a write could be another one's by now: the write must still succeed.
        store.go.set()
        for put in puts:
            put.result(20)
    assert keys(repository, "d") == []
    with pytest.raises(StoreError, match="given up"):
        session.seal()


def test_abandon_closes_every_file(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PACK_SIZE", 60_000)
    before = _open_files()
    for _ in range(5):
        session = begin(repository)
        for i in range(10):
            session.put(grain(i))
        session.abandon()
        session._background.shutdown()  # the files of the packs under way
    assert _open_files() == before


def test_packs_on_their_way_do_not_keep_a_put_from_ending_after_abandon(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PACK_SIZE", 20_000)
    store = LocalStore(repository._store.root)  # type: ignore[attr-defined]
    repository._store = store
    go, stuck = threading.Event(), threading.Semaphore(0)
    real = Session._make_durable

    def slow(self: Session, pack: session_module._Pack) -> None:
        stuck.release()
        assert go.wait(20)
        real(self, pack)

    monkeypatch.setattr(Session, "_make_durable", slow)
    session = begin(repository)

    def work() -> None:
        for i in range(50):
            session.put(grain(i))

    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(work) for _ in range(2)]
        assert stuck.acquire(timeout=20)
        assert stuck.acquire(timeout=20)  # both slots are taken: the next full pack waits
        time.sleep(0.1)
        session.abandon()
        go.set()
        for thread in threads:
            with pytest.raises(StoreError, match="given up"):
                thread.result(20)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_sealed_session_takes_no_more(repository: Repository) -> None:
    session = full(repository)
    session.seal()
    session.seal()
    with pytest.raises(ValueError, match="sealed"):
        session.put(b"x")


def test_a_disk_of_two_segments_keeps_the_one_that_did_not_change(repository: Repository) -> None:
    size = SEGMENT + 3 * GRAIN + 512
    last = SEGMENT // GRAIN + 3
    first = backup(repository, size, {0: grain(0), last: b"e" * 512})
    second = backup(repository, size, {0: grain(1)}, first)
    assert second.segments[1] == first.segments[1]
    reader = repository.reader(second)
    (tail,) = reader.segment(1)
    assert reader.read(tail) == b"e" * 512
    (head,) = reader.segment(0)
    assert reader.read(head) == grain(1)
    third = backup(repository, size, {0: None}, second)
    assert third.segments[0] is None


def test_a_map_is_read_and_checked_once(repository: Repository) -> None:
    manifest = backup(repository, SIZE, {n: grain(n) for n in range(4)})
    reader = repository.reader(manifest)
    before = reader.segment(0)
    for key in keys(repository, "d"):
        repository._store.delete(key)
    assert reader.segment(0) is before
    with pytest.raises(DamagedError):
        repository.reader(manifest).segment(0)


def test_overlay_reads_a_part_of_an_older_frame(repository: Repository) -> None:
    first = backup(repository, SIZE, {n: grain(n) for n in range(16)})
    second = backup(repository, SIZE, {7: None, 8: grain(99)}, first)
    assert [one.n for one in repository.reader(second).segment(0)] == [7, 1, 7]
    content = restore(repository.reader(second))
    assert content[6 * GRAIN : 10 * GRAIN] == grain(6) + bytes(GRAIN) + grain(99) + grain(9)
