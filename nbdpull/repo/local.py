"""A repository in a local folder: durable, and never a half-written object under a key.

An object is written to a file without a name (O_TMPFILE, open(2)), synced, and linked to its key:
link(2) fails when the key is taken, which makes `create` atomic between any number of processes, and a
killed process leaves nothing behind. Then the folder is synced, and after it the folders above whose entries
this process does not know to be durable yet: another process may have made them a moment ago, and not
have synced them. In this order a file system with a journal writes it once: it holds all of these entries.

A folder on a hard-mounted network file system whose server is gone lets no call return. So each is made within
the verb's deadline, see `nbdpull.repo.deadline`; a call that was left behind does as little as it can when it
goes on after all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from nbdpull.errors import StoreError
from nbdpull.repo.calls import Told
from nbdpull.repo.deadline import Deadline, current, directly_in_time, ended_in_time, in_time
from nbdpull.repo.store import (
    AccessDeniedError,
    KeyExistsError,
    KeyMissingError,
    Listed,
    LostBytesError,
    check_key,
)

__all__ = ["LocalStore", "folder_call", "sync_folder", "told"]

_T = TypeVar("_T")

_TMP: Final = ".tmp-"
_TMP_AGE_S: Final = 3600.0
# EISDIR and ENOENT: kernels and file systems from before O_TMPFILE take it for O_DIRECTORY.
_NO_TMPFILE: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_OWN_FOLDERS: Final = ("d/", "x/", "o/")
_LARGE: Final = 1 << 20
"""Bytes; smaller objects (manifests, indexes) are what the next commands read."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_TRIES: Final = 2
_NO_OBJECT: Final = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_LOOK_S: Final = 30.0
"""How often a call is looked at that does not return: syncs of a slow disk do within seconds."""
_LOOKS: Final = 120
"""Until it has failed: a server that is started again answers within minutes."""
_ENTRIES: Final = 128
"""Of a folder, that are looked at in one call."""
_HINTS: Final = {
    errno.ENOSPC: "make room and try again",
    errno.EDQUOT: "the quota is used up: make room and try again",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "run as a user who may do that",
    errno.EPERM: "run as a user who may do that, on a file system with hard links",
    errno.EIO: "the storage fails: look at the kernel's log",
}


@contextmanager
def told(what: str, path: Path) -> Iterator[None]:
    """Turn the operating system's errors into `StoreError`: can't `what` `path`."""
    try:
        yield
    except OSError as exc:
        hint = _HINTS.get(exc.errno or 0)
        raise StoreError(
            f"can't {what} {path}: {exc.strerror}{f'; {hint}' if hint else ''}"
        ) from exc


def folder_call(deadline: Deadline | None, what: str, where: Path, work: Callable[[], _T]) -> _T:
    """What `work`, which has to do with `where`, returns or raises, unless it hangs: see `Deadline.within`."""
    return in_time(deadline, work, Told(what, where, look_s=_LOOK_S, looks=_LOOKS))


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    fd = os.open(folder, _FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _LocalUpload:
    """A file under way. Calls may be inside it that were left behind: the last one to leave closes it."""

    def __init__(self, store: LocalStore, key: str) -> None:
        self._store = store
        self._path = store.path(key)
        self._name: str | None = None
        self._fd = -1
        self._lock = threading.Lock()
        self._inside = 0
        self._given_up = False
        try:
            store.call("write", self._path, self._open)
        except BaseException:
            self.abort()
            raise

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self._lock:
            self._check()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                last = self._given_up and not self._inside
            if last:
                self._close()

    def _check(self) -> None:
        if self._given_up:
            raise StoreError(f"the writing of {self._path} was given up")

    def _open(self) -> None:
        root = self._store.root
        with told("write in", root), self._entered():
            try:
                self._fd = os.open(root, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                if exc.errno not in _NO_TMPFILE or not root.is_dir():
                    raise
            else:
                return
            self._fd, self._name = tempfile.mkstemp(prefix=_TMP, dir=root)
            # The lock tells `remove_leftovers` that its writer lives.
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, offset: int, *parts: bytes | bytearray | memoryview) -> None:
        self._store.call_directly("write", self._path, lambda: self._write(offset, parts))

    def _write(self, offset: int, parts: tuple[bytes | bytearray | memoryview, ...]) -> None:
        with told("write", self._path), self._entered():
            want = sum(map(len, parts))
            done = os.pwritev(self._fd, parts, offset)
            if done < want:
                # A file system that fills up writes short, and says so at the next write.
                rest = b"".join(parts)
                while done < want:
                    done += os.pwrite(self._fd, rest[done:], offset + done)

    def commit(self) -> None:
        try:
            self._store.call("write", self._path, self._commit)
        finally:
            self.abort()

    def _commit(self) -> None:
        with self._entered():
            with told("sync", self._path):
                os.fdatasync(self._fd)
            self._leave_page_cache()
            with self._lock:
                self._check()  # whoever is gone has given this object up
            with told("create", self._path):
                self._link()

    def _leave_page_cache(self) -> None:
        """Give back the memory that a pack takes: the host has better use for it than what is read on the day of a restore."""
        with suppress(OSError):
            if os.fstat(self._fd).st_size >= _LARGE:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _link(self) -> None:
        path = self._path
        source = self._name or f"/proc/self/fd/{self._fd}"
        folder = self._store.open_folder(path.parent)
        try:
            # With a folder's descriptor Python calls linkat(2), which can follow the link in /proc
            # to the file without a name; plain link(2) can't.
            os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=self._name is None)
        except FileExistsError as exc:
            there = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            if not os.path.samestat(there, os.fstat(self._fd)):
                raise KeyExistsError(f"{path} exists already") from exc
            # NFS: the link was made, its answer lost, and the retry found it.
        finally:
            # Also when the key is taken: who is told so relies on that object.
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._store.sync_above(path.parent)

    def abort(self) -> None:
        with self._lock:
            close = not self._given_up and not self._inside and self._fd >= 0
            self._given_up = True
        if close:
            # It can hang, too: what was not written yet is then.
            self._store.end("close", self._path, self._close)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        with suppress(OSError):
            if fd >= 0:
                os.close(fd)
        if self._name is not None:
            with suppress(OSError):
                Path(self._name).unlink()


class LocalStore:
    """Objects as files below `root`, mode 0600 in folders of mode 0700."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._durable = {root}
        self._lock = threading.Lock()
        self._deadline = current.get()

    def call(self, what: str, path: Path, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises, unless it hangs.

        Raises:
            Cancelled: the verb's deadline was over before it was done.
            StoreError: it hangs for too long.
        """
        return folder_call(self._deadline, what, path, work)

    def call_directly(self, what: str, path: Path, work: Callable[[], _T]) -> _T:
        """The same, by this very thread where that can be left behind."""
        told = Told(what, path, look_s=_LOOK_S, looks=_LOOKS)
        return directly_in_time(self._deadline, work, told)

    def end(self, what: str, path: Path, work: Callable[[], None]) -> None:
        """Have `work` done, which lets go of something: also after the deadline, and not waited for then."""
        ended_in_time(self._deadline, work, Told(what, path))

    def path(self, key: str) -> Path:
        """Where an object is."""
        return self.root / check_key(key)

    def open_folder(self, folder: Path) -> int:
        """A descriptor of a folder of objects, which is made where there is none."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                return os.open(folder, _FOLDER)
            # Never made; or a collector removed it, empty, since it was: then its entry is another one.
            with self._lock:
                self._durable.discard(folder)
            self._make(folder)
        return os.open(folder, _FOLDER)

    def _make(self, folder: Path) -> None:
        if folder != self.root:
            self._make(folder.parent)
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)

    def sync_above(self, folder: Path) -> None:
        """Make the entry of a folder of objects durable, and those of the folders above it."""
        made = []
        with self._lock:
            while folder not in self._durable:
                made.append(folder)
                folder = folder.parent
        for one in made:
            sync_folder(one.parent)
        with self._lock:
            self._durable.update(made)

    def create(self, key: str, data: bytes) -> None:
        """See `Store.create`."""
        upload = self.begin(key)
        try:
            upload.write(0, data)
            upload.commit()
        finally:
            upload.abort()

    def begin(self, key: str) -> _LocalUpload:
        """See `Store.begin`."""
        return _LocalUpload(self, key)

    def get(self, key: str, *, limit: int) -> bytes:
        """See `Store.get`."""
        raw = self.get_range(key, 0, limit + 1)
        if len(raw) > limit:
            raise StoreError(
                f"{self.path(key)} has more than {limit} bytes, which no object of its kind has"
            )
        return raw

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        path = self.path(key)
        return self.call("read", path, lambda: self._read(path, start, length))

    def _read(self, path: Path, start: int, length: int) -> bytes:
        with told("read", path), _missing(path, self.root):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                # Not more than is there is ever allocated, whatever length was claimed.
                length = max(0, min(length, os.fstat(fd).st_size - start))
                raw = os.pread(fd, length, start)
                while len(raw) < length:
                    more = os.pread(fd, length - len(raw), start + len(raw))
                    if not more:
                        break
                    raw += more
            finally:
                os.close(fd)
        return raw

    def stat(self, key: str) -> Listed:
        """See `Store.stat`."""
        path = self.path(key)
        with told("look at", path), _missing(path):
            state = self.call("look at", path, path.lstat)
        if not stat.S_ISREG(state.st_mode):
            raise KeyMissingError(f"{path} is missing")
        return Listed(key, state.st_size, state.st_mtime)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See `Store.list`. Files that are no objects of ours are passed over."""
        return self._walk(self.path(prefix) if prefix else self.root, prefix)

    def _walk(self, folder: Path, prefix: str) -> Iterator[Listed]:
        entries = self.call("list", folder, lambda: _entries(folder, prefix))
        for start in range(0, len(entries), _ENTRIES):
            some = entries[start : start + _ENTRIES]
            for key, path, state in self.call("list", folder, partial(_looked_at, some)):
                if stat.S_ISDIR(state.st_mode):
                    yield from self._walk(path, key)
                elif stat.S_ISREG(state.st_mode):
                    yield Listed(key, state.st_size, state.st_mtime)

    def sync(self, prefix: str) -> None:
        """See `Store.sync`. The bytes of what has a name are durable already: its folder's entries are not."""
        folder = self.path(prefix)
        self.call("sync", folder, lambda: self._sync(folder))

    def _sync(self, folder: Path) -> None:
        with told("sync", folder):
            try:
                sync_folder(folder)
            except FileNotFoundError:
                return
            self.sync_above(folder)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        path = self.path(key)
        self.call("delete", path, lambda: self._delete(key, path))

    @staticmethod
    def _delete(key: str, path: Path) -> None:
        with (
            told("delete", path),
            suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError),
        ):
            try:
                path.unlink()
            except PermissionError as exc:
                raise AccessDeniedError(f"can't delete {path}: {exc.strerror}") from exc
            sync_folder(path.parent)
        if key.startswith(_OWN_FOLDERS):
            # Only the folder of a session is nobody else's: another one could be about to use it.
            with suppress(OSError):
                path.parent.rmdir()

    def remove_leftovers(self) -> None:
        """Remove what killed writers left where files can't be without a name (NFS, for one)."""
        self.call("list", self.root, self._remove_leftovers)

    def _remove_leftovers(self) -> None:
        for path in self.root.glob(f"{_TMP}*"):
            with suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    # The age only covers the moment between the file and its lock.
                    if time.time() - os.fstat(fd).st_mtime > _TMP_AGE_S:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()
                finally:
                    os.close(fd)


def _entries(folder: Path, prefix: str) -> list[tuple[str, os.DirEntry[str]]]:
    """What of a folder may be ours, by key."""
    with told("list", folder):
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
    named = []
    for entry in entries:
        key = f"{prefix}/{entry.name}" if prefix else entry.name
        with suppress(ValueError):
            named.append((check_key(key), entry))
    return named


def _looked_at(
    entries: Sequence[tuple[str, os.DirEntry[str]]],
) -> list[tuple[str, Path, os.stat_result]]:
    """Those that are still there."""
    found = []
    for key, entry in entries:
        path = Path(entry.path)
        with told("list", path), suppress(FileNotFoundError):
            found.append((key, path, entry.stat(follow_symlinks=False)))
    return found


@contextmanager
def _missing(path: Path, root: Path | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EIO and root is not None and not _is_gone(root):
            # What a disk, btrfs or ZFS answers for the one block that it has lost; the others can be read.
            raise LostBytesError(f"can't read {path}: {exc.strerror}; {_HINTS[errno.EIO]}") from exc
        if exc.errno not in _NO_OBJECT:
            raise
        raise KeyMissingError(f"{path} is missing") from exc


def _is_gone(root: Path) -> bool:
    """Whether nothing else can be read there either: the disk, or the server behind it, is gone."""
    try:
        with os.scandir(root) as entries:
            one = next((entry for entry in entries if entry.is_file(follow_symlinks=False)), None)
        if one is not None:
            Path(one.path).read_bytes()
    except OSError:
        return True
    return False
