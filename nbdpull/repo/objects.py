"""A repository in an object store: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

Every object is written by one conditional PUT. Such a PUT can be carried out although it failed: the
answer was lost, or a gateway sent it twice and the second one found the first. So whenever a create may
have been carried out, and also when the key is said to be taken, the object there is compared with the
one to be made; the same bytes count as made.

Packs are kept in memory until their PUT is answered; `nbdpull.repo.buffer` bounds them.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from nbdpull.errors import StoreError
from nbdpull.model.config import Lock
from nbdpull.repo.buffer import Budget, MemoryUpload
from nbdpull.repo.calls import Told
from nbdpull.repo.cloud import Cloud
from nbdpull.repo.deadline import current, in_time
from nbdpull.repo.objectlock import lock_headers, lockable, locked_until
from nbdpull.repo.patience import PATIENCE, Patience
from nbdpull.repo.retention import CONNECTIONS, Retention, load
from nbdpull.repo.store import AccessDeniedError, KeyExistsError, KeyMissingError, Listed, check_key
from nbdpull.repo.trouble import Kind, Trouble, diagnose, without_secrets
from nbdpull.version import __version__

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as Handle

__all__ = ["ObjectStore"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_PIECE: Final = 1 << 20
_SMALL: Final = 1 << 20


class _Failed(Exception):
    """What the client library said, without what must not be told."""


class ObjectStore:
    """Objects below a prefix of a bucket or container. All methods may be called by many threads."""

    def __init__(
        self,
        cloud: Cloud,
        *,
        patience: Patience = PATIENCE,
    ) -> None:
        """Connects to nothing yet.

        Args:
            cloud: where it is, and how to get in.
            patience: how long to wait for it.
        """
        self.cloud = cloud
        self._patience = patience
        self._budget = Budget()
        self._deadline = current.get()
        self._met = False
        self._small = self._handle(patience.small_s)
        self._bulk = self._handle(patience.bulk_s)
        self._lock: Lock | None = None
        self._retention: Retention | None = None
        self._locking: dict[tuple[int, float], Handle] = {}
        # A listing comes in pages that only the library can try again one by one.
        self._pages = self._handle(patience.small_s, retry_s=patience.retry_s)

    def _handle(
        self, timeout_s: float, *, retry_s: float = 0.0, headers: Mapping[str, str] | None = None
    ) -> Handle:
        patience = self._patience
        client: ClientConfig = {
            "allow_http": self.cloud.allow_http,
            "connect_timeout": timedelta(seconds=patience.connect_s),
            "timeout": timedelta(seconds=timeout_s),
            "user_agent": f"nbdpull/{__version__}",
        }
        if self.cloud.root_certificate is not None:
            client["root_certificate"] = self.cloud.root_certificate
        if headers:
            client["default_headers"] = dict(headers)
        retry: RetryConfig = {
            "max_retries": 30 if retry_s else 0,
            "retry_timeout": timedelta(seconds=retry_s),
            "backoff": {
                "init_backoff": timedelta(seconds=patience.pause_s),
                "max_backoff": timedelta(seconds=patience.pause_max_s),
                "base": 2,
            },
        }
        options: dict[str, Any] = {
            "prefix": self.cloud.prefix or None,
            "config": dict(self.cloud.config),
            "client_options": client,
            "retry_config": retry,
        }
        if self.cloud.credentials is not None:
            options["credential_provider"] = self.cloud.credentials
        kind = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[self.cloud.scheme]
        if self.cloud.scheme == "s3" and headers:
            # Amazon wants a checksum of every object that is to be locked.
            options["config"].setdefault("checksum_algorithm", "SHA256")
        try:
            made: Handle = kind(self.cloud.bucket, **options)
        except (BaseError, ValueError) as exc:
            trouble = without_secrets(str(exc).partition("\n")[0])
            raise StoreError(f"can't use {self.cloud}: {trouble}") from _Failed(trouble)
        return made

    # -- object lock -------------------------------------------------------------------------------

    def lock(self, lock: Lock) -> None:
        """From now on have S3 lock every object that backups consist of, from when it is written."""
        self._lock = lock
        self._retention = load(self.cloud)

    def try_lock(self, lock: Lock, key: str) -> None:
        """See that the bucket takes locks, with an object that is locked for a minute.

        Raises:
            StoreError: it does not.
        """
        handle = self._locked(self._patience.small_s, lock.mode, time.time() + 60)

        def work() -> bool:
            made = obstore.put(handle, key, b"", mode="create", use_multipart=False)
            return made["version"] is not None

        done = self._call("lock", key, work)
        if isinstance(done, Trouble) and done.kind is not Kind.REFUSED:
            raise self._error("lock", key, done)
        if done is not True:
            words = f" ({done.words})" if isinstance(done, Trouble) else ""
            raise StoreError(
                f"bucket {self.cloud.bucket} locks no objects{words}; make one with object lock, or"
                " leave --lock out"
            )
        self.delete(key)

    def _locked_until(self, key: str, lock: Lock) -> float:
        """When its lock ends: as it was made, or as it was extended."""
        made = locked_until(self.stat(key).modified, lock)
        retention = self._retention
        if time.time() < made or retention is None:
            return made
        return self._in_time("look at", key, lambda: retention.until(key))

    def hold(self, keys: Iterable[str], until: float, further: float) -> int | None:
        """Extend the locks of objects that end before `until`, to `further`; how many that were.

        None where nothing can extend them, and some would have to be.

        Raises:
            KeyMissingError: an object is gone.
            AccessDeniedError: the credentials may not.
            StoreError: it failed.
        """
        lock, retention = self._lock, self._retention
        wanted = list(keys)
        if lock is None or not wanted:
            return 0
        if retention is None:
            return None

        def one(key: str) -> bool:
            short = self._in_time("look at", key, lambda: retention.until(key)) < until
            if short:
                self._in_time("lock", key, lambda: retention.extend(key, lock.mode, further))
            return short

        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="nbdpull-lock") as threads:
            return sum(threads.map(one, wanted))

    def lock_ends(self, objects: Iterable[Listed], lock: Lock) -> list[float]:
        """When the locks of objects end, as they were made, or as the store says where it can be asked.

        Raises:
            StoreError: it failed.
        """
        retention = load(self.cloud)

        def one(listed: Listed) -> float:
            made = locked_until(listed.modified, lock)
            if retention is None:
                return made
            # Who may not see locks is told of none.
            return self._in_time("look at", listed.key, lambda: retention.until(listed.key)) or made

        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="nbdpull-lock") as threads:
            return list(threads.map(one, objects))

    def _locked(self, timeout_s: float, mode: str, until: float) -> Handle:
        """A handle whose PUTs lock. Not for other calls: a listing is refused with such headers."""
        return self._handle(timeout_s, headers=lock_headers(mode, until))

    def _putter(self, key: str, size: int) -> Handle:
        """The handle for a PUT."""
        bulk = size > _SMALL
        if self._lock is None or not lockable(key):
            return self._bulk if bulk else self._small
        timeout_s = self._patience.bulk_s if bulk else self._patience.small_s
        # The headers are the handle's, so there is one for each hour, which ends after that hour.
        hour = int(time.time() // 3600)
        made = self._locking.get((hour, timeout_s))
        if made is None:
            until = locked_until(time.time(), self._lock)
            made = self._locking[hour, timeout_s] = self._locked(timeout_s, self._lock.mode, until)
        return made

    # -- calls, tried again ------------------------------------------------------------------------

    def _call(
        self, what: str, key: str, work: Callable[[], _T], stopped: threading.Event | None = None
    ) -> _T | Trouble:
        """What `work` returns, or what is wrong in a way that another try won't change.

        Raises:
            StoreError: it kept failing, or `stopped` was set meanwhile.
            Cancelled: the verb's deadline was over before it was done.
        """
        return self._in_time(what, key, lambda: self._try(what, key, work, stopped))

    def _in_time(self, what: str, key: str, work: Callable[[], _T]) -> _T:
        where = f"{self.cloud}/{key}" if key else self.cloud
        return in_time(self._deadline, work, Told(what, where))

    def _try(
        self, what: str, key: str, work: Callable[[], _T], stopped: threading.Event | None
    ) -> _T | Trouble:
        began = time.monotonic()
        failing_since: float | None = None
        pause_s = self._patience.pause_s
        while True:
            try:
                done = work()
            except (BaseError, FileNotFoundError) as exc:
                failing_since = failing_since or time.monotonic()
                text = str(exc)
                trouble = diagnose(text)
                failed = _Failed(without_secrets(text))
            else:
                self._met = True
                return done
            if trouble.status is not None:
                self._met = True
            if trouble.kind is not Kind.PASSING:
                return trouble
            # A request may take as long as it is tried again: that begins with its first failure. But who
            # never answered gets no second minute.
            since, limit_s = began, self._patience.first_s
            if self._met:
                since, limit_s = failing_since, self._patience.retry_s
            given_up = (stopped is not None and stopped.is_set()) or (
                self._deadline is not None and self._deadline.over
            )
            if given_up or time.monotonic() - since + pause_s > limit_s:
                raise self._error(what, key, trouble) from failed
            _log.info("%s %s: %s; trying again", what, key, trouble.words)
            wait_s = pause_s * (0.5 + random.random() / 2)  # noqa: S311 - no secret
            if stopped is None:
                time.sleep(wait_s)
            else:
                stopped.wait(wait_s)
            pause_s = min(2 * pause_s, self._patience.pause_max_s)

    def _error(self, what: str, key: str, trouble: Trouble) -> StoreError:
        """The error that tells what is wrong, and what to do."""
        where = f"can't {what} {f'{self.cloud}/{key}' if key else self.cloud}"
        words = trouble.words
        error: type[StoreError] = StoreError
        match trouble.kind:
            case Kind.NO_BUCKET:
                where = f"{self.cloud.at} has no {self.cloud.bucket_word} '{self.cloud.bucket}'"
                hint = f"create it, or correct its name or {self.cloud.endpoint_variable}"
            case Kind.DENIED:
                error = AccessDeniedError
                hint = self.cloud.denied_hint(trouble.code)
            case Kind.NO_CREDENTIALS:
                hint = self.cloud.credentials_hint
            case Kind.PASSING if not self._met:
                where = f"can't reach {self.cloud.at} for {self.cloud}"
                hint = f"is {self.cloud.endpoint_variable} right, and the network up?"
            case Kind.PASSING:
                hint = "the store or the network fails; try again later"
            case Kind.REFUSED if trouble.status in {301, 307, 400}:
                hint = self.cloud.refused_hint
            case _:
                hint = "this store can't hold a repository"
        return error(f"{where}: {words}; {hint}")

    # -- the store's calls -------------------------------------------------------------------------

    def create(self, key: str, data: bytes) -> None:
        """See `Store.create`."""
        self.put(check_key(key), memoryview(data))

    def begin(self, key: str) -> MemoryUpload:
        """See `Store.begin`; the object is kept in memory."""
        return MemoryUpload(check_key(key), self._budget, self.put)

    def put(self, key: str, data: memoryview, stopped: threading.Event | None = None) -> None:
        """Create an object of `data`, which must not change any more, not even after an error."""
        handle = self._putter(key, len(data))

        def work() -> None:
            obstore.put(handle, key, data, mode="create", use_multipart=False)

        began = time.monotonic()
        pause_s = self._patience.pause_s
        while True:
            done = self._call("create", key, work, stopped)
            if not isinstance(done, Trouble):
                return
            if done.kind is not Kind.TAKEN:
                raise self._error("create", key, done)
            same = self._holds(key, data)
            if same:
                _log.info("create %s: it was made although its answer said otherwise", key)
                return
            if same is False:
                raise KeyExistsError(f"{self.cloud}/{key} exists already")
            # Taken, and yet not there: another writer's request was under way (S3 answers 409 then),
            # or the object was deleted just now.
            if time.monotonic() - began > self._patience.retry_s:
                raise self._error("create", key, done)
            self._in_time("create", key, partial(time.sleep, pause_s))
            pause_s = min(2 * pause_s, self._patience.pause_max_s)

    def _holds(self, key: str, data: memoryview) -> bool | None:
        """Whether an object has these very bytes; None when there is no such object."""
        try:
            if self.stat(key).size != len(data):
                return False
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE]
                if self.get_range(key, start, len(piece)) != piece:
                    return False
        except KeyMissingError:
            return None
        return True

    def get(self, key: str, *, limit: int) -> bytes:
        """See `Store.get`."""
        raw = self._read(check_key(key), 0, limit + 1)
        if len(raw) > limit:
            raise StoreError(
                f"{self.cloud}/{key} has more than {limit} bytes, which no object of its kind has"
            )
        return raw

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        return self._read(check_key(key), start, length)

    def _read(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            self.stat(key)
            return b""
        handle = self._small if length <= _SMALL + (64 << 10) else self._bulk

        def work() -> bytes:
            found = obstore.get(handle, key, options={"range": (start, start + length)})
            first, end = found.range
            if first != start or not start <= end <= start + length:
                raise StoreError(
                    f"{self.cloud} answers a read of bytes {start} to {start + length} of {key} with"
                    f" {first} to {end}; this store can't hold a repository"
                )
            # Piece by piece: what was claimed is not allocated before it is there.
            raw = bytearray()
            for piece in found.stream(min_chunk_size=_PIECE):
                raw += memoryview(piece)
                if len(raw) > end - first:
                    break
            if len(raw) != end - first:
                raise StoreError(
                    f"{self.cloud} sends {len(raw)} bytes of {key}, it had announced {end - first}"
                )
            return bytes(raw)

        done = self._call("read", key, work)
        if not isinstance(done, Trouble):
            return done
        if done.kind is Kind.MISSING:
            raise KeyMissingError(f"{self.cloud}/{key} is missing")
        if done.kind is Kind.RANGE:
            return b""
        raise self._error("read", key, done)

    def stat(self, key: str) -> Listed:
        """See `Store.stat`."""
        check_key(key)
        done = self._call("look at", key, lambda: obstore.head(self._small, key))
        if not isinstance(done, Trouble):
            return _listed(done)
        if done.kind is Kind.MISSING:
            raise KeyMissingError(f"{self.cloud}/{key} is missing")
        raise self._error("look at", key, done)

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self.stat(key)
        except KeyMissingError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[Listed]:
        """See `Store.list`. Objects whose keys are none of ours are passed over."""
        if prefix:
            check_key(prefix)
        for found in self._list(prefix):
            with suppress(ValueError):
                check_key(found["path"])
                yield _listed(found)

    def anything(self) -> Iterator[str]:
        """The keys of all objects, those that are none of ours too."""
        for found in self._list(""):
            yield found["path"]

    def _list(self, prefix: str) -> Iterator[Any]:
        if not self._met:
            # The library would try for minutes; this tells soon whether there is somebody.
            self._greet()
        pages = obstore.list(self._pages, prefix or None, chunk_size=1000)
        while True:
            try:
                page = self._in_time("list", prefix, lambda: next(pages, None))
            except (BaseError, FileNotFoundError) as exc:
                text = str(exc)
                trouble = diagnose(text)
                if trouble.kind in {Kind.MISSING, Kind.TAKEN, Kind.RANGE}:
                    trouble = Trouble(Kind.REFUSED, trouble.words, trouble.status, trouble.code)
                raise self._error("list", prefix, trouble) from _Failed(without_secrets(text))
            if page is None:
                return
            yield from page

    def _greet(self) -> None:
        with suppress(KeyMissingError, AccessDeniedError):
            self.stat("nbdpull.json")

    def sync(self, prefix: str) -> None:
        """See `Store.sync`. What a listing of an object store has is durable."""

    def delete(self, key: str) -> None:
        """See `Store.delete`. A locked object is refused here.

        S3 itself would hide it behind a marker, keep its bytes, and free nothing.
        """
        check_key(key)
        if self._lock is not None and lockable(key):
            try:
                until = self._locked_until(key, self._lock)
            except KeyMissingError:
                return
            if time.time() < until:
                ends = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(until))
                raise AccessDeniedError(f"{self.cloud}/{key} is locked until {ends}", until=until)
        done = self._call("delete", key, lambda: obstore.delete(self._small, key))
        if isinstance(done, Trouble) and done.kind is not Kind.MISSING:
            raise self._error("delete", key, done)


def _listed(found: Mapping[str, Any]) -> Listed:
    # A listing tells more of the time than a look at one object does.
    return Listed(found["path"], found["size"], float(int(found["last_modified"].timestamp())))
