"""What every target offers, and how zeroes inside data are found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

__all__ = ["Buffer", "Target", "runs"]

Buffer = bytes | bytearray | memoryview

_NONE = np.empty(0, dtype=np.uint64)


class Target(Protocol):
    """One disk being restored.

    The caller covers the disk exactly once: each byte by one `write` or one `zero`. Both may be
    called from many threads at once, in any order (`target.stream` waits for the right one: its
    callers must have started on lower ranges before). Then `finish`, or after any failure `abort`.

    Attributes:
        name: what it is, for messages and results: a path, a URI, or ``-``.
        note: one line the user should know (a range that is left alone), or empty.
    """

    name: str
    note: str

    def expect(self, offset: int, length: int) -> None:
        """Told, before any of a range is written, that nearly all of it will be: room for it can be made at once.

        Never raises.
        """

    def write(self, offset: int, data: Buffer) -> int:
        """Put `data` at `offset`; the bytes that were not skipped as zeroes.

        Raises:
            TargetError: the target refused or failed.
        """

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, without taking space where the target can."""

    def finish(self) -> None:
        """Make all of it durable, and only then visible under its name."""

    def abort(self) -> None:
        """Close everything and remove what can be removed. Never raises; harmless after `finish`."""


def runs(data: Buffer, block: int) -> Iterator[tuple[int, int, bool]]:
    """Cut `data` into (start, end, zero) runs of whole blocks; the last block may be short.

    `block` is a multiple of 8. Only blocks whose first eight bytes are zero are looked at in full:
    for real data nearly none, so this costs next to nothing beside the decompression.
    """
    view = memoryview(data)
    length = len(view)
    whole = length // block
    heads = np.frombuffer(view, dtype=np.uint64, count=whole * block // 8)[:: block // 8]
    # bytearray compares with any buffer by memcmp, memoryview and bytes would go byte by byte.
    blank = bytearray(block)
    candidates = (np.flatnonzero(heads == 0) * block).tolist()
    zeroes = [at for at in candidates if blank == view[at : at + block]]
    if whole * block < length and view[whole * block :] == bytes(length - whole * block):
        zeroes.append(whole * block)
    start = 0
    position = 0
    while position < len(zeroes):
        first = end = zeroes[position]
        while position < len(zeroes) and zeroes[position] == end:
            end += block
            position += 1
        if start < first:
            yield start, first, False
        start = min(end, length)
        yield first, start, True
    if start < length:
        yield start, length, False
