r"""What a run leaves on record of its point in time, so that another process can go on at it.

Written into the run's folder once everything stands in QEMU, read by the chain's next backup. It says only what
neither QEMU nor the repository tells; whoever reads it makes the plan anew and compares. It is believed only
where it is a file of this user or root: the folder may be QEMU's user's. It need not survive the host: nor does
QEMU, and without it the next backup takes a new point in time.

    <blake3 of the rest, hex>\n<JSON>
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, TypeVar

from blake3 import blake3

from nbdpull.model.results import Level, Quiesced

__all__ = ["RECORD_MAX", "Unfinished", "UnfinishedDisk"]

RECORD_MAX: Final = 1 << 20
"""Bytes; some thousand disks."""

_VERSION: Final = 2
"""1 did not tell of what was trimmed."""
_DISKS_MAX: Final = 4096
_TEXT_MAX: Final = 4096
_HEAD: Final = 65
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedDisk:
    """One disk of it.

    Attributes:
        base: name of the bitmap that its changes were counted from; None where all of it is read.
        checkpoint: name of the bitmap that records since; None for a copy.
        lie: what the audit found that `base` calls clean and is not; no part of the plan.
    """

    name: str
    size: int
    level: Level
    base: str | None
    checkpoint: str | None
    lie: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A point in time whose backup did not come to its end.

    Attributes:
        backup: its id.
        chain: the id of its chain, which stands for repository, VM and chain.
        time: of the point in time, seconds since 1970.
        pid: of the process that made it; only told to the user.
        asked: the level that was asked for.
        disks: in the order that QEMU's names count them.
        guest_first, trims: how it was made; see `QemuOptions`.
        server: a digest of how its exports are reached, see `QemuPointInTime`.
        port: of the NBD server that was started with TLS on loopback.
        listens: it started the NBD server that is reached by an address of the user's.
        machine: BLAKE3, in hex, of the archive of files that are kept with it; None for none.
        pause_s: how long the guest was stopped for it.
        quiesced: what the guest's agent froze for it.
    """

    backup: str
    chain: str
    time: float
    pid: int
    asked: Level | None
    disks: tuple[UnfinishedDisk, ...]
    guest_first: bool = False
    trims: bool = False
    server: str = ""
    port: int | None = None
    listens: bool = False
    machine: str | None = None
    pause_s: float = 0.0
    quiesced: Quiesced | None = None

    @property
    def run(self) -> str:
        """The run, as it is named in QEMU."""
        return self.backup[:8]

    def with_lie(self, disk: str, lie: str) -> Unfinished:
        """The same, with what the audit found of a disk."""
        disks = (replace(one, lie=lie) if one.name == disk else one for one in self.disks)
        return replace(self, disks=tuple(disks))

    def encode(self) -> bytes:
        """What is written."""
        raw = json.dumps({"version": _VERSION} | asdict(self), sort_keys=True).encode()
        return blake3(raw).hexdigest().encode() + b"\n" + raw

    @classmethod
    def decode(cls, raw: bytes) -> Unfinished:
        """The opposite.

        Raises:
            ValueError: any bytes that `encode` does not write.
        """
        if len(raw) > RECORD_MAX or raw[: _HEAD - 1] != blake3(raw[_HEAD:]).hexdigest().encode():
            raise ValueError("the record is damaged, or cut short")
        try:
            fields = _Fields(json.loads(raw[_HEAD:]))
        except RecursionError as exc:
            raise ValueError("the record is nested too deeply") from exc
        if fields.take("version", int) != _VERSION:
            raise ValueError("the record is of another version of nbdpull")
        made = cls(
            backup=fields.text("backup", r"[0-9a-f]{16}"),
            chain=fields.text("chain", r"[0-9a-f]{12}"),
            time=fields.number("time"),
            pid=fields.count("pid"),
            asked=fields.maybe("asked", lambda name: Level(fields.text(name))),
            disks=tuple(map(_disk, fields.rows("disks"))),
            guest_first=fields.take("guest_first", bool),
            trims=fields.take("trims", bool),
            server=fields.text("server", r"[0-9a-f]{64}"),
            port=fields.maybe("port", lambda name: fields.count(name, most=65535)),
            listens=fields.take("listens", bool),
            machine=fields.maybe("machine", lambda name: fields.text(name, r"[0-9a-f]{64}")),
            pause_s=fields.number("pause_s"),
            quiesced=fields.maybe("quiesced", lambda name: _quiesced(_Fields(fields.raw[name]))),
        )
        fields.end()
        if not made.disks:
            raise ValueError("the record names no disk")
        return made


class _Fields:
    """The fields of one JSON object, each of which is to be taken once."""

    def __init__(self, raw: object) -> None:
        if not isinstance(raw, dict):
            raise ValueError(f"expected an object, got {type(raw).__name__}")  # noqa: TRY004 - bad input, no bug
        self.raw: dict[str, Any] = raw
        self._taken: set[str] = set()

    def take(self, name: str, kind: type[_T]) -> _T:
        self._taken.add(name)
        value = self.raw.get(name)
        # Not isinstance: True would pass for a number.
        if type(value) is not kind:
            raise ValueError(f"'{name}' is {type(value).__name__}, expected {kind.__name__}")
        return value

    def text(self, name: str, pattern: str = r"[^\x00]+") -> str:
        value = self.take(name, str)
        if len(value) > _TEXT_MAX or not re.fullmatch(pattern, value, re.DOTALL):
            raise ValueError(f"'{name}' can't be what it says")
        return value

    def count(self, name: str, *, most: int = 1 << 63) -> int:
        value = self.take(name, int)
        if not 1 <= value <= most:
            raise ValueError(f"'{name}' is {value}, expected 1 to {most}")
        return value

    def number(self, name: str) -> float:
        value = self.take(name, float)
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"'{name}' is {value}, expected 0 or more")
        return value

    def maybe(self, name: str, read: Callable[[str], _T]) -> _T | None:
        if name in self.raw and self.raw[name] is None:
            self._taken.add(name)
            return None
        self._taken.add(name)
        if name not in self.raw:
            raise ValueError(f"'{name}' is missing")
        return read(name)

    def rows(self, name: str) -> list[_Fields]:
        value = self.take(name, list)
        if len(value) > _DISKS_MAX:
            raise ValueError(f"'{name}' has {len(value)} entries, expected at most {_DISKS_MAX}")
        return [_Fields(one) for one in value]

    def end(self) -> None:
        unknown = self.raw.keys() - self._taken
        if unknown:
            raise ValueError(f"the record has {len(unknown)} unknown fields")


def _disk(fields: _Fields) -> UnfinishedDisk:
    made = UnfinishedDisk(
        name=fields.text("name"),
        size=fields.count("size"),
        level=Level(fields.text("level")),
        base=fields.maybe("base", fields.text),
        checkpoint=fields.maybe("checkpoint", fields.text),
        lie=fields.maybe("lie", fields.text),
    )
    fields.end()
    return made


def _quiesced(fields: _Fields) -> Quiesced:
    points = fields.take("mountpoints", list)
    if len(points) > _DISKS_MAX or not all(
        isinstance(one, str) and len(one) <= _TEXT_MAX for one in points
    ):
        raise ValueError("'mountpoints' is no list of paths")
    filesystems = fields.take("filesystems", int)
    if filesystems < 0:
        raise ValueError(f"'filesystems' is {filesystems}, expected 0 or more")
    made = Quiesced(
        filesystems=filesystems, mountpoints=tuple(points), frozen_s=fields.number("frozen_s")
    )
    fields.end()
    return made
