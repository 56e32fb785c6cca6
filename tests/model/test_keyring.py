"""Slots and exported keys: any bytes, any password."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdpull.errors import WrongKeyError
from nbdpull.model.crypto import Kdf, KdfName
from nbdpull.model.frame import FormatError
from nbdpull.model.keyring import Ring, Slot
from tests.model.samples import REPOSITORY, damaged

CHEAP = Kdf(KdfName.ARGON2ID, memory_kib=8, passes=1, lanes=1)
SCRYPT = Kdf(KdfName.SCRYPT, memory_kib=16, passes=1, lanes=8)
RING = Ring(REPOSITORY, b"k" * 32, ()).rotated(b"1" * 32, b"2" * 32).rotated(b"3" * 32, b"4" * 32)
KID = "12" * 16


def slot(password: bytes = b"pass", kdf: Kdf = CHEAP) -> Slot:
    return Slot.make(RING, password, kid=KID, created=7, label="mine", salt=b"s" * 16, kdf=kdf)


@given(st.binary(min_size=1, max_size=100), st.sampled_from([CHEAP, SCRYPT]))
@settings(max_examples=30)
def test_any_password_opens_its_slot_and_no_other_does(password: bytes, kdf: Kdf) -> None:
    made = Slot.decode(slot(password, kdf).encode(), KID)
    assert made.open(password) == RING
    assert (made.generation, made.label, made.kdf) == (2, "mine", kdf)
    for other in (password + b"x", password[:-1] + b"\xff\xfe", b""):
        with pytest.raises(WrongKeyError):
            made.open(other)


def test_every_damage_of_a_slot_is_found() -> None:
    raw = slot().encode()
    for bad in damaged(raw):
        with pytest.raises((FormatError, WrongKeyError)):
            Slot.decode(bad, KID).open(b"pass")
    with pytest.raises(FormatError, match="bad tag"):
        Slot.decode(raw, "34" * 16).open(b"pass")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"kdf": None}, "no key slot"),
        ({"kdf": {"name": "md5"}}, "'md5'"),
        (
            {"kdf": {"name": "argon2id", "memory_kib": 1 << 30, "passes": 1, "lanes": 1}},
            "memory_kib",
        ),
        ({"kdf": {"name": "argon2id", "memory_kib": 8, "passes": 99, "lanes": 1}}, "passes"),
        ({"generation": 0}, "generation"),
        ({"generation": True}, "generation"),
        ({"label": "x" * 101}, "label"),
        ({"salt": "zz"}, "salt"),
        ({"extra": 1}, "not as it was written"),
    ],
)
def test_a_slot_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    fields = json.loads(slot().encode()) | changes
    with pytest.raises(FormatError, match=message):
        Slot.decode((json.dumps(fields, indent=2) + "\n").encode(), KID)


@given(st.binary(max_size=200))
def test_no_bytes_crash(raw: bytes) -> None:
    with pytest.raises(FormatError):
        Slot.decode(raw, KID)
    with pytest.raises(FormatError):
        Ring.decode(raw)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=70),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "nbdpull",
                        "version",
                        "generations",
                        "public",
                        "secret",
                        "kdf",
                        "salt",
                        "label",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
def test_no_json_crashes(fields: object) -> None:
    for kind in ("key", "writer key", "recovery key"):
        given_fields = {**fields, "nbdpull": kind} if isinstance(fields, dict) else fields
        raw = json.dumps(given_fields).encode()
        with pytest.raises(FormatError):
            Slot.decode(raw, KID)
        with pytest.raises(FormatError):
            Ring.decode(raw)


def test_a_ring_that_was_put_together_wrongly_is_refused() -> None:
    """With a check that fits: as by hand."""
    from nbdpull.model import keyring  # noqa: PLC0415

    good = json.loads(RING.encode())
    first = good["generations"][0]
    for changes, message in (
        ({"nbdpull": "writer key"}, "other private keys"),
        ({"generations": []}, "no list"),
        ({"generations": [7]}, "generation that can't be"),
        ({"generations": [{**first, "public": "00" * 32}]}, "not its private key's"),
        ({"generations": [first, {**first, "secret": "x"}]}, "secret"),
        ({"version": 2}, "version 2"),
        ({"digest_key": "00"}, "digest_key"),
    ):
        fields = {key: value for key, value in (good | changes).items() if key != "check"}
        fields["check"] = keyring._check(fields)
        with pytest.raises(FormatError, match=message):
            Ring.decode(json.dumps(fields).encode())
