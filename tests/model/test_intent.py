"""What a session says before it begins."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.frame import FormatError
from nbdpull.model.intent import Adopts, Intent, checked_intent, is_pin

HEX = st.text("0123456789abcdef", min_size=32, max_size=32)
SID = "12" * 16
GC = Intent(role="gc", disk="")
PINS = st.builds("{}/{}".format, HEX, HEX)


@given(
    st.builds(
        Intent,
        role=st.sampled_from(["backup", "repack", "undo"]),
        disk=HEX,
        pins=st.lists(PINS, max_size=4).map(tuple),
        brings=st.lists(HEX, max_size=4).map(tuple),
        host=st.text(max_size=20),
        time=st.floats(allow_nan=False, allow_infinity=False),
        keys=st.none() | st.binary(max_size=200),
        adopts=st.lists(
            st.builds(Adopts, HEX, st.none() | st.binary(max_size=200)), max_size=4
        ).map(tuple),
        process=st.text(max_size=40),
    )
)
def test_what_is_written_is_read_back(intent: Intent) -> None:
    assert Intent.decode(intent.encode(SID), SID) == intent


def test_a_collectors_intent_has_no_disk() -> None:
    assert Intent.decode(GC.encode(SID), SID) == GC


GOOD = {"role": "backup", "disk": "ab" * 16, "pins": []}


@pytest.mark.parametrize(
    "change",
    [
        {"disk": ""},
        {"disk": "xy" * 16},
        {"disk": "AB" * 16},
        {"disk": 3},
        {"role": None},
        {"pins": None},
        {"adopts": [{"session": "ab" * 15}]},
        {"adopts": [{"session": "ab" * 16, "keys": "x"}]},
        {"adopts": ["ab" * 16]},
        {"pins": ["ab" * 16]},
        {"pins": ["../../etc/passwd"]},
        {"pins": [3]},
        {"brings": "ab" * 16},
        {"brings": ["ab" * 15]},
        {"brings": [3]},
        {"keys": "xyz"},
    ],
)
def test_what_no_session_writes_is_refused(change: dict[str, object]) -> None:
    assert Intent.decode(checked_intent(json.dumps(GOOD).encode(), SID), SID).disk == "ab" * 16
    with pytest.raises(FormatError, match=r"it (is|has|brings|adopts)|its '(disk|keys)'"):
        Intent.decode(checked_intent(json.dumps(GOOD | change).encode(), SID), SID)


def test_not_one_bit_can_flip_unnoticed() -> None:
    raw = Intent(role="backup", disk="ab" * 16, pins=(f"{'cd' * 16}/{'ef' * 16}",)).encode(SID)
    assert json.loads(raw)["check"]
    for at in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(FormatError):
            Intent.decode(bytes(flipped), SID)
    for end in range(len(raw)):
        with pytest.raises(FormatError):
            Intent.decode(raw[:end], SID)


def test_the_intent_of_another_session_is_refused() -> None:
    raw = Intent(role="backup", disk="ab" * 16).encode(SID)
    with pytest.raises(FormatError, match="as the intent of this session"):
        Intent.decode(raw, "21" * 16)


@given(st.binary(max_size=60) | st.recursive(st.none(), st.lists, max_leaves=9).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_an_intent_or_an_error(raw: bytes) -> None:
    for one in (raw, checked_intent(raw, SID)):
        with pytest.raises(FormatError):
            Intent.decode(one, SID)


def test_deep_nesting_is_an_error() -> None:
    with pytest.raises(FormatError):
        Intent.decode(checked_intent(b"[" * 100_000, SID), SID)


@pytest.mark.parametrize(
    "text", ["", "/", "ab" * 16, "ab" * 16 + "/", "ab" * 16 + "/" + "cd" * 16 + "/"]
)
def test_what_is_no_pin(text: str) -> None:
    assert not is_pin(text)
    assert is_pin("ab" * 16 + "/" + "cd" * 16)
