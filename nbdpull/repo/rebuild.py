"""Making a session index again that is lost or damaged: all that it says, its packs say too.

    x/<sid>/<n>      | head | table: for each pack seq, frames, size, digest | directories |
                                                  ^
    d/<sid>/<seq>    | header: salt | frames | directory | footer: frames, digest of the directory |

The manifest has the digest of head and table, so what is made is the very bytes that were written, or it is
refused. Nothing here is believed before that. It takes all packs of the index: where a collector has
deleted one of them the table can't be made again.

Where the repository is encrypted the session's sealed keys stand in the table too. They are looked for in
what is left of the index, in the session's other indexes, its manifests, and its intent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from blake3 import blake3

from nbdpull.errors import WrongKeyError
from nbdpull.model.frame import (
    ENCRYPTED,
    FOOTER_SIZE,
    PACK_HEADER_SIZE,
    FormatError,
    PackHeader,
    decode_footer,
)
from nbdpull.model.ids import SessionId
from nbdpull.model.index import (
    PACKS_PER_INDEX,
    TABLE_MAX,
    IndexTable,
    PackFacts,
    PackPlace,
    encode_table,
    index_envelope,
)
from nbdpull.model.intent import INTENT_MAX, Intent
from nbdpull.model.manifest import HEAD_SIZE, manifest_envelope
from nbdpull.model.sealing import ENVELOPE_MAX, KeyOpener, SessionKeys
from nbdpull.repo.store import KeyMissingError, Listed, Store
from nbdpull.repo.vault import Vault

__all__ = ["pack_directory", "rebuilt_table"]

_T = TypeVar("_T")


def pack_directory(store: Store, key: str, place: PackPlace) -> bytes:
    """The directory that stands in the pack itself, as stored; not verified.

    Raises:
        KeyMissingError: the pack is missing.
    """
    return store.get_range(key, place.size - FOOTER_SIZE - place.length, place.length)


def rebuilt_table(
    store: Store, vault: Vault | None, *, sid: SessionId, number: int, digest: bytes
) -> IndexTable:
    """The table of an index, made from the ends of its packs.

    Args:
        store: where the packs are.
        vault: the keys; None where nothing is encrypted.
        sid: the session.
        number: of the index in the session.
        digest: BLAKE3 of head and table, from the manifest.

    Raises:
        FormatError: what is there does not give the bytes that the manifest vouches for.
    """
    packs = [
        _facts(store, listed, sealed=vault is not None)
        for listed in store.list(f"d/{sid}")
        if int(listed.key.rpartition("/")[2], 16) // PACKS_PER_INDEX == number
    ]
    open_keys = None if vault is None else vault.opener(sid)
    found: Iterable[SessionKeys | None] = (None,)
    if open_keys is not None:
        found = _session_keys(store, open_keys, sid, number)
    for keys in found:
        top = encode_table(sid, number, packs, keys)
        if blake3(top).digest() == digest:
            return IndexTable.decode(
                top, sid=sid, number=number, digest=digest, open_keys=open_keys
            )
    raise FormatError(
        f"the {len(packs)} of its packs that are there don't give what the manifest vouches for"
    )


def _facts(store: Store, listed: Listed, *, sealed: bool) -> PackFacts:
    """What a pack's ends say of it."""
    salt, suite = b"", 0
    if sealed:
        salt, suite = _read(store, listed.key, 0, PACK_HEADER_SIZE, _salt), ENCRYPTED

    def footer(raw: bytes) -> tuple[int, int, bytes]:
        return decode_footer(raw, listed.size, suite)

    end = max(0, listed.size - FOOTER_SIZE)
    _, frames, digest = _read(store, listed.key, end, FOOTER_SIZE, footer)
    return PackFacts(int(listed.key.rpartition("/")[2], 16), frames, listed.size, digest, salt)


def _salt(raw: bytes) -> bytes:
    return PackHeader.decode(raw).salt


def _read(store: Store, key: str, start: int, length: int, decode: Callable[[bytes], _T]) -> _T:
    try:
        return decode(store.get_range(key, start, length))
    except (KeyMissingError, FormatError) as exc:
        raise FormatError(f"{key}: {exc}") from exc


def _session_keys(
    store: Store, open_keys: KeyOpener, sid: SessionId, number: int
) -> Iterator[SessionKeys]:
    """The session's keys, from wherever they are sealed."""
    tried: set[bytes] = set()
    for envelope in _envelopes(store, sid, number):
        if envelope not in tried:
            tried.add(envelope)
            with suppress(FormatError, WrongKeyError):
                yield open_keys(envelope)


def _envelopes(store: Store, sid: SessionId, number: int) -> Iterator[bytes]:
    own = f"x/{sid}/{number}"
    others = [listed.key for listed in store.list(f"x/{sid}") if listed.key != own]
    for key in (own, *others):
        with suppress(KeyMissingError):
            yield index_envelope(store.get_range(key, 0, TABLE_MAX))
    for listed in store.list("m"):
        if listed.key.endswith(f"/{sid}"):
            with suppress(KeyMissingError, FormatError):
                yield manifest_envelope(store.get_range(listed.key, 0, HEAD_SIZE + ENVELOPE_MAX))
    with suppress(KeyMissingError, FormatError):
        yield Intent.decode(store.get(f"s/{sid}", limit=INTENT_MAX)).keys or b""
