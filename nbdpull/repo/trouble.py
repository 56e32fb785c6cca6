"""What an object store's error means, told from the client library's words.

obstore raises one class for nearly everything, and the response's status and body only stand in its text:

    Generic S3 error: Error performing PUT <url> in 1ms - Server returned non-2xx status code: 503 ...:
    <Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message>...
    (blank line) Debug source: ... kind: Connect ... message: "Connection refused" ...

Nothing of that text is handed on as it is: with a shared access signature Azure's URLs are secrets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["Kind", "Trouble", "diagnose", "without_secrets"]

_STATUS: Final = re.compile(r"(?:status code: |status: |\(code: )(\d{3})\b")
_CODE: Final = re.compile(r"<Code>\s*([A-Za-z]{1,64})\s*</Code>")
_MESSAGE: Final = re.compile(r"<Message>([^<]{1,400})")
_TRANSPORT: Final = re.compile(r"\bkind: (Connect|Timeout|Interrupted|Decode|Request)\b")
_CAUSE: Final = re.compile(r'\b(?:message|error): "([^"\\]{1,200})"')
_QUERY: Final = re.compile(r"\?[^\s,>\"')]+")
_METADATA: Final = re.compile(
    r"169\.254\.169\.254|169\.254\.170\.2|\[?fd00:ec2::254|metadata\.google\.internal"
    r"|/latest/api/token|/metadata/identity|/computeMetadata/"
)
_TLS: Final = re.compile(
    r"InvalidCertificate|UnknownIssuer|InvalidMessage|HandshakeFailure|CertNotValid|NotValidForName"
)


class Kind(Enum):
    """What to do about it."""

    MISSING = "missing"
    """There is no such object."""
    NO_BUCKET = "no bucket"
    """There is not even the bucket or container."""
    TAKEN = "taken"
    """The key exists, or another writer of it is under way."""
    RANGE = "range"
    """The range begins behind the object's end."""
    DENIED = "denied"
    """Wrong credentials, or ones that may not do it; or a locked object."""
    NO_CREDENTIALS = "no credentials"
    """None were found, and no instance role gave any."""
    REFUSED = "refused"
    """Another answer that will be the same next time."""
    PASSING = "passing"
    """Another try may work, and this one may have been carried out all the same."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error, read.

    Attributes:
        words: what went wrong, for people: one line, no secrets.
        status: the response's, or None when there was none.
        code: the store's own name of the error, or None.
    """

    kind: Kind
    words: str
    status: int | None = None
    code: str | None = None


_BY_CODE: Final = {
    "NoSuchBucket": Kind.NO_BUCKET,
    "InvalidBucketName": Kind.NO_BUCKET,
    "ContainerNotFound": Kind.NO_BUCKET,
    "ContainerBeingDeleted": Kind.NO_BUCKET,
    # Azure answers with 409 where others say 403.
    "BlobImmutableDueToPolicy": Kind.DENIED,
    "BlobImmutableDueToLegalHold": Kind.DENIED,
    # A request that was cut is answered like one that can't be.
    "RequestTimeout": Kind.PASSING,
    "IncompleteBody": Kind.PASSING,
}
_BY_STATUS: Final = {
    401: Kind.DENIED,
    403: Kind.DENIED,
    404: Kind.MISSING,
    408: Kind.PASSING,
    409: Kind.TAKEN,
    412: Kind.TAKEN,
    416: Kind.RANGE,
    429: Kind.PASSING,
}


def diagnose(text: str) -> Trouble:
    """What the client library's words mean.

    `text` is what `str` makes of its exception. What is not understood is taken as passing.
    """
    if _METADATA.search(text):
        return Trouble(
            Kind.NO_CREDENTIALS, "no credentials were given, and this machine has no role"
        )
    if "builder error" in text:
        return Trouble(Kind.REFUSED, "the endpoint is not encrypted, which was not allowed")
    found = _STATUS.search(text)
    if found is not None:
        return _answered(text, int(found[1]))
    if "StartTooLarge" in text or "bytes 0--1/0" in text:
        # Azure answers a read from the very end with nothing, and the library calls that wrong. Of an
        # empty object Azurite (3.35) even tells the range of these no bytes.
        return Trouble(Kind.RANGE, "the range begins behind the object's end", 206)
    if (
        "Content-Range" in text
        or "ContentRange" in text
        or "NotPartial" in text
        or "UnexpectedRange" in text
    ):
        return Trouble(Kind.REFUSED, "the store answers a ranged read with something else")
    return _unanswered(text)


def _unanswered(text: str) -> Trouble:
    transport = _TRANSPORT.search(text)
    kind = transport[1] if transport else ""
    causes = _CAUSE.findall(text)
    if kind == "Connect" and _TLS.search(text):
        words = "can't agree on TLS with it"
    elif kind == "Connect":
        words = f"can't connect ({causes[-1] if causes else 'no answer'})"
    elif kind == "Timeout" or "TimedOut" in text:
        words = "it did not answer in time"
    elif causes:
        words = f"the connection broke ({causes[-1]})"
    else:
        words = "the connection broke, or the answer is not understood"
    return Trouble(Kind.PASSING, words)


def _answered(text: str, status: int) -> Trouble:
    code = _CODE.search(text)
    name = code[1] if code else None
    kind = _BY_CODE.get(name or "") or _BY_STATUS.get(status)
    if kind is None:
        kind = Kind.PASSING if status >= 500 else Kind.REFUSED
    message = _MESSAGE.search(text)
    words = f"it answers {status}"
    if name:
        words += f" {name}"
    if message:
        words += f": {' '.join(message[1].split()).rstrip('.')}"
    return Trouble(kind, without_secrets(words), status, name)


def without_secrets(text: str) -> str:
    """The text without the queries of its URLs, which may hold signatures."""
    return _QUERY.sub("?...", text)
