"""What a backup was told to share with other backups: a base, and a digest cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbdpull.errors import Error
from nbdpull.model.manifest import Manifest
from nbdpull.repo.repository import Backup, DigestIndex, Repository

if TYPE_CHECKING:
    from nbdpull.repo.digestcache import DigestCache  # loads SQLite

__all__ = ["Reusing"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reusing:
    """Where frames are looked for beyond the disk's own earlier backups.

    Attributes:
        base: what the user named.
        index: of its frames.
    """

    base: Backup | None
    index: DigestIndex | None
    cache: DigestCache | None

    @classmethod
    def open(
        cls,
        repository: Repository,
        *,
        base: str | None,
        digest_cache: str | None,
        say: Callable[[str], None],
    ) -> Reusing:
        """Look the base up, read its digests, and open the cache.

        Raises:
            BackupNotFoundError: there is no such base.
            DamagedError: its manifest can't be read.
        """
        found = index = cache = None
        if base is not None:
            found = repository.find(base)
        if not repository.reuses:
            if base is not None or digest_cache is not None:
                say("the store can't tell writers apart, so nothing is shared between backups")
            return cls(None, None, None)
        if found is not None:
            index = repository.digest_index(found)
            if not index.whole:
                say(
                    f"backup {found.id} has more frames than are kept in memory; some are not found"
                )
        if digest_cache is not None:
            from nbdpull.repo.digestcache import DigestCache  # noqa: PLC0415

            cache = DigestCache(Path(digest_cache).absolute(), repository.id)
        return cls(found, index, cache)

    def learn(self, repository: Repository, manifests: Sequence[Manifest]) -> None:
        """Remember what was committed; nothing that can go wrong here harms the backup."""
        if self.cache is not None:
            for manifest in manifests:
                try:
                    repository.learn(self.cache, manifest)
                except Error as exc:
                    _log.warning("the digest cache did not learn this backup: %s", exc)

    def close(self) -> None:
        """Let go of the cache's file."""
        if self.cache is not None:
            self.cache.close()
