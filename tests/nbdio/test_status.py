"""Block status: every shape that a reply may have, and how much of it may be outstanding."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdpull.errors import NbdError
from nbdpull.nbdio.connection import Connection
from nbdpull.nbdio.status import StatusReader, allocation_reader, dirty_reader
from tests.nbdio.conftest import Serve
from tests.support.fakenbd import FakeNbd, Request
from tests.support.holdingproxy import HoldingProxy

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
CONTEXT = "base:allocation"
SMALLEST = 512
STEP = 8192 * SMALLEST
"""What a reader of extents that small asks for at a time."""

Extent = tuple[int, int]


def rows(reader: StatusReader, start: int, end: int) -> list[tuple[int, int, int]]:
    starts, ends, flags = reader.read(start, end)
    return list(zip(starts.tolist(), ends.tolist(), flags.tolist(), strict=True))


def joined(extents: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours of one kind as one; checks that there is no gap and no overlap."""
    out: list[tuple[int, int, int]] = []
    for start, end, flags in extents:
        assert start < end
        if out:
            assert out[-1][1] == start
            if out[-1][2] == flags:
                out[-1] = (out[-1][0], end, flags)
                continue
        out.append((start, end, flags))
    return out


@pytest.mark.parametrize(
    ("shape", "answer"),
    [
        ("single", [(64 * KIB, 0)]),
        ("short", [(64 * KIB, 0), (64 * KIB, 3), (512, 0)]),
        ("same type", [(64 * KIB, 3)] * 5),
        ("long", [(64 * KIB, 0), (3 * GIB, 3)]),
    ],
)
def test_shapes_of_replies(tmp_path: Path, shape: str, answer: list[Extent]) -> None:
    """The server says the same wherever it is asked: what comes is the replies, end to end."""
    with (
        FakeNbd(tmp_path, 64 * GIB, lambda _asked: answer) as fake,
        Connection.open(fake.uri, contexts=(CONTEXT,)) as connection,
    ):
        reader = StatusReader(connection, CONTEXT, smallest=SMALLEST)
        told = rows(reader, 0, MIB)
        wanted: list[tuple[int, int, int]] = []
        at = 0
        while at < MIB:
            for length, flags in answer:
                if at < MIB:
                    wanted.append((at, min(at + length, MIB), flags))
                at += length
        assert joined(told) == joined(wanted)
        assert shape != "long" or len(fake.requests) == 1


def test_what_a_reply_said_beyond_the_range_is_not_asked_again(tmp_path: Path) -> None:
    with (
        FakeNbd(tmp_path, GIB, lambda _asked: [(MIB, 0), (GIB - MIB, 3)]) as fake,
        Connection.open(fake.uri, contexts=(CONTEXT,)) as connection,
    ):
        reader = allocation_reader(connection, strict=False)
        assert rows(reader, 0, 512) == [(0, 512, 0)]
        assert rows(reader, 512, 2 * MIB) == [(512, MIB, 0), (MIB, 2 * MIB, 3)]
        assert rows(reader, 2 * MIB, GIB) == [(2 * MIB, GIB, 3)]
        assert len(fake.requests) == 1


def test_strict_reader_asks_for_nothing_beyond_the_range(tmp_path: Path) -> None:
    def answer(asked: Request) -> Sequence[Extent]:
        return [(asked.length, 0)]

    with (
        FakeNbd(tmp_path, GIB, answer) as fake,
        Connection.open(fake.uri, contexts=(CONTEXT,)) as connection,
    ):
        reader = allocation_reader(connection, strict=True)
        ranges = [(0, 64 * KIB), (MIB, 17 * MIB), (200 * MIB, 200 * MIB + 512)]
        for start, end in ranges:
            assert joined(rows(reader, start, end)) == [(start, end, 0)]
        for asked in fake.requests:
            assert any(a <= asked.offset and asked.offset + asked.length <= b for a, b in ranges)


def test_request_reaches_to_the_end_of_the_disk_at_most(tmp_path: Path) -> None:
    size = STEP + 1024
    with (
        FakeNbd(tmp_path, size, lambda asked: [(asked.length, 0)]) as fake,
        Connection.open(fake.uri, contexts=(CONTEXT,)) as connection,
    ):
        reader = allocation_reader(connection, strict=False)
        assert joined(rows(reader, 0, size)) == [(0, size, 0)]
        assert [asked.offset + asked.length for asked in fake.requests] == [STEP, size]


@pytest.mark.parametrize("answer", [[(0, 0)], [(4096, 0), (0, 3)]], ids=["only", "second"])
def test_empty_extent_is_an_error(tmp_path: Path, answer: list[Extent]) -> None:
    with (
        FakeNbd(tmp_path, MIB, lambda _asked: answer) as fake,
        Connection.open(fake.uri, contexts=(CONTEXT,)) as connection,
        pytest.raises(NbdError, match=CONTEXT),
    ):
        rows(allocation_reader(connection, strict=False), 0, MIB)


def test_reply_without_an_extent_is_an_error(tmp_path: Path) -> None:
    with (
        FakeNbd(tmp_path, MIB, lambda _asked: []) as fake,
        Connection.open(fake.uri, contexts=(CONTEXT,)) as connection,
        pytest.raises(NbdError),
    ):
        rows(allocation_reader(connection, strict=False), 0, MIB)


def test_extents_of_nbdkit(nbdkit: Serve) -> None:
    """A real server that is asked in pieces, through a script that says which is which."""
    server = nbdkit(
        *("eval", "get_size=echo 64M", "can_extents=exit 0", "pread=head -c $3 /dev/zero"),
        "extents=echo 0 1M; echo 1M 2M hole,zero; echo 3M 64K; echo 3136K 64K zero; echo 3200K 61M",
    )
    with Connection.open(server.uri, contexts=(CONTEXT,)) as connection:
        reader = allocation_reader(connection, strict=False)
        assert joined(rows(reader, 512, 64 * MIB)) == [
            (512, MIB, 0),
            (MIB, 3 * MIB, 3),
            (3 * MIB, 3136 * KIB, 0),
            (3136 * KIB, 3200 * KIB, 2),
            (3200 * KIB, 64 * MIB, 0),
        ]


# -- how much is outstanding -----------------------------------------------------------------------


def test_reply_stays_small_where_a_thin_disk_turns_fragmented(tmp_path: Path) -> None:
    """64 GiB of holes, then the smallest extents there are: none of the replies gets large."""
    turn, size = 64 * GIB, 64 * GIB + 8 * MIB

    def answer(asked: Request) -> Sequence[Extent]:
        end = asked.offset + asked.length
        out: list[Extent] = []
        at = asked.offset
        while at < end:
            if at < turn:
                length, flags = min(turn, end) - at, 3
            else:
                length, flags = SMALLEST, at // SMALLEST % 2 * 3
            out.append((length, flags))
            if asked.one:
                break
            at += length
        return out

    with (
        FakeNbd(tmp_path, size, answer) as fake,
        Connection.open(fake.uri, contexts=(CONTEXT,)) as connection,
    ):
        reader = allocation_reader(connection, strict=False)
        told = rows(reader, 0, size)
        assert joined(told)[0] == (0, turn, 3)
        assert len(joined(told)) == 1 + 8 * MIB // SMALLEST
        assert max(fake.replies) <= 64 * KIB + 4
        # Holes cost a request for each 4 GiB, not one a step.
        assert len([asked for asked in fake.requests if asked.offset < turn]) < 20


def test_a_fragmented_bitmap_of_real_qemu_stays_in_the_limit(serve: Serve, tmp_path: Path) -> None:
    """Every other of 16384 bits: 64 KiB of reply for each 512 MiB, counted on the wire."""
    image, commands = tmp_path / "disk.qcow2", tmp_path / "commands"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", "-g", "64k", image, "b"], check=True)
    commands.write_text("".join(f"write -q -z {at}k 4k\n" for at in range(0, 1 << 20, 128)))
    with commands.open() as file:
        subprocess.run(
            ["qemu-io", "-t", "unsafe", "-f", "qcow2", image],
            stdin=file,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    server = serve(
        *("qemu-nbd", "-r", "-f", "qcow2", "-t", "-e", "8", "-k", "SOCKET", "-A", "-B", "b", image)
    )
    context = "qemu:dirty-bitmap:b"
    with (
        HoldingProxy(tmp_path, server.path) as proxy,
        Connection.open(proxy.uri, contexts=(context,)) as connection,
    ):
        told = rows(dirty_reader(connection, context), 0, GIB)
        handshake = len(proxy.bursts) - 2
    assert len(told) == 16384
    assert all(flags == (number + 1) % 2 for number, (_, _, flags) in enumerate(told))
    assert all(a[1] == b[0] for a, b in pairwise(told))
    assert 64 * KIB <= max(proxy.bursts[handshake:]) <= 64 * KIB + 64


# -- any server, any question ----------------------------------------------------------------------

SMALL = 64 * KIB


@st.composite
def layouts(draw: st.DrawFn) -> list[Extent]:
    """Extents of a small disk, neighbours of one kind included."""
    cuts = draw(st.lists(st.integers(1, SMALL // 512 - 1), max_size=40, unique=True))
    edges = [0, *sorted(cuts), SMALL // 512]
    return [((b - a) * 512, draw(st.sampled_from([0, 1, 3]))) for a, b in pairwise(edges)]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layout=layouts(),
    limits=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    overlong=st.booleans(),
    questions=st.lists(
        st.tuples(st.integers(0, SMALL - 1), st.integers(1, SMALL)), min_size=1, max_size=6
    ),
    step=st.sampled_from([512, 4096]),
    strict=st.booleans(),
)
def test_any_honest_server_gives_the_same_extents(
    tmp_path: Path,
    layout: list[Extent],
    limits: list[int],
    overlong: bool,
    questions: list[tuple[int, int]],
    step: int,
    strict: bool,
) -> None:
    truth = [flags for length, flags in layout for _ in range(length // 512)]

    def answer(asked: Request) -> Sequence[Extent]:
        out: list[Extent] = []
        at = 0
        end = asked.offset + asked.length
        limit = 1 if asked.one else limits[len(fake.requests) % len(limits)]
        for length, flags in layout:
            start, stop = max(at, asked.offset), at + length
            at += length
            if start >= stop or start >= end or len(out) >= limit:
                continue
            out.append(((stop if overlong and not asked.one else min(stop, end)) - start, flags))
        return out

    with (
        FakeNbd(tmp_path, SMALL, answer) as fake,
        Connection.open(fake.uri, contexts=(CONTEXT,)) as connection,
    ):
        reader = StatusReader(connection, CONTEXT, smallest=1, strict=strict)
        reader._step = step
        for start, length in questions:
            end = min(start + length, SMALL)
            told = joined(rows(reader, start, end))
            assert (told[0][0], told[-1][1]) == (start, end)
            for a, b, flags in told:
                assert set(truth[a // 512 : (b - 1) // 512 + 1]) == {flags}
