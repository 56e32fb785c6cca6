"""What the client library says is understood, and nothing secret of it is handed on."""

from __future__ import annotations

import pytest

from nbdpull.repo.trouble import Kind, diagnose, without_secrets


def answered(status: int, code: str = "", message: str = "Some words.") -> str:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
    return (
        "Generic S3 error: Error performing GET http://127.0.0.1:1/b/k?sig=s3cret in 1ms - Server"
        f" returned non-2xx status code: {status} Words: {body}\n\nDebug source:\nGeneric {{ uri:"
        f" http://127.0.0.1:1/b/k?sig=s3cret, inner: Status {{ status: {status}, body: Some() }} }}"
    )


def broken(kind: str, cause: str) -> str:
    return (
        "Generic S3 error: Error performing GET https://h/b/k?sig=s3cret in 1ms - HTTP error: error"
        f" sending request\n\nDebug source:\n inner: Http(HttpError {{ kind: {kind}, source: {cause} }})"
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (answered(404, "NoSuchKey"), Kind.MISSING),
        (answered(404), Kind.MISSING),
        (answered(404, "NoSuchBucket"), Kind.NO_BUCKET),
        (answered(404, "ContainerNotFound"), Kind.NO_BUCKET),
        (answered(403, "SignatureDoesNotMatch"), Kind.DENIED),
        (answered(403), Kind.DENIED),
        (answered(401), Kind.DENIED),
        (answered(409, "ConditionalRequestConflict"), Kind.TAKEN),
        (answered(409, "BlobImmutableDueToPolicy"), Kind.DENIED),
        (answered(412, "PreconditionFailed"), Kind.TAKEN),
        (answered(416, "InvalidRange"), Kind.RANGE),
        (answered(301, "PermanentRedirect"), Kind.REFUSED),
        (answered(400, "AuthorizationHeaderMalformed"), Kind.REFUSED),
        (answered(400, "RequestTimeout"), Kind.PASSING),
        (answered(429, "TooManyRequests"), Kind.PASSING),
        (answered(500, "InternalError"), Kind.PASSING),
        (answered(503, "SlowDown"), Kind.PASSING),
        (broken("Timeout", "reqwest::Error { source: TimedOut }"), Kind.PASSING),
        (broken("Connect", 'Os { code: 111, message: "Connection refused" }'), Kind.PASSING),
        (broken("Interrupted", 'Os { code: 104, message: "Connection reset" }'), Kind.PASSING),
        ("Bulk delete request failed for key q/k: It is not there. (code: 404)", Kind.MISSING),
        ("error sending request to http://169.254.169.254/latest/api/token", Kind.NO_CREDENTIALS),
        ("HTTP error: builder error", Kind.REFUSED),
        ("source: InvalidRangeRequest { source: StartTooLarge {", Kind.RANGE),
        ("something that nobody has seen yet", Kind.PASSING),
    ],
)
def test_each_answer_is_understood_in_one_line_without_a_secret(text: str, kind: Kind) -> None:
    trouble = diagnose(text)
    assert trouble.kind is kind
    assert "s3cret" not in trouble.words
    assert "\n" not in trouble.words
    assert "s3cret" not in without_secrets(text)


def test_the_words_tell_what_the_store_said() -> None:
    trouble = diagnose(answered(403, "RequestTimeTooSkewed", "The difference\nis too large."))
    assert trouble.words == "it answers 403 RequestTimeTooSkewed: The difference is too large"
    assert (trouble.status, trouble.code) == (403, "RequestTimeTooSkewed")
    refused = diagnose(broken("Connect", 'Os { code: 111, message: "Connection refused" }'))
    assert refused.words == "can't connect (Connection refused)"


def test_any_words_of_a_hostile_store_are_taken() -> None:
    assert diagnose(answered(400, "A" * 70, "x" * 5000)).kind is Kind.REFUSED
    assert len(diagnose(answered(400, "Code", "x" * 5000)).words) < 500
