"""Connections against real servers: nbdkit with its filters, qemu-nbd, and silent sockets."""

from __future__ import annotations

import errno
import itertools
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbdpull.errors import NbdError, UsageError
from nbdpull.nbdio import connection as module
from nbdpull.nbdio.connection import (
    MAX_REQUEST,
    Cancelled,
    Connection,
    ReplyError,
    check_uri,
    is_unix,
    unix_uri,
    with_export,
)
from tests.nbdio.conftest import Serve
from tests.support.fakenbd import FakeNbd
from tests.support.holdingproxy import HoldingProxy
from tests.support.process import spawn, stop
from tests.target.helpers import random_bytes

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random_bytes(3 * MIB + 512))
    return path


def read(connection: Connection, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    connection.read_into(memoryview(buffer), offset)
    return bytes(buffer)


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[str]:
    """A server that takes connections and never says a word."""
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield f"nbd+unix:///?socket={path}"


def test_bytes_are_read_from_any_offset(nbdkit: Serve, image: Path) -> None:
    whole = image.read_bytes()
    with Connection.open(nbdkit("file", image).uri) as connection:
        assert connection.size == len(whole)
        for offset, length in [
            (0, len(whole)),
            (1, MAX_REQUEST),
            (513, 2 * MAX_REQUEST + 1),
            (MAX_REQUEST - 1, 2),
            (len(whole) - 1, 1),
        ]:
            assert read(connection, offset, length) == whole[offset : offset + length]
        assert read(connection, 7, 0) == b""


@pytest.mark.parametrize(
    ("minimum", "maximum", "length"),
    [(1, 64 * KIB, 3 * MIB + 512), (512, 32 * MIB, 3 * MIB + 512), (4 * KIB, 64 * KIB, 3 * MIB)],
)
def test_requests_keep_to_the_servers_block_sizes(
    nbdkit: Serve, image: Path, minimum: int, maximum: int, length: int
) -> None:
    """This server answers a request of another size with an error."""
    server = nbdkit(
        *("--filter=blocksize-policy", "file", image, "blocksize-error-policy=error"),
        *(f"blocksize-minimum={minimum}", f"blocksize-preferred={max(minimum, 4 * KIB)}"),
        f"blocksize-maximum={maximum}",
    )
    with Connection.open(server.uri) as connection:
        assert (connection.min_block, connection.max_block) == (minimum, maximum)
        assert read(connection, 0, length) == image.read_bytes()[:length]


def test_writes_keep_to_the_largest_block_size(nbdkit: Serve) -> None:
    server = nbdkit(
        *("--filter=blocksize-policy", "memory", "1M", "blocksize-error-policy=error"),
        *("blocksize-minimum=1", "blocksize-preferred=4K", "blocksize-maximum=64K"),
    )
    data = random_bytes(MIB)
    with Connection.open(server.uri) as connection:
        connection.write(data, 0)
        connection.flush()
        assert read(connection, 0, MIB) == data


def test_zeroing_reaches_across_gigabytes(nbdkit: Serve) -> None:
    with Connection.open(nbdkit("memory", "5G").uri) as connection:
        for at in (0, MIB, 4 << 30, (5 << 30) - 1):
            connection.write(b"x", at)
        connection.zero(1, (5 << 30) - 1)
        assert read(connection, 0, 2) == b"x\0"
        for at in (MIB, 4 << 30, (5 << 30) - 1):
            assert read(connection, at, 1) == b"\0"


@pytest.mark.parametrize("mode", ["emulate", "disable"])
def test_multi_conn_is_what_the_server_says(nbdkit: Serve, mode: str) -> None:
    server = nbdkit("--filter=multi-conn", "memory", "1M", f"multi-conn-mode={mode}")
    with Connection.open(server.uri) as connection:
        assert connection.multi_conn is (mode == "emulate")


def test_read_only_is_what_the_server_says(nbdkit: Serve) -> None:
    with Connection.open(nbdkit("-r", "memory", "1M").uri) as connection:
        assert connection.read_only
        with pytest.raises(NbdError, match="write"):
            connection.write(b"x", 0)


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EINVAL"])
def test_refused_request_tells_its_errno_and_leaves_the_connection_usable(
    nbdkit: Serve, image: Path, tmp_path: Path, name: str
) -> None:
    trigger = tmp_path / "fail"
    server = nbdkit(
        *("--filter=error", "file", image, f"error-pread={name}", "error-pread-rate=100%"),
        f"error-pread-file={trigger}",
    )
    with Connection.open(server.uri) as connection:
        assert len(read(connection, 0, MIB)) == MIB
        trigger.touch()
        with pytest.raises(ReplyError, match=r"read of 61440 bytes at 4096 ") as caught:
            read(connection, 4096, MIB)
        assert caught.value.errnum == getattr(errno, name)
        trigger.unlink()
        assert read(connection, 0, MIB) == image.read_bytes()[:MIB]


def test_nothing_lands_in_the_buffer_after_a_refused_request(
    nbdkit: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several requests are in flight and the first one fails: the others' bytes may still come."""
    script = tmp_path / "script"
    script.write_text(
        'case "$1" in get_size) echo 8M ;; thread_model) echo parallel ;;\n'
        "pread) if [ $4 -eq 0 ]; then echo EIO first >&2; exit 1; fi\n"
        "  sleep 0.2; head -c $3 /dev/zero | tr '\\0' x ;; *) exit 2 ;; esac\n"
    )
    script.chmod(0o755)
    # As over TCP, where more is in flight.
    monkeypatch.setattr(module, "_IN_FLIGHT_UNIX", MIB)
    with Connection.open(nbdkit("sh", script).uri) as connection:
        buffer = bytearray(MIB)
        with pytest.raises(ReplyError):
            connection.read_into(memoryview(buffer), 0)
        buffer[:] = bytes(MIB)
        assert read(connection, 2 * MIB, 1) == b"x"
        assert not any(buffer)


def test_connection_that_breaks_is_no_reply(nbdkit: Serve, image: Path) -> None:
    server = nbdkit("--filter=delay", "file", image, "delay-read=60")
    killer = threading.Timer(0.3, server.process.kill)
    killer.start()
    with (
        Connection.open(server.uri) as connection,
        pytest.raises(NbdError, match="read of") as caught,
    ):
        read(connection, 0, MIB)
    killer.join()
    assert not isinstance(caught.value, ReplyError)


def test_close_can_be_called_twice_and_after_the_server_died(nbdkit: Serve) -> None:
    server = nbdkit("memory", "1M")
    connection = Connection.open(server.uri)
    server.process.kill()
    server.process.wait()
    connection.close()
    connection.close()


def test_closing_leaves_no_client_at_the_server(nbdkit: Serve, image: Path) -> None:
    """With a reply outstanding too: an export with a client can't be torn down."""
    server = nbdkit("--exit-with-parent", "--filter=delay", "file", image, "delay-read=1")
    cancel = threading.Event()
    connection = Connection.open(server.uri, cancel=cancel)
    cancel.set()
    with pytest.raises(Cancelled) as kept:
        read(connection, 0, 10)
    connection.close()
    # The traceback in `kept` still refers to libnbd's handle.
    assert kept.tb is not None
    deadline = time.monotonic() + 10
    while _clients(server.path):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _clients(path: Path) -> int:
    """Connected sockets of a server: /proc/net/unix lists its ends with its path, state 03."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(1 for line in lines if line.endswith(f" {path}") and line.split()[5] == "03")


# -- connecting ------------------------------------------------------------------------------------


def test_silent_server_is_an_error_after_the_time_out(silent: str) -> None:
    with pytest.raises(NbdError, match=r"no answer from .* in 0\.3 s"):
        Connection.open(silent, timeout_s=0.3)


@pytest.mark.parametrize("pause_s", [0.1, 0.005], ids=["greeting", "options"])
def test_a_handshake_that_trickles_is_an_error(tmp_path: Path, pause_s: float) -> None:
    """The server sends a byte now and then: slower than its greeting ends, or of answers without end."""
    path = tmp_path / "trickle"
    stop = threading.Event()

    def trickle() -> None:
        client, _ = listener.accept()
        with client, suppress(OSError):
            for byte in itertools.chain.from_iterable(endless()):
                client.sendall(bytes([byte]))
                if stop.wait(pause_s):
                    return

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=trickle, daemon=True)
        server.start()
        try:
            with pytest.raises(NbdError, match=r"no answer from .* in 0\.5 s"):
                Connection.open(unix_uri(str(path)), contexts=("x:y",), timeout_s=0.5)
        finally:
            stop.set()
            server.join(10)


def endless() -> Iterator[bytes]:
    """What a server sends that agrees to structured replies and then lists contexts for ever."""
    yield b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
    head = struct.Struct(">QIII")
    yield head.pack(0x3E889045565A9, 8, 1, 0)
    for number in itertools.count():
        payload = struct.pack(">I", number) + b"x:y"
        yield head.pack(0x3E889045565A9, 10, 4, len(payload)) + payload


def test_connection_limit_of_qemu_is_an_error_that_names_it(serve: Serve, image: Path) -> None:
    server = serve("qemu-nbd", "-r", "-f", "raw", "-t", "-e", "1", "-k", "SOCKET", image)
    with Connection.open(server.uri) as first:
        with pytest.raises(NbdError, match="max-connections"):
            Connection.open(server.uri, timeout_s=0.5)
        assert len(read(first, 0, MIB)) == MIB


def test_connection_limit_of_nbdkit_is_an_error(nbdkit: Serve) -> None:
    server = nbdkit("--filter=limit", "memory", "1M", "limit=1")
    with Connection.open(server.uri), pytest.raises(NbdError, match="can't connect"):
        Connection.open(server.uri)


def test_connecting_can_be_cancelled(silent: str) -> None:
    cancel = threading.Event()
    timer = threading.Timer(0.2, cancel.set)
    timer.start()
    with pytest.raises(Cancelled):
        Connection.open(silent, cancel=cancel, timeout_s=120)
    timer.join()


def test_reading_can_be_cancelled(nbdkit: Serve, image: Path) -> None:
    server = nbdkit("--filter=delay", "file", image, "delay-read=120")
    cancel = threading.Event()
    with Connection.open(server.uri, cancel=cancel) as connection:
        timer = threading.Timer(0.2, cancel.set)
        timer.start()
        with pytest.raises(Cancelled):
            read(connection, 0, MIB)
        timer.join()


def test_request_without_an_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REPLY_S", 0.3)
    with FakeNbd(tmp_path, MIB, lambda _asked: (), deaf=True) as fake:
        connection = Connection.open(fake.uri)
        with pytest.raises(NbdError, match=r"no answer from .* to a read in 0\.3 s") as caught:
            read(connection, 0, 512)
        assert not isinstance(caught.value, ReplyError)
        connection.close()


def test_nobody_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NbdError, match="can't connect"):
        Connection.open(unix_uri(str(tmp_path / "none")))


def test_context_that_is_not_offered_is_named(nbdkit: Serve) -> None:
    server = nbdkit("memory", "1M")
    with pytest.raises(NbdError, match="'qemu:dirty-bitmap:np'"):
        Connection.open(server.uri, contexts=("qemu:dirty-bitmap:np",))


def test_server_without_extents_is_told(nbdkit: Serve) -> None:
    server = nbdkit("--filter=nofilter", "--no-sr", "memory", "1M")
    with pytest.raises(NbdError, match="'base:allocation'"):
        Connection.open(server.uri, contexts=("base:allocation",))


@pytest.mark.parametrize(
    "uri", ["/run/socket", "http://localhost/", "nbd+vsock:///", "nbd+unix:///"]
)
def test_address_that_is_none_is_a_usage_error(uri: str) -> None:
    for look in (Connection.open, check_uri):
        with pytest.raises(UsageError, match="expected nbd://"):
            look(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://localhost",
        "nbd://[::1]:10809/x",
        "nbd+unix:///?socket=/a",
        "nbds+unix:///e?socket=/a",
    ],
)
def test_address_that_is_one_is_taken(uri: str) -> None:
    check_uri(uri)


def test_address_that_is_no_uri_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no URI"):
        check_uri("nbd://[::1")


# -- what is in flight -----------------------------------------------------------------------------


def test_at_most_128_kib_are_in_flight_on_a_unix_socket(
    nbdkit: Serve, image: Path, tmp_path: Path
) -> None:
    server = nbdkit("file", image)
    with (
        HoldingProxy(tmp_path, server.path) as proxy,
        Connection.open(proxy.uri) as connection,
    ):
        assert read(connection, 0, MIB) == image.read_bytes()[:MIB]
    replies = proxy.bursts[-8:]
    # 8 requests, each answered alone; a reply has a header.
    assert all(128 * KIB <= burst <= 128 * KIB + 64 for burst in replies)


def test_the_limit_is_one_of_each_connection(nbdkit: Serve, image: Path, tmp_path: Path) -> None:
    """Four pullers read at once, each from a socket of its own."""
    server = nbdkit("file", image)
    with HoldingProxy(tmp_path, server.path) as proxy:

        def work() -> None:
            with Connection.open(proxy.uri) as connection:
                for _ in range(4):
                    read(connection, 0, MIB // 2)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len([burst for burst in proxy.bursts if burst >= 128 * KIB]) == 4 * 4 * 4
    assert max(proxy.bursts) <= 128 * KIB + 64


def test_at_most_1_mib_is_in_flight_over_tcp(image: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ready = tmp_path / "pid"
    server = spawn(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "-P", ready, "file", image])
    try:
        deadline = time.monotonic() + 10
        while not ready.exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with HoldingProxy(tmp_path, port) as proxy, Connection.open(proxy.uri) as connection:
            assert read(connection, 0, 3 * MIB) == image.read_bytes()[: 3 * MIB]
    finally:
        stop(server)
    assert MIB // 2 <= max(proxy.bursts) <= MIB + 1024


# -- addresses -------------------------------------------------------------------------------------


def test_odd_names_survive_in_addresses(tmp_path: Path, nbdkit: Serve) -> None:
    folder = tmp_path / "a b?#%&é"
    folder.mkdir()
    server = nbdkit("memory", "1M")
    link = folder / "sock et"
    link.symlink_to(server.path)
    with Connection.open(unix_uri(str(link), "disk 1/ä")) as connection:
        assert connection.size == MIB
    assert with_export("nbd+unix:///old?socket=/a%20b", "a/b c") == (
        "nbd+unix:///a%2Fb%20c?socket=/a%20b"
    )
    assert with_export("nbd+unix:?socket=/a", "e") == "nbd+unix:///e?socket=/a"
    assert with_export("nbd://[::1]:99/old", "new") == "nbd://[::1]:99/new"
    assert is_unix("nbd+unix:///?socket=/x")
    assert is_unix("nbds+unix:///?socket=/x")
    assert not is_unix("nbd://h/")
