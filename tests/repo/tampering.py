"""A store that hands out other bytes than were written, and what a reader makes of it.

The objects of a tiny repository lie in memory, so that tens of thousands of damages can be tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdpull.errors import RepositoryError, WrongKeyError
from nbdpull.model.config import Config
from nbdpull.model.keyring import Ring
from nbdpull.repo.repository import Repository
from nbdpull.repo.store import KeyExistsError, KeyMissingError, Listed, Upload
from nbdpull.repo.vault import Vault
from tests.repo.helpers import History, encrypted, restore, small_history

Objects = Mapping[str, bytes]


class MemoryStore:
    """Objects that are only read."""

    def __init__(self, objects: Objects) -> None:
        self.objects = dict(objects)

    def create(self, key: str, data: bytes) -> None:
        raise KeyExistsError(f"{key} of {len(data)} bytes")

    def begin(self, key: str) -> Upload:
        raise KeyExistsError(key)

    def get(self, key: str, *, limit: int) -> bytes:
        return self.get_range(key, 0, limit)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        try:
            return self.objects[key][start : start + length]
        except KeyError:
            raise KeyMissingError(f"{key} is missing") from None

    def stat(self, key: str) -> Listed:
        return Listed(key, len(self.get_range(key, 0, 1 << 40)), 0.0)

    def list(self, prefix: str) -> Iterator[Listed]:
        for key in sorted(self.objects):
            if key.startswith(f"{prefix}/" if prefix else ""):
                yield self.stat(key)

    def sync(self, prefix: str) -> None:
        pass

    def delete(self, key: str) -> None:
        raise KeyMissingError(key)


@dataclass(frozen=True)
class Tiny:
    """An encrypted repository of three backups, and all that is known of it."""

    objects: Objects
    config: Config
    ring: Ring
    history: History

    @classmethod
    def make(cls, root: Path) -> Tiny:
        repository = encrypted(root)
        history = small_history(repository)
        assert repository.vault is not None
        return cls(objects_of(root), repository.config, repository.vault.ring, history)

    def repository(self, objects: Objects) -> Repository:
        """Opened with the right keys over these objects."""
        return Repository(MemoryStore(objects), "memory", self.config, Vault(self.ring))


def objects_of(root: Path) -> dict[str, bytes]:
    """Every object of a local repository."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def read_all(tiny: Tiny, objects: Objects) -> list[str]:
    """Read everything of every backup; returns what was found wrong.

    Raises:
        AssertionError: a wrong byte was handed out.
    """
    repository = tiny.repository(objects)
    found, damaged = repository.scan()
    wrong = [str(one.error) for one in damaged]
    expected = {one.summary.session: one.summary for one in tiny.history.manifests}
    for summary in found:
        # An old or another manifest under a key of its own would be a backup that never was.
        assert summary == expected.get(summary.session), "a summary that was never written"
    for manifest, content in zip(tiny.history.manifests, tiny.history.contents, strict=True):
        try:
            again = repository.manifest(manifest.summary)
            assert again == manifest, "a manifest that was never written"
            reader = repository.reader(again)
            for session, seq in reader.packs():
                reader.check_pack(session, seq)
            wrong += reader.missing_packs()
            assert restore(reader) == content, "wrong bytes were restored"
            wrong += [str(damage) for damage in reader.rebuilt.values()]
        except (RepositoryError, WrongKeyError) as exc:
            wrong.append(str(exc))
    return wrong


READ = ("d/", "m/", "x/")
"""What a restore reads: an intent matters to collectors only, settings and slots to opening."""


def readable(objects: Objects) -> list[str]:
    """The keys of the objects that a restore reads."""
    return [key for key in objects if key.startswith(READ)]


Damage = tuple[str, Objects]
"""What was done, and the objects after it."""


def flip(objects: Objects, rng: random.Random) -> Damage:
    """One bit."""
    key = rng.choice(readable(objects))
    raw = bytearray(objects[key])
    at = rng.randrange(len(raw))
    raw[at] ^= 1 << rng.randrange(8)
    return f"flip {key}:{at}", {**objects, key: bytes(raw)}


def overwrite(objects: Objects, rng: random.Random) -> Damage:
    """Some bytes at once, which a sum of them might miss."""
    key = rng.choice(readable(objects))
    raw = bytearray(objects[key])
    at, length = rng.randrange(len(raw)), rng.randrange(1, 64)
    raw[at : at + length] = rng.randbytes(len(raw[at : at + length]))
    return f"overwrite {key}:{at}", {**objects, key: bytes(raw)}


def truncate(objects: Objects, rng: random.Random) -> Damage:
    """The end of an object."""
    key = rng.choice(readable(objects))
    length = rng.randrange(len(objects[key]))
    return f"truncate {key} to {length}", {**objects, key: objects[key][:length]}


def extend(objects: Objects, rng: random.Random) -> Damage:
    """Something behind an object; behind an index nothing is ever read."""
    key = rng.choice([key for key in readable(objects) if not key.startswith("x/")])
    return f"extend {key}", {**objects, key: objects[key] + rng.randbytes(rng.randrange(1, 100))}


def swap(objects: Objects, rng: random.Random) -> Damage:
    """Two objects' contents."""
    one, other = rng.sample(readable(objects), 2)
    return f"swap {one} {other}", {**objects, one: objects[other], other: objects[one]}


def splice(objects: Objects, rng: random.Random) -> Damage:
    """A part of one object in the place of the same part of another."""
    one, other = rng.sample(readable(objects), 2)
    raw, source = bytearray(objects[one]), objects[other]
    at = rng.randrange(min(len(raw), len(source)))
    length = rng.randrange(1, 200)
    raw[at : at + length] = source[at : at + length]
    return f"splice {one}:{at}+{length} from {other}", {**objects, one: bytes(raw)}


DAMAGES: Sequence[Callable[[Objects, random.Random], Damage]] = (
    flip,
    overwrite,
    truncate,
    extend,
    swap,
    splice,
)
