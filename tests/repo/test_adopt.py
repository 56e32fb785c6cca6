"""Going on with what a dead session of the same disk had stored."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdpull.errors import RepositoryError
from nbdpull.model.grain import GRAIN
from nbdpull.model.ids import SessionId
from nbdpull.model.intent import Intent
from nbdpull.model.manifest import Manifest, adopted_by, register_kind
from nbdpull.repo import alive
from nbdpull.repo.repository import Repository, Session
from nbdpull.repo.session import PACK_SIZE
from nbdpull.repo.vault import Vault
from tests.repo.helpers import Changes, encrypted, grain, restore, store_changes, summary_for
from tests.repo.test_encryption import as_writer

SIZE = 64 * GRAIN
CHANGES = {at: grain(at) for at in (0, 3, 17, 18, 40, 63)}
DAY = 86400.0
FULL_KEYS: dict[str, Vault] = {}
"""Those of the encrypted repositories: a writer's don't read."""


@pytest.fixture(params=["plain", "encrypted", "writer"])
def repository(tmp_path: Path, request: pytest.FixtureRequest) -> Repository:
    if request.param == "plain":
        Repository.create(str(tmp_path / "repo"))
        return Repository.open(str(tmp_path / "repo"), write=True)
    made = encrypted(tmp_path / "repo")
    assert made.vault is not None
    FULL_KEYS[made.id] = made.vault
    return as_writer(made) if request.param == "writer" else made


@pytest.fixture
def plain(tmp_path: Path) -> Repository:
    Repository.create(str(tmp_path / "repo"))
    return Repository.open(str(tmp_path / "repo"), write=True)


def begin(repository: Repository, changes: Changes = CHANGES, *, disk: str = "vda") -> Session:
    """A session with all its packs durable."""
    session = repository.begin(vm="vm", disk=disk, parent=None)
    store_changes(session, None, SIZE, changes)
    session.seal()
    return session


def die(repository: Repository, changes: Changes = CHANGES, *, indexed: bool = False) -> SessionId:
    """A session that ends after its packs, or its index, were durable."""
    session = begin(repository, changes)
    session.abandon()
    if not indexed:
        repository._store.delete(f"x/{session.id}/0")
    return session.id


def commit(repository: Repository, session: Session) -> Manifest:
    return session.commit(summary_for(session, size=SIZE))


def check(repository: Repository, manifest: Manifest, changes: Changes = CHANGES) -> None:
    if repository.vault is not None:
        repository = Repository(
            repository._store, repository.location, repository.config, FULL_KEYS[repository.id]
        )
    reader = repository.reader(repository.manifest(manifest.summary))
    expected = b"".join(changes.get(at) or bytes(GRAIN) for at in range(SIZE // GRAIN))
    assert restore(reader) == expected
    assert reader.missing_packs() == []
    for session, seq in reader.packs():
        reader.check_pack(session, seq)
        reader.check_frames(session, seq)


def register(repository: Repository, sid: SessionId) -> bytes:
    (listed,) = [one for one in repository._store.list("m") if one.key.endswith(sid)]
    return repository._store.get(listed.key, limit=1 << 20)


def collect(repository: Repository) -> None:
    repository.collector(undo_window_s=0).run()


def age(repository: Repository, days: float = 2) -> None:
    for path in Path(repository.location).rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - days * DAY
            os.utime(path, (then, then))


# -- what is reused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [False, True])
def test_what_a_dead_session_stored_is_not_stored_again(
    repository: Repository, indexed: bool
) -> None:
    old = die(repository, indexed=indexed)
    session = begin(repository)
    assert session.adopted.sessions == session.adopted.packs == 1
    assert session.reused_bytes == len(CHANGES) * GRAIN
    assert session.stored_bytes < 2000
    assert register(repository, old) == adopted_by(session.id)
    check(repository, commit(repository, session))


def test_it_restores_when_all_that_nobody_needs_is_collected(repository: Repository) -> None:
    die(repository, CHANGES | {50: grain(500)})
    manifest = commit(repository, begin(repository))
    age(repository)
    for _ in range(2):
        collect(repository)
    assert list(repository._store.list("s")) == []
    check(repository, manifest)


def test_what_sessions_that_died_one_after_the_other_stored_is_reused(
    repository: Repository,
) -> None:
    first = die(repository, {at: CHANGES[at] for at in (0, 3)})
    second = die(repository, {at: CHANGES[at] for at in (0, 3, 40)})
    assert register(repository, first) == adopted_by(second)
    # A collector forgets the first one's intent: what is left of it is in the second one's.
    collect(repository)
    session = begin(repository)
    assert session.adopted.sessions == 2
    assert session.reused_bytes == 3 * GRAIN
    check(repository, commit(repository, session))


def test_what_a_session_had_taken_over_is_not_lost_when_it_dies_before_it_stores_anything(
    repository: Repository,
) -> None:
    first = die(repository)
    heirs = []
    for _ in range(2):
        heir = repository.begin(vm="vm", disk="vda", parent=None)
        heir.abandon()
        heirs.append(heir.id)
    session = begin(repository)
    assert session.adopted.sessions == session.adopted.packs == 1
    assert session.reused_bytes == len(CHANGES) * GRAIN
    assert register(repository, first) == adopted_by(heirs[0])
    assert register(repository, heirs[1]) == adopted_by(session.id)
    manifest = commit(repository, session)
    age(repository)
    for _ in range(2):
        collect(repository)
    assert list(repository._store.list("s")) == []
    check(repository, manifest)


def test_only_the_disks_own_sessions_are_taken_over(plain: Repository) -> None:
    die(plain)
    session = plain.begin(vm="vm", disk="vdb", parent=None)
    assert session.adopted.sessions == 0
    session.abandon()


def test_a_store_that_tells_no_writers_apart_is_left_alone(
    plain: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(plain)
    monkeypatch.setattr(Repository, "reuses", property(lambda _self: False))
    session = begin(plain)
    assert session.adopted.sessions == 0
    assert session.reused_bytes == 0
    session.abandon()


def test_a_pack_that_was_under_way_is_only_left_out(plain: Repository) -> None:
    """Killed for good, in the midst of the second pack: no index was ever made."""
    first, rest = os.urandom(PACK_SIZE // GRAIN * GRAIN), os.urandom(1 << 20)
    code = f"""
import os, sys
from nbdpull.repo.repository import Repository
repository = Repository.open({plain.location!r}, write=True)
session = repository.begin(vm="vm", disk="vda", parent=None)
raw = sys.stdin.buffer.read()
for at in range(0, len(raw), 1 << 20):
    session.put(raw[at:at + (1 << 20)])
while not any(True for _ in repository._store.list(f"d/{{session.id}}")):
    pass
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], input=first + rest, check=False)
    session = plain.begin(vm="vm", disk="vda", parent=None)
    assert session.adopted.packs == 1
    frames = [first[at : at + (1 << 20)] for at in range(0, len(first), 1 << 20)]
    found = [session.put(frame) for frame in frames]
    assert sum(one.session != session.index for one in found) >= len(frames) - 1
    assert session.put(rest).session == session.index
    session.abandon()


def cut(raw: bytes) -> bytes:
    return raw[:-1]


def flip_header(raw: bytes) -> bytes:
    return raw[:20] + bytes([raw[20] ^ 1]) + raw[21:]


def flip_directory(raw: bytes) -> bytes:
    return raw[:-80] + bytes([raw[-80] ^ 1]) + raw[-79:]


def empty(_raw: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("harm", [cut, flip_header, flip_directory, empty])
def test_a_damaged_pack_is_not_relied_on(
    repository: Repository, harm: Callable[[bytes], bytes]
) -> None:
    old = die(repository)
    path = Path(repository.location) / "d" / old / "00000000"
    path.write_bytes(harm(path.read_bytes()))
    session = begin(repository)
    assert session.adopted.packs == 0
    assert session.reused_bytes == 0
    check(repository, commit(repository, session))


def test_a_damaged_index_is_not_relied_on(repository: Repository) -> None:
    old = die(repository, indexed=True)
    path = Path(repository.location) / "x" / old / "0"
    path.write_bytes(path.read_bytes()[:40])
    session = begin(repository)
    assert session.reused_bytes == 0
    check(repository, commit(repository, session))


# -- whose it is -------------------------------------------------------------------------------------


def test_a_session_that_lives_is_left_alone(plain: Repository) -> None:
    living = begin(plain)
    session = begin(plain)
    assert session.adopted.sessions == 0
    check(plain, commit(plain, living))
    check(plain, commit(plain, session))


def test_a_session_of_a_process_that_lives_is_left_alone(plain: Repository) -> None:
    child = _Child(plain)
    try:
        session = begin(plain)
        assert session.adopted.sessions == 0
        session.abandon()
    finally:
        child.kill()
    session = begin(plain)
    assert session.adopted.sessions == 2
    session.abandon()


class _Child:
    """A process with a session whose packs are durable."""

    def __init__(self, repository: Repository) -> None:
        code = f"""
import sys, time
from tests.repo.test_adopt import begin
from nbdpull.repo.repository import Repository
session = begin(Repository.open({repository.location!r}, write=True))
print("ready", flush=True)
time.sleep(600)
"""
        self._process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_who_is_known_to_have_idled_for_a_day_is_taken_over_and_can_not_commit(
    plain: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alive, "process_token", lambda: "")
    idle = begin(plain)
    age(plain, 0.9)
    other = begin(plain)
    assert other.adopted.sessions == 0
    other.abandon()
    age(plain, 0.2)
    # By the store's clock, whatever this machine's says.
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - 20 * DAY)
    session = begin(plain)
    monkeypatch.undo()
    assert session.adopted.sessions >= 1
    with pytest.raises(RepositoryError, match="taken over by a later backup"):
        commit(plain, idle)
    check(plain, commit(plain, session))


def test_who_is_taken_over_before_he_made_his_index_is_told_so(
    plain: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped for a day, and goes on: the index is there, and is not the one that it would make."""
    monkeypatch.setattr(alive, "process_token", lambda: "")
    stopped = plain.begin(vm="vm", disk="vda", parent=None)
    for _ in range(PACK_SIZE >> 20):
        stopped.put(os.urandom(1 << 20))
    while stopped.objects < 1:
        time.sleep(0.01)
    age(plain)
    session = begin(plain)
    assert session.adopted.packs == 1
    stopped.put(os.urandom(1 << 20))
    with pytest.raises(RepositoryError, match="taken over by a later backup"):
        stopped.seal()
    stopped.abandon()
    check(plain, commit(plain, session))


def test_of_two_that_want_it_one_gets_it(plain: Repository) -> None:
    old = die(plain)
    both = threading.Barrier(2)
    sessions: list[Session] = []

    def run() -> None:
        both.wait()
        sessions.append(begin(plain))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [session for session in sessions if session.adopted.sessions]
    assert len(won) == 1
    assert register(plain, old) == adopted_by(won[0].id)
    for session in sessions:
        check(plain, commit(plain, session))


def test_what_a_collector_revoked_is_not_taken_over(plain: Repository) -> None:
    old = die(plain)
    age(plain)
    collect(plain)
    assert register_kind(register(plain, old)) == "revoked"
    session = begin(plain)
    assert session.adopted.sessions == 0
    session.abandon()


def test_a_collector_spares_what_a_living_session_took_over(plain: Repository) -> None:
    old = die(plain)
    session = begin(plain)
    age(plain, 0.5)
    collect(plain)
    assert [one.key for one in plain._store.list(f"d/{old}")] == [f"d/{old}/00000000"]
    collect(plain)  # the old one's intent is gone now
    check(plain, commit(plain, session))


def test_a_collector_takes_what_a_dead_session_took_over(plain: Repository) -> None:
    die(plain)
    begin(plain).abandon()
    age(plain)
    for _ in range(2):
        collect(plain)
    left = [one.key for prefix in "dsx" for one in plain._store.list(prefix)]
    assert left == []


def test_a_dry_run_tells_of_what_a_dead_session_took_over(plain: Repository) -> None:
    die(plain)
    begin(plain).abandon()
    age(plain)
    told = plain.collector(undo_window_s=0, dry_run=True).run()
    done = plain.collector(undo_window_s=0).run()
    assert (told.packs, told.indexes) == (done.packs, done.indexes)
    assert done.packs == 2


def test_registers_that_name_each_other_keep_everything(plain: Repository) -> None:
    first, second = die(plain), die(plain)
    for one, other in ((first, second), (second, first)):
        (key,) = [listed.key for listed in plain._store.list("m") if listed.key.endswith(one)] or [
            "m/" + Intent.decode(plain._store.get(f"s/{one}", limit=1 << 20), one).disk + "/" + one
        ]
        plain._store.delete(key)
        plain._store.create(key, adopted_by(other))
    collect(plain)
    assert len(list(plain._store.list("d"))) == 2


# -- who is dead -------------------------------------------------------------------------------------


def test_this_process_lives_and_its_ended_sessions_do_not() -> None:
    token, sid = alive.process_token(), SessionId("ab" * 16)
    assert alive.has_died(token, sid)
    alive._here.add(sid)
    try:
        assert not alive.has_died(token, sid)
    finally:
        alive._here.discard(sid)


@pytest.mark.parametrize(
    "token",
    ["", "x", "a-b-c", "--", "0123456789abcdef-1-1", "-1-2-3", f"{'9' * 400}-{'9' * 400}-1"],
)
def test_who_can_not_be_judged_is_not_called_dead(token: str) -> None:
    assert not alive.has_died(token, SessionId("ab" * 16))


def test_a_process_that_ended_is_dead_also_when_its_number_came_again() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    boot, _, _ = alive.process_token().split("-")
    start = alive._start(child.pid)
    sid = SessionId("ab" * 16)
    assert not alive.has_died(f"{boot}-{child.pid}-{start}", sid)
    assert alive.has_died(f"{boot}-{child.pid}-{start - 1}", sid)
    child.kill()
    while not alive._is_zombie(child.pid):
        time.sleep(0.01)
    assert alive.has_died(f"{boot}-{child.pid}-{start}", sid)  # nobody asked for its exit code
    child.communicate()
    assert alive.has_died(f"{boot}-{child.pid}-{start}", sid)
    assert not alive.has_died(f"{'0' * 16}-{child.pid}-{start}", sid)
