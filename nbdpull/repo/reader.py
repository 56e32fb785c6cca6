"""Reading a backup: no byte is handed out that the manifest does not vouch for.

manifest (BLAKE3 trailer) -> index table (digest in the manifest) -> pack directory (digest in the
table) -> frame (digest in the directory)

Where the repository is encrypted, each of these is also authenticated as what its session sealed for that
very place, and decrypted, before anything in it is looked at.
An index that is lost or damaged is made again from its packs (`repo.rebuild`); what comes out must have the
digests of this chain. Only where such a pack is gone, too, each of the others is believed for its own hashes,
which is told.
A frame that is damaged is looked for where a later session stored it anew (`repo.damage`): what is found
there must have the digest that this chain ends in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final, Generic, TypeVar

import zstandard

from nbdpull.errors import DamagedError, WrongKeyError
from nbdpull.model.damage import HealedFrame, Place
from nbdpull.model.frame import (
    ENCRYPTED,
    FOOTER_SIZE,
    HEADER_SIZE,
    PACK_HEADER_SIZE,
    FormatError,
    FrameHeader,
    FrameKind,
    PackHeader,
    decode_footer,
    open_frame,
    open_frame_into,
)
from nbdpull.model.grain import GRAIN, segment_grains
from nbdpull.model.ids import SessionId
from nbdpull.model.index import (
    PACKS_PER_INDEX,
    TABLE_MAX,
    Directory,
    IndexTable,
    PackPlace,
    encode_index,
)
from nbdpull.model.manifest import Manifest, SegmentRef, SessionRef
from nbdpull.model.sealing import PackKeys
from nbdpull.model.segment import Interval, Packs, Segment
from nbdpull.repo.damage import DamageRecords
from nbdpull.repo.ranges import RANGE_MAX, Fetched
from nbdpull.repo.rebuild import pack_directory, rebuilt_table
from nbdpull.repo.store import KeyMissingError, Store
from nbdpull.repo.vault import Vault

__all__ = ["DiskReader"]

_TABLES_KEPT: Final = 4 << 20
_DIRECTORIES_KEPT: Final = 24 << 20
_SEGMENTS_KEPT: Final = 2 << 20
_OTHERS_KEPT: Final = 4

_T = TypeVar("_T")


class _Cache(Generic[_T]):
    """The last used values of at most `limit` bytes altogether."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._kept: OrderedDict[tuple[int, int], tuple[_T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], load: Callable[[], tuple[_T, int]]) -> _T:
        """The value, from `load` (which also tells its bytes) when it is not kept."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found[0]
        # Two threads may load the same: better than one waiting for another's slow store.
        value, size = load()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = (value, size)
                self._bytes += size
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1][1]
        return value


class DiskReader:
    """One disk of one backup. All methods may be called by many threads.

    Attributes:
        healed: places of the damaged frames that were read from a copy.
        rebuilt: what was wrong with each index, by (session, number), in whose place its packs were read.
        partial: of these, the tables that are not the written ones: of those packs alone that are there.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        vault: Vault | None = None,
        records: DamageRecords | None = None,
        *,
        rebuild: bool = True,
    ) -> None:
        """Read nothing yet; without `rebuild` an index that is lost or damaged is an error."""
        self._rebuild = rebuild
        self._store = store
        self._vault = vault
        self._records = records
        self._others: dict[SessionRef, DiskReader] = {}
        self.healed: set[Place] = set()
        self.rebuilt: dict[tuple[int, int], DamagedError] = {}
        self.partial: dict[tuple[int, int], IndexTable] = {}
        self._hopeless: set[tuple[int, int]] = set()
        self._digests = [dict(session.index) for session in manifest.sessions]
        self._tables: _Cache[IndexTable] = _Cache(_TABLES_KEPT)
        self._directories: _Cache[Directory] = _Cache(_DIRECTORIES_KEPT)
        self._segments: _Cache[Segment] = _Cache(_SEGMENTS_KEPT)
        self._local = threading.local()
        self.manifest = manifest

    def key(self, session: int, seq: int) -> str:
        """The key of a pack."""
        return f"d/{self.manifest.sessions[session].sid}/{seq:08x}"

    # -- what the manifest vouches for -------------------------------------------------------------

    def _index_key(self, session: int, number: int) -> str:
        return f"x/{self.manifest.sessions[session].sid}/{number}"

    def _table(self, session: int, number: int) -> IndexTable:
        def load() -> tuple[IndexTable, int]:
            try:
                return self._read_table(session, number)
            except DamagedError as exc:
                return self._rebuild_table(session, number, exc), TABLE_MAX

        return self._tables.get((session, number), load)

    def _read_table(self, session: int, number: int) -> tuple[IndexTable, int]:
        key = self._index_key(session, number)
        digest = self._digests[session].get(number)
        if digest is None:
            raise DamagedError(f"the manifest does not vouch for {key}", key=key)
        with _damage(f"session index {key}", key):
            raw = self._store.get_range(key, 0, TABLE_MAX)
            sid = self.manifest.sessions[session].sid
            table = IndexTable.decode(
                raw,
                sid=sid,
                number=number,
                digest=digest,
                open_keys=None if self._vault is None else self._vault.opener(sid),
            )
        return table, len(raw)

    def _rebuild_table(self, session: int, number: int, damage: DamagedError) -> IndexTable:
        """The table, from the packs; `damage` is raised when they don't give it."""
        if (session, number) in self.partial:
            return self.partial[session, number]
        digest = self._digests[session].get(number)
        if digest is None or not self._rebuild or (session, number) in self._hopeless:
            raise damage
        sid = self.manifest.sessions[session].sid
        try:
            table, whole = rebuilt_table(
                self._store,
                self._vault,
                repository=self.manifest.repository,
                sid=sid,
                number=number,
                digest=digest,
            )
        except FormatError as exc:
            self._hopeless.add((session, number))  # not for each frame again
            raise DamagedError(
                f"{damage}, and it can't be made again: {exc}", key=damage.key
            ) from damage
        self.rebuilt[session, number] = damage
        if not whole:
            self.partial[session, number] = table
        return table

    def pack_place(self, session: int, seq: int) -> PackPlace:
        """Size of a pack, and where its directory is.

        Raises:
            DamagedError: the index is not what was written.
        """
        number = seq // PACKS_PER_INDEX
        table = self._table(session, number)
        key = self._index_key(session, number)
        try:
            with _damage(f"session index {key}", key):
                return table.place(seq)
        except DamagedError:
            if (session, number) not in self.partial:
                raise
            own = self.key(session, seq)
            raise DamagedError(
                f"pack {own} is missing or damaged, and so is its index {key}", key=own
            ) from None

    def directory(self, session: int, seq: int) -> Directory:
        """The frames of a pack.

        Raises:
            DamagedError: the index is not what was written.
        """

        def load() -> tuple[Directory, int]:
            place = self.pack_place(session, seq)
            number = seq // PACKS_PER_INDEX
            key = self._index_key(session, number)
            try:
                with _damage(f"directory of pack {seq} at {key}:{place.offset}", key, place.offset):
                    raw = self._store.get_range(key, place.offset, place.length)
                    directory = Directory.decode(raw, place)
            except DamagedError as exc:
                directory = self._pack_directory(session, seq, exc)
            return directory, directory.nbytes

        return self._directories.get((session, seq), load)

    def _pack_directory(self, session: int, seq: int, damage: DamagedError) -> Directory:
        """The directory that stands in the pack; `damage`, of the index, is raised when it is no better."""
        if not self._rebuild:
            raise damage
        place = self.pack_place(session, seq)
        try:
            directory = Directory.decode(
                pack_directory(self._store, self.key(session, seq), place), place
            )
        except (KeyMissingError, FormatError):
            raise damage from None
        self.rebuilt.setdefault((session, seq // PACKS_PER_INDEX), damage)
        return directory

    def directories(self, session: int, number: int) -> list[tuple[int, Directory]]:
        """All directories of one index, by seq, with one read.

        Raises:
            DamagedError: the index is not what was written.
        """
        table = self._table(session, number)
        key = self._index_key(session, number)
        places = [(seq, table.place(seq)) for seq in table.seqs]
        end = max(place.offset + place.length for _, place in places)
        try:
            with _damage(f"session index {key}", key):
                raw = self._store.get_range(key, 0, end)
                return [
                    (seq, Directory.decode(raw[place.offset : place.offset + place.length], place))
                    for seq, place in places
                ]
        except DamagedError:
            return [(seq, self.directory(session, seq)) for seq, _ in places]

    def index_object(self, session: int, number: int) -> bytes:
        """An index as it was written, whole, whether or not it is readable.

        Raises:
            DamagedError: it is neither there nor can it be made again.
        """
        key = self._index_key(session, number)
        found = dict(self.directories(session, number))
        sid = self.manifest.sessions[session].sid
        raw, digest = encode_index(sid, number, found, self._table(session, number).keys)
        if digest != self._digests[session][number]:
            raise DamagedError(f"session index {key} can't be made again", key=key)
        return raw

    # -- reading -----------------------------------------------------------------------------------

    def _unpacker(self) -> zstandard.ZstdDecompressor:
        made: zstandard.ZstdDecompressor | None = getattr(self._local, "unpacker", None)
        if made is None:
            made = self._local.unpacker = zstandard.ZstdDecompressor()
        return made

    def written(self, session: int, seq: int, offset: int) -> FrameHeader:
        """The header of a frame as its session wrote it.

        Raises:
            DamagedError: the session's index is not what was written.
        """
        directory = self.directory(session, seq)
        key = self.key(session, seq)
        with _damage(f"frame at {key}:{offset}", key, offset):
            return directory.find(offset)

    def _frame(
        self,
        session: int,
        seq: int,
        offset: int,
        clen: int,
        kind: FrameKind,
        fetched: Fetched | None = None,
    ) -> bytes:
        """The verified bytes of a frame.

        Raises:
            DamagedError: they are not what was written, and there is no sound copy of them.
        """
        expected = self.written(session, seq, offset)
        keys = self.directory(session, seq).keys
        key = self.key(session, seq)
        try:
            with _damage(f"frame at {key}:{offset}", key, offset):
                if expected.kind is not kind or expected.clen != clen:
                    raise FormatError("the map does not fit the session's index")
                stored = self._stored(session, seq, offset, clen, fetched)
                return open_frame(stored, expected, self._unpacker(), keys)
        except DamagedError:
            place = Place(self.manifest.sessions[session].sid, seq, offset)
            copy = self._copy(place, expected) if expected.kind is kind else None
            if copy is None:
                raise
            self.healed.add(place)
            return copy

    def _stored(
        self, session: int, seq: int, offset: int, clen: int, fetched: Fetched | None
    ) -> bytes | memoryview:
        length = HEADER_SIZE + clen
        found = None if fetched is None else fetched.find(session, seq, offset, length)
        if found is not None:
            return found
        return self._store.get_range(self.key(session, seq), offset, length)

    def _copy(self, place: Place, expected: FrameHeader) -> bytes | None:
        """The bytes of a damaged frame from where a later session stored them, with the same digest."""
        if self._records is None:
            return None
        for healed in self._records.copies(place):
            try:
                return self._read_copy(healed, expected)
            except (DamagedError, WrongKeyError):
                continue
        return None

    def _read_copy(self, healed: HealedFrame, expected: FrameHeader) -> bytes:
        _, seq, offset = healed.copy
        other = self._reader_of(healed)
        there = other.written(0, seq, offset)
        if (there.rlen, there.kind, there.digest) != (
            expected.rlen,
            expected.kind,
            expected.digest,
        ):
            raise DamagedError("the copy is of another frame", key=other.key(0, seq), offset=offset)
        return other._frame(0, seq, offset, there.clen, there.kind)  # noqa: SLF001 - our own class

    def _reader_of(self, healed: HealedFrame) -> DiskReader:
        """A reader of the copy's session alone; its index is believed only where it says what ours does."""
        session = SessionRef(
            healed.copy.session, ((healed.copy.seq // PACKS_PER_INDEX, healed.index),)
        )
        other = self._others.get(session)
        if other is None:
            other = DiskReader(
                self._store,
                replace(self.manifest, sessions=(session,), segments=()),
                self._vault,
            )
            if len(self._others) >= _OTHERS_KEPT:
                self._others.clear()
            self._others[session] = other
        return other

    def segment(self, index: int) -> Segment:
        """The map of segment `index`.

        Raises:
            DamagedError: it is not what was written.
        """
        ref = self.manifest.segments[index]
        if ref is None:
            return Segment.empty()

        def load() -> tuple[Segment, int]:
            segment = self._map(index, ref)
            return segment, segment.rows.nbytes

        return self._segments.get((index, 0), load)

    def _map(self, index: int, ref: SegmentRef) -> Segment:
        raw = self._frame(ref.session, ref.seq, ref.offset, ref.clen, FrameKind.MAP)
        key = self.key(ref.session, ref.seq)
        with _damage(f"map of segment {index} at {key}:{ref.offset}", key, ref.offset):
            segment = Segment.decode(
                raw,
                grains=segment_grains(self.manifest.summary.size, index),
                sessions=len(self.manifest.sessions),
            )
            if segment.packs() != ref.packs:
                raise FormatError("it refers to other packs than the manifest says")
        return segment

    def fetch(self, intervals: Sequence[Interval], *, limit: int = RANGE_MAX) -> Fetched:
        """The stored frames of `intervals`, to be read with few requests, for `read` and `read_into`.

        Nothing is read before its `load`, and nothing of it is verified before `read`.

        Args:
            intervals: of this disk's map.
            limit: most bytes of a request.
        """
        keys = {(one.session, one.seq): self.key(one.session, one.seq) for one in intervals}
        return Fetched(self._store, intervals, keys, limit=limit)

    def read(self, interval: Interval, fetched: Fetched | None = None) -> bytes:
        """The bytes of an interval's grains; fewer where the disk ends in its last grain.

        Args:
            interval: of this disk's map.
            fetched: where to look for the stored frame first.

        Raises:
            DamagedError: they are not what was written.
        """
        key = self.key(interval.session, interval.seq)
        raw = self._frame(
            interval.session, interval.seq, interval.offset, interval.clen, FrameKind.DATA, fetched
        )
        with _damage(f"frame at {key}:{interval.offset}", key, interval.offset):
            self._check_length(interval, len(raw))
        if interval.n == interval.flen:
            return raw
        return raw[interval.skip * GRAIN : (interval.skip + interval.n) * GRAIN]

    def read_into(self, interval: Interval, fetched: Fetched, out: memoryview) -> int:
        """The same into `out`, which is undefined when it raises; how many bytes they are.

        Args:
            interval: of this disk's map.
            fetched: where to look for the stored frame first.
            out: room for the interval's grains; it may be larger.

        Raises:
            DamagedError: they are not what was written.
        """
        session, seq, offset = interval.session, interval.seq, interval.offset
        stored = fetched.find(session, seq, offset, HEADER_SIZE + interval.clen)
        if stored is not None and interval.n == interval.flen:
            key = self.key(session, seq)
            with suppress(DamagedError), _damage(f"frame at {key}:{offset}", key, offset):
                directory = self.directory(session, seq)
                expected = directory.find(offset)
                if expected.kind is FrameKind.DATA and expected.clen == interval.clen:
                    self._check_length(interval, expected.rlen)
                    part = out[: expected.rlen]
                    open_frame_into(stored, expected, self._unpacker(), directory.keys, part)
                    return expected.rlen
        # Part of a frame, or something is wrong with it: the longer way tells what, or finds a copy.
        raw = self.read(interval, fetched)
        out[: len(raw)] = raw
        return len(raw)

    def _check_length(self, interval: Interval, length: int) -> None:
        # Only the disk's last grain may be short.
        if -(-length // GRAIN) != interval.flen or (
            length % GRAIN not in {0, self.manifest.summary.size % GRAIN}
        ):
            raise FormatError(f"it has {length} bytes, its map says {interval.flen} grains")

    # -- checking ----------------------------------------------------------------------------------

    def packs(self) -> Packs:
        """Every pack that the backup needs, as (session, seq)."""
        return self.manifest.packs()

    def check_frames(self, session: int, seq: int) -> None:
        """Read and hash every frame of a pack.

        Raises:
            DamagedError: one is not what was written.
        """
        for entry in self.directory(session, seq).entries:
            kind = FrameKind(int(entry["kind"]))
            self._frame(session, seq, int(entry["offset"]), int(entry["clen"]), kind)

    def check_pack(self, session: int, seq: int) -> None:
        """Compare what stands around the frames of a pack: its header, directory and footer.

        A restore does without these; to repair a repository one needs them.

        Raises:
            DamagedError: a byte is not what was written.
        """
        key = self.key(session, seq)
        place = self.pack_place(session, seq)
        directory = self.directory(session, seq)
        with _damage(f"header of pack {key}", key, 0):
            header = PackHeader.decode(self._store.get_range(key, 0, PACK_HEADER_SIZE))
            own = self.manifest.sessions[session].sid
            if (header.repository.hex(), header.session.hex(), header.seq) != (
                self.manifest.repository,
                own,
                seq,
            ):
                raise FormatError("it is of another pack")
            if not _fits(header, directory.keys):
                raise FormatError("it has the salt or the commitment of another pack's keys")
        with _damage(f"directory of pack {key}", key, directory.end):
            raw = self._store.get_range(key, directory.end, place.length + FOOTER_SIZE + 1)
            if len(raw) != place.length + FOOTER_SIZE or raw[: place.length] != directory.encode():
                raise FormatError("it is not the one that the session's index has")
            offset, _, digest = decode_footer(raw[place.length :], place.size, header.suite)
            if offset != directory.end or digest != place.digest:
                raise FormatError("its footer is of another pack")

    def missing_packs(self, *, copies: bool = True, indexes: bool = False) -> list[str]:
        """Keys of the packs and indexes that the backup needs and that are absent or of another size.

        Costs one listing a session and a small read for 64 packs: no frame is read.

        Args:
            copies: leave out packs of which a frame was stored anew: whether all that is needed was,
                reading will tell.
            indexes: name those too that had to be made again.
        """
        missing: dict[str, None] = {}
        needed: dict[int, dict[str, int]] = {}
        for session, seq in self.packs():
            try:
                size = self.pack_place(session, seq).size
            except DamagedError as exc:
                missing[exc.key] = None
            else:
                needed.setdefault(session, {})[self.key(session, seq)] = size
        for session, sizes in needed.items():
            for listed in self._store.list(f"d/{self.manifest.sessions[session].sid}"):
                if sizes.get(listed.key) == listed.size:
                    del sizes[listed.key]
            missing |= {key: None for key in sizes if not (copies and self._has_copies(key))}
        if indexes:
            missing |= {self._index_key(*index): None for index in self.rebuilt}
        return list(missing)

    def _has_copies(self, key: str) -> bool:
        _, sid, seq = key.split("/")
        return self._records is not None and self._records.has_copies(
            (SessionId(sid), int(seq, 16))
        )


def _fits(header: PackHeader, keys: PackKeys | None) -> bool:
    if keys is None:
        return header.suite == 0 and not any(header.salt + header.commitment)
    return header.suite == ENCRYPTED and header.salt == keys.salt and keys.fits(header.commitment)


@contextmanager
def _damage(what: str, key: str, offset: int | None = None) -> Iterator[None]:
    """Turn what shows that stored bytes are not the written ones into `DamagedError`."""
    try:
        yield
    except KeyMissingError as exc:
        raise DamagedError(f"{what} is lost: {key} is missing", key=key, offset=offset) from exc
    except FormatError as exc:
        raise DamagedError(f"{what} is damaged: {exc}", key=key, offset=offset) from exc
