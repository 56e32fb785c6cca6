"""Copying backups into a replica: the same objects under the same keys, each proved on its way.

    packs and indexes of all disks of a backup  ->  seen in a listing  ->  its manifests

A replica has the repository's id, since every pack and manifest names it and encryption is bound to it.
A pack is read once, checked in memory against the manifest's chain, and written; nothing is decoded that
is not also checked. Copying again goes on where it ended.

A collector must spare packs whose manifest is not there yet. So each session whose packs come has an
intent in the replica meanwhile, with a disk id that no disk has: if such an intent is taken for dead, its
revocation lies where it hinders nobody. A collection that began before is waited for by the user.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nbdpull.errors import DamagedError, InUseError, RepositoryError, StoreError
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import SessionId
from nbdpull.model.index import PACKS_PER_INDEX
from nbdpull.model.intent import INTENT_MAX, Intent
from nbdpull.model.manifest import MANIFEST_MAX, Manifest, register_kind
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.reuseplan import pin_of
from nbdpull.repo.store import KeyExistsError, KeyMissingError, Listed, Store, Upload

__all__ = ["REPLICA", "Copier", "replica_mark"]

REPLICA: Final = "replica.json"
"""The object that says that a repository is a replica."""
_NOBODY: Final = "0" * 32
_INDEX_MAX: Final = 16 << 20
_REFRESH_S: Final = 3600.0
_WORKERS: Final = 3  # each holds a pack


def replica_mark() -> bytes:
    """The bytes of `REPLICA`."""
    return (json.dumps({"nbdpull": "replica"}) + "\n").encode()


class _Held:
    """A store with some objects in memory: what was fetched is checked before it is passed on."""

    def __init__(self, below: Store) -> None:
        self._below = below
        self.held: dict[str, bytes] = {}

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        raw = self.held.get(key)
        return (
            self._below.get_range(key, start, length)
            if raw is None
            else raw[start : start + length]
        )

    def get(self, key: str, *, limit: int) -> bytes:
        """See `Store.get`."""
        return self._below.get(key, limit=limit)

    def stat(self, key: str) -> Listed:
        """See `Store.stat`."""
        return self._below.stat(key)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See `Store.list`."""
        return self._below.list(prefix)

    def create(self, key: str, data: bytes) -> None:  # noqa: ARG002
        """Nothing is written to what is copied from."""
        raise StoreError(f"{key} is not written here")

    def begin(self, key: str) -> Upload:
        """Nothing is written to what is copied from."""
        raise StoreError(f"{key} is not written here")

    def delete(self, key: str) -> None:
        """Nothing is written to what is copied from."""
        raise StoreError(f"{key} is not deleted here")


@dataclass(slots=True)
class CopyCounts:
    """What was written."""

    objects: int = 0
    written_bytes: int = 0


class Copier:
    """From one store into another of the same repository id.

    Args:
        source: is only read.
        target: the replica.
        reader: of a manifest in one of the stores.
        frames: whether the keys open disk data, so that each frame can be hashed; else a pack is checked
            for its size, header, directory and footer alone.
        check: called often; what it raises ends the copy.
    """

    def __init__(
        self,
        source: Store,
        target: Store,
        *,
        reader: Callable[[Store, Manifest], DiskReader],
        frames: bool,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._target = target
        self._held = _Held(source)
        self._reader = reader
        self._frames = frames
        self._check = check
        self._intents: set[str] = set()
        self._fresh = 0.0
        self.counts = CopyCounts()

    def copy_slots(self) -> None:
        """Copy the key slots that are not there: a replica is opened with the same passwords."""
        for listed in list(self._source.list("key")):
            raw = self._source.get(listed.key, limit=max(listed.size, 1))
            with suppress(KeyExistsError):
                self._target.create(listed.key, raw)

    def forgotten(self, manifests: Sequence[Manifest]) -> bool:
        """Whether a backup was forgotten in the replica: it is not brought back."""
        pins = [pin_of(one) for one in manifests]
        return any(self._there(f"{mark}/{pin}") for pin in pins for mark in "tf")

    def copy(self, manifests: Sequence[Manifest]) -> bool:
        """Copy one backup, all its disks; returns whether anything had to be written.

        Raises:
            DamagedError: an object is not what was written; the replica has not got it.
            StoreError: a store failed, or the replica has another object under a key.
            InUseError: a collection runs on the replica.
        """
        if self._is_whole(manifests):
            return False
        before = self.counts.objects
        readers = [self._reader(self._held, one) for one in manifests]
        sids = {reader.manifest.sessions[at].sid for reader in readers for at, _ in reader.packs()}
        self._announce(sids)
        for reader in readers:
            self._copy_objects(reader)
        self._look_for_collectors()
        for one in manifests:
            missing = self._reader(self._target, one).missing_packs()
            if missing:
                raise StoreError(f"the replica does not list {missing[0]}, which was just copied")
        for one in manifests:
            self._copy_manifest(one)
        self.finish()
        return self.counts.objects > before

    def _is_whole(self, manifests: Sequence[Manifest]) -> bool:
        return all(
            self._there(f"m/{pin_of(one)}") and not self._reader(self._target, one).missing_packs()
            for one in manifests
        )

    def finish(self) -> None:
        """Take back the intents: manifests hold the packs now, or nothing does."""
        for key in self._intents:
            self._target.delete(key)
        self._intents.clear()

    # -- what a collector sees -----------------------------------------------------------------------

    def _announce(self, sids: set[SessionId]) -> None:
        self._intents = {f"s/{sid}" for sid in sids}
        self._refresh()
        self._look_for_collectors()

    def _refresh(self) -> None:
        """Make the intents young: a collector goes by the store's time."""
        raw = Intent(role="copy", disk=_NOBODY, time=time.time()).encode()
        for key in sorted(self._intents):
            self._target.delete(f"m/{_NOBODY}/{key[2:]}")
            self._target.delete(key)
            with suppress(KeyExistsError):  # another copy does the same
                self._target.create(key, raw)
        self._fresh = time.clock_gettime(time.CLOCK_BOOTTIME)

    def _keep_alive(self) -> None:
        self._check()
        if time.clock_gettime(time.CLOCK_BOOTTIME) - self._fresh > _REFRESH_S:
            self._refresh()
            self._look_for_collectors()

    def _look_for_collectors(self) -> None:
        for listed in list(self._target.list("s")):
            if listed.key in self._intents:
                continue
            try:
                intent = Intent.decode(self._target.get(listed.key, limit=INTENT_MAX))
            except (KeyMissingError, FormatError):
                continue
            if intent.role == "gc":
                raise InUseError(
                    f"a garbage collection runs on the replica (or died there within a day: then delete"
                    f" {listed.key}); copy again when it is done"
                )

    # -- objects -----------------------------------------------------------------------------------

    def _copy_objects(self, reader: DiskReader) -> None:
        packs = list(reader.packs())
        sids = {at: reader.manifest.sessions[at].sid for at, _ in packs}
        there = {
            listed.key: listed.size
            for sid in sids.values()
            for prefix in ("d", "x")
            for listed in self._target.list(f"{prefix}/{sid}")
        }
        numbers = sorted({(at, seq // PACKS_PER_INDEX) for at, seq in packs})
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="nbdpull-copy") as pool:
            tasks = [pool.submit(self._copy_pack, reader, at, seq, there) for at, seq in packs]
            tasks += [pool.submit(self._copy_index, reader, at, n, there) for at, n in numbers]
            try:
                waiting = set(tasks)
                while waiting:
                    done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    self._keep_alive()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _copy_pack(self, reader: DiskReader, session: int, seq: int, there: dict[str, int]) -> None:
        key = reader.key(session, seq)
        size = reader.pack_place(session, seq).size
        if self._is_there(key, size, there):
            return
        raw = self._get(key, size)
        if len(raw) != size:
            raise DamagedError(f"pack {key} has {len(raw)} bytes, expected {size}", key=key)
        self._held.held[key] = raw
        try:
            reader.check_pack(session, seq)
            if self._frames:
                reader.check_frames(session, seq)
        finally:
            del self._held.held[key]
        self._create(key, raw)

    def _copy_index(
        self, reader: DiskReader, session: int, number: int, there: dict[str, int]
    ) -> None:
        key = f"x/{reader.manifest.sessions[session].sid}/{number}"
        raw = self._get(key, _INDEX_MAX)
        if self._is_there(key, len(raw), there):
            return
        self._held.held[key] = raw
        try:
            reader.directories(session, number)
        finally:
            del self._held.held[key]
        self._create(key, raw)

    def _copy_manifest(self, manifest: Manifest) -> None:
        key = f"m/{pin_of(manifest)}"
        raw = self._get(key, MANIFEST_MAX)
        try:
            self._create(key, raw)
        except KeyExistsError:
            found = self._target.get(key, limit=MANIFEST_MAX)
            if found != raw:
                raise RepositoryError(
                    f"the replica has another object under {key} ({register_kind(found)}); it can't be"
                    " a replica of this backup"
                ) from None

    def _get(self, key: str, limit: int) -> bytes:
        try:
            return self._source.get(key, limit=limit)
        except KeyMissingError as exc:
            raise DamagedError(f"{key} is missing; was its backup forgotten?", key=key) from exc

    def _create(self, key: str, raw: bytes) -> None:
        self._target.create(key, raw)
        self.counts.objects += 1
        self.counts.written_bytes += len(raw)

    @staticmethod
    def _is_there(key: str, size: int, there: dict[str, int]) -> bool:
        found = there.get(key)
        if found is not None and found != size:
            raise StoreError(
                f"the replica has {key} with {found} bytes, expected {size}; delete it there and copy"
                " again"
            )
        return found is not None

    def _there(self, key: str) -> bool:
        try:
            self._target.stat(key)
        except KeyMissingError:
            return False
        return True
