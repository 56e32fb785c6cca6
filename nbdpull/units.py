"""Bytes, rates and durations for people, and sizes as people write them.

A size is always counted in powers of 1024 and says so: KiB, MiB, GiB, TiB, PiB.
"""

from __future__ import annotations

import re

__all__ = ["format_duration", "format_rate", "format_size", "parse_duration", "parse_size"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STEP = 1024
_MINUTE_S = 60.0
_HOUR_S = 3600.0
_DURATIONS_S = {
    "s": 1.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 7 * 86400.0,
    "y": 365 * 86400.0,
}
_DURATION = re.compile(r"([0-9]{1,9})\s*(s|min|h|d|w|y)")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGTP])(?:iB)?|B)?", re.IGNORECASE)


def format_size(size: float) -> str:
    """A size with three or four significant digits: ``0 B``, ``64.0 KiB``, ``1023 MiB``, ``2.95 GiB``."""
    value = float(size)
    unit = 0
    # 1023.5 would be shown as 1024, which is one of the next unit.
    while abs(value) >= _STEP - 0.5 and unit < len(_UNITS) - 1:
        value /= _STEP
        unit += 1
    if unit == 0:
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {_UNITS[unit]}"


def format_rate(bytes_per_s: float) -> str:
    """A rate: ``512 MiB/s``."""
    return f"{format_size(bytes_per_s)}/s"


def format_duration(duration_s: float) -> str:
    """A duration in its two largest units: ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if duration_s < 9.95:
        return f"{max(duration_s, 0.0):.1f} s"
    seconds = round(duration_s)
    if seconds < _MINUTE_S:
        return f"{seconds} s"
    if seconds < _HOUR_S:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = round(duration_s / _MINUTE_S)
    return f"{minutes // 60} h {minutes % 60} min"


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4096``, ``64K``, ``64 KiB`` or ``1.5GiB``; units are powers of 1024.

    Raises:
        ValueError: not a size, a fraction of a byte, or KB, MB ..., which mean 1000 to some and
            1024 to others.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"'{text}' is no size; expected a number with B, KiB, MiB, GiB, TiB or PiB"
        )
    number: str = match[1]
    letter: str | None = match[2]
    power = "KMGTP".index(letter.upper()) + 1 if letter else 0
    whole, _, fraction = number.partition(".")
    # Integers all the way: a float would round sizes above 8 PiB.
    numerator = int(whole + fraction) << 10 * power
    denominator: int = 10 ** len(fraction)
    size, rest = divmod(numerator, denominator)
    if rest:
        raise ValueError(f"'{text}' is no whole number of bytes")
    return size


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``90s``, ``30min``, ``12h``, ``7d``, ``2w`` or ``1y`` (365 days).

    Raises:
        ValueError: not a duration, or one without a unit: seconds to some, days to others.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        expected = ", ".join(_DURATIONS_S)
        raise ValueError(f"'{text}' is no duration; expected a whole number with one of {expected}")
    return int(match[1]) * _DURATIONS_S[match[2]]
