"""Tables of numbers: what goes in comes out, and no bytes can break the reader."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nbdpull.model.columns import pack_columns, unpack_columns
from nbdpull.model.frame import FormatError


def test_layout_is_the_one_that_the_format_document_draws() -> None:
    rows = np.array([[3, 100], [4, 170], [5, 240]])
    assert pack_columns(rows) == bytes.fromhex(
        "030101 000000 000000 000000 644646 000000 000000 000000"
    )


def test_empty_table() -> None:
    assert pack_columns(np.empty((0, 3), dtype=np.int64)) == b""
    assert unpack_columns(b"", 3).shape == (0, 3)


def test_falling_numbers_wrap_around() -> None:
    rows = np.array([[2**32 - 1], [0], [7], [6]], dtype=np.uint64)
    assert unpack_columns(pack_columns(rows), 1).tolist() == rows.tolist()


@given(
    arrays(
        np.uint32,
        st.tuples(st.integers(0, 60), st.integers(1, 8)),
        elements=st.integers(0, 2**32 - 1),
    )
)
def test_any_table_comes_back(rows: np.ndarray) -> None:
    packed = pack_columns(rows)
    assert len(packed) == 4 * rows.size
    again = unpack_columns(packed, rows.shape[1])
    assert again.shape == rows.shape
    assert np.array_equal(again, rows)


@given(st.binary(max_size=400), st.integers(1, 8))
def test_any_bytes_decode_or_are_refused_by_their_length(raw: bytes, columns: int) -> None:
    if len(raw) % (4 * columns):
        with pytest.raises(FormatError, match=f"{columns} columns has {len(raw)} bytes"):
            unpack_columns(raw, columns)
        return
    rows = unpack_columns(memoryview(raw), columns)
    assert pack_columns(rows) == raw
