"""key: the keys of an encrypted repository: slots under passwords, exported keys, rotation."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from nbdpull.errors import StoreError, UsageError, WrongKeyError
from nbdpull.model.crypto import KdfName
from nbdpull.model.keyring import KDFS, Ring, Slot
from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import KeyExport, KeyInfo
from nbdpull.ops.threads import call
from nbdpull.repo.password import NEW_PASSWORD, password_of, ring_of
from nbdpull.repo.repository import Repository
from nbdpull.repo.slots import Slots, new_keys

__all__ = [
    "KeyOptions",
    "key_add",
    "key_export",
    "key_import",
    "key_list",
    "key_remove",
    "key_rotate",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOptions:
    """Which repository, and with which keys.

    Attributes:
        keys: what opens it now.
        new: where a new password comes from: NBDPULL_NEW_PASSWORD and its like.
        label: of a new slot, for people.
        kdf: what the password of a new slot goes through.
    """

    repository: str
    keys: KeySource | None = None
    new: KeySource = field(default_factory=KeySource)
    label: str = ""
    kdf: KdfName = KdfName.ARGON2ID


async def key_list(options: KeyOptions) -> tuple[KeyInfo, ...]:
    """The slots; no password is needed.

    Raises:
        UsageError: the repository is not encrypted.
    """

    def work() -> tuple[KeyInfo, ...]:
        slots = Repository.slots(options.repository)
        found = slots.find()
        return tuple(_info(slot, _newest(found)) for slot in found)

    return await call(work)


async def key_add(options: KeyOptions) -> KeyInfo:
    """Let a new password open the repository too.

    Raises:
        WrongKeyError: the repository does not open, or there is no new password.
        UsageError: the repository is not encrypted, or the key given is an old or a writer's one.
    """

    def work() -> KeyInfo:
        slots = Repository.slots(options.repository)
        ring = _newest_ring(options.keys, slots)
        slot = slots.add(ring, _new_password(options), label=options.label, kdf=KDFS[options.kdf])
        return _info(slot, slot.generation)

    return await call(work)


async def key_remove(options: KeyOptions, key: str, *, force: bool = False) -> KeyInfo:
    """Delete a slot; who has a copy of it and its password still opens what was written so far.

    Raises:
        UsageError: no such slot, or it is the last one of the newest keys, and not `force`.
    """

    def work() -> KeyInfo:
        slots = Repository.slots(options.repository)
        slot = slots.choose(key)
        found = slots.find()
        newest = _newest(found)
        others = [one for one in found if one.generation == newest and one != slot]
        if not others and not force:
            raise UsageError(
                f"key {slot.kid} is the last one that opens everything; add another first, or export"
                " the recovery key and give --force"
            )
        slots.remove(slot)
        return _info(slot, newest)

    return await call(work)


async def key_rotate(options: KeyOptions) -> KeyInfo:
    """New keys for what is written from now on, in a slot under the new, or else the same, password.

    Raises:
        WrongKeyError: the repository does not open.
        UsageError: the repository is not encrypted, the key given is an old or a writer's one, or it
            is a file and there is no new password.
    """

    def work() -> KeyInfo:
        slots = Repository.slots(options.repository)
        keys = options.keys or KeySource()
        password: bytes | None = None
        if ring_of(keys) is None:
            # Asked for once, and used twice.
            password = password_of(keys)
            if password is not None:
                text = password.decode("utf-8", "surrogateescape")
                keys = KeySource(password=text, environment=False)
        ring = _newest_ring(keys, slots)
        new = password_of(options.new, NEW_PASSWORD) or password
        if new is None:
            raise UsageError(
                f"no new password is given for the new keys; set {NEW_PASSWORD}_FILE, or open the"
                " repository with a password"
            )
        slot = slots.add(ring.rotated(*new_keys()), new, label=options.label, kdf=KDFS[options.kdf])
        return _info(slot, slot.generation)

    return await call(work)


async def key_export(options: KeyOptions, file: str, *, writer: bool = False) -> KeyExport:
    """Write the recovery key, or a key for a host that only backs up, into a new file of mode 0600.

    Raises:
        WrongKeyError: the repository does not open.
        UsageError: the file exists, the repository is not encrypted, or a writer's key is to become
            more than one.
    """

    def work() -> KeyExport:
        slots = Repository.slots(options.repository)
        ring = slots.unlock(options.keys or KeySource())
        if not ring.opens_data and not writer:
            raise UsageError(
                "the key given is a writer's, which no recovery key can be made of; give the password"
            )
        _write(file, (ring.for_writers() if writer else ring).encode())
        return KeyExport(
            repository=options.repository,
            file=file,
            writer=writer,
            generation=len(ring.generations),
        )

    return await call(work)


async def key_import(options: KeyOptions, file: str) -> KeyInfo:
    """Let a new password open the repository, with a recovery key that was exported: the old one is lost.

    Raises:
        WrongKeyError: the file is no recovery key of this repository, or there is no new password.
        UsageError: the repository is not encrypted.
    """

    def work() -> KeyInfo:
        slots = Repository.slots(options.repository)
        ring = ring_of(KeySource(key_file=file, environment=False))
        if ring is None or ring.repository != slots.repository:
            raise WrongKeyError(f"the key file {file} is not of repository {options.repository}")
        if not ring.opens_data:
            raise WrongKeyError(f"the key file {file} is a writer's key; expected a recovery key")
        slot = slots.add(ring, _new_password(options), label=options.label, kdf=KDFS[options.kdf])
        return _info(slot, _newest(slots.find()))

    return await call(work)


def _newest_ring(keys: KeySource | None, slots: Slots) -> Ring:
    ring = slots.unlock(keys or KeySource())
    newest = _newest(slots.find())
    if not ring.opens_data:
        raise UsageError(
            "the key given is a writer's, which changes no keys; give the password or the recovery key"
        )
    if len(ring.generations) < newest:
        raise UsageError(
            f"the key given is of generation {len(ring.generations)}, the newest is {newest};"
            " give a password or a recovery key of the newest"
        )
    return ring


def _newest(slots: list[Slot]) -> int:
    return max((slot.generation for slot in slots), default=1)


def _new_password(options: KeyOptions) -> bytes:
    password = password_of(options.new, NEW_PASSWORD)
    if password is None:
        raise WrongKeyError(
            f"no new password is given; set {NEW_PASSWORD}_FILE, {NEW_PASSWORD}_COMMAND or"
            f" {NEW_PASSWORD}"
        )
    return password


def _info(slot: Slot, newest: int) -> KeyInfo:
    return KeyInfo(
        key=slot.kid,
        time=float(slot.created),
        generation=slot.generation,
        newest=slot.generation == newest,
        kdf=str(slot.kdf.name),
        label=slot.label,
    )


def _write(file: str, raw: bytes) -> None:
    """Make a file that only its owner reads; durable when it returns."""
    path = Path(file)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, raw)
            os.fsync(fd)
        finally:
            os.close(fd)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError as exc:
        raise UsageError(f"{file} exists; give another name") from exc
    except OSError as exc:
        raise StoreError(f"can't write {file}: {exc.strerror}") from exc
