"""The local store: what every store does, and what only a folder can get wrong."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdpull.errors import StoreError
from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo.calls import abandoned_calls
from nbdpull.repo.deadline import Deadline, current
from nbdpull.repo.local import LocalStore
from nbdpull.repo.store import AccessDeniedError, KeyExistsError
from tests.repo.conformance import StoreConformance


class TestConformance(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path)


def no_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system, such as NFS, that has no files without a name."""
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)


class TestConformanceWithoutNamelessFiles(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
        no_tmpfile(monkeypatch)
        return LocalStore(tmp_path)

    def test_nothing_but_the_object_is_left(self, store: LocalStore) -> None:
        store.create("m/a/b", b"x")
        with pytest.raises(KeyExistsError):
            store.create("m/a/b", b"y")
        assert os.listdir(store.root) == ["m"]  # noqa: PTH208


def test_objects_and_folders_are_private(tmp_path: Path) -> None:
    LocalStore(tmp_path).create("m/a/b", b"x")
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "m/a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "m/a/b").stat().st_mode) == 0o600


class _Log:
    """The calls that make things durable, in order; folders by their path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self._wrap(monkeypatch, "fdatasync", lambda _fd: "data")
        self._wrap(monkeypatch, "fsync", lambda fd: str(Path(f"/proc/self/fd/{fd}").readlink()))
        self._wrap(monkeypatch, "link", lambda _source, name, **_kwargs: name)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str, what: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            done = real(*args, **kwargs)
            self.calls.append((name, what(*args, **kwargs)))
            return done

        monkeypatch.setattr(os, name, call)


def test_create_returns_after_data_name_and_every_folder_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    log = _Log(monkeypatch)
    store.create("m/a/b", b"x")
    store.create("m/a/c", b"x")
    root = str(tmp_path)
    assert log.calls == [
        ("fdatasync", "data"),
        ("link", "b"),
        ("fsync", f"{root}/m/a"),
        ("fsync", f"{root}/m"),
        ("fsync", root),
        ("fdatasync", "data"),
        ("link", "c"),
        ("fsync", f"{root}/m/a"),
    ]


def test_what_is_large_leaves_the_page_cache_once_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    calls: list[str] = []
    fdatasync, fadvise = os.fdatasync, os.posix_fadvise

    def sync(fd: int) -> None:
        fdatasync(fd)
        calls.append(f"sync {os.fstat(fd).st_size}")

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        fadvise(fd, offset, length, advice)
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        calls.append(f"drop {os.fstat(fd).st_size}")

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    large, small = 1 << 20, (1 << 20) - 1
    store.create("d/a/0", bytes(large))
    store.create("x/a/0", bytes(small))
    assert calls == [f"sync {large}", f"drop {large}", f"sync {small}"]
    assert store.get("d/a/0", limit=large) == bytes(large)


def test_a_folder_that_another_process_just_made_is_synced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m/a").mkdir(parents=True)
    log = _Log(monkeypatch)
    LocalStore(tmp_path).create("m/a/b", b"x")
    synced = [what for call, what in log.calls if call == "fsync"]
    assert synced == [f"{tmp_path}/m/a", f"{tmp_path}/m", str(tmp_path)]


def test_who_loses_the_race_syncs_what_the_winner_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LocalStore(tmp_path).create("m/a/b", b"x")
    log = _Log(monkeypatch)
    with pytest.raises(KeyExistsError):
        LocalStore(tmp_path).create("m/a/b", b"x")
    synced = [what for call, what in log.calls if call == "fsync"]
    assert synced == [f"{tmp_path}/m/a", f"{tmp_path}/m", str(tmp_path)]


def test_a_link_whose_answer_was_lost_counts_as_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def twice(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)  # type: ignore[arg-type]
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", twice)
    store = LocalStore(tmp_path)
    store.create("m/a/b", b"x")
    assert store.get("m/a/b", limit=1) == b"x"


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "fsync", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_an_error_of_the_system_is_one_line_that_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    store = LocalStore(tmp_path)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError) as caught:
            store.create("m/a/b", b"x")
    message = str(caught.value)
    assert str(tmp_path) in message
    assert os.strerror(number) in message
    assert ";" in message
    assert "\n" not in message


def test_a_full_file_system_fails_a_write_that_it_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: real(fd, [parts[0][:3]], offset))
    store = LocalStore(tmp_path)
    store.create("m/a/b", b"0123456789")  # the rest is written by another call
    assert store.get("m/a/b", limit=99) == b"0123456789"

    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match="make room"):
        store.create("m/a/c", b"0123456789")


def test_foreign_files_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create("m/a/b", b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "m/README.txt").write_bytes(b"x")
    (tmp_path / "m/a/link").symlink_to("/etc/passwd")
    (tmp_path / "lost+found").mkdir()
    assert [entry.key for entry in store.list("")] == ["m/a/b"]


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "link").symlink_to("secret")
    with pytest.raises(StoreError):
        LocalStore(tmp_path).get("link", limit=9)


WRITER = """
import sys
from pathlib import Path
from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo.calls import abandoned_calls
from nbdpull.repo.deadline import Deadline, current
from nbdpull.repo.local import LocalStore
upload = LocalStore(Path(sys.argv[1])).begin("d/a/b")
upload.write(0, b"x" * 1000)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_writer_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        writer.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_once_their_writer_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_tmpfile(monkeypatch)
    store = LocalStore(tmp_path)
    upload = store.begin("d/a/b")
    upload.write(0, b"x")
    (live,) = tmp_path.iterdir()
    dead, young = tmp_path / ".tmp-dead", tmp_path / ".tmp-young"
    for path in (dead, young):
        path.write_bytes(b"x")
    long_ago = time.time() - 7200
    for path in (live, dead):
        os.utime(path, (long_ago, long_ago))
    store.remove_leftovers()
    assert set(tmp_path.iterdir()) == {live, young}
    upload.commit()
    assert store.get("d/a/b", limit=9) == b"x"


def test_what_may_not_be_deleted_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.create("d/aa/00", b"x")

    def refuse(_path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")  # of an immutable file, for one

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(AccessDeniedError, match=r"can't delete .*d/aa/00"):
        store.delete("d/aa/00")


def test_a_sessions_empty_folder_goes_and_can_be_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for key in ("d/aa/00", "d/aa/01", "m/bb/cc"):
        store.create(key, b"x")
    store.delete("d/aa/00")
    assert (tmp_path / "d/aa").is_dir()
    store.delete("d/aa/01")
    assert not (tmp_path / "d/aa").exists()
    # One that others may be about to use stays.
    store.delete("m/bb/cc")
    assert (tmp_path / "m/bb").is_dir()
    store.create("d/aa/02", b"y")
    assert store.get("d/aa/02", limit=9) == b"y"


class TestConformanceWithinADeadline(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return within(Deadline(), tmp_path)


def within(deadline: Deadline, root: Path) -> LocalStore:
    token = current.set(deadline)
    try:
        return LocalStore(root)
    finally:
        current.reset(token)


def open_files(root: Path) -> list[str]:
    fds = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return [str(fd.readlink()) for fd in fds if fd.is_symlink() and str(root) in str(fd.readlink())]


@pytest.mark.parametrize("names", [False, True], ids=["nameless", "named"])
@pytest.mark.parametrize("what", ["open", "pwritev", "fdatasync"])
def test_a_call_that_is_left_behind_makes_no_object_and_leaves_nothing_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, *, names: bool
) -> None:
    if names:
        no_tmpfile(monkeypatch)
    deadline = Deadline()
    store = within(deadline, tmp_path)
    store.create("m/before", b"1")
    begun, gate = threading.Event(), threading.Event()
    real = getattr(os, what)

    def hang(*args: object, **kwargs: object) -> object:
        begun.set()
        gate.wait(240)
        return real(*args, **kwargs)

    monkeypatch.setattr(os, what, hang)
    raised: list[BaseException] = []

    def create() -> None:
        try:
            store.create("m/x", b"2")
        except Cancelled as exc:
            raised.append(exc)

    writer = threading.Thread(target=create)
    writer.start()
    assert begun.wait(30)
    deadline.set_in(0)
    writer.join(30)
    assert raised
    gate.set()
    while abandoned_calls():
        time.sleep(0.01)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["before", "m"]
    assert open_files(tmp_path) == []
