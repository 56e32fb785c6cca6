"""Disks' names: what to call those that only their ids are known of, and what no name can be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from nbdpull.errors import UsageError
from nbdpull.model.ids import DiskId
from nbdpull.repo.repository import Repository

__all__ = ["MACHINE", "check_names", "disk_names"]


def disk_names(repository: Repository, ids: Iterable[DiskId]) -> tuple[str, ...]:
    """The disks' names, as other backups tell them; the id itself where none does."""
    known = {summary.disk_id: summary.disk for summary in repository.summaries()}
    return tuple(known.get(disk, disk) for disk in ids)


MACHINE: Final = "(machine)"
"""What a machine's state goes by, beside the disks. QEMU's ids begin with a letter."""


def check_names(what: str, names: Iterable[str | None]) -> None:
    """See that names are texts that can be stored, and not that of a machine's state.

    Raises:
        UsageError: one is empty, or has half of a surrogate pair: an argument that is no UTF-8, or a broken escape in JSON.
    """
    for name in names:
        if not name and name is not None:
            raise UsageError(f"the {what}'s name is empty; give one, or leave the option out")
        if name == MACHINE:
            raise UsageError(
                f"{what} '{name}' has the name of a machine's state; give another name"
            )
        try:
            (name or "").encode()
        except UnicodeEncodeError as exc:
            raise UsageError(
                f"{what} {name!a} is no text that can be stored (not UTF-8 at character {exc.start});"
                " give another name"
            ) from exc
