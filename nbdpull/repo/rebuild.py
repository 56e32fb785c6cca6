"""Making a session index again that is lost or damaged: all that it says, its packs say too.

    x/<sid>/<n>      | head | table: for each pack seq, frames, size, digest | directories |
                                                  ^
    d/<sid>/<seq>    | header: salt | frames | directory | footer: frames, digest of the directory |

The manifest has the digest of head and table. Where what the packs say gives it, that is the very table that
was written. Where it does not, because a collector has deleted a pack of the index, or one is damaged at its
ends, there is no such proof: then each pack that is left speaks for itself alone. It must be the one that its
name says, in its session's own keys where the repository is encrypted, and its directory and frames must have
the hashes that it says; nothing new is built on it. See docs/decisions/0108-packs-speak-for-themselves.md.

Where the repository is encrypted the session's sealed keys stand in the table too. They are looked for in
what is left of the index, in the session's other indexes, its manifests, and its intent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

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
from nbdpull.model.ids import SessionId, is_hex
from nbdpull.model.index import (
    FRAMES_PER_PACK,
    PACKS_PER_INDEX,
    TABLE_MAX,
    IndexTable,
    PackFacts,
    PackPlace,
    encode_table,
    index_envelope,
)
from nbdpull.model.manifest import HEAD_SIZE, manifest_envelope
from nbdpull.model.sealing import ENVELOPE_MAX, KeyOpener, SessionKeys
from nbdpull.repo.intents import read_intent
from nbdpull.repo.store import KeyMissingError, Listed, Store
from nbdpull.repo.vault import Vault

__all__ = ["pack_directory", "rebuilt_table"]


def pack_directory(store: Store, key: str, place: PackPlace) -> bytes:
    """The directory that stands in the pack itself, as stored; not verified.

    Raises:
        KeyMissingError: the pack is missing.
    """
    return store.get_range(key, place.size - FOOTER_SIZE - place.length, place.length)


def rebuilt_table(
    store: Store,
    vault: Vault | None,
    *,
    repository: str,
    sid: SessionId,
    number: int,
    digest: bytes,
) -> tuple[IndexTable, bool]:
    """The table of an index, made from the ends of its packs, and whether it is the one that was written.

    If not, it has those packs that are there, by what each says of itself.

    Args:
        store: where the packs are.
        vault: the keys; None where nothing is encrypted.
        repository: its id.
        sid: the session.
        number: of the index in the session.
        digest: BLAKE3 of head and table, from the manifest.

    Raises:
        FormatError: nothing can be told.
    """
    ends = [
        found
        for listed in _packs(store, sid, number)
        if (found := _ends(store, listed, sealed=vault is not None)) is not None
    ]
    open_keys = None if vault is None else vault.opener(sid)
    known: list[SessionKeys | None] = [None]
    if open_keys is not None:
        known = [*_session_keys(store, open_keys, sid, number)]

    def table(packs: Sequence[_Ends], keys: SessionKeys | None, wanted: bytes | None) -> IndexTable:
        top = encode_table(sid, number, [one.facts for one in packs], keys)
        return IndexTable.decode(
            top,
            sid=sid,
            number=number,
            digest=wanted or blake3(top).digest(),
            open_keys=open_keys,
        )

    for keys in known:
        with suppress(FormatError):
            return table(ends, keys, digest), True
    for keys in known:
        own = [one for one in ends if one.are_of(repository, sid, keys)]
        with suppress(FormatError):
            return table(own, keys, None), False
    raise FormatError(f"none of its {len(ends)} packs that are there can tell what it holds")


class _Ends(NamedTuple):
    """What stands at a pack's ends; `header` is None where it is damaged and can be done without."""

    facts: PackFacts
    header: PackHeader | None

    def are_of(self, repository: str, sid: SessionId, keys: SessionKeys | None) -> bool:
        """Whether the pack is the one that its name says."""
        header = self.header
        if header is None or not 0 < self.facts.frames <= FRAMES_PER_PACK:
            return False
        said = (header.repository.hex(), header.session.hex(), header.seq, header.suite)
        if said != (repository, sid, self.facts.seq, 0 if keys is None else ENCRYPTED):
            return False
        return keys is None or keys.pack(header.seq, header.salt).fits(header.commitment)


def _packs(store: Store, sid: SessionId, number: int) -> Iterator[Listed]:
    """The packs of an index that are there."""
    for listed in store.list(f"d/{sid}"):
        name = listed.key.rpartition("/")[2]
        if is_hex(name, 8) and int(name, 16) // PACKS_PER_INDEX == number:
            yield listed


def _ends(store: Store, listed: Listed, *, sealed: bool) -> _Ends | None:
    """What a pack's ends say of it; None where they are damaged."""
    header = None
    with suppress(KeyMissingError, FormatError):
        header = PackHeader.decode(store.get_range(listed.key, 0, PACK_HEADER_SIZE))
    if sealed and header is None:
        return None
    try:
        raw = store.get_range(listed.key, max(0, listed.size - FOOTER_SIZE), FOOTER_SIZE)
        _, frames, digest = decode_footer(raw, listed.size, ENCRYPTED if sealed else 0)
    except (KeyMissingError, FormatError):
        return None
    salt = header.salt if sealed and header is not None else b""
    seq = int(listed.key.rpartition("/")[2], 16)
    return _Ends(PackFacts(seq, frames, listed.size, digest, salt), header)


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
        yield read_intent(store, sid).keys or b""
