"""The key slots `key/<kid>` of a repository, and opening it with one of them."""

from __future__ import annotations

import logging
import os
import time
from typing import Final

from nbdpull.errors import DamagedError, RepositoryError, UsageError, WrongKeyError
from nbdpull.model.crypto import Kdf
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import is_hex
from nbdpull.model.keyring import DEFAULT_KDF, SLOT_MAX, Ring, Slot
from nbdpull.model.keysource import KeySource
from nbdpull.model.sealing import SALT_SIZE
from nbdpull.repo.password import password_of, ring_of
from nbdpull.repo.store import KeyMissingError, Store

__all__ = ["add_slot", "chosen_slot", "find_slots", "remove_slot", "unlock"]

_log = logging.getLogger(__name__)

_PREFIX: Final = "key"
_SLOTS_MAX: Final = 64
"""A store must not make a password be tried more often: each time costs memory and a second."""


def find_slots(store: Store, repository: str) -> list[Slot]:
    """The repository's slots, newest keys first. One that can't be read is logged as a warning.

    Raises:
        StoreError: the storage can't be read.
    """
    found = []
    for listed in store.list(_PREFIX):
        kid = listed.key.rpartition("/")[2]
        if not is_hex(kid, 32):
            continue
        try:
            slot = Slot.decode(store.get(listed.key, limit=SLOT_MAX), kid)
        except KeyMissingError:
            continue  # removed between the listing and now
        except (FormatError, RepositoryError) as exc:
            _log.warning("key slot %s is damaged: %s", listed.key, exc)
            continue
        # What a killed 'init' left has the id of a repository that never was.
        if slot.repository == repository:
            found.append(slot)
    return sorted(found, key=lambda slot: (-slot.generation, slot.created, slot.kid))


def add_slot(
    store: Store, ring: Ring, password: bytes, *, label: str = "", kdf: Kdf = DEFAULT_KDF
) -> Slot:
    """Let `password` open the repository too. Durable when it returns."""
    slot = Slot.make(
        ring,
        password,
        kid=os.urandom(16).hex(),
        created=int(time.time()),
        label=label,
        salt=os.urandom(SALT_SIZE),
        kdf=kdf,
    )
    store.create(f"{_PREFIX}/{slot.kid}", slot.encode())
    return slot


def remove_slot(store: Store, slot: Slot) -> None:
    """Delete a slot."""
    store.delete(f"{_PREFIX}/{slot.kid}")


def unlock(store: Store, repository: str, location: str, source: KeySource) -> Ring:
    """The ring of an encrypted repository.

    Raises:
        WrongKeyError: no key is given, or another one.
        DamagedError: the password is right, and its slot is not what was written.
        UsageError: more than one password is given.
    """
    ring = ring_of(source)
    if ring is not None:
        if ring.repository != repository:
            raise WrongKeyError(
                f"the key file is of repository {ring.repository}, {location} is {repository}"
            )
        return ring
    slots = find_slots(store, repository)[:_SLOTS_MAX]
    if not slots:
        raise WrongKeyError(
            f"repository {location} is encrypted and has no usable key slot; give the exported"
            " recovery key in NBDPULL_KEY_FILE"
        )
    password = password_of(source)
    if password is None:
        raise WrongKeyError(
            f"repository {location} is encrypted and no key is given; set NBDPULL_PASSWORD_FILE,"
            " NBDPULL_PASSWORD_COMMAND, NBDPULL_PASSWORD or NBDPULL_KEY_FILE"
        )
    for slot in slots:
        try:
            ring = slot.open(password)
        except WrongKeyError:
            continue
        except FormatError as exc:
            key = f"{_PREFIX}/{slot.kid}"
            raise DamagedError(f"key slot {key} is damaged: {exc}", key=key) from exc
        newest = slots[0].generation
        if slot.generation < newest:
            _log.warning(
                "this password opens generation %d of the keys, the newest is %d: backups made since"
                " can't be read with it; add it again with 'nbdpull key add'",
                slot.generation,
                newest,
            )
        return ring
    raise WrongKeyError(f"the password opens none of the key slots of repository {location}")


def chosen_slot(slots: list[Slot], name: str) -> Slot:
    """The slot with an id, or with a unique beginning of one.

    Raises:
        UsageError: none, or more than one, fits.
    """
    fitting = [slot for slot in slots if name and slot.kid.startswith(name)]
    if len(fitting) != 1:
        raise UsageError(
            f"{len(fitting) or 'no'} key slots begin with '{name}', expected one; see 'nbdpull key list'"
        )
    return fitting[0]
