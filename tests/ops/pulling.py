"""Pulls from a real NBD server, qemu-nbd, into a repository, without any VM."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nbdpull.model.grain import GRAIN, SEGMENT, segment_count
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest, Summary
from nbdpull.model.results import Level
from nbdpull.nbdio.connection import unix_uri
from nbdpull.ops.pull import DiskPull, pull
from nbdpull.repo.repository import Repository, Session
from tests.support.process import spawn, stop
from tests.support.tools import QEMU_72

MIB = 1 << 20


def answers(path: Path) -> bool:
    """Whether somebody listens there: the socket is there a moment before."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@contextmanager
def served(raw: Path) -> Iterator[str]:
    """A raw file over NBD; yields the URI."""
    folder = Path(tempfile.mkdtemp(prefix="np-"))
    path = folder / "s"
    server = spawn(
        [QEMU_72.qemu_nbd, "-r", "-t", "-e", "16", "-f", "raw", "-k", path, raw],
        log=folder / "log",
    )
    try:
        deadline = time.monotonic() + 20
        while not answers(path):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield unix_uri(str(path), "")
    finally:
        stop(server)
        shutil.rmtree(folder)


def write(raw: Path, pieces: Mapping[int, bytes], *, size: int | None = None) -> Path:
    """Put bytes at offsets into a sparse file."""
    raw.touch()
    with raw.open("r+b") as file:
        if size is not None:
            file.truncate(size)
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)
    return raw


def summary_of(session: Session, size: int, *, vm: str, disk: str, time: float = 1.0) -> Summary:
    """A full's summary."""
    return Summary(
        backup=BackupId(secrets.token_hex(8)),
        vm=vm,
        chain="default",
        level=Level.FULL,
        parent=None,
        time=time,
        duration_s=1.0,
        disk=disk,
        disk_id=session.disk_id,
        session=session.id,
        size=size,
        disk_level=Level.FULL,
        reason="test",
        checkpoint=None,
        full_checkpoint=None,
        changed_bytes=size,
        read_bytes=size,
        stored_bytes=session.stored_bytes,
        reused_bytes=session.reused_bytes,
        siblings=((session.disk_id, session.id),),
        tool="test",
    )


def fill(session: Session, raw: Path) -> None:
    """Read all of a raw file into a session."""
    with served(raw) as uri:
        one = DiskPull(
            name="vda",
            size=raw.stat().st_size,
            uri=uri,
            context=None,
            parent=None,
            session=session,
        )
        asyncio.run(pull([one]))


def full(
    repository: Repository, raw: Path, *, like: Manifest | None = None, vm: str = "vm1"
) -> Manifest:
    """A full backup of a raw file, compared with `like`."""
    session = repository.begin(vm=vm, disk="vda", parent=None, like=like)
    fill(session, raw)
    session.seal()
    return session.commit(summary_of(session, raw.stat().st_size, vm=vm, disk="vda"))


def content(repository: Repository, manifest: Manifest) -> bytes:
    """The disk, through a reader that starts from the repository alone."""
    reader = repository.reader(repository.manifest(manifest.summary))
    size = manifest.summary.size
    out = bytearray(size)
    for index in range(segment_count(size)):
        for one in reader.segment(index):
            raw = reader.read(one)
            at = index * SEGMENT + one.start * GRAIN
            out[at : at + len(raw)] = raw
    assert reader.missing_packs() == []
    return bytes(out)
