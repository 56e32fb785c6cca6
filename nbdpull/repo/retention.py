"""Reads and extends S3's object locks; the only importer of botocore.

obstore has no such request. botocore is Amazon's own client and no dependency of nbdpull: it is there after
``pip install 'nbdpull[lock]'``, and without it locks are not extended. See
docs/decisions/0089-locks-are-extended.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from nbdpull.errors import StoreError
from nbdpull.repo.cloud import Cloud
from nbdpull.repo.store import AccessDeniedError, KeyMissingError
from nbdpull.repo.trouble import without_secrets

__all__ = ["CONNECTIONS", "Retention", "load"]

CONNECTIONS: Final = 16
_CREDENTIALS_S: Final = 600.0
"""A profile's program is asked again after so long: what it gives lasts a quarter of an hour at least."""
_MISSING: Final = {"404", "NoSuchKey", "NotFound"}
_DENIED: Final = {"403", "AccessDenied", "Forbidden"}

_T = TypeVar("_T")


def load(cloud: Cloud) -> Retention | None:
    """What extends the locks there; None where botocore is not installed."""
    try:
        import botocore.config  # noqa: PLC0415 - it may not be there
        import botocore.exceptions  # noqa: PLC0415
        import botocore.session  # noqa: PLC0415
    except ImportError:
        return None
    return Retention(
        cloud,
        session=botocore.session.Session,
        config=botocore.config.Config,
        refused=botocore.exceptions.ClientError,
        failed=botocore.exceptions.BotoCoreError,
    )


class Retention:
    """The locks of one bucket's current versions. All methods may be called by many threads."""

    def __init__(
        self,
        cloud: Cloud,
        *,
        session: Callable[[], Any],
        config: Callable[..., Any],
        refused: type[Exception],
        failed: type[Exception],
    ) -> None:
        self._cloud = cloud
        self._session = session
        self._config = config
        self._refused = refused
        self._failed = failed
        self._lock = threading.Lock()
        self._client: Any = None
        self._made = 0.0

    def _get(self) -> Any:
        """A client with credentials that are good for a while."""
        provider = self._cloud.credentials
        with self._lock:
            old = provider is not None and time.monotonic() - self._made > _CREDENTIALS_S
            if self._client is None or old:
                self._client = self._make(None if provider is None else provider())
                self._made = time.monotonic()
            return self._client

    def _make(self, given: Any) -> Any:
        known = self._cloud.config if given is None else given
        token = known.get("session_token") if given is None else given.get("token")
        return self._session().create_client(
            "s3",
            region_name=self._cloud.config.get("region") or "us-east-1",
            endpoint_url=self._cloud.endpoint,
            # Without keys botocore looks for a role, as obstore does.
            aws_access_key_id=known.get("access_key_id"),
            aws_secret_access_key=known.get("secret_access_key"),
            aws_session_token=token,
            config=self._config(
                connect_timeout=10,
                read_timeout=60,
                max_pool_connections=CONNECTIONS,
                retries={"mode": "standard", "total_max_attempts": 8},
                s3={"addressing_style": "path"} if self._cloud.endpoint else {},
            ),
        )

    def _call(self, what: str, key: str, work: Callable[[Any, dict[str, str]], _T]) -> _T:
        name = f"{self._cloud.prefix}/{key}" if self._cloud.prefix else key
        try:
            return work(self._get(), {"Bucket": self._cloud.bucket, "Key": name})
        except self._refused as exc:
            response: Any = getattr(exc, "response", {})
            code = str(response.get("Error", {}).get("Code", ""))
            text = f"can't {what} {self._cloud}/{key}: {without_secrets(str(exc))}"
            if code in _MISSING:
                raise KeyMissingError(f"{self._cloud}/{key} is missing") from exc
            if code in _DENIED:
                raise AccessDeniedError(text) from exc
            raise StoreError(text) from exc
        except self._failed as exc:
            raise StoreError(
                f"can't {what} {self._cloud}/{key}: {without_secrets(str(exc))}"
            ) from exc

    def until(self, key: str) -> float:
        """When the lock of an object ends, seconds since the Unix epoch; 0 when it has none.

        Raises:
            KeyMissingError: there is no such object.
            StoreError: it can't be told.
        """
        found = self._call("see the lock of", key, lambda client, at: client.head_object(**at))
        ends = found.get("ObjectLockRetainUntilDate")
        return ends.timestamp() if isinstance(ends, datetime) else 0.0

    def extend(self, key: str, mode: str, until: float) -> None:
        """Have the lock end at `until`, which is later than now.

        Raises:
            KeyMissingError: there is no such object.
            AccessDeniedError: we may not.
            StoreError: it failed.
        """
        retention = {
            "Mode": mode.upper(),
            "RetainUntilDate": datetime.fromtimestamp(int(until), UTC),
        }
        self._call(
            "extend the lock of",
            key,
            lambda client, at: client.put_object_retention(**at, Retention=retention),
        )
