"""A log of what a local store asks of the file system, and what of it a power cut may leave.

Recorded are the calls themselves (`os.open`, `pwritev`, `link`, `fsync` ...), so what is tried is the code as
it runs. What POSIX promises is little: data is there after fdatasync(2) of the file, an entry of a folder
after fsync(2) of the folder; of anything later any part may be there or not.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Event", "OsLog", "Survivors"]

_PROC = re.compile(r"/proc/self/fd/(\d+)")


@dataclass(frozen=True, slots=True)
class Event:
    """One call that was made.

    Attributes:
        kind: write, link, mkdir, unlink, rmdir, sync-file, sync-folder, or a note of the test's own.
        path: of the entry or folder, below the root; for a note its text.
        inode: number of a file.
        covers: of a sync, how long the log was when it began.
    """

    kind: str
    path: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    covers: int = 0


@dataclass
class OsLog:
    """What was done below `root`."""

    root: Path
    events: list[Event] = field(default_factory=list)
    _files: dict[int, int] = field(default_factory=dict)
    _folders: dict[int, str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _inodes: int = 0

    def note(self, text: str) -> None:
        """Put a note of one's own into the log."""
        with self._lock:
            self.events.append(Event("note", text))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this process does below the root."""
        real = {
            name: getattr(os, name)
            for name in (
                [
                    "open",
                    "close",
                    "pwrite",
                    "pwritev",
                    "fdatasync",
                    "fsync",
                    "link",
                    "mkdir",
                    "unlink",
                    "rmdir",
                ]
            )
        }
        try:
            for name in real:
                setattr(os, name, getattr(_Recorder(self, real), name))
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)


class _Recorder:
    """The functions that stand in for those of `os`."""

    def __init__(self, log: OsLog, real: dict[str, Callable[..., Any]]) -> None:
        self._log = log
        self._real = real

    def _below(self, path: object) -> str | None:
        if not isinstance(path, str | os.PathLike):
            return None
        text = os.fspath(path)
        root = str(self._log.root)
        if text == root:
            return "."
        return text[len(root) + 1 :] if text.startswith(f"{root}/") else None

    def open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        with self._log._lock:
            fd: int = self._real["open"](path, flags, mode, **options)
            below = self._below(path)
            if below is not None and flags & os.O_TMPFILE == os.O_TMPFILE:
                self._log._inodes += 1
                self._log._files[fd] = self._log._inodes
            elif below is not None and flags & os.O_DIRECTORY:
                self._log._folders[fd] = below
            return fd

    def close(self, fd: int) -> None:
        with self._log._lock:
            self._log._files.pop(fd, None)
            self._log._folders.pop(fd, None)
            self._real["close"](fd)

    def _wrote(self, fd: int, data: bytes, offset: int) -> None:
        if fd in self._log._files:
            inode = self._log._files[fd]
            self._log.events.append(Event("write", inode=inode, offset=offset, data=data))

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        with self._log._lock:
            done: int = self._real["pwrite"](fd, data, offset)
            self._wrote(fd, bytes(data[:done]), offset)
            return done

    def pwritev(self, fd: int, parts: Sequence[Any], offset: int, *more: int) -> int:
        with self._log._lock:
            done: int = self._real["pwritev"](fd, parts, offset, *more)
            self._wrote(fd, b"".join(parts)[:done], offset)
            return done

    def _sync(self, name: str, fd: int) -> None:
        with self._log._lock:
            covers = len(self._log.events)
        self._real[name](fd)
        with self._log._lock:
            if fd in self._log._files:
                event = Event("sync-file", inode=self._log._files[fd], covers=covers)
                self._log.events.append(event)
            elif fd in self._log._folders:
                event = Event("sync-folder", self._log._folders[fd], covers=covers)
                self._log.events.append(event)

    def fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def link(self, source: str, name: str, **options: Any) -> None:
        with self._log._lock:
            self._real["link"](source, name, **options)
            match = _PROC.fullmatch(source)
            folder = self._log._folders.get(options.get("dst_dir_fd", -1))
            if match is not None and folder is not None:
                inode = self._log._files[int(match[1])]
                self._log.events.append(Event("link", _join(folder, name), inode=inode))

    def _entry(self, name: str, path: Any, *rest: Any, **options: Any) -> None:
        with self._log._lock:
            self._real[name](path, *rest, **options)
            below = self._below(path)
            if below is not None:
                self._log.events.append(Event(name, below))

    def mkdir(self, path: Any, *rest: Any, **options: Any) -> None:
        self._entry("mkdir", path, *rest, **options)

    def unlink(self, path: Any, **options: Any) -> None:
        self._entry("unlink", path, **options)

    def rmdir(self, path: Any, **options: Any) -> None:
        self._entry("rmdir", path, **options)


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder or ".", name


class Survivors:
    """What is on the disk after a power cut, event by event.

    `keep` says of each thing that was not synced whether it survives all the same.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._synced: set[int] = set()

    def add(self, event: Event) -> None:
        """The next event of the log."""
        at = len(self._events)
        self._events.append(event)
        if event.kind == "sync-file":
            self._sync(event.covers, lambda one: one.kind == "write" and one.inode == event.inode)
        elif event.kind == "sync-folder":
            self._sync(
                event.covers, lambda one: _is_entry(one) and _split(one.path)[0] == event.path
            )
        elif event.kind.startswith("note"):
            self._synced.add(at)

    def _sync(self, covers: int, concerns: Callable[[Event], bool]) -> None:
        for at in range(covers):
            if at not in self._synced and concerns(self._events[at]):
                self._synced.add(at)

    def write_to(self, root: Path, keep: Callable[[], bool]) -> None:
        """Make a folder of what survives."""
        data: dict[int, bytearray] = {}
        entries: dict[str, int | None] = {}
        for at, event in enumerate(self._events):
            if at not in self._synced and not keep():
                continue
            if event.kind == "write":
                content = data.setdefault(event.inode, bytearray())
                end = event.offset + len(event.data)
                content.extend(bytes(max(0, end - len(content))))
                content[event.offset : end] = event.data
            elif event.kind == "link":
                entries[event.path] = event.inode
            elif event.kind == "mkdir":
                entries[event.path] = None
            elif event.kind in {"unlink", "rmdir"}:
                entries.pop(event.path, None)
        root.mkdir()
        for path, inode in sorted(entries.items()):
            # What lies in a folder that did not survive is lost with it.
            if not (root / path).parent.is_dir():
                continue
            if inode is None:
                (root / path).mkdir()
            else:
                (root / path).write_bytes(data.get(inode, b""))


def _is_entry(event: Event) -> bool:
    return event.kind in {"link", "mkdir", "unlink", "rmdir"}


def dropping(rng: random.Random) -> Callable[[], bool]:
    """Keeps nothing, everything, or any part of what was not synced."""
    chance = rng.choice([0.0, 0.0, 0.5, 0.9, 1.0])
    return lambda: rng.random() < chance
