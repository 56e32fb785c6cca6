"""Sizes, rates and durations for people, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.units import format_duration, format_rate, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (65536, "64.0 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (1023 * 1024, "1023 KiB"),
        (int(9.996 * 1024**2), "10.0 MiB"),
        (int(99.96 * 1024**2), "100 MiB"),
        (3 * 1024**3, "3.00 GiB"),
        (16 * 1024**4, "16.0 TiB"),
        (5000 * 1024**5, "5000 PiB"),
    ],
)
def test_size_has_three_or_four_digits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1023 * 2**50))
def test_shown_size_is_within_one_percent(size: int) -> None:
    shown = format_size(size)
    number, unit = shown.split()
    assert float(number) < 1024
    power = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert abs(float(number) * 1024**power - size) <= size / 100


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (-1.0, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200.0, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500.0, "2 h 5 min"),
        (90000.0, "25 h 0 min"),
    ],
)
def test_duration_has_two_units(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


def test_rate_is_a_size_a_second() -> None:
    assert format_rate(512 * 1024**2) == "512 MiB/s"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        (" 64 KiB ", 65536),
        ("64kib", 65536),
        ("1.5GiB", 1610612736),
        ("7B", 7),
        ("9007199254740993", 2**53 + 1),
        ("8388608.0009765625T", 2**63 + 2**30),
    ],
)
def test_written_size_is_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1,5G", "10KB", "10 mb", "1e6", "1GiBs", "٣", "0.3B"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no (size|whole number of bytes)"):
        parse_size(text)


@given(st.integers(0, 2**62))
def test_bytes_come_back(size: int) -> None:
    assert parse_size(f"{size} B") == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("90s", 90),
        ("30 min", 1800),
        ("12h", 43_200),
        ("7d", 604_800),
        ("2w", 1_209_600),
        ("1y", 31_536_000),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "7", "d", "-1d", "1.5h", "7 days", "1m", "9999999999s", "\u0663d"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)
