"""The record of a point in time: what is not exactly what was written is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.results import Level, Quiesced
from nbdpull.source.unfinished import RECORD_MAX, Unfinished, UnfinishedDisk

RECORD = Unfinished(
    backup="0123456789abcdef",
    chain="c" * 12,
    time=1700000000.5,
    pid=17,
    asked=None,
    disks=(
        UnfinishedDisk(
            name="vda",
            size=1 << 40,
            level=Level.INCREMENTAL,
            base="nbdpull-x",
            checkpoint="y",
            lie="bytes 0 to 512 changed",
        ),
        UnfinishedDisk(name="größe", size=512, level=Level.FULL, base=None, checkpoint=None),
    ),
    guest_first=True,
    server="0" * 64,
    port=10809,
    listens=True,
    machine="a" * 64,
    pause_s=0.25,
    quiesced=Quiesced(filesystems=2, mountpoints=("/", "/srv"), frozen_s=0.5),
)


def sealed(fields: object) -> bytes:
    """A record with a right checksum."""
    raw = json.dumps(fields).encode()
    return blake3(raw).hexdigest().encode() + b"\n" + raw


def fields(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(RECORD.encode()[65:])
    return made | changes


def test_it_comes_back_as_it_was_written() -> None:
    assert Unfinished.decode(RECORD.encode()) == RECORD
    assert Unfinished.decode(sealed(fields())) == RECORD
    # No part of the plan, and so not compared.
    assert [one.lie for one in Unfinished.decode(RECORD.encode()).disks] == [
        "bytes 0 to 512 changed",
        None,
    ]
    assert RECORD.run == "01234567"


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"version": 3},
        {"version": True},
        {"backup": "0123456789ABCDEF"},
        {"backup": "../../../../etc/"},
        {"chain": 5},
        {"time": "now"},
        {"time": -1.0},
        {"time": float("nan")},
        {"time": float("inf")},
        {"time": 1},
        {"pid": 0},
        {"pid": 1 << 70},
        {"pid": True},
        {"asked": "everything"},
        {"disks": []},
        {"disks": {}},
        {"disks": [5]},
        {"disks": [{}]},
        {"guest_first": 1},
        {"server": "x"},
        {"port": 65536},
        {"port": 0},
        {"listens": 1},
        {"machine": "x"},
        {"machine": 5},
        {"pause_s": None},
        {"quiesced": {}},
        {"quiesced": {"filesystems": -1, "mountpoints": [], "frozen_s": 0.0}},
        {"quiesced": {"filesystems": 1, "mountpoints": [5], "frozen_s": 0.0}},
        {"more": 1},
    ],
)
def test_what_can_not_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Unfinished.decode(sealed(fields(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "x" * 5000},
        {"size": 0},
        {"size": 1.0},
        {"level": "none"},
        {"lie": 5},
        {"x": 1},
    ],
)
def test_a_disk_that_can_not_be_is_refused(changes: dict[str, Any]) -> None:
    disk = fields()["disks"][0] | changes
    with pytest.raises(ValueError, match=r"."):
        Unfinished.decode(sealed(fields(disks=[disk])))


@pytest.mark.parametrize("missing", sorted(fields()))
def test_a_field_that_is_missing_is_refused(missing: str) -> None:
    less = fields()
    del less[missing]
    with pytest.raises(ValueError, match=missing):
        Unfinished.decode(sealed(less))


def test_a_record_that_was_cut_short_or_damaged_is_refused() -> None:
    raw = RECORD.encode()
    for length in range(len(raw)):
        with pytest.raises(ValueError, match="damaged, or cut short"):
            Unfinished.decode(raw[:length])
    with pytest.raises(ValueError, match="damaged, or cut short"):
        Unfinished.decode(raw.replace(b"vda", b"vdb"))
    with pytest.raises(ValueError, match="damaged, or cut short"):
        Unfinished.decode(raw + b" " * RECORD_MAX)


def test_json_that_nests_without_end_is_refused() -> None:
    raw = b"[" * 200_000
    with pytest.raises(ValueError, match=r"."):
        Unfinished.decode(blake3(raw).hexdigest().encode() + b"\n" + raw)


@given(raw=st.binary(max_size=300))
def test_any_bytes_are_refused(raw: bytes) -> None:
    for one in (raw, blake3(raw).hexdigest().encode() + b"\n" + raw):
        with pytest.raises(ValueError, match=r"."):
            Unfinished.decode(one)
