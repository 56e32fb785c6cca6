"""Tables of small numbers, stored so that zstd packs them well.

rows      (3, 100) (4, 170) (5, 240)
columns   3 4 5 | 100 170 240
deltas    3 1 1 | 100 70 70           modulo 2**32
bytes     030101 000000 000000 000000 | 644646 000000 000000 000000
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nbdpull.model.frame import FormatError

__all__ = ["pack_columns", "unpack_columns"]


def pack_columns(rows: NDArray[np.integer]) -> bytes:
    """Four bytes a number of `rows`, an array of shape (rows, columns) of numbers below 2**32."""
    deltas = np.diff(rows.astype(np.uint32), axis=0, prepend=np.uint32(0))
    split = np.ascontiguousarray(deltas.T).view(np.uint8).reshape(rows.shape[1], -1, 4)
    return np.ascontiguousarray(split.transpose(0, 2, 1)).tobytes()


def unpack_columns(raw: bytes | memoryview, columns: int) -> NDArray[np.uint32]:
    """The opposite of `pack_columns`, with shape (rows, columns). Any bytes of a fitting length decode.

    Raises:
        FormatError: the length fits no number of rows.
    """
    if len(raw) % (4 * columns):
        raise FormatError(f"a table of {columns} columns has {len(raw)} bytes")
    split = np.frombuffer(raw, dtype=np.uint8).reshape(columns, 4, -1)
    deltas = np.ascontiguousarray(split.transpose(0, 2, 1)).view(np.uint32)[:, :, 0]
    return np.ascontiguousarray(np.cumsum(deltas, axis=1, dtype=np.uint32).T)
