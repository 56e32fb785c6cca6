"""What encryption does to the stored form of a session: its keys, its packs, its small objects.

    k_meta, k_data       two random keys a session
      | sealed           with HPKE to the repository's recipients: both keys
      |                  under the writer key: k_meta only      = the envelope
      v
    HKDF(key | digest key, salt, purpose | repository | session)
      |- a pack's keys     salt: random, in the pack's header; nonce: the number of the frame
      '- a small object's  salt: made from its content, so that equal keys never meet other bytes

The digest key keys BLAKE3 and goes into every derived key. It is nowhere in the repository in clear, so
who only has the store can forge nothing, whatever becomes of X25519 one day.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from blake3 import blake3

from nbdpull.errors import WrongKeyError
from nbdpull.model.crypto import (
    HPKE_OVERHEAD,
    KEY_SIZE,
    Aead,
    derive,
    hpke_open,
    hpke_seal,
)
from nbdpull.model.frame import (
    ENCRYPTED,
    HEADER_SIZE,
    TAG_SIZE,
    Buffer,
    FormatError,
    FrameHeader,
    FrameKind,
)
from nbdpull.model.ids import SessionId

__all__ = [
    "ENVELOPE_MAX",
    "SALT_SIZE",
    "SEAL_OVERHEAD",
    "KeyOpener",
    "PackKeys",
    "Recipient",
    "SessionKeys",
    "key_id",
    "open_envelope",
    "seal_envelope",
]

SALT_SIZE: Final = 16
SEAL_OVERHEAD: Final = SALT_SIZE + TAG_SIZE
_ID_SIZE: Final = 8
_FRAME_AAD: Final = 20  # all of a frame's header before the digest
_DIRECTORY_NONCE: Final = 1 << 32  # above every frame's number

_WRAPPED_META: Final = SALT_SIZE + KEY_SIZE + TAG_SIZE
_SEALED_BOTH: Final = 2 * KEY_SIZE + HPKE_OVERHEAD
_ENVELOPE: Final = struct.Struct("<BBH")
_KEYS_MAX: Final = 16
ENVELOPE_MAX: Final = _ENVELOPE.size + _KEYS_MAX * (2 * _ID_SIZE + _WRAPPED_META + _SEALED_BOTH)


def key_id(purpose: bytes, public: bytes) -> bytes:
    """What an envelope calls a key: eight bytes that tell nothing of it."""
    return derive(public, salt=b"nbdpull key id", info=purpose, length=_ID_SIZE)


@dataclass(frozen=True, slots=True, repr=False)
class Recipient:
    """Keys that a session's keys are sealed to, and may be opened with.

    Attributes:
        public: X25519.
        secret: its private key; None for a writer.
        writer: symmetric, for k_meta.
    """

    public: bytes
    secret: bytes | None
    writer: bytes

    @property
    def public_id(self) -> bytes:
        """What an envelope calls `public`."""
        return key_id(b"recipient", self.public)

    @property
    def writer_id(self) -> bytes:
        """What an envelope calls `writer`."""
        return key_id(b"writer", self.writer)


class SessionKeys:
    """The keys of one session. All methods may be called by many threads.

    Attributes:
        sid: the session.
        envelope: its keys, sealed.
        digest_key: the repository's.
    """

    def __init__(
        self,
        *,
        repository: str,
        sid: SessionId,
        meta: bytes,
        data: bytes | None,
        digest_key: bytes,
        envelope: bytes,
    ) -> None:
        self._context = bytes.fromhex(repository) + bytes.fromhex(sid)
        self._meta = meta + digest_key
        self._data = None if data is None else data + digest_key
        self._siv = derive(self._meta, salt=b"", info=b"salt" + self._context)
        self.sid = sid
        self.envelope = envelope
        self.digest_key = digest_key

    def __repr__(self) -> str:
        return f"SessionKeys({self.sid})"

    @property
    def opens_data(self) -> bool:
        """Whether disk data can be decrypted, not only maps and names."""
        return self._data is not None

    def digest(self, raw: Buffer) -> bytes:
        """Keyed BLAKE3-256: what names a frame."""
        return blake3(raw, key=self.digest_key).digest()

    def pack(self, seq: int, salt: bytes) -> PackKeys:
        """The keys of pack `seq`, whose header has this salt."""
        return PackKeys(self, self._context + seq.to_bytes(4, "little"), salt)

    def derive_pack(self, kind: FrameKind, context: bytes, salt: bytes) -> bytes:
        """Key and commitment of the frames of a kind in one pack.

        Raises:
            WrongKeyError: it is the key of disk data, and these are a writer's keys.
        """
        secret = self._data if kind is FrameKind.DATA else self._meta
        if secret is None:
            raise WrongKeyError(
                "this is a writer's key: it adds backups but can't read the data of any; give the"
                " password, or the recovery key in NBDPULL_KEY_FILE"
            )
        return derive(secret, salt=salt, info=b"pack %d" % kind + context, length=2 * KEY_SIZE)

    # -- small objects -----------------------------------------------------------------------------

    def seal(self, purpose: bytes, data: bytes, aad: bytes) -> bytes:
        """`data` encrypted with a key of its own: salt, ciphertext, tag. Equal calls give equal bytes."""
        mac = blake3(key=self._siv)
        for part in (purpose, aad, data):
            mac.update(len(part).to_bytes(8, "little"))
            mac.update(part)
        salt = mac.digest(SALT_SIZE)
        return salt + self._small(purpose, salt).seal(0, data, aad)

    def open(self, purpose: bytes, sealed: bytes, aad: bytes) -> bytes:
        """The opposite of `seal`.

        Raises:
            NotAuthenticError: it was not sealed by this session for this purpose and `aad`.
        """
        salt = sealed[:SALT_SIZE]
        return self._small(purpose, salt).open(0, memoryview(sealed)[SALT_SIZE:], aad)

    def _small(self, purpose: bytes, salt: bytes) -> Aead:
        return Aead(derive(self._meta, salt=salt, info=purpose + b" " + self._context))


KeyOpener = Callable[[bytes], SessionKeys]
"""Opens the envelope of the session that an object is of.

Raises `WrongKeyError` when it is for other keys, `FormatError` when it is not what was written.
"""


class _FrameKeys(NamedTuple):
    aead: Aead
    commitment: bytes


class PackKeys:
    """The keys of one pack. All methods may be called by many threads."""

    __slots__ = ("_context", "_keys", "_session", "salt")

    def __init__(self, session: SessionKeys, context: bytes, salt: bytes) -> None:
        self._session = session
        self._context = context
        self._keys: dict[FrameKind, _FrameKeys] = {}
        self.salt = salt

    def __repr__(self) -> str:
        return f"PackKeys({self._context.hex()})"

    def _of(self, kind: FrameKind) -> _FrameKeys:
        # Two threads may make the same: that does no harm.
        keys = self._keys.get(kind)
        if keys is None:
            raw = self._session.derive_pack(kind, self._context, self.salt)
            keys = self._keys[kind] = _FrameKeys(Aead(raw[:KEY_SIZE]), raw[KEY_SIZE:])
        return keys

    def commitment(self) -> bytes:
        """32 bytes that only these keys have: of the maps' key, then of the data's, 16 each.

        Raises:
            WrongKeyError: these are a writer's keys.
        """
        half = KEY_SIZE // 2
        return (
            self._of(FrameKind.MAP).commitment[:half] + self._of(FrameKind.DATA).commitment[:half]
        )

    def fits(self, commitment: bytes) -> bool:
        """Whether a pack's header has the commitment to these keys, as far as they go."""
        half = KEY_SIZE // 2
        if not self._session.opens_data:
            return self._of(FrameKind.MAP).commitment[:half] == commitment[:half]
        return self.commitment() == commitment

    def digest(self, raw: Buffer) -> bytes:
        """Keyed BLAKE3-256."""
        return self._session.digest(raw)

    def seal_frame(
        self, header: FrameHeader, payload: Buffer, buffer: memoryview
    ) -> tuple[bytes, memoryview]:
        """The stored form of a frame: its header, and its payload in `buffer`.

        The header's place for the digest, which would tell equal frames, holds the tag.

        Args:
            header: with the number of the frame, which no other frame of the pack may have.
            payload: `header.clen` bytes.
            buffer: with room for 16 bytes more.
        """
        out = buffer[: header.clen + TAG_SIZE]
        aead = self._of(header.kind).aead
        aad = self._context + header.encode()[:_FRAME_AAD]
        aead.seal_into(header.number, payload, aad, out)
        tag = bytes(out[header.clen :])
        return header.with_digest(tag.ljust(32, b"\0")).encode(), out[: header.clen]

    def open_frame(self, stored: Buffer, header: FrameHeader) -> bytes:
        """The payload of a stored frame whose header, as stored, is `header`.

        Raises:
            NotAuthenticError: it is not what was sealed there.
            WrongKeyError: it is disk data, and these are a writer's keys.
        """
        if any(header.digest[TAG_SIZE:]):
            raise FormatError("its header has more than a tag")
        aad = self._context + bytes(stored[:_FRAME_AAD])
        sealed = b"".join((memoryview(stored)[HEADER_SIZE:], header.digest[:TAG_SIZE]))
        return self._of(header.kind).aead.open(header.number, sealed, aad)

    def seal_directory(self, raw: bytes) -> bytes:
        """The stored form of the pack's directory, which there is one of."""
        return self._of(FrameKind.MAP).aead.seal(_DIRECTORY_NONCE, raw, self._context)

    def open_directory(self, sealed: bytes) -> bytes:
        """The opposite.

        Raises:
            NotAuthenticError: it is not what was sealed there.
        """
        return self._of(FrameKind.MAP).aead.open(_DIRECTORY_NONCE, sealed, self._context)


# -- the envelope ----------------------------------------------------------------------------------------


def _info(repository: str, sid: SessionId) -> bytes:
    return b"nbdpull session keys 1" + bytes.fromhex(repository) + bytes.fromhex(sid)


def seal_envelope(
    *,
    repository: str,
    sid: SessionId,
    meta: bytes,
    data: bytes,
    recipients: Sequence[Recipient],
    salt: bytes,
) -> bytes:
    """A session's keys for each of `recipients`.

    Args:
        repository: its id.
        sid: the session.
        meta: k_meta, random.
        data: k_data, random.
        recipients: at most 16.
        salt: 16 random bytes.
    """
    info = _info(repository, sid)
    parts = [_ENVELOPE.pack(ENCRYPTED, len(recipients), 0)]
    for one in recipients:
        wrap = Aead(derive(one.writer, salt=salt, info=b"writer" + info))
        parts += [
            one.public_id,
            hpke_seal(one.public, meta + data, info),
            one.writer_id,
            salt,
            wrap.seal(0, meta, b""),
        ]
    return b"".join(parts)


def open_envelope(
    envelope: bytes,
    *,
    repository: str,
    sid: SessionId,
    recipients: Sequence[Recipient],
    digest_key: bytes,
) -> SessionKeys:
    """The keys of a session; without k_data where only the writer's key opens it.

    Raises:
        FormatError: it is not what was sealed for that session.
        WrongKeyError: it is for none of these recipients.
    """
    entry = 2 * _ID_SIZE + _SEALED_BOTH + _WRAPPED_META
    if len(envelope) < _ENVELOPE.size:
        raise FormatError("its envelope of keys is cut")
    suite, count, zero = _ENVELOPE.unpack_from(envelope)
    if suite != ENCRYPTED or zero or not 0 < count <= _KEYS_MAX:
        raise FormatError(
            f"its envelope has suite {suite} and {count} recipients, expected suite 1"
        )
    if len(envelope) != _ENVELOPE.size + count * entry:
        raise FormatError("its envelope of keys has another length than it says")
    info = _info(repository, sid)
    entries = [envelope[at : at + entry] for at in range(_ENVELOPE.size, len(envelope), entry)]
    found = _open_both(entries, recipients, info) or _open_meta(entries, recipients, info)
    if found is None:
        raise WrongKeyError("it is sealed to another key than the one given")
    meta, data = found
    return SessionKeys(
        repository=repository,
        sid=sid,
        meta=meta,
        data=data,
        digest_key=digest_key,
        envelope=envelope,
    )


def _open_both(
    entries: Sequence[bytes], recipients: Sequence[Recipient], info: bytes
) -> tuple[bytes, bytes | None] | None:
    secrets = {one.public_id: one.secret for one in recipients if one.secret is not None}
    for entry in entries:
        secret = secrets.get(entry[:_ID_SIZE])
        if secret is not None:
            both = hpke_open(secret, entry[_ID_SIZE : _ID_SIZE + _SEALED_BOTH], info)
            return both[:KEY_SIZE], both[KEY_SIZE:]
    return None


def _open_meta(
    entries: Sequence[bytes], recipients: Sequence[Recipient], info: bytes
) -> tuple[bytes, bytes | None] | None:
    writers = {one.writer_id: one.writer for one in recipients}
    for entry in entries:
        mine = entry[_ID_SIZE + _SEALED_BOTH :]
        writer = writers.get(mine[:_ID_SIZE])
        if writer is not None:
            salt, wrapped = mine[_ID_SIZE:][:SALT_SIZE], mine[_ID_SIZE + SALT_SIZE :]
            aead = Aead(derive(writer, salt=salt, info=b"writer" + info))
            return aead.open(0, wrapped, b""), None
    return None
