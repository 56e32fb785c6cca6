"""One NBD connection, owned by one thread; the only importer of libnbd.

Why reads are cut small and few are in flight: a reply that the client does not take off its socket
blocks QEMU's drains, and with them its monitor and its guest. Replies that fit the socket's buffers
can't. Measured on Linux, with replies that come in one piece: a unix socket holds 128 KiB without harm
and hangs QEMU at 256 KiB; TCP on loopback holds 2 MiB and hangs at 4 MiB. So even a client stopped by
SIGSTOP in the middle of a pull leaves the VM alone.

Everything is asynchronous below (`aio_*` and `poll`), because libnbd's blocking calls have no time-out
and can't be cancelled.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, quote, urlsplit

import nbd
import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import NbdError, UsageError
from nbdpull.nbdio.errors import Cancelled, DroppedError, RefusedError, ReplyError, TlsError
from nbdpull.nbdio.readahead import ReadAhead

__all__ = [
    "MAX_REQUEST",
    "Cancelled",
    "Connection",
    "RefusedError",
    "ReplyError",
    "check_uri",
    "is_unix",
    "socket_of",
    "unix_uri",
    "with_export",
    "with_socket",
]

MAX_REQUEST = 64 * 1024
"""Largest read request in bytes; none crosses a multiple of it either.

QEMU 7.2 answers a plain read of a point in time (snapshot-access) wrongly when it covers copied and
uncopied blocks: what the guest has overwritten since then comes back as it is now. Blocks are copied in
multiples of 64 KiB, so within one all is from one place. QEMU 10 is right either way.
"""

_STRUCTURED_REQUEST = 32 * 1024
"""Largest one where replies are structured: in the worst case each 512 bytes come as a message of their own
that takes 1 KiB more of the socket's buffer, see `_start`."""

_IN_FLIGHT_UNIX = 128 * 1024
_IN_FLIGHT_TCP = 1024 * 1024
_STRUCTURED_IN_FLIGHT_TCP = 256 * 1024
_FORMS = "expected nbd://host:port/export or nbd+unix:///export?socket=path"
_TICK_MS = 250
_CONNECT_S = 10.0
_CONNECT_TRIES = 6
_CONNECT_PAUSE_S = 0.05
"""QEMU drops a client that is silent for 10 s in the handshake, as one is that was stopped there; and a
unix socket refuses with EAGAIN while more clients wait than its backlog holds."""
_REPLY_S = 300.0
"""A guest's storage may stall for minutes (a failing disk, a busy SAN); longer than this is an error."""


def unix_uri(path: str, export: str = "") -> str:
    """The NBD URI of an export behind a unix socket."""
    return f"nbd+unix:///{quote(export, safe='')}?socket={quote(path, safe='/')}"


def with_export(uri: str, export: str) -> str:
    """The URI of another export of the same server."""
    parts = urlsplit(uri)
    query = f"?{parts.query}" if parts.query else ""
    # Not urlunsplit: it drops the empty host of nbd+unix:///, which libnbd insists on.
    return f"{parts.scheme}://{parts.netloc}/{quote(export, safe='')}{query}"


def is_unix(uri: str) -> bool:
    """Whether an NBD URI names a unix socket."""
    return urlsplit(uri).scheme in {"nbd+unix", "nbds+unix"}


def socket_of(uri: str) -> str:
    """The path in an NBD URI that names a unix socket."""
    return parse_qs(urlsplit(uri).query)["socket"][0]


def with_socket(uri: str, path: str) -> str:
    """The same export, and all else, behind another unix socket."""
    parts = urlsplit(uri)
    query = parse_qs(parts.query) | {"socket": [path]}
    text = "&".join(
        f"{name}={quote(value, safe='/')}" for name, values in query.items() for value in values
    )
    return f"{parts.scheme}://{parts.netloc}{parts.path}?{text}"


def check_uri(uri: str) -> None:
    """Look at an NBD URI without connecting.

    Raises:
        UsageError: it is none.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as exc:
        raise UsageError(f"NBD address '{uri}' is no URI ({exc}); {_FORMS}") from exc
    socket_path = parse_qs(parts.query).get("socket")
    if parts.scheme in {"nbd", "nbds"}:
        fits = bool(parts.netloc)
    else:
        fits = parts.scheme in {"nbd+unix", "nbds+unix"} and bool(socket_path)
    if not fits:
        raise UsageError(f"NBD address '{uri}' is not understood; {_FORMS}")


class Connection:
    """An open connection to one export. Reads and block status may come from any thread, one at a time.

    Attributes:
        uri: what it is connected to.
        size: bytes of the export.
        read_only: True when the server refuses writes.
        multi_conn: True when several connections see each other's flushed writes.
        can_trim: True when the server takes `trim`.
        min_block, preferred_block, max_block: request sizes in bytes that the server asks for.
        requests: sent so far.
        window: read requests that may be in flight.
        contexts: the meta contexts that were granted.
    """

    def __init__(self, handle: nbd.NBD, uri: str, cancel: threading.Event | None) -> None:
        self._nbd = handle
        self._cancel = cancel
        self._lock = threading.Lock()
        self.uri = uri
        self.requests = 0
        self.contexts: frozenset[str] = frozenset()
        self.size: int = handle.get_size()
        self.read_only: bool = handle.is_read_only()
        self.multi_conn: bool = handle.can_multi_conn()
        self.can_zero: bool = handle.can_zero()
        self.can_trim: bool = handle.can_trim()
        self._trimming: tuple[int, int, int] | None = None
        self._can_flush: bool = handle.can_flush()
        self.min_block: int = handle.get_block_size(nbd.SIZE_MINIMUM) or 1
        self.preferred_block: int = handle.get_block_size(nbd.SIZE_PREFERRED) or 4096
        # 32 MiB is what the NBD specification lets a client assume when the server says nothing.
        self.max_block: int = handle.get_block_size(nbd.SIZE_MAXIMUM) or 32 * 1024 * 1024
        largest = self.max_block - self.max_block % self.min_block
        if handle.get_structured_replies_negotiated():
            largest = min(_STRUCTURED_REQUEST, largest)
            self._in_flight = _STRUCTURED_REQUEST if is_unix(uri) else _STRUCTURED_IN_FLIGHT_TCP
        else:
            self._in_flight = _IN_FLIGHT_UNIX if is_unix(uri) else _IN_FLIGHT_TCP
        self._request = max(min(MAX_REQUEST, largest), self.min_block)
        self.window = max(1, self._in_flight // self._request)

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        contexts: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        cancel: threading.Event | None = None,
        timeout_s: float = _CONNECT_S,
    ) -> Self:
        """Connect and negotiate.

        Args:
            uri: ``nbd://host[:port]/export``, ``nbd+unix:///export?socket=path`` (NBD URI specification).
            contexts: meta contexts to negotiate; each must be granted. A connection with contexts is
                for block status, one without reads faster: see `_start`.
            optional: more of them, which a server need not know: see `contexts` of the connection.
            cancel: once set, every call of this connection raises `Cancelled` soon.
            timeout_s: how long to wait for the end of the handshake. QEMU leaves connections over its
                `max-connections` unanswered.

        Raises:
            UsageError: libnbd does not understand the URI.
            NbdError: no connection, or a context was not granted.
        """
        for attempt in range(_CONNECT_TRIES):
            handle = _start(uri, (*contexts, *optional))
            try:
                _await_ready(handle, uri, cancel, timeout_s)
                opened = cls(handle, uri, cancel)
                opened.contexts = _granted(handle, uri, contexts, optional)
            except DroppedError:
                _shut(handle)
                if attempt == _CONNECT_TRIES - 1:
                    raise
                time.sleep(_CONNECT_PAUSE_S * 2**attempt)
            except BaseException:
                _shut(handle)
                raise
            else:
                return opened
        raise AssertionError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye and close the socket. Never raises; a second call does nothing."""
        handle, self._nbd = self._nbd, None
        if handle is None:
            return
        try:
            if handle.aio_is_ready() and not handle.aio_in_flight():
                handle.aio_disconnect()
                handle.poll(_TICK_MS)
        except nbd.Error:
            pass
        _shut(handle)

    def _wait(self, cookie: int, what: str, start: int, length: int) -> None:
        handle = self._nbd
        deadline = 0.0
        try:
            while not handle.aio_command_completed(cookie):
                if self._cancel is not None and self._cancel.is_set():
                    raise Cancelled
                if handle.poll(_TICK_MS) == 1:
                    deadline = 0.0
                    continue
                now = time.monotonic()
                deadline = deadline or now + _REPLY_S
                if now > deadline:
                    raise NbdError(f"no answer from {self.uri} to a {what} in {_REPLY_S:g} s")
        except nbd.Error as exc:
            message = f"{what} of {length} bytes at {start} of {self.uri} failed: {exc}"
            if handle.aio_is_ready():
                raise ReplyError(message, errnum=exc.errnum) from exc
            raise NbdError(message) from exc

    def _issue(self, what: str, call: Any, *args: Any) -> int:
        self.requests += 1
        try:
            return int(call(*args))
        except nbd.Error as exc:
            raise NbdError(f"{what} request to {self.uri} failed: {exc}") from exc

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the export's bytes from `offset` on.

        Raises:
            ReplyError: the server refused one of the requests; `buffer` is undefined, and nothing is
                written into it any more.
            NbdError: the connection is lost.
            Cancelled: the owner's event was set.
        """
        with self._lock:
            read = ReadAhead((self,))
            read.begin(buffer, offset)
            read.finish()

    def piece(self, offset: int, length: int) -> int:
        """How much of `length` bytes from `offset` on, 1 or more, one read request may ask for."""
        return min(self._request, MAX_REQUEST - offset % MAX_REQUEST, length)

    def start_read(self, buffer: memoryview, offset: int) -> int:
        """Send one request for a `piece`; its cookie.

        Of the requests that are not waited for yet at most `window` may be out; whoever uses this owns the
        connection meanwhile.

        Raises:
            NbdError: the connection is lost.
        """
        return self._issue("read", self._nbd.aio_pread, buffer, offset)

    def wait_read(self, cookie: int, offset: int, length: int) -> None:
        """Wait for the answer to a request of `start_read`; raises as `read_into` does."""
        self._wait(cookie, "read", offset, length)

    def block_status(
        self, context: str, offset: int, length: int, *, one: bool = False
    ) -> NDArray[np.int64]:
        """One block status reply, as rows of (length, flags); the last row may reach past the request.

        `length` must be below 4 GiB. The rows cover the range from `offset` on without gaps, at
        least its first byte, possibly less than was asked for (NBD specification, NBD_CMD_BLOCK_STATUS).
        With `one` the server sends the first extent alone (NBD_CMD_FLAG_REQ_ONE).
        """
        replies: list[list[int]] = []

        def extents(name: str, _offset: int, entries: list[int], _error: object) -> int:
            if name == context:
                replies.append(entries)
            return 0

        flags = nbd.CMD_FLAG_REQ_ONE if one else 0
        with self._lock:
            cookie = self._issue(
                "block status", self._nbd.aio_block_status, length, offset, extents, None, flags
            )
            self._wait(cookie, "block status", offset, length)
        if len(replies) != 1:
            raise NbdError(
                f"{self.uri} sent {len(replies)} block status replies for '{context}', expected 1"
            )
        rows = np.array(replies[0], dtype=np.int64).reshape(-1, 2)
        if not len(rows) or not rows[:, 0].all():
            raise NbdError(f"{self.uri} sent an empty extent for '{context}' at {offset}")
        return rows

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write `data` at `offset`; not durable before `flush`."""
        view = memoryview(data)
        for at in range(0, len(view), self.max_block):
            part = view[at : at + self.max_block]
            cookie = self._issue("write", self._nbd.aio_pwrite, part, offset + at)
            self._wait(cookie, "write", offset + at, len(part))

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, freeing its space where the server can.

        Cut into requests below 1 GiB: the length of a request has 32 bits.
        """
        for at in range(offset, offset + length, 1 << 30):
            part = min(1 << 30, offset + length - at)
            cookie = self._issue("write zeroes", self._nbd.aio_zero, part, at)
            self._wait(cookie, "write zeroes", at, part)

    def trim(self, offset: int, length: int) -> None:
        """Ask the server to let a range go; `length` must be below 4 GiB.

        Does not wait for the answer: the next call of `trim` does, or `settle`.

        Raises:
            ReplyError: the server refused the range before.
        """
        with self._lock:
            self._settle()
            cookie = self._issue("trim", self._nbd.aio_trim, length, offset)
            self._trimming = (cookie, offset, length)

    def settle(self) -> None:
        """Wait for the answer to the last `trim`.

        Raises:
            ReplyError: the server refused it.
        """
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        asked, self._trimming = self._trimming, None
        if asked is not None:
            self._wait(asked[0], "trim", *asked[1:])

    def flush(self) -> None:
        """Make every completed write durable, those of other connections too where `multi_conn`."""
        if self._can_flush:
            cookie = self._issue("flush", self._nbd.aio_flush)
            self._wait(cookie, "flush", 0, self.size)


def _check_tls(uri: str) -> None:
    """Refuse what would be TLS without looking who is at the other end.

    libnbd 1.14 checks a server's certificate against the host name of the address, and not at all where there is
    none: any server was taken. A shared key needs no name.
    """
    parts = urlsplit(uri)
    if parts.scheme == "nbds+unix" and not parse_qs(parts.query).get("tls-psk-file"):
        raise UsageError(
            f"NBD address '{uri}' is a unix socket, over which no certificate can be checked; use a shared key"
            " (PSK), or nbds://HOST:PORT"
        )


def _start(uri: str, contexts: tuple[str, ...]) -> nbd.NBD:
    """A handle that has begun to connect."""
    _check_tls(uri)
    handle = nbd.NBD()
    try:
        handle.set_uri_allow_transports(nbd.ALLOW_TRANSPORT_TCP | nbd.ALLOW_TRANSPORT_UNIX)
        # Every buffer is read into in full or the read raises: clearing it first is waste.
        handle.set_pread_initialize(False)
        handle.set_strict_mode(nbd.STRICT_COMMANDS | nbd.STRICT_FLAGS)
        for context in contexts:
            handle.add_meta_context(context)
        # Block status needs structured replies; reads must not have them: QEMU then sends each run of
        # data or zeroes as a message of its own, and the kernel counts about 1 KiB more for each. A
        # read of 128 KiB whose every other 512 bytes are zero doesn't fit a socket: a stopped client
        # froze QEMU 7.2 and 10 with this one request.
        handle.set_request_structured_replies(bool(contexts))
        # Where certificates lie comes from the command line or the caller, as the URI itself does.
        handle.set_uri_allow_local_file(urlsplit(uri).scheme.startswith("nbds"))
        handle.aio_connect_uri(uri)
    except nbd.Error as exc:
        check_uri(uri)
        # Not when it had begun to connect: a server that insists on TLS may say so before this call returns.
        if exc.errnum in {errno.EINVAL, errno.ENOTSUP} and handle.aio_is_created():
            raise UsageError(f"NBD address '{uri}' is not usable ({exc.string}); {_FORMS}") from exc
        raise _unconnected(uri, exc) from exc
    return handle


def _unconnected(uri: str, exc: nbd.Error) -> NbdError:
    kind: type[NbdError] = RefusedError if exc.errnum == errno.ECONNREFUSED else NbdError
    # libnbd gives the errors of the TLS library no number, nor those that only say that the network was lost.
    lost = any(words in exc.string for words in ("terminated", "pull function", "push function"))
    if exc.errnum == errno.ENOTSUP or ("gnutls" in exc.string and not lost):
        kind = TlsError
    return kind(f"can't connect to {uri}: {exc}")


def _granted(
    handle: nbd.NBD, uri: str, contexts: tuple[str, ...], optional: tuple[str, ...]
) -> frozenset[str]:
    granted = frozenset(name for name in (*contexts, *optional) if handle.can_meta_context(name))
    for context in contexts:
        if context not in granted:
            raise NbdError(f"export {uri} does not offer the block status context '{context}'")
    return granted


def _shut(handle: nbd.NBD) -> None:
    """End the connection of a handle, whoever still holds it. Never raises.

    libnbd 1.14 has no close(): it closes the socket when the last reference goes, and an exception's
    traceback may hold one for long. A client that is still connected, or a reply that nobody reads, would
    hang QEMU's teardown of the export.
    """
    try:
        with socket.socket(fileno=os.dup(handle.aio_get_fd())) as copy:
            copy.shutdown(socket.SHUT_RDWR)
    except (nbd.Error, OSError):
        pass  # closed already


def _await_ready(
    handle: nbd.NBD, uri: str, cancel: threading.Event | None, timeout_s: float
) -> None:
    # The whole handshake is bounded, not each silence in it: a server could send a byte now and then for
    # ever. A wait counts as a tick at most, however long the clock says: a process that was stopped
    # meanwhile has not waited.
    waited = 0.0
    try:
        while handle.aio_is_connecting():
            if cancel is not None and cancel.is_set():
                raise Cancelled
            began = time.monotonic()
            handle.poll(_TICK_MS)
            waited += min(time.monotonic() - began, _TICK_MS / 1000)
            if waited >= timeout_s:
                raise NbdError(
                    f"no answer from {uri} in {timeout_s:g} s; the server may have reached its"
                    " connection limit (max-connections), or hang"
                )
    except nbd.Error as exc:
        # EINVAL: libnbd 1.14 leaves a connect that got EAGAIN in a state that it can't poll in.
        if exc.errnum in {errno.EPIPE, errno.ECONNRESET, errno.EINVAL}:
            raise DroppedError(f"can't connect to {uri}: {exc}") from exc
        raise _unconnected(uri, exc) from exc
    if not handle.aio_is_ready():
        raise DroppedError(f"can't connect to {uri}: the server closed the connection")
