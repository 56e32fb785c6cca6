"""A folder whose file system stops to answer, as a hard mount whose server is gone does.

A file system of FUSE shows another folder as it is, until it takes no calls any more. Whoever makes one then
sleeps in the kernel, and wakes up for nothing but SIGKILL or the answer: as on NFS mounted ``hard``. (A call that
was taken can't even be killed. So the last one is answered, and the next one is not taken.) As on NFS, files have
names from the start (no O_TMPFILE).

    hang 2 write .tmp-   -> all that comes after the third `write` to a path with ``.tmp-`` in it
    go                   -> what hangs goes on
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.process import exec_line, run, stop

__all__ = ["HangingFolder", "hanging_folder"]

_READY_S = 30.0
_MOUNTS = Path("/proc/self/mounts")


class HangingFolder:
    """One that is there.

    Attributes:
        path: where it hangs.
        behind: the same folder, where nothing hangs.
        reached: set once nothing is answered any more.
    """

    def __init__(self, path: Path, behind: Path, server: subprocess.Popen[str]) -> None:
        self.path = path
        self.behind = behind
        self.reached = threading.Event()
        self._server = server
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self._server.stdout or ():
            if line == "reached\n":
                self.reached.set()

    def _ask(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()

    def hang(self, what: str, part: str, *, passing: int = 0) -> None:
        """Hang after the next call but `passing` that does `what` with a path which has `part` in it."""
        self.reached.clear()
        self._ask(f"hang {passing} {what} {part}")

    def go(self) -> None:
        """Have it answer again."""
        self._ask("go")


def _is_mounted(path: Path) -> bool:
    # Not by looking at it: that can hang.
    return f" {path} fuse" in _MOUNTS.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def hanging_folder(parent: Path) -> Iterator[HangingFolder]:
    """A folder in `parent`, which must be the test's own."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise AssertionError("/dev/fuse can't be opened here, which a file system that hangs needs")
    path, behind = parent / "mnt", parent / "behind-mnt"
    for folder in (path, behind):
        folder.mkdir()
    with (parent / "mnt.log").open("ab") as log:
        server = subprocess.Popen(
            exec_line([sys.executable, "-m", "tests.support.hangingfolder", behind, path]),
            cwd=Path(__file__).parents[2],
            env={**os.environ, "FUSE_LIBRARY_PATH": "libfuse3.so.3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        ends = time.monotonic() + _READY_S
        while not _is_mounted(path):
            if server.poll() is not None or time.monotonic() > ends:
                raise AssertionError((parent / "mnt.log").read_text(encoding="utf-8"))
            time.sleep(0.02)
        yield HangingFolder(path, behind, server)
    finally:
        stop(server)  # whatever waits for it has an error now
        if _is_mounted(path):
            run(["umount", "-l", path] if os.geteuid() == 0 else ["fusermount3", "-uz", path])


# -- the server's side -----------------------------------------------------------------------------


class _Gate:
    """What every call goes through; there is only one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: tuple[str, str] | None = None
        self._passing = 0
        self._open = threading.Event()
        self._open.set()

    def listen(self) -> None:
        """Do what standard input says, to its end."""
        for line in sys.stdin:
            words = line.split()
            with self._lock:
                self._wanted = None
                if words[0] == "go":
                    self._open.set()
                else:
                    self._passing = int(words[1])
                    self._wanted = (words[2], words[3])

    def look(self, what: str, path: str) -> None:
        """See whether this call is the last one."""
        with self._lock:
            if self._wanted is None or what != self._wanted[0] or self._wanted[1] not in path:
                return
            self._passing -= 1
            if self._passing < 0:
                self._wanted = None
                self._open.clear()

    def wait(self) -> None:
        """Wait while no call is to be taken."""
        if not self._open.is_set():
            print("reached", flush=True)  # noqa: T201 - to the test
            self._open.wait()


class _Args(ctypes.Structure):
    _fields_ = (
        ("argc", ctypes.c_int),
        ("argv", ctypes.POINTER(ctypes.c_char_p)),
        ("allocated", ctypes.c_int),
    )


def _loop(gate: _Gate, path: str, operations: Any, size: int) -> int:
    """Serve, as fuse_main(3) does, but take no call before the gate lets it."""
    import mfusepy  # noqa: PLC0415

    lib = ctypes.CDLL("libfuse3.so.3")
    for name in ("fuse_new_31", "fuse_get_session"):
        getattr(lib, name).restype = ctypes.c_void_p
    args = _Args(1, (ctypes.c_char_p * 2)(b"fuse", None), 0)
    fuse = ctypes.c_void_p(
        lib.fuse_new_31(ctypes.byref(args), operations, ctypes.c_size_t(size), None)
    )
    if lib.fuse_mount(fuse, path.encode()):
        return 1
    session = ctypes.c_void_p(lib.fuse_get_session(fuse))
    request = mfusepy.fuse_buf()
    while not lib.fuse_session_exited(session):
        gate.wait()
        if lib.fuse_session_receive_buf(session, ctypes.byref(request)) <= 0:
            break
        lib.fuse_session_process_buf(session, ctypes.byref(request))
    return 0


def _attributes(state: os.stat_result) -> dict[str, Any]:
    names = ("ino", "mode", "nlink", "size", "uid", "gid", "blocks")
    told = {f"st_{name}": getattr(state, f"st_{name}") for name in names}
    times = ("atime", "mtime", "ctime")
    return told | {f"st_{name}": getattr(state, f"st_{name}_ns") for name in times}


def _serve(behind: str, path: str) -> None:  # noqa: C901 - one of a class's methods after the other
    import mfusepy  # noqa: PLC0415 - looks for libfuse, which only the server needs

    gate = _Gate()

    # Without `flush`: old kernels (before 6.2) would wait for it when a process ends that was killed.
    class Shown(mfusepy.Operations):  # type: ignore[misc]
        """The folder behind. The methods are libfuse's, see its fuse.h."""

        use_ns = True

        def _at(self, what: str, path: str) -> str:
            gate.look(what, path)
            return behind + path

        def init_with_config(self, _connection: Any, config: Any) -> None:
            # Links to one file are one file, and nothing is answered from what was known a second ago.
            config.use_ino = 1
            config.attr_timeout = config.entry_timeout = 0.0

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            at = self._at("getattr", path)
            return _attributes(os.lstat(at) if fh is None else os.fstat(fh))

        def readdir(self, path: str, _fh: int) -> list[tuple[str, dict[str, Any], int]]:
            with os.scandir(self._at("readdir", path)) as found:
                return [
                    (entry.name, _attributes(entry.stat(follow_symlinks=False)), 0)
                    for entry in found
                ]

        def statfs(self, path: str) -> dict[str, int]:
            state = os.statvfs(self._at("statfs", path))
            names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "namemax")
            return {f"f_{name}": getattr(state, f"f_{name}") for name in names}

        def mkdir(self, path: str, mode: int) -> int:
            os.mkdir(self._at("mkdir", path), mode)  # noqa: PTH102
            return 0

        def rmdir(self, path: str) -> int:
            os.rmdir(self._at("rmdir", path))  # noqa: PTH106
            return 0

        def unlink(self, path: str) -> int:
            os.unlink(self._at("unlink", path))  # noqa: PTH108
            return 0

        def link(self, target: str, source: str) -> int:
            os.link(behind + source, self._at("link", target))
            return 0

        def chmod(self, path: str, mode: int) -> int:
            os.chmod(self._at("chmod", path), mode)  # noqa: PTH101
            return 0

        def create(self, path: str, mode: int, _flags: Any = None) -> int:
            return os.open(self._at("create", path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

        def open(self, path: str, flags: int) -> int:
            return os.open(self._at("open", path), flags & (os.O_ACCMODE | os.O_TRUNC))

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            gate.look("read", path)
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            gate.look("write", path)
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            os.truncate(self._at("truncate", path) if fh is None else fh, length)
            return 0

        def fsync(self, path: str, _datasync: int, fh: int) -> int:
            gate.look("fsync", path)
            os.fsync(fh)
            return 0

        def release(self, _path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def fsyncdir(self, path: str, _datasync: int, _fh: int) -> int:
            gate.look("fsyncdir", path)
            return 0

        def rename(self, _old: str, _new: str) -> int:
            raise OSError(errno.ENOSYS, "nothing here renames")

    threading.Thread(target=gate.listen, daemon=True).start()
    mfusepy.fuse_main_real = lambda _argc, _argv, operations, size, _data: _loop(
        gate, path, operations, size
    )
    mfusepy.FUSE(Shown(), path)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
