"""A state machine: a disk that is written, zeroed, resized and backed up, against a plain bytearray.

The disk lies across the border of two segments, of which only the grains around the border are ever
written: so each backup has maps of both. Every backup, also an older one, restores as the bytearray was.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbdpull.model.grain import GRAIN, SEGMENT, segment_count
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Manifest
from nbdpull.repo.repository import DiskReader, Repository
from tests.repo.helpers import Changes, store_changes, summary_for

__all__ = ["DiskStates"]

_BEFORE = 6  # grains before the border
_BASE = SEGMENT // GRAIN - _BEFORE
_MOST = 20 * GRAIN  # of the bytearray

_sizes = st.integers(1, _MOST)
_places = st.integers(0, _MOST - 1)
_lengths = st.sampled_from([1, 512, 5000, GRAIN, 3 * GRAIN, 17 * GRAIN])


class DiskStates(RuleBasedStateMachine):
    """One repository and one disk."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        Repository.create(str(self.folder / "repo"))
        self.repository = Repository.open(str(self.folder / "repo"), write=True)
        self.disk = bytearray()
        self.taken: list[tuple[Manifest, bytes]] = []
        self.since_last: set[int] = set()
        self.since_full: set[int] = set()
        self.last: Manifest | None = None
        self.full: Manifest | None = None

    def teardown(self) -> None:
        """Nothing stays."""
        shutil.rmtree(self.folder)

    @initialize(size=_sizes)
    def begin(self, size: int) -> None:
        """An empty disk."""
        self.disk = bytearray(size)

    # -- the guest ---------------------------------------------------------------------------------

    @rule(at=_places, length=_lengths, byte=st.integers(1, 255))
    def write(self, at: int, length: int, byte: int) -> None:
        """Overwrite with something."""
        self._put(at, bytes([byte]) * length)

    @rule(at=_places, length=_lengths)
    def zero(self, at: int, length: int) -> None:
        """Overwrite with zeroes, whole grains or parts of them."""
        self._put(at, bytes(length))

    @rule(at=_places, seed=st.integers(0, 99))
    def noise(self, at: int, seed: int) -> None:
        """Something that does not pack."""
        self._put(at, bytes((seed * n * n + n) % 256 for n in range(3000)))

    def _put(self, at: int, raw: bytes) -> None:
        at %= len(self.disk)
        raw = raw[: len(self.disk) - at]
        self.disk[at : at + len(raw)] = raw
        touched = range(at // GRAIN, -(-(at + len(raw)) // GRAIN))
        self.since_last.update(touched)
        self.since_full.update(touched)

    @rule(size=_sizes)
    def resize(self, size: int) -> None:
        """Grow or shrink: no bitmap survives it."""
        self.disk = self.disk[:size] + bytes(max(0, size - len(self.disk)))
        self.last = self.full = None

    # -- backups -----------------------------------------------------------------------------------

    @rule(like=st.booleans())
    def back_up_in_full(self, *, like: bool) -> None:
        """Everything, compared with the backup before or not."""
        everything = set(range(-(-len(self.disk) // GRAIN)))
        other = self.taken[-1][0] if like and self.taken else None
        self.full = self._back_up(everything, None, other)
        self.since_full = set()

    @rule()
    def back_up_incrementally(self) -> None:
        """What changed since the last one."""
        if self.last is not None:
            self._back_up(self.since_last, self.last, None)

    @rule()
    def back_up_differentially(self) -> None:
        """What changed since the last full."""
        if self.full is not None:
            self._back_up(self.since_full, self.full, None)

    def _back_up(
        self, grains: set[int], parent: Manifest | None, like: Manifest | None
    ) -> Manifest:
        size = _BASE * GRAIN + len(self.disk)
        changes: dict[int, bytes | None] = {}
        for number in grains:
            raw = bytes(self.disk[number * GRAIN : (number + 1) * GRAIN])
            if raw:
                changes[_BASE + number] = raw if any(raw) else None
        session = self.repository.begin(vm="vm", disk="vda", parent=parent, like=like)
        reader = self.repository.reader(parent) if parent is not None else None
        store_changes(session, reader, size, _whole(changes))
        session.seal()
        number = len(self.taken)
        summary = summary_for(
            session, size=size, backup=BackupId(f"{number:016x}"), time=float(number)
        )
        manifest = session.commit(summary)
        self.taken.append((manifest, bytes(self.disk)))
        self.last = manifest
        self.since_last = set()
        return manifest

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def newest_restores(self) -> None:
        """Byte for byte."""
        if self.taken:
            self._check(*self.taken[-1])

    def _check(self, manifest: Manifest, content: bytes) -> None:
        reader = self.repository.reader(self.repository.manifest(manifest.summary))
        assert restored(reader, len(content)) == content

    @rule()
    def older_ones_restore(self) -> None:
        """Nothing later changes what an earlier backup holds."""
        for manifest, content in self.taken:
            self._check(manifest, content)


def _whole(changes: dict[int, bytes | None]) -> Changes:
    return dict(sorted(changes.items()))


def restored(reader: DiskReader, length: int) -> bytes:
    """The part of the disk that is written to; elsewhere there must be nothing."""
    out = bytearray(length)
    for index in range(segment_count(reader.manifest.summary.size)):
        for one in reader.segment(index):
            raw = reader.read(one)
            at = index * SEGMENT + (one.start - _BASE) * GRAIN
            assert at >= 0
            assert len(raw) == min(one.n * GRAIN, length - at)
            out[at : at + len(raw)] = raw
    return bytes(out)
