"""A session's intent, `s/<sid>`: who writes, and what a collector must spare for it meanwhile.

JSON, because a person who wonders what runs on a repository can read it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from blake3 import blake3

from nbdpull.errors import RepositoryError
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import SessionId, is_hex

__all__ = ["ADOPTS_MAX", "INTENT_MAX", "Adopts", "Intent", "checked_intent", "is_pin"]

INTENT_MAX: Final = 1 << 20
"""Some 15,000 pins."""
ADOPTS_MAX: Final = 64
"""Sessions that one session takes over, half a kilobyte each."""

_CHECK: Final = ', "check": "{}"}}'
_CHECK_DIGITS: Final = 16
_CHECK_SIZE: Final = len(_CHECK.format("0" * _CHECK_DIGITS))


def checked_intent(raw: bytes, session: str) -> bytes:
    """A JSON object with, as its last member, what tells that it is this session's, to the last byte.

    A collector that believed a pin in which a digit has flipped, or the intent of another session in the
    place of this one's, would delete what the right one spares.
    """
    digest = blake3(session.encode() + raw).hexdigest()[:_CHECK_DIGITS]
    return raw.removesuffix(b"}") + _CHECK.format(digest).encode()


def is_pin(text: str) -> bool:
    """Whether `text` is ``<disk id>/<session id>``: what follows ``m/`` in a manifest's key."""
    disk, _, sid = text.partition("/")
    return is_hex(disk, 32) and is_hex(sid, 32)


@dataclass(frozen=True, slots=True)
class Adopts:
    """A session that another one wants to take over.

    Attributes:
        session: of the same disk.
        keys: its sealed keys, where it is encrypted; its own intent may go as soon as it is taken over.
    """

    session: SessionId
    keys: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """What a session says before it begins.

    Attributes:
        role: ``backup``, ``repack``, ``undo``, ``rekey``, ``copy``, or ``gc``, which has no register and spares nothing.
        disk: id of the disk whose register `m/<disk>/<sid>` it will create; empty for ``gc``.
        pins: manifests (`is_pin`) whose packs the session may refer to.
        brings: other sessions, whose packs and indexes it copies here: they are spared like its own.
        host, time: for people; no host where the repository is encrypted.
        keys: the session's sealed keys, where it is encrypted.
        adopts: sessions that it wants to take over: whose they are is told by their registers alone.
        process: what tells on its own host whether its process has died, see `nbdpull.repo.alive`.
    """

    role: str
    disk: str
    pins: tuple[str, ...] = ()
    brings: tuple[SessionId, ...] = ()
    host: str = ""
    time: float = 0.0
    keys: bytes | None = None
    adopts: tuple[Adopts, ...] = ()
    process: str = ""

    def encode(self, session: str) -> bytes:
        """The bytes of the object `s/<session>`.

        Raises:
            RepositoryError: no reader would take it.
        """
        fields: dict[str, object] = {
            "role": self.role,
            "disk": self.disk,
            "pins": list(self.pins),
            "time": self.time,
        }
        if self.brings:
            fields["brings"] = list(self.brings)
        if self.host:
            fields["host"] = self.host
        if self.keys is not None:
            fields["keys"] = self.keys.hex()
        if self.process:
            fields["process"] = self.process
        if self.adopts:
            fields["adopts"] = [
                {"session": one.session} | ({} if one.keys is None else {"keys": one.keys.hex()})
                for one in self.adopts
            ]
        raw = checked_intent(json.dumps(fields).encode(), session)
        if len(raw) > INTENT_MAX:
            raise RepositoryError(
                f"what session {session} needs takes {len(raw)} bytes to tell, at most {INTENT_MAX} are"
                f" read: {len(self.pins)} backups, {len(self.brings)} sessions; run 'nbdpull repack'"
            )
        return raw

    @classmethod
    def decode(cls, raw: bytes, session: str) -> Intent:
        """The opposite of `encode`. Keys that it does not know are passed over.

        Raises:
            FormatError: it was never written by `encode`, or for another session.
        """
        body = raw[:-_CHECK_SIZE] + b"}"
        if checked_intent(body, session) != raw:
            raise FormatError(
                "it does not hash to what it says itself, as the intent of this session"
            )
        try:
            fields: Any = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise FormatError(f"it is no JSON ({exc})") from exc
        if not isinstance(fields, dict):
            raise FormatError("it is no JSON object")
        role, disk, pins = fields.get("role"), fields.get("disk"), fields.get("pins")
        if not isinstance(role, str) or not isinstance(disk, str) or not isinstance(pins, list):
            raise FormatError("it has no 'role', 'disk' or 'pins'")
        if not (is_hex(disk, 32) or (role == "gc" and not disk)):
            raise FormatError("its 'disk' is no disk id")
        if not all(isinstance(pin, str) and is_pin(pin) for pin in pins):
            raise FormatError("it has a pin that can't be")
        brings = fields.get("brings", [])
        if not isinstance(brings, list) or not all(
            isinstance(sid, str) and is_hex(sid, 32) for sid in brings
        ):
            raise FormatError("it brings a session that can't be")
        host, time, keys = fields.get("host"), fields.get("time"), fields.get("keys")
        process = fields.get("process")
        return cls(
            role=role,
            disk=disk,
            pins=tuple(pins),
            brings=tuple(map(SessionId, brings)),
            host=host if isinstance(host, str) else "",
            time=float(time) if isinstance(time, float) else 0.0,
            keys=_envelope(keys),
            adopts=_adopts(fields.get("adopts")),
            process=process if isinstance(process, str) else "",
        )


def _envelope(keys: object) -> bytes | None:
    try:
        return bytes.fromhex(keys) if isinstance(keys, str) else None
    except ValueError as exc:
        raise FormatError("its 'keys' are no hex digits") from exc


def _adopts(listed: object) -> tuple[Adopts, ...]:
    found = []
    for one in listed if isinstance(listed, list) else ():
        sid = one.get("session") if isinstance(one, dict) else None
        if not isinstance(sid, str) or not is_hex(sid, 32):
            raise FormatError("it adopts what is no session")
        found.append(Adopts(SessionId(sid), _envelope(one.get("keys"))))
    return tuple(found)
