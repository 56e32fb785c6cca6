"""What to read of each disk: the level, and the earlier backup that changes are counted from.

QEMU keeps one recording bitmap for each checkpoint. A bitmap holds every write since its checkpoint, so
*any* earlier backup of the chain whose bitmap is still sound is a correct base: the newest is only the
cheapest. That is why a vanished bitmap costs reading more, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nbdpull.model.results import Level

__all__ = ["Base", "BitmapState", "Decision", "choose", "choose_told", "obsolete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapState:
    """A dirty bitmap as QEMU describes it (QAPI ``BlockDirtyInfo``).

    Attributes:
        count: bytes that it calls dirty, in whole grains; None where that is not told.
        inconsistent: QEMU was killed while it was in use; its content is lost.
    """

    name: str
    granularity: int
    count: int | None = None
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool = False

    @property
    def problem(self) -> str | None:
        """Why changes can't be taken from it, or None when they can."""
        if self.inconsistent:
            return "inconsistent (QEMU was killed while it recorded)"
        if not self.recording:
            return "not recording"
        if self.busy:
            return "busy (another backup uses it)"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """An earlier backup of one disk in the chain that may serve as base.

    Attributes:
        backup: its id.
        level: what was read of this disk then.
        size: the disk's size then, in bytes.
        checkpoint: name of the bitmap that has recorded since, or None where none was kept.
    """

    backup: str
    level: Level
    size: int
    checkpoint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to read of a disk, and why. `base` is None for a full and a copy."""

    level: Level
    reason: str
    base: Base | None = None


def _problem(base: Base, size: int, bitmaps: Mapping[str, BitmapState]) -> str | None:
    if base.checkpoint is None:
        return "it kept no checkpoint"
    if base.size != size:
        return f"the disk had {base.size} bytes then and has {size} now"
    state = bitmaps.get(base.checkpoint)
    if state is None:
        return f"its bitmap '{base.checkpoint}' is missing"
    if state.problem is not None:
        return f"its bitmap '{base.checkpoint}' is {state.problem}"
    return None


def choose(
    wanted: Level | None,
    *,
    size: int,
    bitmaps: Mapping[str, BitmapState],
    history: Sequence[Base],
    unreadable: Callable[[Base], str | None] = lambda _base: None,
) -> Decision:
    """Decide for one disk.

    Args:
        wanted: the level asked for; None means incremental where that can be.
        size: bytes of the disk now.
        bitmaps: the bitmaps on the disk now, by name.
        history: complete backups of this disk in the chain, newest first, copies left out.
        unreadable: says why a base's stored data can't be built on, or None when it can. Asked only
            of bases that could be used otherwise, because the answer costs reading.

    Returns:
        A full when nothing else is safe; `reason` then names what was wrong with the nearest base.
    """
    if wanted in {Level.FULL, Level.COPY}:
        return Decision(level=wanted, reason=f"{wanted} was asked for")
    level = wanted or Level.INCREMENTAL
    if level is Level.DIFFERENTIAL:
        candidates = [base for base in history if base.level is Level.FULL][:1]
        since = "the last full"
    else:
        candidates = list(history)
        since = "the last backup"
    first_problem = None
    for base in candidates:
        problem = _problem(base, size, bitmaps) or unreadable(base)
        if problem is None:
            reason = f"changes since {since}"
            if first_problem is not None:
                reason = f"changes since backup {base.backup}, because {first_problem}"
            return Decision(level=level, reason=reason, base=base)
        if first_problem is None:
            first_problem = f"backup {base.backup} can't be built on: {problem}"
    return Decision(
        level=Level.FULL,
        reason=first_problem or "this chain has no earlier backup of the disk",
    )


def choose_told(
    wanted: Level | None,
    context: str,
    *,
    size: int,
    newest: str | None,
    history: Sequence[Base],
    doubt: Callable[[Base], str | None] = lambda _base: None,
    unreadable: Callable[[Base], str | None] = lambda _base: None,
) -> Decision:
    """Decide for one disk whose changes somebody else keeps, and says since when.

    There is one base that this can be right for: no older one may stand in for it, as with `choose`.

    Args:
        wanted: the level asked for; None means incremental where that can be.
        context: meta context of the changes: since the chain's last backup, for a differential since its
            last full.
        size: bytes of the disk now.
        newest: the chain's last backup.
        history: as for `choose`.
        doubt: says why a base may not be the last one, although it is the newest that is known.
        unreadable: as for `choose`.
    """
    if wanted in {Level.FULL, Level.COPY}:
        return Decision(level=wanted, reason=f"{wanted} was asked for")
    level = wanted or Level.INCREMENTAL
    fulls = level is Level.DIFFERENTIAL
    base = next((base for base in history if not fulls or base.level is Level.FULL), None)
    if base is None:
        problem = "this chain has no earlier backup of the disk"
    elif not fulls and base.backup != newest:
        problem = f"the chain's last backup, {newest}, has not this disk"
    elif base.size != size:
        problem = f"the disk had {base.size} bytes in backup {base.backup} and has {size} now"
    elif why := doubt(base):
        problem = (
            f"backup {base.backup} may not be the one that '{context}' counts from: {why}; name the one"
            " that it counts from with --since"
        )
    elif damage := unreadable(base):
        problem = f"backup {base.backup} can't be built on: {damage}"
    else:
        since = "last full" if fulls else "last backup"
        return Decision(
            level=level,
            reason=f"changes since the {since}, {base.backup}, as '{context}' is said to hold",
            base=base,
        )
    return Decision(level=Level.FULL, reason=problem)


def obsolete(owned: Sequence[str], *, newest: str | None, full: str | None) -> tuple[str, ...]:
    """Which of the chain's bitmaps on a disk nothing will be counted from any more.

    Args:
        owned: names of all the chain's bitmaps on the disk.
        newest: the checkpoint of the backup just committed.
        full: the checkpoint of the disk's last full, which the next differential starts from.
    """
    return tuple(name for name in owned if name not in {newest, full})
