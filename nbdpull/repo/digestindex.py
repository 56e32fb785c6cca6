"""Where the frames of a few manifests are, by digest, in memory: for `--base`.

Sixteen bytes a frame: the first eight of the digest, the number of its pack in a list, and its offset.
A GiB of frames of 1 MiB takes 16 KiB, one of the smallest frames 256 KiB.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nbdpull.errors import DamagedError, WrongKeyError
from nbdpull.model.frame import FrameKind
from nbdpull.model.index import PACKS_PER_INDEX, Directory
from nbdpull.repo.reader import DiskReader
from nbdpull.repo.reuse import Found, ReuseSource

__all__ = ["DigestIndex", "IndexFinder", "directories"]

_log = logging.getLogger(__name__)

FRAMES_MAX: Final = 4 << 20
"""64 MiB. 4 TiB of frames of 1 MiB; what a larger base has beyond is not found."""


def directories(
    reader: DiskReader, packs: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, Directory]]:
    """(session, seq, directory) of these packs; those that can't be read are left out."""
    wanted: dict[tuple[int, int], set[int]] = {}
    for session, seq in packs:
        wanted.setdefault((session, seq // PACKS_PER_INDEX), set()).add(seq)
    for (session, number), seqs in wanted.items():
        try:
            found = reader.directories(session, number)
        except (DamagedError, WrongKeyError) as exc:
            _log.debug("what is in %d packs is not known: %s", len(seqs), exc)
            continue
        for seq, directory in found:
            if seq in seqs:
                yield session, seq, directory


class DigestIndex:
    """May be used by many threads.

    Attributes:
        manifests: what it was made of.
        whole: False when it has more frames than fit.
    """

    def __init__(self, readers: Sequence[DiskReader]) -> None:
        keys: list[NDArray[np.uint64]] = []
        places: list[NDArray[np.uint32]] = []
        packs: list[tuple[int, int, int]] = []
        room = FRAMES_MAX
        self.whole = True
        for number, reader in enumerate(readers):
            for session, seq, directory in directories(reader, reader.packs()):
                data = directory.entries[directory.entries["kind"] == FrameKind.DATA]
                self.whole = self.whole and len(data) <= room
                data = data[:room]
                room -= len(data)
                keys.append(_keys(data["digest"]))
                place = np.empty((len(data), 2), dtype=np.uint32)
                place[:, 0] = len(packs)
                place[:, 1] = data["offset"]
                places.append(place)
                packs.append((number, session, seq))
        found = np.concatenate([np.empty(0, dtype=np.uint64), *keys])
        order = np.argsort(found, kind="stable")
        self._keys = found[order]
        self._places = np.concatenate([np.empty((0, 2), dtype=np.uint32), *places])[order]
        self._packs = packs
        self.manifests = [reader.manifest for reader in readers]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self._keys.nbytes + self._places.nbytes

    def hints(self, digest: bytes) -> Iterator[tuple[int, int, int, int]]:
        """(manifest, session, seq, offset) of frames that may have that digest."""
        key = np.uint64(int.from_bytes(digest[:8], "little"))
        at = int(np.searchsorted(self._keys, key))
        while at < len(self._keys) and self._keys[at] == key:
            pack, offset = self._places[at].tolist()
            yield (*self._packs[pack], offset)
            at += 1


def _keys(digests: NDArray[np.void]) -> NDArray[np.uint64]:
    raw = np.frombuffer(digests.tobytes(), dtype="<u8")
    return raw.reshape(-1, 4)[:, 0].astype(np.uint64)


class IndexFinder:
    """Finds frames of an index for one session; `sources` are its manifests, None where not pinned."""

    def __init__(self, index: DigestIndex, sources: Sequence[ReuseSource | None]) -> None:
        self._index = index
        self._sources = sources

    def find(self, digest: bytes, length: int) -> Found | None:
        """See `FrameFinder`."""
        for manifest, session, seq, offset in self._index.hints(digest):
            source = self._sources[manifest]
            if source is None:
                continue
            found = source.check(session, seq, offset, digest, length)
            if found is not None:
                return found
        return None
