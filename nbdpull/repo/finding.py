"""The backup that a name means, among all that a repository has, and never one in the place of another.

A manifest that can't be read may be of any backup: what it may be is not told to be missing, and not passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nbdpull.errors import BackupNotFoundError
from nbdpull.repo.catalog import Backup, Unreadable, check_readable

__all__ = ["Finder", "check_there"]

_log = logging.getLogger(__name__)

_TOLD = 8


def check_there(
    backups: Sequence[Backup],
    unreadable: Sequence[Unreadable],
    *,
    vm: str | None,
    chain: str | None = None,
) -> None:
    """See that a VM, or a chain, that somebody named has any backups, where there are others.

    Forgotten ones count, and so does what can't be read, and may be one.

    Raises:
        BackupNotFoundError: it has none; most likely it is called otherwise.
    """
    vms = {one.vm for one in backups}
    chains = {one.chain for one in backups if vm in {None, one.vm}}
    for what, name, there in (("VM", vm, vms), ("chain", chain, chains)):
        if name is not None and there and not unreadable and name not in there:
            listed = ", ".join(f"'{one}'" for one in sorted(there)[:_TOLD])
            more = f" and {len(there) - _TOLD} more" if len(there) > _TOLD else ""
            raise BackupNotFoundError(
                f"no backup is of a {what} '{name}'; there are backups of {listed}{more}"
            )


class Finder:
    """Finds among the backups of all VMs, or of one."""

    def __init__(
        self,
        location: str,
        backups: Sequence[Backup],
        unreadable: Sequence[Unreadable],
        *,
        vm: str | None,
    ) -> None:
        """Prepare.

        Args:
            location: the repository's, for messages.
            backups: all there are, oldest first, forgotten ones too.
            unreadable: manifests that are in none of these.
            vm: only backups of this VM; None for any.
        """
        self._location = location
        self._of_vm = "" if vm is None else f" of VM '{vm}'"
        self._backups = [one for one in backups if vm in {None, one.vm}]
        others = {summary.disk_id for one in backups if one.vm != vm for summary in one.disks}
        self._unreadable = [
            one for one in unreadable if vm is None or one.key.split("/")[1] not in others
        ]

    def latest(self) -> Backup:
        """The newest complete one that is not forgotten.

        Raises:
            BackupNotFoundError: there is none, or there are several VMs.
            DamagedError, WrongKeyError: it can't be told, because a manifest can't be read.
        """
        there = [one for one in self._backups if one.forgotten is None]
        if not there:
            raise self._nothing()
        complete = [one for one in there if one.complete]
        names = sorted({one.vm for one in complete})
        if len(names) > 1:
            raise BackupNotFoundError(
                f"'latest' could be of any of the VMs {', '.join(names)}; choose one with --vm"
            )
        newest = complete[-1] if complete else None
        # By the clocks of the hosts that wrote: as the order of the backups.
        later = [one for one in self._unreadable if newest is None or one.began >= newest.time]
        then = "" if newest is None else f"; if {newest.id} is meant, give that id"
        check_readable(later, f"which backup{self._of_vm} is the latest can't be told", then)
        if newest is None:
            raise BackupNotFoundError(
                f"repository {self._location} has no complete backup{self._of_vm}; see 'nbdpull list'"
            )
        for one in there:
            if not one.complete and one.time > newest.time:
                _log.warning(
                    "backup %s is newer and not complete; 'latest' is %s", one.id, newest.id
                )
        return newest

    def named(self, name: str, *, forgotten: bool) -> Backup:
        """The one with an id, or with a unique beginning of one.

        Args:
            name: the id's digits.
            forgotten: one that is forgotten will do.

        Raises:
            BackupNotFoundError: none, or more than one, fits.
            DamagedError, WrongKeyError: none fits, and one that can't be read may.
        """
        fitting = [one for one in self._backups if name and one.id.startswith(name)]
        shown = [one for one in fitting if forgotten or one.forgotten is None]
        if len(shown) > 1:
            ids = ", ".join(one.id for one in shown[:_TOLD])
            raise BackupNotFoundError(f"backup '{name}' is not unique: {ids}; give more digits")
        if shown:
            return shown[0]
        if fitting:
            raise BackupNotFoundError(
                f"backup {fitting[0].id} is forgotten; 'nbdpull undo {fitting[0].id}' brings it back"
            )
        what = f"whether there is a backup '{name}'{self._of_vm} can't be told"
        check_readable(self._unreadable, what)
        if not self._backups:
            raise self._nothing()
        raise BackupNotFoundError(
            f"repository {self._location} has no backup '{name}'{self._of_vm}; see 'nbdpull list'"
        )

    def _nothing(self) -> BackupNotFoundError:
        check_readable(self._unreadable, f"whether there is a backup{self._of_vm} can't be told")
        return BackupNotFoundError(
            f"repository {self._location} has no backup{self._of_vm}; make one with 'nbdpull backup'"
        )
