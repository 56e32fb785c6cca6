"""Writing one disk of one backup: frames into packs, packs into the store, and the commit.

Many threads put frames at once. Hashing and compressing happen in the caller's thread; under the lock a
frame only gets its place in the open pack, and its bytes are written there outside of it. A pack that is
full is ended by whichever thread's write was its last, and made durable in the background; at most two
are on their way, so a slow store slows the callers instead of filling memory.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import zstandard
from blake3 import blake3

from nbdpull.errors import RepositoryError, StoreError
from nbdpull.model.frame import (
    ENCRYPTED,
    ENTRY,
    HEADER_SIZE,
    PACK_HEADER_SIZE,
    TAG_SIZE,
    Buffer,
    Codec,
    FrameHeader,
    FrameKind,
    PackHeader,
    encode_footer,
)
from nbdpull.model.grain import FRAME_MAX, GRAIN, Kinds, segment_count
from nbdpull.model.ids import DiskId, SessionId, is_hex
from nbdpull.model.index import FRAMES_PER_PACK, PACKS_PER_INDEX, Directory, encode_index
from nbdpull.model.manifest import (
    MANIFEST_MAX,
    Manifest,
    SegmentRef,
    Summary,
    register_kind,
)
from nbdpull.model.sealing import PackKeys, SessionKeys
from nbdpull.model.segment import Segment
from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo.adopt import Adopted
from nbdpull.repo.alive import KeepAlive, clocks
from nbdpull.repo.reuse import Found, KnownFrame, Reuse
from nbdpull.repo.sessiontable import SessionTable
from nbdpull.repo.stages import Stages
from nbdpull.repo.store import KeyExistsError, KeyMissingError, Store, Upload
from nbdpull.repo.vault import new_pack_keys

__all__ = ["Session"]

_log = logging.getLogger(__name__)

PACK_SIZE: Final = 32 << 20
_BACKGROUND: Final = 2
_COMMIT_WITHIN_S: Final = 30 * 86400.0
"""A collector may forget after a year that it revoked a session: long before, nobody may commit it."""


@dataclass(slots=True, eq=False)
class _Pack:
    """A pack being filled. `writing` threads are at it; none joins them once it is `full`."""

    seq: int
    upload: Upload
    keys: PackKeys | None
    header: bytes
    end: int = PACK_HEADER_SIZE
    writing: int = 0
    full: bool = False
    entries: list[FrameHeader] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def has_room(self, size: int) -> bool:
        return self.end + size <= PACK_SIZE and len(self.entries) < FRAMES_PER_PACK

    def directory(self) -> Directory:
        table = np.zeros(len(self.entries), dtype=ENTRY)
        table["offset"] = self.offsets
        for name in ("clen", "rlen", "codec", "kind"):
            table[name] = [getattr(entry, name) for entry in self.entries]
        digests = b"".join(entry.digest for entry in self.entries)
        table["digest"] = np.frombuffer(digests, dtype="V32")
        return Directory(table, self.keys)


class Session:
    """One disk of one backup, being written. `put` and `put_segment` may be called by many threads.

    Attributes:
        id: names its packs and its manifest.
        index: its place among the manifest's sessions.
        disk_id: names the disk.
        stored_bytes: added to the repository so far.
        reused_bytes: of disk data that the repository had already.
        stages: where the time of its threads went.
        adopted: what it took over from sessions that died.
        lost: digests of frames that are known to be damaged: whatever has one is stored, never referred
            to where it was.
    """

    def __init__(  # noqa: PLR0913 - all but the first by name, from one caller
        self,
        store: Store,
        *,
        repository: str,
        sid: SessionId,
        disk_id: DiskId,
        parent: Manifest | None,
        compression_level: int,
        table: SessionTable | None = None,
        reuse: Reuse | None = None,
        keys: SessionKeys | None = None,
        hold: Callable[[Manifest], None] | None = None,
        alive: KeepAlive | None = None,
        adopted: Adopted | None = None,
    ) -> None:
        self._alive = alive or KeepAlive(store, sid)
        self._store = store
        self._hold = hold
        self._keys = keys
        self._repository = repository
        self._parent = parent
        self._level = compression_level
        self._began = clocks()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._pack: _Pack | None = None
        self._next_seq = 0
        self._sizes: dict[int, int] = {}  # of the packs that are durable, by seq
        self._pending: dict[int, dict[int, Directory]] = {}  # index number -> seq -> directory
        self._indexes: dict[int, bytes] = {}
        self._segments: dict[int, SegmentRef | None] = {}
        self._background = ThreadPoolExecutor(_BACKGROUND, thread_name_prefix="nbdpull-pack")
        self._slots = threading.Semaphore(_BACKGROUND)
        self._failure: BaseException | None = None
        self._abandoned = False
        self._sealed = False
        self._table = table or SessionTable(parent.sessions if parent is not None else (), sid)
        self._reuse = reuse or Reuse()
        self.index = self._table.own
        self.id = sid
        self.disk_id = disk_id
        self.stored_bytes = 0
        self.reused_bytes = 0
        self.stages = Stages()
        self.lost: frozenset[bytes] = frozenset()
        self.adopted = adopted or Adopted()

    # -- frames ------------------------------------------------------------------------------------

    def known(self, index: int, kinds: Kinds) -> Sequence[KnownFrame]:
        """What an earlier backup has inside the DATA grains of segment `index`: see `Reuse.known`."""
        return self._reuse.known(index, kinds)

    def any_known(self, index: int, kinds: Kinds, rng: random.Random) -> KnownFrame | None:
        """One of them, by chance: see `Reuse.any_known`."""
        return self._reuse.any_known(index, kinds, rng)

    def digest(self, raw: Buffer) -> bytes:
        """What a frame of these bytes is named by."""
        return blake3(raw).digest() if self._keys is None else self._keys.digest(raw)

    def matches(self, known: KnownFrame, raw: Buffer) -> bool:
        """Whether these are the bytes of that frame."""
        return len(raw) == known.length and self.digest(raw) == known.digest

    def refer(self, known: KnownFrame, raw: Buffer) -> bool:
        """Whether `raw` is what `known` holds; the caller then refers to it and stores nothing."""
        began = time.perf_counter()
        same = known.digest not in self.lost and self.matches(known, raw)
        self.stages.add(hash_s=time.perf_counter() - began)
        if same:
            self._count_reused(len(raw))
        return same

    def _count_reused(self, length: int) -> None:
        with self._lock:
            self.reused_bytes += length

    def put(self, raw: Buffer, kind: FrameKind = FrameKind.DATA) -> Found:
        """Store one frame of at most 1 MiB; `raw` may be reused when this returns.

        A frame of disk data that the repository has already is not stored again, where the session
        was given a way to find it.

        Raises:
            StoreError: this or an earlier pack could not be written.
        """
        return self.put_named(raw, kind)[0]

    def put_named(self, raw: Buffer, kind: FrameKind = FrameKind.DATA) -> tuple[Found, bytes]:
        """As `put`, and by which digest the frame is named."""
        if not 0 < len(raw) <= FRAME_MAX:
            raise ValueError(f"a frame of {len(raw)} bytes can't be")
        began = time.perf_counter()
        digest = self.digest(raw)
        found = None
        if kind is FrameKind.DATA and digest not in self.lost:
            found = self._reuse.find(digest, len(raw))
        hashed = time.perf_counter()
        if found is not None:
            self.stages.add(hash_s=hashed - began)
            self._count_reused(len(raw))
            return found, digest
        codec, payload = self._compress(raw)
        compressed = time.perf_counter()
        pack, header, offset = self._reserve(codec, len(payload), len(raw), kind, digest)
        encrypt_s = 0.0
        try:
            parts: tuple[Buffer, ...] = (header.encode(), payload)
            if pack.keys is not None:
                reserved = time.perf_counter()
                parts = pack.keys.seal_frame(header, payload, self._buffer())
                encrypt_s = time.perf_counter() - reserved
            pack.upload.write(offset, *parts)
        except BaseException as exc:
            self._fail(exc)
            raise
        finally:
            self._leave(pack)
        self.stages.add(
            hash_s=hashed - began,
            compress_s=compressed - hashed,
            encrypt_s=encrypt_s,
            store_s=time.perf_counter() - compressed - encrypt_s,
        )
        return Found(self.index, pack.seq, offset, len(payload), -(-len(raw) // GRAIN)), digest

    def refer_unread(self, known: KnownFrame, digest: bytes, length: int) -> bool:
        """Whether `known` holds what is named so; the caller then refers to it."""
        if (known.digest, known.length) != (digest, length) or digest in self.lost:
            return False
        self._count_reused(length)
        return True

    def is_durable(self, seq: int) -> bool:
        """Whether that pack of its own is in the store."""
        with self._lock:
            return seq in self._sizes

    def find_adopted(self, digest: bytes, length: int) -> Found | None:
        """A frame of disk data that a dead session of the disk had stored, to be referred to."""
        found = None if digest in self.lost else self._reuse.find_adopted(digest, length)
        if found is not None:
            self._count_reused(length)
        return found

    def _buffer(self) -> memoryview:
        """Of the calling thread, for one encrypted frame: memory that is new each time costs more."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(bytearray(FRAME_MAX + TAG_SIZE))
        return buffer

    def _compress(self, raw: Buffer) -> tuple[Codec, Buffer]:
        compressor: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            # The frame's header has the length, and BLAKE3 is the check.
            compressor = zstandard.ZstdCompressor(level=self._level, write_checksum=False)
            self._local.compressor = compressor
        payload = compressor.compress(raw)
        return (Codec.ZSTD, payload) if len(payload) < len(raw) else (Codec.RAW, raw)

    def _reserve(
        self, codec: Codec, clen: int, rlen: int, kind: FrameKind, digest: bytes
    ) -> tuple[_Pack, FrameHeader, int]:
        """A place in the open pack; the caller then writes there and calls `_leave`."""
        size = HEADER_SIZE + clen
        idle = None
        with self._lock:
            self._check()
            pack = self._pack
            if pack is not None and not pack.has_room(size):
                pack.full = True
                idle = pack if pack.writing == 0 else None  # else who writes last ends it
                pack = None
            if pack is None:
                pack = self._open_pack()
            header = FrameHeader(clen, rlen, codec, kind, len(pack.entries), digest)
            offset = pack.end
            pack.entries.append(header)
            pack.offsets.append(offset)
            pack.end += size
            pack.writing += 1
            self.stored_bytes += size
        if idle is not None:
            try:
                self._end_later(idle)
            except BaseException:
                self._leave(pack)
                raise
        return pack, header, offset

    def _open_pack(self) -> _Pack:
        seq = self._next_seq
        try:
            keys = None if self._keys is None else new_pack_keys(self._keys, seq)
            header = PackHeader(seq, bytes.fromhex(self._repository), bytes.fromhex(self.id))
            if keys is not None:
                header = replace(
                    header, suite=ENCRYPTED, salt=keys.salt, commitment=keys.commitment()
                )
            # Nothing is written under the lock: a thread that hangs there is left behind.
            upload = self._store.begin(f"d/{self.id}/{seq:08x}")
            pack = _Pack(seq, upload, keys, header.encode())
            self._pack = pack
        except BaseException as exc:
            self._failure = self._failure or exc
            raise
        self._next_seq += 1
        return pack

    def _leave(self, pack: _Pack) -> None:
        with self._lock:
            pack.writing -= 1
            if pack.writing or not pack.full:
                return
            dead = self._abandoned or self._failure is not None
        if dead:
            self._drop(pack)
        else:
            self._end_later(pack)

    def _check(self) -> None:
        if self._abandoned:
            raise StoreError("this backup was given up")
        if isinstance(self._failure, Cancelled):
            raise Cancelled from self._failure
        if self._failure is not None:
            raise StoreError(f"writing this backup failed before: {self._failure}")
        if self._sealed:
            raise ValueError("the session is sealed")

    def _fail(self, exc: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or exc

    @staticmethod
    def _drop(pack: _Pack) -> None:
        """Let go of a pack that nobody writes to any more: its bytes go with it."""
        with suppress(StoreError):
            pack.upload.abort()

    # -- packs, in the background --------------------------------------------------------------------

    def _end_later(self, pack: _Pack) -> None:
        self._slots.acquire()  # `_end` releases it
        try:
            self._background.submit(self._end, pack)
        except RuntimeError as exc:  # shut down by `abandon` meanwhile
            self._slots.release()
            self._drop(pack)
            raise StoreError("this backup was given up") from exc

    def _end(self, pack: _Pack) -> None:
        try:
            if not self._abandoned:
                self._make_durable(pack)
        except BaseException as exc:  # noqa: BLE001 - `put` and `seal` tell it
            self._fail(exc)
        finally:
            self._drop(pack)
            self._slots.release()

    def _make_durable(self, pack: _Pack) -> None:
        directory = pack.directory()
        raw = directory.encode()
        footer = encode_footer(blake3(raw).digest(), pack.end, len(pack.entries))
        pack.upload.write(0, pack.header)
        pack.upload.write(pack.end, raw, footer)
        pack.upload.commit()
        _log.debug("pack d/%s/%08x: %d frames", self.id, pack.seq, len(pack.entries))
        number = pack.seq // PACKS_PER_INDEX
        with self._lock:
            self.stored_bytes += PACK_HEADER_SIZE + len(raw) + len(footer)
            self._sizes[pack.seq] = directory.pack_size
            group = self._pending.setdefault(number, {})
            group[pack.seq] = directory
            whole = len(group) == PACKS_PER_INDEX
        if whole:
            self._write_index(number)

    def _write_index(self, number: int) -> None:
        with self._lock:
            packs = self._pending.pop(number)
        raw, digest = encode_index(self.id, number, packs, self._keys)
        try:
            self._store.create(f"x/{self.id}/{number}", raw)
        except KeyExistsError:
            # Who takes a session over makes what is missing of its indexes.
            with suppress(KeyMissingError):
                self._check_mine(self._store.get(self._register, limit=MANIFEST_MAX))
            raise
        with self._lock:
            self._indexes[number] = digest
            self.stored_bytes += len(raw)

    # -- maps --------------------------------------------------------------------------------------

    def put_segment(self, index: int, segment: Segment) -> None:
        """Store the map of segment `index` as it is at this backup's point in time.

        Segments that are not put are as in the parent, and without one read as zeroes.

        Raises:
            StoreError: this or an earlier pack could not be written.
        """
        ref = None
        if len(segment):
            frame = self.put(segment.encode(), FrameKind.MAP)
            ref = SegmentRef(frame.session, frame.seq, frame.offset, frame.clen, segment.packs())
        with self._lock:
            self._segments[index] = ref

    # -- the end -----------------------------------------------------------------------------------

    def seal(self) -> None:
        """Make every frame durable, and see that the store lists what was written.

        No `put` may be under way. A second call does nothing.

        Raises:
            StoreError: something could not be written, or is not there as written.
        """
        with self._lock:
            if self._sealed:
                return
            self._check()
            pack, self._pack = self._pack, None
            if pack is not None:
                pack.full = True
        try:
            if pack is not None:
                self._end_later(pack)
            self._wait_for_packs()
            for number in sorted(self._pending):
                self._write_index(number)
            self._check_listing()
        except BaseException as exc:
            self._fail(exc)
            raise
        with self._lock:
            self._sealed = True
        self._background.shutdown()

    def _wait_for_packs(self) -> None:
        for _ in range(_BACKGROUND):  # when all slots are free all packs are durable, or failed
            self._slots.acquire()
        if isinstance(self._failure, Cancelled):
            raise Cancelled from self._failure
        if self._failure is not None:
            raise StoreError(f"a pack could not be written: {self._failure}") from self._failure

    def _check_listing(self) -> None:
        found = 0
        for entry in self._store.list(f"d/{self.id}"):
            name = entry.key.rpartition("/")[2]
            if not is_hex(name, 8):
                continue  # nobody's pack
            expected = self._sizes.get(int(name, 16))
            if entry.size != expected:
                raise StoreError(
                    f"the store lists {entry.key} with {entry.size} bytes, expected {expected};"
                    " backups can't be trusted to it"
                )
            found += 1
        if found != len(self._sizes):
            raise StoreError(
                f"the store lists {found} packs below d/{self.id}, expected {len(self._sizes)};"
                " backups can't be trusted to it"
            )

    @property
    def objects(self) -> int:
        """Packs and indexes that are durable."""
        with self._lock:
            return len(self._sizes) + len(self._indexes)

    def index_digest(self, seq: int) -> bytes:
        """BLAKE3 of the head and table of the index that has pack `seq`; the session must be sealed."""
        return self._indexes[seq // PACKS_PER_INDEX]

    def commit(self, summary: Summary) -> Manifest:
        """Create the manifest: from now on the backup of this disk is there, and durable.

        A session that is not sealed yet is sealed first.

        Raises:
            RepositoryError: the session was revoked by a collector because it idled too long, or is
                too old.
            StoreError: the manifest could not be written, or another one is there.
        """
        if (summary.disk_id, summary.session) != (self.disk_id, self.id):
            raise ValueError("the summary is of another disk or session")
        self.seal()
        age_s = max(now - then for now, then in zip(clocks(), self._began, strict=True))
        if age_s > _COMMIT_WITHIN_S:
            raise RepositoryError(
                f"session {self.id} began {age_s / 86400:.0f} days ago, at most 30 may pass to its"
                " commit; run the backup again"
            )
        manifest = self._manifest(summary)
        if self._hold is not None:
            self._hold(manifest)
        raw = manifest.encode(self._keys)
        try:
            self._store.create(self._register, raw)
        except KeyExistsError as exc:
            # A create that was carried out and then failed on the way back looks like this.
            there = self._store.get(self._register, limit=MANIFEST_MAX)
            self._check_mine(there)
            if there != raw:
                raise StoreError(
                    f"{self._register} holds something else than this session's manifest"
                    f" ({register_kind(there)})"
                ) from exc
        self.stored_bytes += len(raw)
        self._alive.stop()
        return manifest

    @property
    def _register(self) -> str:
        """The key of its manifest, or of what tells whose the session is now."""
        return f"m/{self.disk_id}/{self.id}"

    def _check_mine(self, there: bytes) -> None:
        """See by its register that nobody has taken the session away.

        Raises:
            RepositoryError: somebody has.
        """
        if register_kind(there) == "revoked":
            raise RepositoryError(
                f"session {self.id} was revoked: it idled so long that its packs may be collected; run the"
                " backup again"
            )
        if register_kind(there) == "adopted":
            raise RepositoryError(
                f"session {self.id} was taken over by a later backup of this disk: this one made no object"
                " for a day; run the backup again"
            )

    def _manifest(self, summary: Summary) -> Manifest:
        before: tuple[SegmentRef | None, ...] = ()
        if self._parent is not None:
            if self._parent.summary.size != summary.size:
                # Its last grain may be short, and its segments other ones.
                raise ValueError(f"the parent's disk had {self._parent.summary.size} bytes")
            before = self._parent.segments
        segments: list[SegmentRef | None] = list(before) or [None] * segment_count(summary.size)
        for index, ref in self._segments.items():
            segments[index] = ref
        manifest = Manifest(summary, self._repository, (), tuple(segments))
        sessions = self._table.finished(self._indexes, manifest.packs())
        return replace(manifest, sessions=sessions)

    def abandon(self) -> None:
        """Give up: nothing more is put. What is durable already stays for the collector.

        Does not wait for threads that are inside `put`, nor for packs on their way to the disk: these
        end by themselves. A second call, or one after `commit`, does nothing.
        """
        self._alive.stop()
        with self._lock:
            self._abandoned = True
            pack, self._pack = self._pack, None
            if pack is not None:
                pack.full = True
                if pack.writing:
                    pack = (
                        None  # who writes last drops it: its file must not be closed under a write
                    )
        if pack is not None:
            self._drop(pack)
        self._background.shutdown(wait=False)
