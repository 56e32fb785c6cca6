"""Copying backups into a replica: the same objects under the same keys, each proved on its way.

    packs and indexes of all disks of a backup  ->  seen in a listing  ->  its manifests

A replica has the repository's id, since every pack and manifest names it and encryption is bound to it.
A pack is read once, checked in memory against the manifest's chain, and written; nothing is decoded that
is not also checked. Copying again goes on where it ended.

A damaged frame that a later session stored anew comes with what it is read from: the record of healing and
the pack with the copy. Its own pack comes as it is when each of its frames can be read so; else it stays
behind, and the backup is copied only if the replica alone then reads all that it needs of that pack.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from nbdpull.errors import DamagedError, RepositoryError, StoreError
from nbdpull.model.damage import RECORD_MAX
from nbdpull.model.index import PACKS_PER_INDEX
from nbdpull.model.keyring import SLOT_MAX
from nbdpull.model.manifest import MANIFEST_MAX, Manifest, SessionRef, register_kind
from nbdpull.repo.copyguard import CopyGuard, check_revoked
from nbdpull.repo.damage import HealedCopies, Pack
from nbdpull.repo.held import Held
from nbdpull.repo.marks import keep_time, there
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.reuseplan import pin_of
from nbdpull.repo.store import KeyExistsError, KeyMissingError, LostBytesError, Store

__all__ = ["Copier", "replica_mark"]

_log = logging.getLogger(__name__)

"""The object that says that a repository is a replica."""
_WORKERS: Final = 3  # each holds a pack


def replica_mark() -> bytes:
    """The bytes of `location.REPLICA`."""
    return (json.dumps({"nbdpull": "replica"}) + "\n").encode()


@dataclass(slots=True)
class CopyCounts:
    """What was written."""

    objects: int = 0
    written_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A pack with damage, which the replica must be seen to do without.

    Attributes:
        damage: what is wrong with it, or None where its frames were all read.
    """

    manifest: Manifest
    session: int
    seq: int
    damage: DamagedError | None


class Copier:
    """From one store into another of the same repository id.

    Args:
        source: is only read.
        target: the replica.
        repository: its id.
        reader: of a manifest in one of the stores.
        frames: whether the keys open disk data, so that each frame can be hashed; else a pack is checked
            for its size, header, directory and footer alone.
        hold: extends the locks of what a manifest refers to, before it is made; None where nothing is locked.
        warnings: what the user should know of the replica.
        check: called often; what it raises ends the copy.
    """

    def __init__(
        self,
        source: Store,
        target: Store,
        *,
        repository: str,
        reader: Callable[[Store, Manifest], DiskReader],
        frames: bool,
        hold: Callable[[Manifest], None] | None = None,
        warnings: Sequence[str] = (),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._target = target
        self._held = Held(source)
        self._reader = reader
        self._frames = frames
        self._hold = hold
        self.warnings = tuple(warnings)
        self._check = check
        self._healed = HealedCopies(source, repository)
        self._doubts: list[_Doubt] = []
        self._durable: Counter[str] = Counter()  # objects in the target, by prefix
        self._relied_on: set[str] = set()  # prefixes of what was there
        self._lock = threading.Lock()
        self.counts = CopyCounts()

    def begin(self) -> None:
        """See that the replica can be copied to, and bring the key slots that it has not got.

        It is opened with the same passwords.

        Raises:
            InUseError: what is there may be about to go.
        """
        check_revoked(self._target)
        for listed in list(self._source.list("key")):
            if listed.size > SLOT_MAX:
                _log.warning("%s is left out: it is too long for a key slot", listed.key)
                continue
            raw = self._source.get(listed.key, limit=SLOT_MAX)
            with suppress(KeyExistsError):
                self._target.create(listed.key, raw)

    def forgotten(self, manifests: Sequence[Manifest]) -> bool:
        """Whether a backup was forgotten in the replica: it is not brought back."""
        pins = [pin_of(one) for one in manifests]
        return any(there(self._target, f"{mark}/{pin}") for pin in pins for mark in "tf")

    def copy(self, manifests: Sequence[Manifest], *, stored: float) -> bool:
        """Copy one backup, all its disks; returns whether anything had to be written.

        Args:
            manifests: of its disks.
            stored: when the original's store took it in.

        Raises:
            DamagedError: an object is not what was written; the replica has not got it.
            StoreError: a store failed, or the replica has another object under a key.
            InUseError: a collection runs on the replica.
        """
        if self._is_whole(manifests):
            for one in manifests:
                sids = {one.sessions[at].sid for at, _ in one.packs()}
                self._relied_on |= {f"{prefix}/{sid}" for sid in sids for prefix in "dx"}
                self._relied_on.add(f"m/{one.summary.disk_id}")
            return False
        before = self.counts.objects
        readers = [self._reader(self._held, one) for one in manifests]
        sids = {reader.manifest.sessions[at].sid for reader in readers for at, _ in reader.packs()}
        sids |= {one.summary.session for one in manifests}
        records, copies = self._healed.of(
            (reader.manifest.sessions[at].sid, seq)
            for reader in readers
            for at, seq in reader.packs()
        )
        guard = CopyGuard(self._target, sids | {sid for sid, _ in copies})
        try:
            self._doubts = []
            for pack, index in copies.items():
                self._check()
                self._copy_carrier(manifests[0], pack, index)
            for reader in readers:
                self._copy_objects(reader)
            for key in records:
                self._create(key, self._get(key, RECORD_MAX))
            self._see_that_it_reads()
            self._see_that_it_is_listed(manifests)
            for one in manifests:
                if self._hold is not None:
                    self._hold(one)
                # First: rules must not see the manifest without it.
                keep_time(self._target, pin_of(one), stored)
                self._copy_manifest(one)
            guard.check()
        except BaseException:
            guard.stop()
            raise
        guard.end()
        return self.counts.objects > before

    def _is_whole(self, manifests: Sequence[Manifest]) -> bool:
        # A pack that is gone is looked at again each time, also if all that is needed of it was stored anew.
        return all(
            there(self._target, f"m/{pin_of(one)}")
            and not self._reader(self._target, one).missing_packs(copies=False, indexes=True)
            for one in manifests
        )

    def finish(self) -> None:
        """Make durable what another copy made, and what backups rely on that were whole: call it at the end."""
        for prefix in self._relied_on:
            self._target.sync(prefix)

    def _look(self, *prefixes: str) -> Mapping[str, int]:
        """Bytes of what is there, by key; it is durable, whoever made it."""
        sizes: dict[str, int] = {}
        for prefix in prefixes:
            found = {listed.key: listed.size for listed in self._target.list(prefix)}
            with self._lock:
                others = len(found) > self._durable[prefix]
            if others:
                # Another copy, which may have been killed between making one and syncing its folder.
                self._target.sync(prefix)
                with self._lock:
                    self._durable[prefix] = max(self._durable[prefix], len(found))
            sizes |= found
        return sizes

    def _see_that_it_is_listed(self, manifests: Iterable[Manifest]) -> None:
        for one in manifests:
            missing = self._reader(self._target, one).missing_packs()
            if missing:
                raise StoreError(f"the replica does not list {missing[0]}, which was just copied")

    # -- packs and indexes -------------------------------------------------------------------------

    def _copy_objects(self, reader: DiskReader) -> None:
        packs = list(reader.packs())
        sids = {at: reader.manifest.sessions[at].sid for at, _ in packs}
        prefixes = [f"{prefix}/{sid}" for sid in set(sids.values()) for prefix in "dx"]
        sizes = self._look(*prefixes)
        numbers = sorted({(at, seq // PACKS_PER_INDEX) for at, seq in packs})
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="nbdpull-copy") as pool:
            tasks = [pool.submit(self._copy_pack, reader, at, seq, sizes) for at, seq in packs]
            tasks += [pool.submit(self._copy_index, reader, at, n, sizes) for at, n in numbers]
            try:
                waiting = set(tasks)
                while waiting:
                    done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    self._check()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _copy_pack(
        self, reader: DiskReader, session: int, seq: int, sizes: Mapping[str, int]
    ) -> None:
        key = reader.key(session, seq)
        pack = (reader.manifest.sessions[session].sid, seq)
        doubtful = self._frames and self._healed.has(pack)
        damage: DamagedError | None = None
        if not self._is_there(key, reader.pack_place(session, seq).size, sizes):
            try:
                self._create(key, self._get_pack(reader, session, seq))
            except DamagedError as exc:
                if not doubtful:
                    raise
                damage = exc
        if doubtful:
            self._doubts.append(_Doubt(reader.manifest, session, seq, damage))

    def _get_pack(self, reader: DiskReader, session: int, seq: int) -> bytes:
        """A pack, checked.

        Raises:
            DamagedError: it is not what was written, or a frame of it can be read nowhere.
        """
        key = reader.key(session, seq)
        size = reader.pack_place(session, seq).size
        try:
            raw = self._source.get_range(key, 0, size + 1)
        except KeyMissingError as exc:
            raise DamagedError(f"{key} is missing; was its backup forgotten?", key=key) from exc
        except LostBytesError as exc:
            raise DamagedError(f"pack {key} is damaged: {exc}", key=key) from exc
        if len(raw) != size:
            found = f"{len(raw)} bytes" if len(raw) < size else "more"
            raise DamagedError(f"pack {key} has {found}, expected {size} bytes", key=key)
        with self._held.holding(key, raw):
            reader.check_pack(session, seq)
            if self._frames:
                reader.check_frames(session, seq)
        return raw

    def _copy_index(
        self, reader: DiskReader, session: int, number: int, sizes: Mapping[str, int]
    ) -> None:
        key = f"x/{reader.manifest.sessions[session].sid}/{number}"
        raw = reader.index_object(session, number)
        if not self._is_there(key, len(raw), sizes):
            self._create(key, raw)

    # -- what was stored anew ----------------------------------------------------------------------

    def _copy_carrier(self, like: Manifest, pack: Pack, index: bytes) -> None:
        """Copy a pack with copies of damaged frames; what is not as it was written is left out."""
        sid, seq = pack
        number = seq // PACKS_PER_INDEX
        session = SessionRef(sid, ((number, index),))
        reader = self._reader(self._held, replace(like, sessions=(session,), segments=()))
        try:
            key = reader.key(0, seq)
            size = reader.pack_place(0, seq).size
            if not self._is_there(key, size, self._look(f"d/{sid}")):
                self._create(key, self._get_pack(reader, 0, seq))
            self._copy_index(reader, 0, number, self._look(f"x/{sid}"))
        except DamagedError as exc:
            _log.debug("copies of damaged frames are left out: %s", exc)

    def _see_that_it_reads(self) -> None:
        """Read, from the replica alone, what the backups need of packs with damage."""
        for doubt in self._doubts:
            self._check()
            reader = self._reader(self._target, doubt.manifest)
            try:
                _read_needed(reader, doubt.session, doubt.seq)
            except DamagedError as exc:
                raise doubt.damage or exc from exc

    # -- single objects ----------------------------------------------------------------------------

    def _copy_manifest(self, manifest: Manifest) -> None:
        key = f"m/{pin_of(manifest)}"
        raw = self._get(key, MANIFEST_MAX)
        try:
            self._target.create(key, raw)
        except KeyExistsError:
            found = self._target.get(key, limit=MANIFEST_MAX)
            if found != raw:
                raise RepositoryError(
                    f"the replica has another object under {key} ({register_kind(found)}); it can't be"
                    " a replica of this backup"
                ) from None
        else:
            self._count(key, raw)

    def _get(self, key: str, limit: int) -> bytes:
        try:
            return self._source.get(key, limit=limit)
        except KeyMissingError as exc:
            raise DamagedError(f"{key} is missing; was its backup forgotten?", key=key) from exc
        except LostBytesError as exc:
            raise DamagedError(f"{key} is damaged: {exc}", key=key) from exc

    def _create(self, key: str, raw: bytes) -> None:
        """Make an object, unless another copy just did."""
        try:
            self._target.create(key, raw)
        except KeyExistsError:
            self._is_there(key, len(raw), {key: self._target.stat(key).size})
        else:
            self._count(key, raw)

    def _count(self, key: str, raw: bytes) -> None:
        with self._lock:
            self.counts.objects += 1
            self.counts.written_bytes += len(raw)
            self._durable[key.rpartition("/")[0]] += 1

    @staticmethod
    def _is_there(key: str, size: int, sizes: Mapping[str, int]) -> bool:
        found = sizes.get(key)
        if found is not None and found != size:
            raise StoreError(
                f"the replica has {key} with {found} bytes, expected {size}; delete it there and copy"
                " again"
            )
        return found is not None


def _read_needed(reader: DiskReader, session: int, seq: int) -> None:
    """Read all that the backup needs of one pack, from wherever it is.

    Raises:
        DamagedError: something can't be read.
    """
    for index, ref in enumerate(reader.manifest.segments):
        if ref is None or (
            (ref.session, ref.seq) != (session, seq)
            and not any(pack == (session, seq) for pack in ref.packs)
        ):
            continue
        for row in reader.segment(index):
            if (row.session, row.seq) == (session, seq):
                reader.read(row)
