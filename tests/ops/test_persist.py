"""Connections that are lost in the middle of a pull are made again, and little is read twice."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest

from nbdpull.errors import NbdError
from nbdpull.model.grain import GRAIN
from nbdpull.model.results import Progress, ProgressKind
from nbdpull.nbdio.connection import Cancelled, socket_of
from nbdpull.nbdio.errors import ReplyError, TlsError
from nbdpull.ops import persist as module
from nbdpull.ops.kept import Kept
from nbdpull.ops.persist import persist
from nbdpull.ops.pull import DiskPull, pull
from nbdpull.repo.repository import Repository
from tests.ops.pulling import MIB, content, served, summary_of, write
from tests.support.cutting import cutting

SIZE = 1100 * MIB + 512
USED = 64 * MIB


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSES_S", (0.01,) * 5)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Noise in two segments, with zeroes that take room."""
    rng = random.Random(7)
    pieces = {at: rng.randbytes(MIB) for at in range(0, USED, MIB)}
    pieces[9 * MIB - 2 * GRAIN] = bytes(2 * MIB)
    pieces[1060 * MIB] = rng.randbytes(20 * MIB)
    pieces[SIZE - 30_000] = rng.randbytes(30_000)
    return write(tmp_path / "disk.raw", pieces, size=SIZE)


@pytest.mark.parametrize("every", [5 * MIB, 40 * MIB])
def test_what_is_stored_is_not_read_again(tmp_path: Path, raw: Path, every: int) -> None:
    Repository.create(str(tmp_path / "repo"))
    repository = Repository.open(str(tmp_path / "repo"), write=True)
    session = repository.begin(vm="vm1", disk="vda", parent=None)
    told: list[Progress] = []
    with served(raw) as uri, cutting(socket_of(uri)) as cutter:
        cutter.every, cutter.cuts = every, 3
        one = DiskPull(
            name="vda",
            size=SIZE,
            uri=f"nbd://127.0.0.1:{cutter.port}/",
            context=None,
            parent=None,
            session=session,
            kept=Kept(),
        )
        asyncio.run(pull([one], progress=told.append))
        assert cutter.lost == 3 - cutter.cuts > 0
    session.seal()
    made = session.commit(summary_of(session, SIZE, vm="vm1", disk="vda"))
    assert content(repository, made) == raw.read_bytes()
    assert one.counts.changed == SIZE
    # What was on its way is read again: of each reader a frame or two.
    assert one.counts.read <= USED + 21 * MIB
    kinds = [event.kind for event in told]
    assert kinds.count(ProgressKind.DISK_START) == kinds.count(ProgressKind.DISK_END) == 1


def test_a_server_that_stays_away_is_an_error(tmp_path: Path, raw: Path) -> None:
    Repository.create(str(tmp_path / "repo"))
    repository = Repository.open(str(tmp_path / "repo"), write=True)
    session = repository.begin(vm="vm1", disk="vda", parent=None)
    with served(raw) as uri, cutting(socket_of(uri)) as cutter:
        cutter.every, cutter.cuts = 10_000, 1000
        one = DiskPull(
            name="vda",
            size=SIZE,
            uri=f"nbd://127.0.0.1:{cutter.port}/",
            context=None,
            parent=None,
            session=session,
            kept=Kept(),
        )
        with pytest.raises(NbdError):
            asyncio.run(pull([one]))
        assert cutter.lost >= 6
    session.abandon()


def test_a_stop_ends_a_try_and_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def waits(cancel: threading.Event) -> None:
        stop.set()
        assert cancel.wait(600)
        raise Cancelled

    with pytest.raises(Cancelled):
        persist(waits, stop)

    monkeypatch.setattr(module, "_PAUSES_S", (600.0,))
    paused = threading.Event()

    def fails(_cancel: threading.Event) -> None:
        threading.Timer(0.05, paused.set).start()
        raise NbdError("gone")

    with pytest.raises(Cancelled):
        persist(fails, paused)


@pytest.mark.parametrize("kind", [TlsError, ReplyError])
def test_what_would_be_refused_again_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: type[NbdError]
) -> None:
    monkeypatch.setattr(module, "_PAUSES_S", (600.0,) * 5)
    tries = []

    def refused(_cancel: threading.Event) -> None:
        tries.append(1)
        raise TlsError("certificate") if kind is TlsError else ReplyError("no", errnum=5)

    with pytest.raises(kind):
        persist(refused, threading.Event())
    assert tries == [1]
