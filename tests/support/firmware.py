"""OVMF, the UEFI firmware of a VM, and what it keeps in its flash."""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["OVMF_CODE", "OVMF_VARIABLES", "pflash", "uefi_variables"]

OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
"""The firmware itself, read-only."""
OVMF_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
"""An empty variable store, which each VM gets a copy of."""

_STORE = 0x48  # behind the header of the firmware volume
_HEADER = struct.Struct("<HBBIQ16sIII16s")  # AUTHENTICATED_VARIABLE_HEADER of EDK2
_START_ID = 0x55AA
_ADDED = 0x3F
_BEING_REPLACED = 0x3E  # valid until the new one is there
_UNUSED = 0xFF
_UNWRITTEN = 0xFFFFFFFF


def pflash(variables: Path) -> list[str]:
    """QEMU's arguments for OVMF with its variables in the file `variables`."""
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={OVMF_CODE}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
    ]


def uefi_variables(flash: bytes) -> dict[str, bytes]:
    """The values of all variables in a store, by name; those that were replaced or deleted are left out."""
    found: dict[str, bytes] = {}
    (size,) = struct.unpack_from("<I", flash, _STORE + 16)
    at = _STORE + 28
    while at + _HEADER.size <= _STORE + size:
        start, state, _, _, _, _, _, names, values, _ = _HEADER.unpack_from(flash, at)
        if start != _START_ID:
            break
        if state == _UNUSED or _UNWRITTEN in {names, values}:
            names = values = 0  # the machine was stopped while this header was being written
        name = at + _HEADER.size
        value = name + names
        text = flash[name : value - 2].decode("utf-16-le", errors="replace")
        if state == _ADDED or (state == _BEING_REPLACED and text not in found):
            found[text] = flash[value : value + values]
        at = (value + values + 3) & ~3
    return found
