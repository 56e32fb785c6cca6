from __future__ import annotations

import tracemalloc
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.cbor import decode_map
from nbdpull.model.frame import FormatError

values = st.recursive(
    st.integers(-(1 << 64), (1 << 64) - 1)
    | st.binary()
    | st.text(st.characters(codec="utf-8"))
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=8,
)


def depth(value: object) -> int:
    inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return 1 + max(map(depth, inner), default=0) if isinstance(value, list | dict) else 0


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), values))
def test_what_another_implementation_writes_is_read(fields: dict[str, Any]) -> None:
    raw = cbor2.dumps(fields)
    if depth(fields) <= 4:
        assert decode_map(raw) == fields
    else:
        with pytest.raises(FormatError, match="levels"):
            decode_map(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80",  # an array
        b"\xa1\x61a",  # a key without a value
        b"\xa0\x00",  # something follows
        b"\xa1\x01\x01",  # a key that is no text
        b"\xa2\x61a\x01\x61a\x02",  # a key twice
        b"\xa1\x61a\x9f\xff",  # an indefinite length
        b"\xbf\xff",
        b"\xa1\x61a\x1c",  # a reserved length
        b"\xa1\x61a\x62\xff\xfe",  # no UTF-8
        b"\xa1\x61a\xf9\x00\x00",  # a half float
        b"\xa1\x61a\xf7",  # undefined
        b"\xa1\x61a\xc2\x41\x01",  # a big number
        b"\xa1\x61a\xc4\x82\x1b\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a decimal of that exponent
        b"\xa1\x61a\xd8\x23\x61(",  # a pattern
        b"\xa1\x61a\xd8\x1c\x81\xd8\x1d\x00",  # a list that holds itself
        b"\xa1\x61a\x9b\x7f\xff\xff\xff\xff\xff\xff\xff",  # lengths that can't be
        b"\xa1\x61a\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\xa1\x61a" + b"\x81" * 100_000,  # nesting
    ],
)
def test_what_no_manifest_has_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        decode_map(raw)


@given(st.binary(max_size=400))
def test_no_bytes_crash_the_decoder(raw: bytes) -> None:
    for data in (raw, b"\xa1\x61a" + raw):
        try:
            decode_map(data)
        except FormatError:
            continue


def test_a_body_of_empty_lists_takes_no_memory() -> None:
    """Ten bytes a list would be a hundred, in a body that zstd packs to nothing."""
    raw = b"\xa1\x61a\x9a" + (20 << 20).to_bytes(4, "big") + b"\x80" * (20 << 20)
    tracemalloc.start()
    with pytest.raises(FormatError, match="claims"):
        decode_map(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
