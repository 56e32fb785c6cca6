"""What speaks like Google Cloud Storage's XML API, in front of a real S3 server that keeps the objects.

Google's API is S3's but for how it asks for conditions and who it believes: ``x-goog-if-generation-match: 0`` is
``If-None-Match: *``, and a token is S3's signature. So this translates these two, and nothing else:
https://cloud.google.com/storage/docs/xml-api/reference-headers
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tests.support.s3 import S3

__all__ = ["gcs_front"]

_PASSED_ON = {"content-type", "last-modified", "etag", "content-range", "accept-ranges"}


def _handler(s3: S3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            parts = urlsplit(self.path)
            pairs = sorted(parse_qsl(parts.query, keep_blank_values=True))
            query = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in pairs)
            headers = {}
            if self.headers.get("x-goog-if-generation-match") == "0":
                headers["if-none-match"] = "*"
            if "range" in self.headers:
                headers["range"] = self.headers["range"]
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            done = s3.request(self.command, unquote(parts.path), query, headers, body)
            self.send_response(done.status)
            answered = {name.lower(): value for name, value in done.headers.items()}
            for name in _PASSED_ON & answered.keys():
                self.send_header(name, answered[name])
            length = answered.get("content-length", "0")
            self.send_header(
                "Content-Length", length if self.command == "HEAD" else str(len(done.body))
            )
            self.end_headers()
            self.wfile.write(done.body)

        do_GET = do_HEAD = do_PUT = do_DELETE = _answer  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            """Say nothing."""

    return Handler


@contextmanager
def gcs_front(s3: S3) -> Iterator[str]:
    """It runs on loopback; its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(s3))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
