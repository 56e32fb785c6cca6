"""An HTTP proxy in front of a real store: it counts, and it fails where the store itself never would."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import parse_qsl, urlsplit

__all__ = ["Exchange", "Fault", "Past", "Proxy", "Request", "proxy"]

_HEAD_MAX = 64 << 10


class Fault(StrEnum):
    """What goes wrong with one request."""

    BEFORE_503 = "before-503"
    """Not carried out, answered 503 SlowDown."""
    AFTER_500 = "after-500"
    """Carried out, answered 500."""
    BEFORE_CLOSE = "before-close"
    """Not carried out, the connection is closed."""
    AFTER_CLOSE = "after-close"
    """Carried out, the connection is closed."""
    HANG = "hang"
    """Carried out, and never answered."""
    TWICE = "twice"
    """Carried out two times, as by a gateway that tries again; the second answer counts."""
    CONFLICT = "conflict"
    """Not carried out, answered 409 ConditionalRequestConflict, as S3 does in a race."""
    TRUNCATE = "truncate"
    """Carried out; the answer's body ends in its middle."""
    FLIP = "flip"
    """Carried out; one bit of the answer's body is another."""
    STALE = "stale"
    """A listing is answered with `Proxy.past`, as by a replica that lags behind."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asks for."""

    method: str
    path: str
    query: str
    body: bytes = field(repr=False)

    @property
    def lists(self) -> bool:
        """Whether it asks for a listing."""
        return self.method == "GET" and "list-type=2" in self.query

    @property
    def key(self) -> str:
        """The path below the bucket; of a listing its prefix."""
        if self.lists:
            return dict(parse_qsl(self.query)).get("prefix", "")
        return self.path.lstrip("/").partition("/")[2]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer.

    Attributes:
        call: the method, or LIST for a GET that lists.
        key: the path below the bucket; of a listing its prefix.
        sent, received: bytes of the bodies.
    """

    call: str
    key: str
    status: int
    sent: int
    received: int
    fault: Fault | None


@dataclass(frozen=True, slots=True)
class Past:
    """What a bucket held at an earlier time: each key with its element of a listing, in order.

    There must be less than a page of them.
    """

    entries: Mapping[str, bytes]

    @classmethod
    def of(cls, listing: bytes) -> Past:
        """From the body of a listing."""
        found = re.findall(rb"<Contents>.*?</Contents>", listing, re.DOTALL)
        keys = [re.search(rb"<Key>(.*?)</Key>", one) for one in found]
        return cls({key[1].decode(): one for key, one in zip(keys, found, strict=True) if key})

    def answer(self, query: str) -> tuple[bytes, bytes]:
        """The answer to a request for a listing."""
        prefix = dict(parse_qsl(query)).get("prefix", "")
        there = [one for key, one in self.entries.items() if key.startswith(prefix)]
        body = b"".join(
            [
                b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">',
                b"<Prefix>%b</Prefix><KeyCount>%d</KeyCount>" % (prefix.encode(), len(there)),
                b"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>",
                *there,
                b"</ListBucketResult>",
            ]
        )
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
        return f"{head}\r\n\r\n".encode(), body


@dataclass(slots=True)
class Proxy:
    """A running proxy. `plan` says what is to go wrong; None is nothing."""

    endpoint: str
    upstream: tuple[str, int]
    plan: Callable[[Request], Fault | None] = lambda _request: None
    past: Past = field(default_factory=lambda: Past({}))
    exchanges: list[Exchange] = field(default_factory=list)

    def calls(self) -> Counter[str]:
        """How often each call was made."""
        return Counter(exchange.call for exchange in self.exchanges)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(_close, writer)
            up = _Upstream(self.upstream, stack)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._answer(reader, writer, up):
                    pass

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: _Upstream
    ) -> bool:
        """Answer one request; returns whether the connection goes on."""
        head, body = await _message(reader)
        method, target = head.split(b" ", 2)[:2]
        parts = urlsplit(target.decode())
        request = Request(method.decode(), parts.path, parts.query, body)
        fault = self.plan(request)
        if fault is Fault.STALE and request.lists:
            answer_head, answer = self.past.answer(request.query)
        else:
            answer_head, answer = await _carried_out(up, request, head, fault)
        self._note(request, answer_head, answer, fault)
        if fault is Fault.HANG:
            await reader.read(1)  # until the client gives up
        if fault in {Fault.HANG, Fault.BEFORE_CLOSE, Fault.AFTER_CLOSE}:
            return False
        cut = len(answer) // 2 if fault is Fault.TRUNCATE else len(answer)
        writer.write(answer_head + answer[:cut])
        await writer.drain()
        return fault is not Fault.TRUNCATE and b"connection: close" not in answer_head.lower()

    def _note(self, request: Request, head: bytes, answer: bytes, fault: Fault | None) -> None:
        self.exchanges.append(
            Exchange(
                "LIST" if request.lists else request.method,
                request.key,
                int(head.split(b" ", 2)[1]) if head else 0,
                len(request.body),
                len(answer),
                fault,
            )
        )


class _Upstream:
    """The connection to the store, made when it is needed first."""

    def __init__(self, address: tuple[str, int], stack: contextlib.AsyncExitStack) -> None:
        self._address = address
        self._stack = stack
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, raw: bytes, *, bodiless: bool) -> tuple[bytes, bytes]:
        """Send a request as it is; returns the head and the body of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, limit=1 << 20)
            self._stack.push_async_callback(_close, self._streams[1])
        reader, writer = self._streams
        writer.write(raw)
        await writer.drain()
        return await _message(reader, bodiless=bodiless)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def _carried_out(
    up: _Upstream, request: Request, head: bytes, fault: Fault | None
) -> tuple[bytes, bytes]:
    """The answer, after the store did what was asked, unless the fault comes before."""
    match fault:
        case Fault.BEFORE_503:
            return _error(503, "SlowDown")
        case Fault.CONFLICT:
            return _error(409, "ConditionalRequestConflict")
        case Fault.BEFORE_CLOSE:
            return b"", b""
        case _:
            pass
    bodiless = request.method == "HEAD"
    if fault is Fault.TWICE:
        await up.send(head + request.body, bodiless=bodiless)
    answer_head, answer = await up.send(head + request.body, bodiless=bodiless)
    if fault is Fault.AFTER_500:
        return _error(500, "InternalError")
    if fault is Fault.FLIP and answer:
        flipped = bytearray(answer)
        flipped[len(flipped) // 2] ^= 4
        return answer_head, bytes(flipped)
    return answer_head, answer


def _error(status: int, code: str) -> tuple[bytes, bytes]:
    body = f"<Error><Code>{code}</Code><Message>As planned.</Message></Error>".encode()
    head = f"HTTP/1.1 {status} Planned\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode(), body


async def _message(reader: asyncio.StreamReader, *, bodiless: bool = False) -> tuple[bytes, bytes]:
    """The head and the body of one message, as they came."""
    head = await reader.readuntil(b"\r\n\r\n")
    if len(head) > _HEAD_MAX:
        raise AssertionError("a head that large is no head")
    fields = head.lower().split(b"\r\n")
    values = dict(line.split(b":", 1) for line in fields[1:] if b":" in line)
    if bodiless or head.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")):
        return head, b""
    if b"chunked" in values.get(b"transfer-encoding", b""):
        raw = bytearray()
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            raw += line + await reader.readexactly(size + 2)
            if size == 0:
                return head, bytes(raw)
    return head, await reader.readexactly(int(values.get(b"content-length", b"0")))


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy on loopback in front of the URL `upstream`, in a thread of its own."""
    parts = urlsplit(upstream)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{upstream} has no host and port")
    target = (parts.hostname, parts.port)
    started: Future[tuple[Proxy, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def main() -> None:
        made = Proxy("", target)
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(made.serve(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 20)
        made.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        end = asyncio.Event()
        started.set_result((made, asyncio.get_running_loop(), end))
        await end.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    made, loop, end = started.result(30)
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(30)
