from __future__ import annotations

import os

from nbdpull.model.ids import disk_id, is_hex, make_session_id, may_be_of, session_id_of


def test_a_session_id_begins_with_its_milliseconds() -> None:
    sid = make_session_id(0x0123456789AB, bytes(range(10)))
    assert sid == "0123456789ab00010203040506070809"
    assert is_hex(sid, 32)


def test_a_session_id_survives_a_clock_beyond_48_bits() -> None:
    assert is_hex(make_session_id(1 << 60, os.urandom(10)), 32)


def test_moving_a_letter_from_the_vm_to_the_disk_gives_another_disk() -> None:
    assert disk_id("ab", "c") != disk_id("a", "bc")
    assert disk_id("vm", "vda") == disk_id("vm", "vda")
    assert is_hex(disk_id("vm/../x\ud800", ""), 32)


def test_only_exactly_so_many_lower_case_digits_are_hex() -> None:
    assert is_hex("09af", 4)
    for text in ("09AF", "09a", "09afa", "09a\n", "09ag", ""):
        assert not is_hex(text, 4)


def test_a_session_id_tells_whose_it_may_be() -> None:
    vda, vdb = disk_id("vm", "vda"), disk_id("vm", "vdb")
    sid = session_id_of(vda, 0x0123456789AB, bytes(range(8)))
    assert is_hex(sid, 32)
    assert sid.startswith("0123456789ab0001020304050607")
    assert may_be_of(sid, vda)
    assert not may_be_of(sid, vdb)
