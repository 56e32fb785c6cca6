"""Reads in two steps, through several connections to a real server."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdpull.nbdio.connection import Cancelled, Connection, ReplyError
from nbdpull.nbdio.readahead import ReadAhead
from tests.nbdio.conftest import Serve
from tests.support.holdingproxy import HoldingProxy
from tests.target.helpers import random_bytes

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random_bytes(4 * MIB + 512))
    return path


@contextmanager
def opened(uri: str, count: int) -> Iterator[ReadAhead]:
    with ExitStack() as stack:
        yield ReadAhead([stack.enter_context(Connection.open(uri)) for _ in range(count)])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_read_is_the_disks_bytes_though_the_next_has_begun(
    nbdkit: Serve, image: Path, count: int
) -> None:
    whole, rng = image.read_bytes(), random.Random(count)
    asked = [(0, MIB), (len(whole) - 512, 512), (0, 0), (1, 64 * KIB)]
    asked += [(rng.randrange(3 * MIB), rng.randrange(1, MIB)) for _ in range(30)]
    with opened(nbdkit("file", image).uri, count) as ahead:
        buffers = [memoryview(bytearray(MIB)) for _ in range(2)]
        before = None
        for number, (offset, length) in enumerate(asked):
            buffer = buffers[number % 2][:length]
            if before is not None:
                ahead.finish()
            ahead.begin(buffer, offset)
            if before is not None:
                assert before[0] == whole[before[1] : before[1] + len(before[0])]
            before = (buffer, offset)
        ahead.finish()
        assert before is not None
        assert before[0] == whole[before[1] : before[1] + len(before[0])]


def test_the_server_answers_while_the_caller_works_and_128_kib_wait_on_each_connection(
    nbdkit: Serve, image: Path, tmp_path: Path
) -> None:
    server = nbdkit("file", image)
    with HoldingProxy(tmp_path, server.path) as proxy, opened(proxy.uri, 2) as ahead:
        handshakes = len(proxy.bursts)
        buffer = bytearray(MIB)
        ahead.begin(memoryview(buffer), 0)
        deadline = time.monotonic() + 20
        while len(proxy.bursts) < handshakes + 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ahead.finish()
        assert buffer == image.read_bytes()[:MIB]
    replies = proxy.bursts[handshakes:]
    # 4 from each of 2 connections; a reply has a header.
    assert sum(burst // (64 * KIB) for burst in replies) == 16
    assert max(replies) <= 128 * KIB + 64


def test_nothing_lands_in_the_buffer_after_a_refused_request(nbdkit: Serve, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(
        'case "$1" in get_size) echo 8M ;; thread_model) echo parallel ;; can_multi_conn) exit 0 ;;\n'
        "pread) if [ $4 -eq 0 ]; then echo EIO first >&2; exit 1; fi\n"
        "  sleep 0.2; head -c $3 /dev/zero | tr '\\0' x ;; *) exit 2 ;; esac\n"
    )
    script.chmod(0o755)
    with opened(nbdkit("sh", script).uri, 3) as ahead:
        buffer = bytearray(MIB)
        ahead.begin(memoryview(buffer), 0)
        with pytest.raises(ReplyError):
            ahead.finish()
        buffer[:] = bytes(MIB)
        again = bytearray(MIB)
        ahead.begin(memoryview(again), 2 * MIB)
        ahead.finish()
        assert again == b"x" * MIB
        assert not any(buffer)


def test_a_second_read_waits_for_the_first_to_be_finished(nbdkit: Serve, image: Path) -> None:
    with opened(nbdkit("file", image).uri, 2) as ahead:
        ahead.begin(memoryview(bytearray(MIB)), 0)
        with pytest.raises(ValueError, match="not finished"):
            ahead.begin(memoryview(bytearray(MIB)), MIB)
        ahead.finish()


def test_every_request_waits_for_its_turn(nbdkit: Serve, image: Path) -> None:
    with (
        Connection.open(nbdkit("file", image).uri) as one,
        Connection.open(one.uri) as two,
    ):
        turns: list[tuple[int, int]] = []

        def pace(length: int) -> None:
            turns.append((length, one.requests + two.requests))

        ahead = ReadAhead([one, two], pace)
        ahead.begin(memoryview(bytearray(MIB)), 512)
        ahead.finish()
    assert sum(length for length, _ in turns) == MIB
    assert max(length for length, _ in turns) == 64 * KIB
    assert [sent for _, sent in turns] == list(range(17))


def test_a_turn_that_never_comes_ends_the_read(nbdkit: Serve, image: Path) -> None:
    def pace(_length: int) -> None:
        raise Cancelled

    with Connection.open(nbdkit("file", image).uri) as one:
        ahead = ReadAhead([one], pace)
        with pytest.raises(Cancelled):
            ahead.begin(memoryview(bytearray(MIB)), 0)
        assert one.requests == 0
