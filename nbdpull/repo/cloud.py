"""Where an object store is, and how to get in: from a location and what each cloud's users have set.

    s3://bucket/prefix?endpoint=URL&region=NAME&profile=NAME
    gs://bucket/prefix
    az://container/prefix?account=NAME&endpoint=URL

Nothing secret may stand in a location: it is shown in messages, and by ps(1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from nbdpull.errors import StoreError, UsageError
from nbdpull.repo.awsprofile import Profile, load_profile

__all__ = ["Cloud", "parse_cloud"]

_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}[A-Za-z0-9]")
_PART: Final = re.compile(r"[A-Za-z0-9._=+@-]+")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]")
_OPTIONS: Final[Mapping[str, frozenset[str]]] = {
    "s3": frozenset({"endpoint", "region", "profile"}),
    "gs": frozenset(),
    "az": frozenset({"account", "endpoint"}),
}
_TRUE: Final = {"1", "true", "yes", "on"}

_CREDENTIALS: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or run where a role gives them",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run where a service account gives them",
    "az": "set AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or run where"
    " a managed identity gives them",
}
_ENDPOINT: Final = {
    "s3": "AWS_ENDPOINT_URL",
    "gs": "the network's proxy",
    "az": "AZURE_STORAGE_ACCOUNT or AZURE_STORAGE_ENDPOINT",
}
# What the stores call it when it is the credentials themselves that are wrong.
_WRONG: Final = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed"}
_OLD: Final = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_CLOCK: Final = {"RequestTimeTooSkewed", "RequestExpired"}
# Said of a delete, these don't mean the credentials.
_LOCKED: Final = {"BlobImmutableDueToPolicy", "BlobImmutableDueToLegalHold", "ObjectLocked"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """One place in one object store.

    Attributes:
        scheme: ``s3``, ``gs`` or ``az``.
        bucket: or container.
        prefix: below which all keys are, without slashes around; may be empty.
        endpoint: URL of the service, or None for the cloud's own.
        config: of obstore's store of that kind; secrets are in here, so it is never shown.
        credentials: gives S3 credentials that end some time, or None.
        allow_http: the endpoint may be plain HTTP.
        root_certificate: one more authority to trust, PEM.
    """

    scheme: str
    bucket: str
    prefix: str
    endpoint: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    credentials: Callable[[], Any] | None = field(default=None, repr=False)
    allow_http: bool = False
    root_certificate: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The location, without its options."""
        return f"{self.scheme}://{self.bucket}{f'/{self.prefix}' if self.prefix else ''}"

    @property
    def at(self) -> str:
        """The service, for messages."""
        return self.endpoint or {"s3": "Amazon S3", "gs": "Google Cloud Storage"}.get(
            self.scheme, "Azure Blob Storage"
        )

    @property
    def bucket_word(self) -> str:
        """What the cloud calls its `bucket`."""
        return "container" if self.scheme == "az" else "bucket"

    @property
    def endpoint_variable(self) -> str:
        """What names the endpoint."""
        return _ENDPOINT[self.scheme]

    @property
    def credentials_hint(self) -> str:
        """What to do when there are no credentials."""
        return _CREDENTIALS[self.scheme]

    @property
    def refused_hint(self) -> str:
        """What to do when the request is not understood."""
        if self.scheme == "s3":
            return "is AWS_REGION the bucket's region, and AWS_ENDPOINT_URL right?"
        return "are its name and endpoint right?"

    def denied_hint(self, code: str | None) -> str:
        """What to do about the store's `code` for a refusal."""
        if code in _WRONG:
            return f"the credentials are wrong; {_CREDENTIALS[self.scheme]}"
        if code in _OLD:
            return "the credentials have expired; get new ones"
        if code in _CLOCK:
            return "this machine's clock is wrong; set it"
        if code in _LOCKED:
            return "the object is locked; try again when its lock has ended"
        return "the credentials may not do that, or the object is locked"


def parse_cloud(location: str, environ: Mapping[str, str]) -> Cloud:
    """The place a location means, in an environment.

    Raises:
        UsageError: the location can't be.
        StoreError: what the environment or a profile says can't be.
    """
    parts = urlsplit(location)
    scheme = parts.scheme
    if "@" in parts.netloc:
        raise UsageError(
            f"a {scheme}:// location must not hold a user or a secret; {_CREDENTIALS[scheme]}"
        )
    if not _BUCKET.fullmatch(parts.netloc):
        raise UsageError(
            f"'{parts.netloc}' is no name of a bucket; expected {scheme}://BUCKET/PREFIX"
        )
    prefix = parts.path.strip("/")
    for part in prefix.split("/") if prefix else ():
        if not _PART.fullmatch(part) or part in {".", ".."}:
            raise UsageError(
                f"'{part}' can't be in a repository's prefix; expected letters, digits and ._=+@-"
            )
    if parts.fragment:
        raise UsageError(f"a {scheme}:// location has no part behind '#'")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS[scheme]:
            known = ", ".join(sorted(_OPTIONS[scheme])) or "none"
            raise UsageError(f"a {scheme}:// location has no option '{name[:32]}'; it has: {known}")
    make = {"s3": _s3, "gs": _gs, "az": _az}[scheme]
    return make(parts.netloc, prefix, options, environ)


def _s3(bucket: str, prefix: str, options: Mapping[str, str], environ: Mapping[str, str]) -> Cloud:
    keys = bool(environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_SECRET_ACCESS_KEY"))
    profile = Profile()
    if "profile" in options:
        profile = load_profile(options["profile"], environ)
    elif not keys or environ.get("AWS_PROFILE"):
        profile = load_profile(None, environ)
    endpoint = (
        options.get("endpoint")
        or environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
        or environ.get("AWS_ENDPOINT")
        or profile.endpoint
    )
    region = (
        options.get("region")
        or environ.get("AWS_REGION")
        or environ.get("AWS_DEFAULT_REGION")
        or profile.region
    )
    config: dict[str, Any] = {"disable_bulk_delete": True}
    if endpoint:
        config["endpoint"] = endpoint
    if region:
        config["region"] = region
    if keys and "profile" not in options:
        config["access_key_id"] = environ["AWS_ACCESS_KEY_ID"]
        config["secret_access_key"] = environ["AWS_SECRET_ACCESS_KEY"]
        if environ.get("AWS_SESSION_TOKEN"):
            config["session_token"] = environ["AWS_SESSION_TOKEN"]
    credentials: Callable[[], Any] | None = None
    role = environ.get("AWS_WEB_IDENTITY_TOKEN_FILE") and environ.get("AWS_ROLE_ARN")
    if "profile" in options or not (keys or role):
        credentials = profile.credentials()
        if credentials is None and "profile" in options:
            raise StoreError(
                f"AWS profile '{options['profile']}' has no credentials that nbdpull can use; give it"
                " aws_access_key_id and aws_secret_access_key, or a credential_process"
            )
    return Cloud(
        scheme="s3",
        bucket=bucket,
        prefix=prefix,
        endpoint=_endpoint(endpoint),
        config=config,
        credentials=credentials,
        allow_http=_http_allowed(endpoint, "AWS_ALLOW_HTTP", environ),
        root_certificate=_certificate(environ.get("AWS_CA_BUNDLE"), "AWS_CA_BUNDLE"),
    )


def _gs(bucket: str, prefix: str, options: Mapping[str, str], environ: Mapping[str, str]) -> Cloud:
    del options  # obstore looks at the environment itself
    return Cloud(
        scheme="gs",
        bucket=bucket,
        prefix=prefix,
        allow_http=environ.get("GOOGLE_ALLOW_HTTP", "").lower() == "true",
    )


def _az(bucket: str, prefix: str, options: Mapping[str, str], environ: Mapping[str, str]) -> Cloud:
    known = _connection_string(environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    account = (
        options.get("account")
        or environ.get("AZURE_STORAGE_ACCOUNT")
        or environ.get("AZURE_STORAGE_ACCOUNT_NAME")
        or known.get("accountname")
    )
    endpoint = (
        options.get("endpoint")
        or environ.get("AZURE_STORAGE_ENDPOINT")
        or environ.get("AZURE_ENDPOINT")
        or known.get("blobendpoint")
    )
    if endpoint is None and account and "endpointsuffix" in known:
        endpoint = f"https://{account}.blob.{known['endpointsuffix']}"
    key = environ.get("AZURE_STORAGE_KEY") or known.get("accountkey")
    signature = environ.get("AZURE_STORAGE_SAS_TOKEN") or known.get("sharedaccesssignature")
    config: dict[str, Any] = {}
    if account:
        config["account_name"] = account
    elif not environ.get("AZURE_STORAGE_USE_EMULATOR"):
        raise StoreError(f"az://{bucket} is in no known account; {_CREDENTIALS['az']}")
    if key:
        config["account_key"] = key
    elif signature:
        config["sas_key"] = signature.lstrip("?")
    if endpoint:
        config["endpoint"] = endpoint
    return Cloud(
        scheme="az",
        bucket=bucket,
        prefix=prefix,
        endpoint=_endpoint(endpoint),
        config=config,
        allow_http=_http_allowed(endpoint, "AZURE_ALLOW_HTTP", environ),
    )


def _connection_string(text: str) -> Mapping[str, str]:
    pairs = (part.partition("=") for part in text.split(";") if part.strip())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _endpoint(url: str | None) -> str | None:
    """The URL, checked: the client library panics on one that is none."""
    if not url:
        return None
    parts = urlsplit(url)
    try:
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        port_ok = False
    host = parts.netloc.rpartition("@")[2]
    host = host if host.endswith("]") else re.sub(r":[0-9]+$", "", host)
    if parts.scheme not in {"http", "https"} or not port_ok or not _HOST.fullmatch(host):
        raise StoreError("the endpoint is no URL; expected https://HOST or https://HOST:PORT")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise StoreError("the endpoint must not hold a user, a query or a fragment")
    return url.rstrip("/")


def _http_allowed(url: str | None, variable: str, environ: Mapping[str, str]) -> bool:
    """Whether plain HTTP is allowed: on this machine itself, or when the user says so.

    Raises:
        StoreError: it is asked for, and not allowed.
    """
    if not url or urlsplit(url).scheme != "http":
        return False
    if urlsplit(url).hostname in {"127.0.0.1", "::1", "localhost"}:
        return True
    if environ.get(variable, "").lower() in _TRUE:
        return True
    raise StoreError(
        f"endpoint {_endpoint(url)} is not encrypted; use https, or set {variable}=true if everybody on"
        " the way may read along"
    )


def _certificate(path: str | None, variable: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise StoreError(f"can't read {path} of {variable}: {exc.strerror}") from exc
