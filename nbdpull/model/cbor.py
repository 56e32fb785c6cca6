"""The part of CBOR (RFC 8949) that a manifest is made of, and nothing else.

Decoding allocates what the input has, never what it claims: no tags (which make libraries build numbers
of gigabytes, compile patterns and parse dates), no indefinite lengths, no references, no nesting below
`_DEPTH`. Kinds: integers, byte strings, texts, arrays, maps with text keys, true, false, null, and floats
of 64 bits.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from nbdpull.model.frame import FormatError

__all__ = ["decode_map"]

_DEPTH: Final = 4
_ITEMS: Final = 1 << 20
"""Of arrays and maps altogether; a backup of a thousand disks has some 3,000."""
_WIDTHS: Final = {24: 1, 25: 2, 26: 4, 27: 8}
_SIMPLE: Final = {20: False, 21: True, 22: None}


def decode_map(raw: bytes) -> dict[str, Any]:
    """The map that `raw` is.

    Raises:
        FormatError: it is something else, or has a kind of item that no manifest has.
    """
    decoder = _Decoder(raw)
    value = decoder.item(0)
    if not isinstance(value, dict):
        raise FormatError("it is no CBOR map")
    if decoder.at != len(raw):
        raise FormatError("something follows the CBOR map")
    return value


class _Decoder:
    def __init__(self, raw: bytes) -> None:
        self.at = 0
        self._raw = raw
        self._left = _ITEMS

    def item(self, depth: int) -> Any:
        kind, value = self._head()
        if kind < 2:
            return -1 - value if kind else value
        if kind < 4:
            return self._take(value) if kind == 2 else self._text(value)
        if kind == 7:
            return self._simple(value)
        if kind == 6 or depth >= _DEPTH:
            raise FormatError(f"CBOR has a tag, or more than {_DEPTH} levels, at {self.at}")
        return self._items(kind, value, depth + 1)

    def _items(self, kind: int, count: int, depth: int) -> list[Any] | dict[str, Any]:
        self._left -= count
        # An item takes a byte at least: a length that can't be is refused before anything is made.
        if self._left < 0 or count > len(self._raw) - self.at:
            raise FormatError(f"CBOR claims {count} items at {self.at}")
        if kind == 4:
            return [self.item(depth) for _ in range(count)]
        fields: dict[str, Any] = {}
        for _ in range(count):
            name = self.item(depth)
            if not isinstance(name, str) or name in fields:
                raise FormatError(
                    f"CBOR has a key before {self.at} that is no text, or is there twice"
                )
            fields[name] = self.item(depth)
        return fields

    def _head(self) -> tuple[int, int]:
        """The major type of the next item, and its number; of floats the eight bytes."""
        first = self._take(1)[0]
        kind, short = first >> 5, first & 31
        if kind == 7:
            if short not in {20, 21, 22, 27}:
                raise FormatError(f"CBOR has a simple value {short} at {self.at}")
            return kind, short
        if short < 24:
            return kind, short
        width = _WIDTHS.get(short)
        if width is None:
            raise FormatError(f"CBOR has an indefinite or reserved length at {self.at}")
        return kind, int.from_bytes(self._take(width), "big")

    def _take(self, length: int) -> bytes:
        end = self.at + length
        if end > len(self._raw):
            raise FormatError(f"CBOR claims {length} bytes at {self.at}, there are less")
        part = self._raw[self.at : end]
        self.at = end
        return part

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise FormatError(f"CBOR has a text that is no UTF-8 before {self.at}") from exc

    def _simple(self, short: int) -> float | bool | None:
        if short in _SIMPLE:
            return _SIMPLE[short]
        number: float = struct.unpack(">d", self._take(8))[0]
        return number
