"""The primitives against published vectors, and HPKE against a second implementation from its RFC."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.crypto import (
    Aead,
    Kdf,
    KdfName,
    NotAuthenticError,
    derive,
    hpke_open,
    hpke_seal,
    new_secret,
    public_of,
    stretch,
)
from nbdpull.model.frame import FormatError

# -- HPKE as RFC 9180 words it, sections 4 and 5.1, for the one suite that is used --------------------------

KEM_SUITE = b"KEM" + (0x0020).to_bytes(2, "big")
SUITE = b"HPKE" + b"".join(part.to_bytes(2, "big") for part in (0x0020, 0x0001, 0x0002))


def hmac256(key: bytes, data: bytes) -> bytes:
    mac = hmac.HMAC(key, hashes.SHA256())
    mac.update(data)
    return mac.finalize()


def extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac256(salt or bytes(32), b"HPKE-v1" + suite + label + ikm)


def expand(suite: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac256(prk, labelled + b"\x01")[:length]


def schedule(dh: bytes, enc: bytes, public: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and base nonce of the base mode."""
    shared = expand(
        KEM_SUITE, extract(KEM_SUITE, b"", b"eae_prk", dh), b"shared_secret", enc + public, 32
    )
    context = (
        b"\x00" + extract(SUITE, b"", b"psk_id_hash", b"") + extract(SUITE, b"", b"info_hash", info)
    )
    secret = extract(SUITE, shared, b"secret", b"")
    return expand(SUITE, secret, b"key", context, 32), expand(
        SUITE, secret, b"base_nonce", context, 12
    )


def rfc_open(secret: bytes, sealed: bytes, info: bytes) -> bytes:
    enc, ciphertext = sealed[:32], sealed[32:]
    dh = X25519PrivateKey.from_private_bytes(secret).exchange(
        X25519PublicKey.from_public_bytes(enc)
    )
    key, nonce = schedule(dh, enc, public_of(secret), info)
    return AESGCM(key).decrypt(nonce, ciphertext, b"")


def test_the_second_implementation_has_the_keys_of_the_rfc() -> None:
    # RFC 9180, appendix A.1.1: the shared secret is of the KEM alone, so it holds for this suite too.
    secret = bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
    enc = bytes.fromhex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
    dh = X25519PrivateKey.from_private_bytes(secret).exchange(
        X25519PublicKey.from_public_bytes(enc)
    )
    shared = expand(
        KEM_SUITE,
        extract(KEM_SUITE, b"", b"eae_prk", dh),
        b"shared_secret",
        enc + public_of(secret),
        32,
    )
    assert shared.hex() == "fe0e18c9f024ce43799ae393c7e8fe8fce9d218875e8227b0187c04e7d2ea1fc"


@given(st.binary(max_size=200), st.binary(max_size=80))
def test_hpke_is_what_the_rfc_says(data: bytes, info: bytes) -> None:
    secret = new_secret()
    sealed = hpke_seal(public_of(secret), data, info)
    assert len(sealed) == len(data) + 48
    assert rfc_open(secret, sealed, info) == data
    assert hpke_open(secret, sealed, info) == data


def test_hpke_opens_nothing_that_was_changed_or_is_of_another_key_or_context() -> None:
    secret = new_secret()
    sealed = hpke_seal(public_of(secret), b"x" * 64, b"here")
    for at in range(len(sealed)):
        with pytest.raises(NotAuthenticError):
            hpke_open(secret, sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :], b"here")
        with pytest.raises(NotAuthenticError):
            hpke_open(secret, sealed[:at], b"here")
    with pytest.raises(NotAuthenticError):
        hpke_open(secret, sealed, b"there")
    with pytest.raises(NotAuthenticError):
        hpke_open(new_secret(), sealed, b"here")


# -- the others ------------------------------------------------------------------------------------------


def test_aead_is_aes_256_gcm() -> None:
    # The GCM specification's test case 16, whose nonce as a little-endian number is this.
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308")
    nonce = int.from_bytes(bytes.fromhex("cafebabefacedbaddecaf888"), "little")
    data = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    aad = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    sealed = Aead(key).seal(nonce, data, aad)
    assert sealed[-16:].hex() == "76fc6ece0f4e1768cddf8853bb2d551b"
    out = bytearray(len(data) + 16)
    Aead(key).seal_into(nonce, data, aad, out)
    assert bytes(out) == sealed
    assert Aead(key).open(nonce, sealed, aad) == data
    for number, other_aad in ((nonce + 1, aad), (nonce, aad + b"x")):
        with pytest.raises(NotAuthenticError):
            Aead(key).open(number, sealed, other_aad)
    with pytest.raises(NotAuthenticError):
        Aead(key).open(nonce, sealed[:15], aad)


def test_derive_is_hkdf_sha256() -> None:
    # RFC 5869, appendix A.1.
    okm = derive(
        bytes([0x0B] * 22),
        salt=bytes(range(13)),
        info=bytes(range(0xF0, 0xFA)),
        length=42,
    )
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_scrypt_is_that_of_its_rfc() -> None:
    # RFC 7914, section 12: N 1024, r 8, p 16 takes 1 MiB.
    kdf = Kdf(KdfName.SCRYPT, memory_kib=1024, passes=16, lanes=8)
    assert (
        stretch(b"password", b"NaCl", kdf, 64).hex()
        == "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
        "2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640"
    )


def test_argon2id_makes_what_the_reference_does() -> None:
    # Made with the reference implementation: argon2 somesalt -id -t 2 -k 65536 -p 1 -l 32
    kdf = Kdf(KdfName.ARGON2ID, memory_kib=65536, passes=2, lanes=1)
    assert (
        stretch(b"password", b"somesalt", kdf, 32).hex()
        == "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7"
    )


@pytest.mark.parametrize(
    "kdf",
    [
        Kdf(KdfName.ARGON2ID, memory_kib=(1 << 20) + 1, passes=1, lanes=1),
        Kdf(KdfName.ARGON2ID, memory_kib=7, passes=1, lanes=1),
        Kdf(KdfName.ARGON2ID, memory_kib=8, passes=17, lanes=1),
        Kdf(KdfName.ARGON2ID, memory_kib=8, passes=0, lanes=1),
        Kdf(KdfName.ARGON2ID, memory_kib=1024, passes=1, lanes=17),
        Kdf(KdfName.SCRYPT, memory_kib=1000, passes=1, lanes=8),
    ],
)
def test_costs_that_cannot_be_are_refused(kdf: Kdf) -> None:
    with pytest.raises(FormatError):
        stretch(b"password", b"somesalt", kdf, 32)
