"""Committing a backup again: the same content and id, under new sessions.

It is how a repacked backup takes the place of the old one, and how a forgotten one comes back. An ordinary
session pins each manifest that it stands on, so all that holds for backups holds here: a collector spares
what is needed, or the session is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from nbdpull.errors import DamagedError
from nbdpull.model.ids import DiskId, SessionId
from nbdpull.model.manifest import Manifest, SessionRef, Summary
from nbdpull.repo.repository import Backup, ParentGoneError, Repository, Session
from nbdpull.version import __version__

__all__ = ["Recommit"]


class Recommit:
    """One backup being committed again. End it with `commit` or `abandon`."""

    def __init__(
        self,
        repository: Repository,
        backup: Backup,
        *,
        role: str,
        beside: Mapping[DiskId, Sequence[Manifest]] | None = None,
    ) -> None:
        """Begin a session for each disk.

        Args:
            repository: where.
            backup: must be complete.
            role: of the sessions.
            beside: for each disk, other manifests whose packs the new one may refer to.

        Raises:
            ParentGoneError: a collector is about to delete the backup.
        """
        self._repository = repository
        self._backup = backup
        self.sessions: dict[DiskId, Session] = {}
        self.parents: dict[DiskId, Manifest] = {}
        try:
            for summary in backup.disks:
                others = (beside or {}).get(summary.disk_id, ())
                parent = _joined(_manifest(repository, summary), others)
                self.parents[summary.disk_id] = parent
                self.sessions[summary.disk_id] = repository.begin(
                    vm=summary.vm,
                    disk=summary.disk,
                    parent=parent,
                    pins=[f"{one.summary.disk_id}/{one.summary.session}" for one in others],
                    role=role,
                )
        except BaseException:
            self.abandon()
            raise

    def commit(self) -> list[Manifest]:
        """Make it durable, disk by disk; until the last one is, the old manifests are shown."""
        siblings = tuple((disk, session.id) for disk, session in self.sessions.items())
        for session in self.sessions.values():
            session.seal()
        return [
            self.sessions[summary.disk_id].commit(self._summary(summary, siblings))
            for summary in self._backup.disks
        ]

    def _summary(self, old: Summary, siblings: tuple[tuple[DiskId, SessionId], ...]) -> Summary:
        return replace(
            old,
            session=self.sessions[old.disk_id].id,
            siblings=siblings,
            stored=self._backup.stored,
            tool=f"nbdpull {__version__}",
        )

    def abandon(self) -> None:
        """Give up; what was stored stays for a collector."""
        for session in self.sessions.values():
            session.abandon()


def _manifest(repository: Repository, summary: Summary) -> Manifest:
    try:
        return repository.manifest(summary)
    except DamagedError as exc:
        pin = f"{summary.disk_id}/{summary.session}"
        if repository.is_alive(pin):
            raise
        raise ParentGoneError(f"m/{pin} is being deleted") from exc


def _joined(manifest: Manifest, others: Sequence[Manifest]) -> Manifest:
    """`manifest`, with the sessions that `others` are named by at the end of its table."""
    known = {ref.sid for ref in manifest.sessions}
    added: list[SessionRef] = []
    for other in others:
        own = next((ref for ref in other.sessions if ref.sid == other.summary.session), None)
        if own is not None and own.sid not in known:
            known.add(own.sid)
            added.append(own)
    return replace(manifest, sessions=(*manifest.sessions, *added))
