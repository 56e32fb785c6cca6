"""A repository's long-lived keys, and the two forms that they are kept in.

    ring            digest key, and for each generation: X25519 key pair, writer key
      |- slot       the whole ring, sealed under a password: `key/<kid>` in the repository
      |- recovery   the whole ring in a file, to be kept away from the repository
      '- writer     the ring without private keys in a file, for a host that only backs up

A new password is a new slot. A new generation begins when keys are rotated: what is written from then on
is sealed to the new key pair, and the older ones stay in the ring for what is there already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from blake3 import blake3

from nbdpull.errors import WrongKeyError
from nbdpull.model.crypto import (
    KEY_SIZE,
    Aead,
    Kdf,
    KdfName,
    public_of,
    stretch,
)
from nbdpull.model.frame import FormatError
from nbdpull.model.ids import is_hex
from nbdpull.model.sealing import SALT_SIZE, Recipient

__all__ = ["DEFAULT_KDF", "KDFS", "KEY_FILE_MAX", "LABEL_MAX", "SLOT_MAX", "Ring", "Slot"]

DEFAULT_KDF: Final = Kdf(KdfName.ARGON2ID, memory_kib=256 << 10, passes=2, lanes=4)
KDFS: Final = {
    KdfName.ARGON2ID: DEFAULT_KDF,
    KdfName.SCRYPT: Kdf(KdfName.SCRYPT, memory_kib=256 << 10, passes=1, lanes=8),
}
"""What new slots take: as much memory, and about as long."""
SLOT_MAX: Final = 64 << 10
KEY_FILE_MAX: Final = 64 << 10
_GENERATIONS_MAX: Final = 64
LABEL_MAX: Final = 100
_CHECK_DIGITS: Final = 16


@dataclass(frozen=True, slots=True, repr=False)
class Ring:
    """The long-lived keys of one repository.

    Attributes:
        repository: its id.
        digest_key: keys BLAKE3, and goes into every derived key.
        generations: oldest first; the last one is in use.
    """

    repository: str
    digest_key: bytes
    generations: tuple[Recipient, ...]

    @property
    def opens_data(self) -> bool:
        """Whether it restores; a writer's ring does not."""
        return self.generations[-1].secret is not None

    def rotated(self, secret: bytes, writer: bytes) -> Ring:
        """With a new generation, of a new private key and a new writer key."""
        new = Recipient(public_of(secret), secret, writer)
        return replace(self, generations=(*self.generations, new))

    def for_writers(self) -> Ring:
        """Without private keys."""
        return replace(
            self,
            generations=tuple(replace(one, secret=None) for one in self.generations),
        )

    def encode(self) -> bytes:
        """Its form in a file, or, sealed, in a slot."""
        fields: dict[str, Any] = {
            "nbdpull": "recovery key" if self.opens_data else "writer key",
            "version": 1,
            "repository": self.repository,
            "digest_key": self.digest_key.hex(),
            "generations": [
                {
                    "public": one.public.hex(),
                    "writer": one.writer.hex(),
                    **({} if one.secret is None else {"secret": one.secret.hex()}),
                }
                for one in self.generations
            ],
        }
        fields["check"] = _check(fields)
        return (json.dumps(fields, indent=2) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes) -> Ring:
        """The opposite of `encode`; white space may differ.

        Raises:
            FormatError: it was never written by `encode`, or a digit was changed.
        """
        fields = _loads(raw)
        if fields.get("nbdpull") not in {"recovery key", "writer key"}:
            raise FormatError("it is no key of nbdpull")
        if fields.get("version") != 1:
            raise FormatError(f"it has version {fields.get('version')!r}, expected 1")
        if fields.pop("check", None) != _check(fields):
            raise FormatError("it has been changed: its check does not fit")
        generations = fields.get("generations")
        if not isinstance(generations, list) or not 0 < len(generations) <= _GENERATIONS_MAX:
            raise FormatError("it has no list of generations")
        ring = cls(
            repository=_hex(fields, "repository", 16).hex(),
            digest_key=_hex(fields, "digest_key", KEY_SIZE),
            generations=tuple(map(_generation, generations)),
        )
        recovery = fields["nbdpull"] == "recovery key"
        if any((one.secret is not None) != recovery for one in ring.generations):
            raise FormatError("it has other private keys than its kind says")
        return ring


def _generation(fields: object) -> Recipient:
    if not isinstance(fields, dict):
        raise FormatError("it has a generation that can't be")
    secret = _hex(fields, "secret", KEY_SIZE) if "secret" in fields else None
    public = _hex(fields, "public", KEY_SIZE)
    if secret is not None and public_of(secret) != public:
        raise FormatError("it has a public key that is not its private key's")
    return Recipient(public, secret, _hex(fields, "writer", KEY_SIZE))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Slot:
    """A ring under a password.

    Attributes:
        kid: its name, 32 hex digits.
        repository: the id of the one that it belongs to.
        generation: of the newest key in it, from 1.
        created: seconds since the Unix epoch.
        label: for people.
        salt: random.
        commitment: what only the right password gives.
        sealed: the ring.
    """

    kid: str
    repository: str
    generation: int
    created: int
    label: str
    kdf: Kdf
    salt: bytes
    commitment: bytes = b""
    sealed: bytes = b""

    @classmethod
    def make(
        cls,
        ring: Ring,
        password: bytes,
        *,
        kid: str,
        created: int,
        label: str,
        salt: bytes,
        kdf: Kdf = DEFAULT_KDF,
    ) -> Slot:
        """A slot for `ring`; `kid` and `salt` (16 bytes) must be random."""
        slot = cls(
            kid=kid,
            repository=ring.repository,
            generation=len(ring.generations),
            created=created,
            label=label,
            kdf=kdf,
            salt=salt,
        )
        keys = stretch(password, salt, kdf, 2 * KEY_SIZE)
        slot = replace(slot, commitment=keys[KEY_SIZE:])
        sealed = Aead(keys[:KEY_SIZE]).seal(0, ring.encode(), slot.aad())
        return replace(slot, sealed=sealed)

    def aad(self) -> bytes:
        """What stands around the sealed ring, and is authenticated with it."""
        return self.kid.encode() + replace(self, sealed=b"").encode()

    def open(self, password: bytes) -> Ring:
        """The ring.

        Raises:
            WrongKeyError: the password is another one.
            FormatError: the slot is not what was written.
        """
        keys = stretch(password, self.salt, self.kdf, 2 * KEY_SIZE)
        if keys[KEY_SIZE:] != self.commitment:
            raise WrongKeyError("the password is wrong")
        ring = Ring.decode(Aead(keys[:KEY_SIZE]).open(0, self.sealed, self.aad()))
        if ring.repository != self.repository or len(ring.generations) != self.generation:
            raise FormatError("it holds another ring than it says")
        return ring

    def encode(self) -> bytes:
        """The object's bytes."""
        fields = {
            "nbdpull": "key",
            "version": 1,
            "repository": self.repository,
            "generation": self.generation,
            "created": self.created,
            "label": self.label,
            "kdf": {
                "name": str(self.kdf.name),
                "memory_kib": self.kdf.memory_kib,
                "passes": self.kdf.passes,
                "lanes": self.kdf.lanes,
            },
            "salt": self.salt.hex(),
            "commitment": self.commitment.hex(),
            "sealed": self.sealed.hex(),
        }
        return (json.dumps(fields, indent=2) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes, kid: str) -> Slot:
        """The opposite of `encode`.

        Raises:
            FormatError: any byte is not as `encode` writes it.
        """
        fields = _loads(raw)
        kdf = fields.get("kdf")
        if fields.get("nbdpull") != "key" or not isinstance(kdf, dict):
            raise FormatError("it is no key slot")
        if fields.get("version") != 1:
            raise FormatError(f"it has version {fields.get('version')!r}, expected 1")
        if kdf.get("name") not in list(KdfName):
            raise FormatError(f"its password goes through {kdf.get('name')!r}, which is unknown")
        label, sealed = fields.get("label"), fields.get("sealed")
        if not isinstance(label, str) or len(label) > LABEL_MAX or not isinstance(sealed, str):
            raise FormatError("it has a label or a sealed part that can't be")
        slot = cls(
            kid=kid,
            repository=_hex(fields, "repository", 16).hex(),
            generation=_count(fields, "generation", _GENERATIONS_MAX),
            created=_count(fields, "created", 1 << 40),
            label=label,
            kdf=Kdf(
                KdfName(kdf["name"]),
                memory_kib=_count(kdf, "memory_kib", 1 << 20),
                passes=_count(kdf, "passes", 16),
                lanes=_count(kdf, "lanes", 16),
            ),
            salt=_hex(fields, "salt", SALT_SIZE),
            commitment=_hex(fields, "commitment", KEY_SIZE),
            sealed=_hex(fields, "sealed", len(sealed) // 2),
        )
        slot.kdf.check()
        if slot.encode() != raw:
            raise FormatError("it is not as it was written")
        return slot


# -- checked values --------------------------------------------------------------------------------------


def _loads(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        # The error's own words would quote the text, and with it a key.
        raise FormatError("it is no JSON") from exc
    if not isinstance(fields, dict):
        raise FormatError("it is no JSON object")
    return fields


def _check(fields: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in fields.items() if name != "check"})
    return blake3(text.encode()).hexdigest()[:_CHECK_DIGITS]


def _hex(fields: Mapping[str, Any], name: str, size: int) -> bytes:
    value = fields.get(name)
    if not isinstance(value, str) or (size and not is_hex(value, 2 * size)):
        raise FormatError(f"its '{name}' is not {2 * size} hex digits")
    return bytes.fromhex(value)


def _count(fields: Mapping[str, Any], name: str, most: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 < value <= most:
        raise FormatError(f"its '{name}' is no number up to {most}")
    return value
