"""The key slots `key/<kid>` of a repository, and opening it with one of them."""

from __future__ import annotations

import logging
import os
import time
from typing import Final

from nbdpull.errors import DamagedError, RepositoryError, UsageError, WrongKeyError
from nbdpull.model.crypto import KEY_SIZE, Kdf, new_secret
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import is_hex
from nbdpull.model.keyring import DEFAULT_KDF, LABEL_MAX, SLOT_MAX, Ring, Slot
from nbdpull.model.keysource import KeySource
from nbdpull.model.sealing import SALT_SIZE
from nbdpull.repo.password import password_of, ring_of
from nbdpull.repo.store import KeyMissingError, Store

__all__ = ["Slots", "new_keys"]

_log = logging.getLogger(__name__)

_PREFIX: Final = "key"
_SLOTS_MAX: Final = 64
"""A store must not make a password be tried more often: each time costs memory and a second."""


def new_keys() -> tuple[bytes, bytes]:
    """A private key and a writer key, for `Ring.rotated`."""
    return new_secret(), os.urandom(KEY_SIZE)


class Slots:
    """The slots of one encrypted repository.

    Attributes:
        repository: its id.
        location: as the user gave it.
    """

    def __init__(self, store: Store, repository: str, location: str) -> None:
        self._store = store
        self.repository = repository
        self.location = location

    def find(self) -> list[Slot]:
        """All of them, newest keys first. One that can't be read is logged as a warning.

        Raises:
            StoreError: the storage can't be read.
        """
        found = []
        for listed in self._store.list(_PREFIX):
            kid = listed.key.rpartition("/")[2]
            if not is_hex(kid, 32):
                continue
            try:
                slot = Slot.decode(self._store.get(listed.key, limit=SLOT_MAX), kid)
            except KeyMissingError:
                continue  # removed between the listing and now
            except (FormatError, RepositoryError) as exc:
                _log.warning("key slot %s is damaged: %s", listed.key, exc)
                continue
            # What a killed 'init' left has the id of a repository that never was.
            if slot.repository == self.repository:
                found.append(slot)
        return sorted(found, key=lambda slot: (-slot.generation, slot.created, slot.kid))

    def choose(self, name: str) -> Slot:
        """The slot with an id, or with a unique beginning of one.

        Raises:
            UsageError: none, or more than one, fits.
        """
        fitting = [slot for slot in self.find() if name and slot.kid.startswith(name)]
        if len(fitting) != 1:
            raise UsageError(
                f"{len(fitting) or 'no'} key slots begin with '{name}', expected one; see"
                " 'nbdpull key list'"
            )
        return fitting[0]

    def add(self, ring: Ring, password: bytes, *, label: str = "", kdf: Kdf | None = None) -> Slot:
        """Let `password` open the repository too. Durable when it returns.

        Raises:
            UsageError: the label is too long.
        """
        if len(label) > LABEL_MAX:
            raise UsageError(f"the label has {len(label)} characters, at most {LABEL_MAX} may be")
        slot = Slot.make(
            ring,
            password,
            kid=os.urandom(16).hex(),
            created=int(time.time()),
            label=label,
            salt=os.urandom(SALT_SIZE),
            kdf=kdf or DEFAULT_KDF,
        )
        self._store.create(f"{_PREFIX}/{slot.kid}", slot.encode())
        return slot

    def remove(self, slot: Slot) -> None:
        """Delete a slot."""
        self._store.delete(f"{_PREFIX}/{slot.kid}")

    def unlock(self, source: KeySource) -> Ring:
        """The ring.

        Raises:
            WrongKeyError: no key is given, or another one.
            DamagedError: the password is right, and its slot is not what was written.
            UsageError: more than one password is given.
        """
        ring = ring_of(source)
        if ring is not None:
            if ring.repository != self.repository:
                raise WrongKeyError(
                    f"the key file is of repository {ring.repository}, {self.location} is"
                    f" {self.repository}"
                )
            return ring
        slots = self.find()[:_SLOTS_MAX]
        if not slots:
            raise WrongKeyError(
                f"repository {self.location} is encrypted and has no usable key slot; give the exported"
                f" recovery key in {source.variables}_KEY_FILE"
            )
        password = password_of(source)
        name = source.variables
        if password is None:
            raise WrongKeyError(
                f"repository {self.location} is encrypted and no key is given; set {name}_PASSWORD_FILE,"
                f" {name}_PASSWORD_COMMAND, {name}_PASSWORD or {name}_KEY_FILE"
            )
        damaged: DamagedError | None = None
        for slot in slots:
            try:
                ring = slot.open(password)
            except WrongKeyError:
                continue
            except FormatError as exc:
                # Another slot may have the same password; and anybody can put a changed copy there.
                key = f"{_PREFIX}/{slot.kid}"
                damaged = DamagedError(f"key slot {key} is damaged: {exc}", key=key)
                continue
            if slot.generation < slots[0].generation:
                _log.warning(
                    "this password opens generation %d of the keys, the newest is %d: backups made"
                    " since can't be read with it; add it again with 'nbdpull key add'",
                    slot.generation,
                    slots[0].generation,
                )
            return ring
        if damaged is not None:
            raise damaged
        raise WrongKeyError(
            f"the password opens none of the key slots of repository {self.location}"
        )
