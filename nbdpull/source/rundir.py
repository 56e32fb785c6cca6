"""The folder of one run: scratch images, NBD socket, and a lock that tells whether the run lives.

nbdpull-<run>/
    run.json      which monitor, which chain, which process
    lock          held with flock(2) as long as the process lives, also while it is stopped
    paused        there only while this run has paused the guest (mode C's few milliseconds)
    disk<n>.raw   scratch, sparse (through libvirt: disk<n>.qcow2)
    held          room that is held back, see `scratch`
    machine       files that are kept with the backup, as old as its disks (`model.archive`)
    resume        once the view stands: what another process needs to go on at it, see `unfinished`
    journal       what of it is read, see `journal`
    server        there when this run started an NBD server that listens elsewhere
    life          made by QEMU; see `lifeline`
    nbd.sock      made by QEMU; there as long as the server that this run started
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from nbdpull.errors import InUseError, SourceError, UsageError
from nbdpull.model.archive import ARCHIVE_MAX
from nbdpull.source.journal import FileHere, Journal
from nbdpull.source.unfinished import RECORD_MAX, Unfinished

__all__ = ["FULL", "SOCKET_PATH_MAX", "FoundRun", "RunDir", "find_run", "find_runs"]

# sun_path of Linux is 108 bytes with its closing NUL, see unix(7).
SOCKET_PATH_MAX: Final = 107
"""Bytes."""

FULL: Final = 1 << 20
"""Bytes of room below which scratch may be too small for the next write of a guest: QEMU copies 64 KiB at a time."""

_RUN_JSON_MAX: Final = 64 * 1024
_PACE_S: Final = 0.05
_LOOKS: Final = 20

log = logging.getLogger(__name__)


class RunDir:
    """A folder made for this run; `close` removes it.

    Attributes:
        path: absolute.
        here: whether its files can be opened by this process.
    """

    here = True

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._keep = False

    @classmethod
    def create(
        cls,
        parent: str | None,
        run: str,
        *,
        source: str,
        chain: str,
        owner: tuple[int, int] | None,
    ) -> RunDir:
        """Make and lock the folder.

        Args:
            parent: where; the system's folder for temporary files when None.
            run: its id.
            source: the monitor it works with.
            chain: the id of the chain it backs up.
            owner: user and group that QEMU runs as: given the folder where this process is root.

        Raises:
            UsageError: the folder can't be made there.
        """
        base = Path(parent or tempfile.gettempdir()).absolute()
        path = base / f"nbdpull-{run}"
        if len(os.fsencode(path / "nbd.sock")) > SOCKET_PATH_MAX:
            raise UsageError(
                f"scratch folder {base} is too deep: a socket's path has at most {SOCKET_PATH_MAX}"
                f" bytes; choose a shorter one with --scratch"
            )
        refused = f"can't use {base} for scratch images"
        try:
            path.mkdir(mode=0o700)
        except OSError as exc:
            raise UsageError(
                f"{refused}: {exc.strerror}; choose a writable folder with --scratch"
            ) from exc
        try:
            lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made = cls(path, lock)
            (path / "run.json").write_text(
                json.dumps({"source": source, "chain": chain, "pid": os.getpid()})
            )
            if owner is not None and os.geteuid() == 0 and owner[0] != 0:
                os.chown(path, *owner)
        except OSError as exc:
            shutil.rmtree(path, ignore_errors=True)
            raise UsageError(
                f"{refused}: {exc.strerror}; choose a writable folder with --scratch"
            ) from exc
        return made

    @classmethod
    def take_over(cls, path: Path, *, source: str, chain: str) -> RunDir:
        """Lock the folder of a run that died, and go on with it.

        Raises:
            InUseError: somebody holds it.
            SourceError: it is no more, or is not ours.
        """
        try:
            lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise SourceError(f"scratch folder {path} can't be taken over: {exc.strerror}") from exc
        taken = cls(path, lock)
        try:
            taken._lock_again(source, chain)
        except BaseException:
            os.close(lock)
            raise
        return taken

    def _lock_again(self, source: str, chain: str) -> None:
        for attempt in range(_LOOKS):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as exc:
                # Whoever looks whether it lives holds the lock for that moment.
                if attempt == _LOOKS - 1:
                    raise InUseError(
                        f"scratch folder {self.path} is held by another process"
                    ) from exc
                time.sleep(_PACE_S)
        try:
            held, named = os.fstat(self._lock), (self.path / "lock").lstat()
            if held.st_uid not in {0, os.geteuid()} or (held.st_dev, held.st_ino) != (
                named.st_dev,
                named.st_ino,
            ):
                raise SourceError(f"scratch folder {self.path} is not ours, or was just removed")
            self._describe(source, chain)
            self.let_go()
        except OSError as exc:
            raise SourceError(
                f"scratch folder {self.path} can't be taken over: {exc.strerror}"
            ) from exc

    def _describe(self, source: str, chain: str) -> None:
        """Say whose it is now: the old words stay until the new ones are there."""
        with suppress(FileNotFoundError):
            (self.path / "run.new").unlink()
        with os.fdopen(self._make("run.new"), "w") as file:
            json.dump({"source": source, "chain": chain, "pid": os.getpid()}, file)
        (self.path / "run.new").rename(self.path / "run.json")

    def keep_record(self, record: Unfinished, machine: bytes | None) -> bool:
        """Leave on record what another process needs to go on; False, and never an error, where it can't be.

        `machine` is the archive that the record names by its digest.
        """
        try:
            if machine is not None:
                with os.fdopen(self._make("machine"), "wb") as file:
                    file.write(machine)
            with os.fdopen(self._make("resume"), "wb") as file:
                file.write(record.encode())
        except OSError as exc:
            log.debug("nobody could go on with this run: %s", exc)
            return False
        return True

    def replace_record(self, record: Unfinished) -> None:
        """Put a new record in the place of the old one, of which nobody may go on any more.

        Raises:
            SourceError: the old one is still there.
        """
        try:
            with suppress(FileNotFoundError):
                (self.path / "resume.new").unlink()
            with os.fdopen(self._make("resume.new"), "wb") as file:
                file.write(record.encode())
            (self.path / "resume.new").rename(self.path / "resume")
        except OSError as exc:
            log.debug("nobody could go on with this run from here on: %s", exc)
            try:
                (self.path / "resume").unlink(missing_ok=True)
            except OSError as worse:
                raise SourceError(
                    f"can't write to scratch folder {self.path}: {worse.strerror}"
                ) from worse

    def journal(self, backup: str) -> Journal | None:
        """The run's journal, made where there is none yet; None where that can't be."""
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(self.path / "journal", flags, 0o600)
            if _is_ours(fd):
                return Journal(FileHere(fd), backup, self.path / "resume")
            os.close(fd)
        except OSError as exc:
            log.debug("what is read is not noted: %s", exc)
        return None

    def _make(self, name: str) -> int:
        """A new, empty file in the folder, open for writing.

        Never through what is there already: the folder may belong to QEMU's user, and a QEMU that its
        guest took over could put a link there for root to write through.
        """
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        return os.open(self.path / name, flags, 0o600)

    @property
    def socket(self) -> str:
        """Where QEMU's NBD server is to listen."""
        return str(self.path / "nbd.sock")

    @property
    def life(self) -> str:
        """Where QEMU is to listen for the run's lifeline."""
        return str(self.path / "life")

    def make_scratch(self, index: int, size: int) -> str:
        """Make a sparse file of `size` bytes and return its path.

        Raises:
            SourceError: the file system can't hold a file of that size.
        """
        path = self.path / f"disk{index}.raw"
        try:
            with os.fdopen(self._make(path.name), "wb") as file:
                os.truncate(file.fileno(), size)
                owner = self.path.stat()
                if os.geteuid() == 0 and owner.st_uid != 0:
                    os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        except OSError as exc:
            hint = "its file system has no such large files" if exc.errno == errno.EFBIG else ""
            raise SourceError(
                f"can't make a sparse scratch file of {size} bytes at {path}: {exc.strerror}"
                f" {hint}; choose another folder with --scratch"
            ) from exc
        return str(path)

    def room(self) -> tuple[int, int]:
        """Bytes that are free for scratch images, and that they take now."""
        used = sum(map(_taken, self.path.glob("disk*")))
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize, used

    def pace_s(self, spare: int) -> float:  # noqa: ARG002 - a look costs microseconds
        """Seconds until the room must be looked at again, with `spare` bytes left."""
        return _PACE_S

    def hold_back(self, size: int) -> None:
        """Take `size` bytes of real room, until `let_go`.

        Raises:
            UsageError: the room is not there.
        """
        try:
            with os.fdopen(self._make("held"), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as exc:
            raise UsageError(
                f"can't take {size} bytes in scratch folder {self.path.parent}: {exc.strerror}; make room,"
                " or choose another folder with --scratch"
            ) from exc

    def let_go(self) -> None:
        """Give back what `hold_back` took; never raises."""
        with suppress(OSError):
            (self.path / "held").unlink()

    def mark_server(self) -> None:
        """Note that this run starts an NBD server that has no socket here."""
        with suppress(FileExistsError):
            os.close(self._make("server"))

    def mark_paused(self, *, paused: bool) -> None:
        """Note that this run has stopped the guest, for whoever cleans up after a crash."""
        if paused:
            with suppress(FileExistsError):
                os.close(self._make("paused"))
        else:
            (self.path / "paused").unlink(missing_ok=True)

    def keep(self) -> None:
        """Leave the folder and what is in it when this run ends: QEMU may still use it."""
        self._keep = True

    def remove_scratch(self) -> None:
        """Remove the scratch images, once QEMU has let them go; never raises."""
        if self._keep:
            return
        self.let_go()
        for file in self.path.glob("disk*"):
            with suppress(OSError):
                file.unlink()

    def leave(self) -> None:
        """Let the lock go and nothing else, as if this run had died; never raises."""
        with suppress(OSError):
            os.close(self._lock)

    def close(self) -> None:
        """Remove the folder, unless it is kept, and let the lock go; never raises."""
        if not self._keep:
            shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            os.close(self._lock)


@dataclass(frozen=True, slots=True)
class FoundRun:
    """The folder of some run, as found on the disk.

    Attributes:
        alive: its process lives (and may be stopped), as far as its lock tells.
        paused: it stopped the guest and has not let it go on.
        server: it started the NBD server.
    """

    path: Path
    alive: bool
    paused: bool
    server: bool
    source: str | None
    chain: str | None
    pid: int | None

    def full(self) -> bool:
        """Whether a guest can wait for room in its scratch; no where that can't be seen."""
        with suppress(OSError):
            state = os.statvfs(self.path)
            return state.f_bavail * state.f_frsize < FULL
        return False

    def remove(self) -> None:
        """Remove what is left of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def record(self) -> Unfinished:
        """What it left on record for whoever goes on with it.

        Raises:
            ValueError: nothing that can be believed; the message says why.
        """
        raw = self._read_record()
        if not raw:
            raise ValueError(
                "it left nothing on record: it had not come to reading, or was to keep files or to trim over ssh, or"
                " let go of what it read early (--trim-scratch) because its scratch had little room"
            )
        found = Unfinished.decode(raw)
        if self.path.name != f"nbdpull-{found.run}":
            raise ValueError("its record is of another run")
        return found

    def _read_record(self) -> bytes:
        """The record as it is written; empty where there is none."""
        try:
            return self._read("resume", RECORD_MAX)
        except FileNotFoundError:
            return b""
        except OSError as exc:
            raise ValueError(f"its record can't be read: {exc.strerror}") from exc

    def machine(self, digest: str) -> bytes:
        """The archive of files that it was to keep with its backup.

        Raises:
            ValueError: it is not there, or is not the one that has this BLAKE3 in hex.
        """
        try:
            raw = self._read("machine", ARCHIVE_MAX)
        except OSError as exc:
            raise ValueError(
                f"the files that it was to keep can't be read: {exc.strerror}"
            ) from exc
        if blake3(raw).hexdigest() != digest:
            raise ValueError("the files that it was to keep are damaged")
        return raw

    def _read(self, name: str, most: int) -> bytes:
        """A file of the folder, and a byte more than `most` where it is longer.

        Raises:
            OSError: it can't be read.
            ValueError: it is not ours.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(self.path / name, flags), "rb") as file:
            if not _is_ours(file.fileno()):
                raise ValueError(f"'{name}' in its folder is not a file of ours")
            return file.read(most + 1)


def _taken(image: Path) -> int:
    """Bytes that a scratch image takes; nothing where libvirt has just removed it, with its job."""
    try:
        return image.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _is_ours(fd: int) -> bool:
    """Whether an open file of the folder was made by this user or root, and has this name only.

    QEMU's user may own the folder: it can take files away there, and bring its own.
    """
    found = os.fstat(fd)
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid in {0, os.geteuid()}
        and found.st_nlink == 1
        and not found.st_mode & 0o022
    )


def find_run(path: Path) -> FoundRun | None:
    """What is known of the run whose folder is `path`; None when there is none, or it is not ours.

    The path may come from QEMU, so it counts only when it is a folder of the right name that
    this user, or root, made.
    """
    if not re.fullmatch(r"nbdpull-[0-9a-f]{8}", path.name):
        return None
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return None
        lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(lock).st_uid not in {0, os.geteuid()}:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alive = False
        except OSError:
            alive = True
    finally:
        os.close(lock)
    described = _described(path)
    source, chain, pid = (described.get(name) for name in ("source", "chain", "pid"))
    return FoundRun(
        path=path,
        alive=alive,
        paused=(path / "paused").exists(),
        server=(path / "nbd.sock").is_socket() or (path / "server").exists(),
        source=source if isinstance(source, str) else None,
        chain=chain if isinstance(chain, str) else None,
        pid=pid if isinstance(pid, int) else None,
    )


def _described(path: Path) -> dict[str, Any]:
    """What `run.json` says; nothing where it is no short file of JSON. QEMU's user may have written it."""
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(path / "run.json", flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return {}
            loaded = json.loads(file.read(_RUN_JSON_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def find_runs(parent: str | None) -> Iterator[FoundRun]:
    """All runs whose folders are in `parent` (None: where they are by default)."""
    base = Path(parent or tempfile.gettempdir())
    for path in sorted(base.glob("nbdpull-????????")):
        found = find_run(path)
        if found is not None:
            yield found
