"""The cryptographic parts that the repository is built from; the only importer of `cryptography`.

AEAD is AES-256-GCM, key derivation HKDF-SHA256 (RFC 5869), sealing to a public key HPKE (RFC 9180, base
mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM), passwords go through Argon2id (RFC 9106) or
scrypt (RFC 7914). What each is used for is in `sealing` and `keyring`.
"""
# The library is loaded by what uses it: where nothing is encrypted a backup need not.
# ruff: noqa: PLC0415

from __future__ import annotations

import functools
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdpull.model.frame import TAG_SIZE, Buffer, FormatError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.hpke import Suite

__all__ = [
    "HPKE_OVERHEAD",
    "KEY_SIZE",
    "Aead",
    "Kdf",
    "KdfName",
    "NotAuthenticError",
    "derive",
    "hpke_open",
    "hpke_seal",
    "new_secret",
    "public_of",
    "stretch",
]

KEY_SIZE: Final = 32
HPKE_OVERHEAD: Final = 32 + TAG_SIZE
_NONCE_SIZE: Final = 12


class NotAuthenticError(FormatError):
    """Sealed bytes that were not sealed with this key, for this place: changed, moved, or forged."""


class Aead:
    """AES-256-GCM with one key. Calls may come from many threads.

    A number must never be used twice to seal with the same key.
    """

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes")
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(key)

    def seal(self, number: int, data: Buffer, aad: bytes) -> bytes:
        """`data` encrypted, and its tag of 16 bytes."""
        return self._cipher.encrypt(number.to_bytes(_NONCE_SIZE, "little"), data, aad)

    def seal_into(self, number: int, data: Buffer, aad: bytes, out: Buffer) -> None:
        """The same into `out`, which has 16 bytes more than `data`."""
        self._cipher.encrypt_into(number.to_bytes(_NONCE_SIZE, "little"), data, aad, out)

    def open(self, number: int, sealed: Buffer, aad: bytes) -> bytes:
        """What was sealed.

        Raises:
            NotAuthenticError: it was not, with this key, number and `aad`.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(number.to_bytes(_NONCE_SIZE, "little"), sealed, aad)
        except (InvalidTag, ValueError) as exc:
            raise NotAuthenticError("it is not what was sealed there (bad tag)") from exc


def derive(secret: bytes, *, salt: bytes, info: bytes, length: int = KEY_SIZE) -> bytes:
    """HKDF-SHA256."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), length, salt, info).derive(secret)


# -- public keys -----------------------------------------------------------------------------------------


def new_secret() -> bytes:
    """A new X25519 private key, 32 bytes."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(secret: bytes) -> bytes:
    """The public key of a private one."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


@functools.cache
def _suite() -> Suite:
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def hpke_seal(public: bytes, data: bytes, info: bytes) -> bytes:
    """`data` for whoever has the private key: encapsulated key (32 bytes), ciphertext, tag."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    return _suite().encrypt(data, X25519PublicKey.from_public_bytes(public), info)


def hpke_open(secret: bytes, sealed: bytes, info: bytes) -> bytes:
    """What was sealed.

    Raises:
        NotAuthenticError: it was not, for this key and `info`.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    try:
        return _suite().decrypt(sealed, X25519PrivateKey.from_private_bytes(secret), info)
    except (InvalidTag, ValueError) as exc:
        raise NotAuthenticError("it is not what was sealed there (bad tag)") from exc


# -- passwords -------------------------------------------------------------------------------------------


class KdfName(StrEnum):
    """How a password becomes a key."""

    ARGON2ID = "argon2id"
    SCRYPT = "scrypt"


class Kdf(NamedTuple):
    """How a password becomes a key, and what that costs.

    Attributes:
        memory_kib: what it takes.
        passes: Argon2's t, scrypt's p.
        lanes: Argon2's p, scrypt's r.
    """

    name: KdfName
    memory_kib: int
    passes: int
    lanes: int

    def check(self) -> None:
        """Refuse costs that nobody chose: the slot that has them lies in the repository.

        Raises:
            FormatError: more than 1 GiB, or more than 16 passes, or what the algorithm does not take.
        """
        low = 8 * self.lanes if self.name is KdfName.ARGON2ID else 1
        if not (
            0 < self.lanes <= 16 and 0 < self.passes <= 16 and low <= self.memory_kib <= 1 << 20
        ):
            raise FormatError(
                f"{self.name} of {self.memory_kib} KiB, {self.passes} passes and {self.lanes} lanes"
                " can't be"
            )


def stretch(password: bytes, salt: bytes, kdf: Kdf, length: int) -> bytes:
    """The key of a password; slow on purpose.

    Raises:
        FormatError: the costs can't be.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    kdf.check()
    try:
        if kdf.name is KdfName.ARGON2ID:
            return Argon2id(
                salt=salt,
                length=length,
                iterations=kdf.passes,
                lanes=kdf.lanes,
                memory_cost=kdf.memory_kib,
            ).derive(password)
        n = kdf.memory_kib * 1024 // (128 * kdf.lanes)
        return Scrypt(salt=salt, length=length, n=n, r=kdf.lanes, p=kdf.passes).derive(password)
    except (UnsupportedAlgorithm, ValueError) as exc:
        raise FormatError(f"{kdf.name} does not work here: {exc}") from exc
