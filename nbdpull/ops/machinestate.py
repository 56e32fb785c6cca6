"""What is needed to start a VM again, besides its disks: kept with a backup as one more, small disk.

    machine/qemu.json             what QMP tells of its devices; of a domain of libvirt domain.xml
    machine/definition/1-web.xml  what the user gives: a libvirt XML, a script
    machine/tpm/...               the state of its TPM, as swtpm keeps it

As a disk it is encrypted, deduplicated, copied, verified, repacked and collected as all disks are. Its content is an
archive (`model.archive`), and its summary lists the files.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from nbdpull.errors import DamagedError, SourceError, UsageError
from nbdpull.model.archive import ARCHIVE_MAX, FILES_MAX, File, is_name, pack_files, unpack_files
from nbdpull.model.frame import FormatError
from nbdpull.model.grain import GRAIN, Kind, frame_runs, segment_grains
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.segment import Interval, Segment
from nbdpull.ops.disknames import MACHINE
from nbdpull.repo.repository import DiskReader, Found, ParentGoneError, Repository, Session

__all__ = ["TPM", "MachinePart", "collect_files", "read_definitions", "read_machine"]

TPM: Final = "tpm/"
"""What the names of a TPM's files begin with."""

_FILE_MAX: Final = 16 << 20
_DEPTH: Final = 3
_TRIES: Final = 5
_WAIT_S: Final = 0.2


def _read(path: str, *, folder: int | None = None) -> bytes:
    """A regular file of a bounded size; in `folder` no link is followed."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags | (0 if folder is None else os.O_NOFOLLOW), dir_fd=folder)
    except OSError as exc:
        raise SourceError(f"can't open '{path}': {exc.strerror}") from exc
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SourceError(f"'{path}' is no regular file")
        raw = file.read(_FILE_MAX + 1)
    if len(raw) > _FILE_MAX:
        raise SourceError(
            f"'{path}' is larger than {_FILE_MAX} bytes; that is no definition or state"
        )
    return raw


def read_definitions(paths: Sequence[str], tpm: str | None) -> list[File]:
    """The files that the user gives, under names of ours; and a first look at the TPM's state.

    Raises:
        UsageError: one can't be read, or is too large.
        SourceError: the TPM's state can't be read.
    """
    if tpm is not None:
        read_tpm(tpm)
    files = []
    for number, path in enumerate(paths, 1):
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).name)[-48:]
        try:
            files.append((f"definition/{number}-{name}", _read(path)))
        except SourceError as exc:
            raise UsageError(f"--definition: {exc}") from exc
    return files


def _look(fd: int, prefix: str, depth: int) -> tuple[list[File], list[object]]:
    """Files below an open folder, and what tells whether any changed."""
    files: list[File] = []
    seen: list[object] = []
    for entry in sorted(os.scandir(fd), key=lambda one: one.name):
        name = entry.name
        if name.startswith("."):
            continue  # swtpm's lock
        state = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(state.st_mode) and depth < _DEPTH:
            below = os.open(
                name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd
            )
            try:
                more, state_below = _look(below, f"{prefix}/{name}", depth + 1)
            finally:
                os.close(below)
            files += more
            seen += state_below
        elif stat.S_ISREG(state.st_mode):
            if not is_name(f"{prefix}/{name}"):
                raise SourceError(
                    f"'{prefix}/{name}' is no name of a TPM's state; is the folder the right one?"
                )
            files.append((f"{prefix}/{name}", _read(name, folder=fd)))
            seen.append((prefix, name, state.st_ino, state.st_mtime_ns, state.st_size))
        elif not stat.S_ISSOCK(state.st_mode):
            raise SourceError(
                f"'{prefix}/{name}' is neither a file nor a folder; links are not followed"
            )
        if len(files) > FILES_MAX:
            raise SourceError(
                f"more than {FILES_MAX} files are no TPM's state; is the folder the right one?"
            )
    return files, seen


def read_tpm(folder: str) -> list[File]:
    """A TPM's state, as it was at one moment.

    Raises:
        SourceError: it can't be read, is no such state, or is written all the time.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise SourceError(f"can't open the TPM's state '{folder}': {exc.strerror}") from exc
    try:
        for _ in range(_TRIES):
            try:
                files, before = _look(fd, "tpm", 0)
                _, after = _look(fd, "tpm", 0)
            except FileNotFoundError:
                continue  # swtpm writes a new file and renames it
            if before == after:
                if not files:
                    raise SourceError(f"the TPM's state '{folder}' has no files")
                return files
            time.sleep(_WAIT_S)
    except OSError as exc:
        raise SourceError(f"can't read the TPM's state '{folder}': {exc.strerror}") from exc
    finally:
        os.close(fd)
    raise SourceError(f"the TPM's state '{folder}' changes all the time")


def collect_files(
    definitions: Sequence[File], tpm: str | None, described: File | None
) -> list[File]:
    """All files to keep; blocks.

    Raises:
        SourceError: they can't be had.
    """
    files = [*definitions, *(read_tpm(tpm) if tpm is not None else ())]
    if described is not None:
        files.append(described)
    if len(files) > FILES_MAX or sum(len(raw) + 1024 for _, raw in files) + 1024 > ARCHIVE_MAX:
        raise SourceError(
            f"the machine's state is more than {FILES_MAX} files or {ARCHIVE_MAX} bytes"
        )
    return files


class MachinePart:
    """The machine's state, on its way into the repository."""

    def __init__(
        self, repository: Repository, *, vm: str, files: Sequence[File], before: Summary | None
    ) -> None:
        """Store it.

        Args:
            repository: where.
            vm: whose it is.
            files: what to keep.
            before: an earlier one, of the same size or not; what did not change is not stored again.
        """
        raw = pack_files(files)
        self._files = tuple((name, len(data)) for name, data in files)
        self._size = len(raw)
        parent = _parent(repository, before, len(raw))
        try:
            self.session = repository.begin(vm=vm, disk=MACHINE, parent=parent)
        except ParentGoneError:
            parent = None
            self.session = repository.begin(vm=vm, disk=MACHINE, parent=None)
        try:
            # What is known to be damaged is stored, not referred to.
            lost = repository.damage.lost().values()
            self.session.lost = frozenset(row.digest for rows in lost for row in rows if row.rlen)
            _store(self.session, raw, _map(repository, parent))
        except BaseException:
            self.session.abandon()
            raise

    def commit(self, like: Summary) -> Manifest:
        """Commit it, as what `like`, a disk of the same backup, is of."""
        return self.session.commit(
            Summary(
                backup=like.backup,
                vm=like.vm,
                chain=like.chain,
                level=like.level,
                parent=like.parent,
                time=like.time,
                duration_s=like.duration_s,
                disk=MACHINE,
                disk_id=self.session.disk_id,
                session=self.session.id,
                size=self._size,
                disk_level=like.level,
                reason="the machine's state is kept whole",
                checkpoint=None,
                full_checkpoint=None,
                changed_bytes=self._size,
                read_bytes=self._size,
                stored_bytes=self.session.stored_bytes,
                reused_bytes=self.session.reused_bytes,
                siblings=like.siblings,
                tool=like.tool,
                tags=like.tags,
                machine=self._files,
            )
        )


def _parent(repository: Repository, before: Summary | None, size: int) -> Manifest | None:
    if before is None or before.size != size:
        return None
    try:
        manifest = repository.manifest(before)
        return None if repository.missing(manifest) else manifest
    except DamagedError:
        return None


def _map(repository: Repository, manifest: Manifest | None) -> Sequence[Interval]:
    try:
        return () if manifest is None else tuple(repository.reader(manifest).segment(0))
    except DamagedError:
        return ()


def _store(session: Session, raw: bytes, before: Sequence[Interval]) -> None:
    grains = segment_grains(len(raw), 0)
    kinds = np.full(grains, Kind.DATA, dtype=np.uint8)
    for grain in range(grains):
        if not any(raw[grain * GRAIN : (grain + 1) * GRAIN]):
            kinds[grain] = Kind.ZERO
    known = {one.start: one for one in session.known(0, kinds)}
    intervals = []
    same = True
    for first, count in frame_runs(kinds):
        part = raw[first * GRAIN : (first + count) * GRAIN]
        old = known.get(first)
        if old is not None and old.length == len(part) and session.refer(old, part):
            intervals.append(_interval(first, old.found))
        else:
            same = False
            intervals.append(_interval(first, session.put(part)))
    if not same or [(one.start, one.n) for one in before] != [
        (one.start, one.n) for one in intervals
    ]:
        session.put_segment(0, Segment.empty().overlay(kinds, intervals))


def _interval(start: int, found: Found) -> Interval:
    return Interval(
        start=start,
        n=found.grains,
        session=found.session,
        seq=found.seq,
        offset=found.offset,
        clen=found.clen,
        skip=0,
        flen=found.grains,
    )


def read_machine(reader: DiskReader) -> list[File]:
    """The files of a backup's machine state, verified.

    Raises:
        DamagedError: they are not what was written.
    """
    summary = reader.manifest.summary
    key = f"m/{summary.disk_id}/{summary.session}"
    if summary.machine is None or not 0 < summary.size <= ARCHIVE_MAX:
        raise DamagedError(f"manifest {key} says of a machine's state what can't be", key=key)
    raw = bytearray(summary.size)
    for one in reader.segment(0):
        part = reader.read(one)
        raw[one.start * GRAIN : one.start * GRAIN + len(part)] = part
    try:
        files = unpack_files(bytes(raw))
    except FormatError as exc:
        raise DamagedError(f"the machine's state of {key} is damaged: {exc}", key=key) from exc
    if tuple((name, len(data)) for name, data in files) != summary.machine:
        raise DamagedError(f"the machine's state of {key} has other files than it says", key=key)
    return files
