from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.target.filename import disk_file_name


@pytest.mark.parametrize(
    ("disk", "name"),
    [
        ("virtio0", "virtio0.raw"),
        ("drive-scsi0.1_x", "drive-scsi0.1_x.raw"),
        ("../etc/passwd", "%2E.%2Fetc%2Fpasswd.raw"),
        (".", "%2E.raw"),
        ("a/b", "a%2Fb.raw"),
        ("a%2Fb", "a%252Fb.raw"),
        ("a\0b\n", "a%00b%0A.raw"),
        ("ä", "%C3%A4.raw"),
        ("/machine/peripheral-anon/device[0]", "%2Fmachine%2Fperipheral-anon%2Fdevice%5B0%5D.raw"),
    ],
)
def test_unsafe_characters_are_percent_encoded(disk: str, name: str) -> None:
    assert disk_file_name(disk, "raw") == name


@given(st.text(), st.text())
def test_two_disks_never_share_a_name(first: str, second: str) -> None:
    names = disk_file_name(first, "raw"), disk_file_name(second, "raw")
    assert (names[0] == names[1]) == (first == second)
    assert all("/" not in name and len(name.encode()) <= 210 for name in names)
    assert not names[0].startswith(".") or not first


def test_long_names_stay_apart() -> None:
    names = {disk_file_name("ä" * 300 + end, "qcow2") for end in ("", "a", "b")}
    assert len(names) == 3
    assert all(len(name) <= 210 for name in names)
