"""A small repository, damaged in every way there is; each restore must be right, or fail loudly.

    flip      each bit of each object
    invert    each byte, and zero it
    cut       each object to each length (to a sample of lengths where it is long)
    empty, delete, grow
    swap      each object with each other one of its kind

Restores go through the same code as the program's, into a target that compares each byte that is written
with what the disk held: a wrong one counts even when the restore fails afterwards.

A backup that is not listed must be told of: a manifest that can't be read, unless the very object is gone. `latest`
must be the newest backup, or an error. Where all restores are right, `verify` must still find the damage.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbdpull.errors import Error
from nbdpull.model.ids import BackupId
from nbdpull.model.manifest import Summary
from nbdpull.ops.meter import Meter
from nbdpull.ops.push import DiskPush, push
from nbdpull.ops.verify import VerifyOptions, verify
from nbdpull.repo.repository import Repository

__all__ = ["Case", "Counts", "cases", "objects", "try_case"]


@dataclass(frozen=True)
class Case:
    """One damage: the files to replace, None for one that goes."""

    name: str
    files: Mapping[str, bytes | None]


@dataclass
class Counts:
    """What became of the restores: three of each case."""

    cases: int = 0
    right: int = 0
    loud: int = 0
    absent: int = 0
    """Backups whose manifest was deleted, which nothing can tell."""
    latest_loud: int = 0
    verified: int = 0
    """Cases of which no restore told, and `verify` did."""
    unseen: Counter[str] = field(default_factory=Counter)
    """Cases of which neither told, by the kind of object."""
    wrong: list[str] = field(default_factory=list)


class _Truth:
    """A target that holds nothing: it compares."""

    name = "truth"
    note = ""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.wrong: list[tuple[int, int]] = []
        self.covered = 0

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        if self._content[offset : offset + len(data)] != bytes(data):
            self.wrong.append((offset, len(data)))
        self.covered += len(data)
        return len(data)

    def expect(self, offset: int, length: int) -> None:
        pass

    def zero(self, offset: int, length: int) -> None:
        if self._content.count(0, offset, offset + length) != min(
            length, len(self._content) - offset
        ):
            self.wrong.append((offset, length))
        self.covered += length

    def finish(self) -> None:
        """Nothing to do."""

    def abort(self) -> None:
        """Nothing to do."""


def objects(root: Path) -> dict[str, bytes]:
    """Every object that a restore may look at, by key."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not str(path.relative_to(root)).startswith("s/")
    }


def cases(stored: Mapping[str, bytes], rng: random.Random) -> Iterator[Case]:
    """All of them, in an order of the seed."""
    made: list[tuple[str, str, int]] = []
    for key, raw in stored.items():
        made += [("flip", key, at) for at in range(8 * len(raw))]
        made += [("invert", key, at) for at in range(len(raw))]
        made += [("zero", key, at) for at in range(len(raw)) if raw[at]]
        made += [("cut", key, at) for at in range(len(raw))]
        made += [(what, key, 0) for what in ("delete", "grow", "double")]
        made += [
            ("swap", key, number)
            for number, other in enumerate(stored)
            if other != key and other[0] == key[0]
        ]
    rng.shuffle(made)
    names = list(stored)
    for what, key, at in made:
        raw = stored[key]
        changed: bytes | None
        if what == "flip":
            byte = raw[at // 8] ^ (1 << at % 8)
            changed = raw[: at // 8] + bytes([byte]) + raw[at // 8 + 1 :]
        elif what in {"invert", "zero"}:
            byte = raw[at] ^ 0xFF if what == "invert" else 0
            changed = raw[:at] + bytes([byte]) + raw[at + 1 :]
        elif what == "cut":
            changed = raw[:at]
        elif what == "delete":
            changed = None
        elif what == "swap":
            other = names[at]
            yield Case(f"swap {key} {other}", {key: stored[other], other: raw})
            continue
        else:
            changed = raw + (b"\0" if what == "grow" else raw)
        yield Case(f"{what} {key} {at}", {key: changed})


def _restore(repository: Repository, summary: Summary, content: bytes) -> str:
    """``right``, ``loud``, or what was wrong."""
    target = _Truth(content)
    disk = summary.disk
    try:
        manifest = repository.manifest(summary)
        one = DiskPush(
            name=disk,
            size=summary.size,
            reader=repository.reader(manifest),
            target=target,
            meter=Meter(None, verb="restore", disk=disk, total=summary.size),
        )
        push(one, cancel=threading.Event())
    except Error:
        return f"wrong bytes before it failed: {target.wrong}" if target.wrong else "loud"
    if target.wrong or target.covered != len(content):
        return f"wrong bytes: {target.wrong}, {target.covered} of {len(content)} written"
    return "right"


def _count(results: Mapping[str, str], case: Case, counts: Counts) -> None:
    for backup, result in results.items():
        if result in {"right", "loud", "absent"}:
            setattr(counts, result, getattr(counts, result) + 1)
        else:
            counts.wrong.append(f"{case.name}: backup {backup}: {result}")


def _look_for_latest(
    repository: Repository, newest: str, case: Case, counts: Counts, *, gone: bool
) -> None:
    try:
        found = repository.find("latest").id
    except Error:
        counts.latest_loud += 1
        return
    if found != newest and not gone:
        counts.wrong.append(f"{case.name}: 'latest' is {found}")


def run_verify(root: Path) -> bool:
    """Whether everything is as it was written, as far as `verify` can tell."""
    try:
        return asyncio.run(verify(VerifyOptions(repository=str(root), record=False))).ok
    except Error:
        return False


def try_case(root: Path, case: Case, contents: Mapping[str, bytes], counts: Counts) -> None:
    """Damage the repository, restore every backup, and put it right again."""
    before = {key: (root / key).read_bytes() for key in case.files}
    for key, raw in case.files.items():
        (root / key).unlink()
        if raw is not None:
            (root / key).write_bytes(raw)
    try:
        counts.cases += 1
        try:
            repository = Repository.open(str(root))
            found = {one.id: one.disks[0] for one in repository.backups()}
            unreadable = {one.key for one in repository.unreadable()}
        except Error:
            counts.loud += len(contents)
            return
        gone = {key for key, raw in case.files.items() if raw is None and key.startswith("m/")}
        missing = "absent" if gone else "is not there, and nothing is told of it"
        if unreadable & case.files.keys():
            missing = "loud"
        results = {
            backup: _restore(repository, found[BackupId(backup)], content)
            if BackupId(backup) in found
            else missing
            for backup, content in contents.items()
        }
        _count(results, case, counts)
        _look_for_latest(repository, list(contents)[-1], case, counts, gone=bool(gone))
        if set(results.values()) == {"right"}:
            if not run_verify(root):
                counts.verified += 1
            else:
                counts.unseen[next(iter(case.files)).split("/")[0]] += 1
    finally:
        for key, raw in before.items():
            (root / key).unlink(missing_ok=True)
            (root / key).write_bytes(raw)
