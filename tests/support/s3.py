"""A small S3 client that shares nothing with nbdpull's: it makes buckets and looks behind its back."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

__all__ = ["S3", "Answer"]

_REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class S3:
    """One endpoint with one pair of keys; requests are signed with Signature Version 4."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)

    def request(
        self,
        method: str,
        path: str,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Answer:
        """Send one request; `path` is ``/bucket/key``, not quoted, `query` as it is signed."""
        host = urlsplit(self.endpoint).netloc
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        sent = {
            "host": host,
            "x-amz-date": stamp,
            "x-amz-content-sha256": hashlib.sha256(body).hexdigest(),
            **(headers or {}),
        }
        names = ";".join(sorted(sent))
        lines = [f"{name}:{sent[name]}" for name in sorted(sent)]
        canonical = "\n".join(
            [method, quote(path), query, *lines, "", names, sent["x-amz-content-sha256"]]
        )
        scope = f"{stamp[:8]}/{_REGION}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        key = f"AWS4{self.secret_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
        sent["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, SignedHeaders={names},"
            f" Signature={hmac.digest(key, text.encode(), 'sha256').hex()}"
        )
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            connection.request(method, quote(path) + (f"?{query}" if query else ""), body, sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def make_bucket(self, name: str, *, lock: bool = False) -> str:
        """Make a bucket, with object lock and versions if asked; returns its name."""
        headers = {"x-amz-bucket-object-lock-enabled": "true"} if lock else {}
        answer = self.request("PUT", f"/{name}", headers=headers)
        if answer.status != 200:
            raise AssertionError(f"bucket {name} was not made: {answer}")
        return name

    def listing(self, bucket: str, prefix: str) -> bytes:
        """The body of a listing of one page."""
        query = f"list-type=2&prefix={quote(prefix, safe='')}"
        answer = self.request("GET", f"/{bucket}", query)
        if answer.status != 200:
            raise AssertionError(f"bucket {bucket} was not listed: {answer}")
        return answer.body
