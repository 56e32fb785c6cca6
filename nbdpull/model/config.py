"""`nbdpull.json`: what a repository is, and what a program must know to use it.

It is JSON, not CBOR, because it is the one file that a person opens to find out what this folder is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from blake3 import blake3

from nbdpull.model.frame import FormatError
from nbdpull.model.ids import is_hex

__all__ = ["CONFIG_MAX", "FORMAT", "LOCK_MAX_S", "LOCK_MODES", "SINGLE_WRITER", "Config", "Lock"]

FORMAT: Final = 1
CONFIG_MAX: Final = 64 << 10
SINGLE_WRITER: Final = "single_writer"
"""The store does not refuse to overwrite: nothing may be collected beside a writer."""
LOCK_MODES: Final = ("governance", "compliance")
LOCK_MAX_S: Final = 10 * 366 * 86400
_LOCK: Final = "lock"
_KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "read": frozenset({"encrypted"}),
    "write": frozenset({SINGLE_WRITER, _LOCK}),
    "gc": frozenset({SINGLE_WRITER}),
}
_SUITES: Final = {"digest": "blake3-256", "cipher": "none"}
_SUITES_ENCRYPTED: Final = {"digest": "blake3-256-keyed", "cipher": "aes-256-gcm"}
_ID_CHECK_DIGITS: Final = 16
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """How long objects are locked from when they are written, by the store's object lock.

    Attributes:
        mode: ``governance`` or ``compliance``.
        duration_s: seconds, at least 1.
    """

    mode: str
    duration_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The repository's settings; written once.

    Attributes:
        id: 32 hex digits.
        features: names by what they concern: to ``read``, ``write`` or ``gc`` one must know them all.
        suites: which digest and which cipher.
        capabilities: what the probe at `init` found the store to do.
        lock: of what backups consist of; None is none.
    """

    id: str
    format: int = FORMAT
    features: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"read": (), "write": (), "gc": ()}
    )
    suites: Mapping[str, str] = field(default_factory=lambda: dict(_SUITES))
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    lock: Lock | None = None

    @classmethod
    def new(
        cls,
        own: str,
        capabilities: Mapping[str, bool],
        *,
        encrypted: bool,
        lock: Lock | None = None,
    ) -> Config:
        """The settings of a new repository."""
        alone = () if capabilities["create_only"] else (SINGLE_WRITER,)
        read = ("encrypted",) if encrypted else ()
        return cls(
            id=own,
            features={"read": read, "write": alone + ((_LOCK,) if lock else ()), "gc": alone},
            suites=dict(_SUITES_ENCRYPTED if encrypted else _SUITES),
            capabilities=capabilities,
            lock=lock,
        )

    @property
    def encrypted(self) -> bool:
        """Whether everything in it but the settings is encrypted."""
        return "encrypted" in self.features.get("read", ())

    def encode(self) -> bytes:
        """The object's bytes."""
        fields: dict[str, Any] = {
            "nbdpull": "repository",
            "format": self.format,
            "id": self.id,
            "id_check": _id_check(self.id),
            "features": {name: list(value) for name, value in self.features.items()},
            "suites": dict(self.suites),
            "capabilities": dict(self.capabilities),
        }
        if self.lock is not None:
            fields["lock"] = {"mode": self.lock.mode, "seconds": self.lock.duration_s}
        return (json.dumps(fields, indent=2) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes) -> Config:
        """The opposite of `encode`. Keys that it does not know are passed over.

        Raises:
            FormatError: it was never written by `encode`.
        """
        try:
            fields: Any = json.loads(raw)
        except (ValueError, RecursionError) as exc:
            raise FormatError(f"it is no JSON ({exc})") from exc
        if not isinstance(fields, dict) or fields.get("nbdpull") != "repository":
            raise FormatError("it does not describe a repository")
        own, number = fields.get("id"), fields.get("format")
        if type(number) is not int:
            raise FormatError("its 'format' is no number")
        if (
            not isinstance(own, str)
            or not is_hex(own, 32)
            or fields.get("id_check") != _id_check(own)
        ):
            raise FormatError("its 'id' is not the one that was written")
        features = _mapping(fields, "features")
        return cls(
            id=own,
            format=number,
            features={concern: _names(features, concern) for concern in _KNOWN},
            suites={name: _typed(value, str) for name, value in _mapping(fields, "suites").items()},
            capabilities={
                name: _typed(value, bool)
                for name, value in _mapping(fields, "capabilities").items()
            },
            lock=_lock(fields) if _LOCK in _names(features, "write") else None,
        )

    @property
    def single_writer(self) -> bool:
        """Whether the store lets objects be overwritten: see docs/decisions/0011-single-writer.md."""
        return SINGLE_WRITER in self.features["gc"]

    def unknown(self, use: str) -> str | None:
        """What of this repository this version does not know and must, for `use`; None when nothing."""
        if self.format != FORMAT:
            return f"format {self.format} (this version knows {FORMAT})"
        for concern in dict.fromkeys(("read", use)):
            for feature in self.features.get(concern, ()):
                if feature not in _KNOWN[concern]:
                    return f"{concern} feature '{feature}'"
        suites = _SUITES_ENCRYPTED if self.encrypted else _SUITES
        for name in (*suites, *self.suites):
            if suites.get(name) != self.suites.get(name):
                return f"{name} suite '{self.suites.get(name)}'"
        return None


def _id_check(own: str) -> str:
    """A flipped digit in the id would make every pack look like another repository's."""
    return blake3(f"nbdpull repository {own}".encode()).hexdigest()[:_ID_CHECK_DIGITS]


def _mapping(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise FormatError(f"its '{name}' is no object")
    return value


def _lock(fields: Mapping[str, Any]) -> Lock:
    value = _mapping(fields, "lock")
    mode, duration_s = value.get("mode"), value.get("seconds")
    if mode not in LOCK_MODES or type(duration_s) is not int or not 0 < duration_s <= LOCK_MAX_S:
        raise FormatError("its lock is none that can be")
    return Lock(mode=mode, duration_s=duration_s)


def _names(features: Mapping[str, Any], concern: str) -> tuple[str, ...]:
    value = features.get(concern)
    if not isinstance(value, list):
        raise FormatError(f"its features have no list '{concern}'")
    return tuple(_typed(name, str) for name in value)


def _typed(value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise FormatError(f"it has {value!r}, expected a {kind.__name__}")
    return value
