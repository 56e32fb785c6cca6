"""Which backups a policy keeps, and why: pure, so that what it never drops can be tested.

Backups are judged in sets of the same VM, chain and disks, each by itself, by the time at which the
*store* took them in: a host whose clock is wrong can neither crowd out another's backups nor its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from nbdpull.model.results import Level
from nbdpull.units import parse_duration

__all__ = ["Candidate", "Policy", "Verdict", "judge"]

STALE_S: Final = 31 * 86400.0
"""A backup that lacks a disk so long can't get it any more: writers commit within 30 days or not at all."""
SKEW_S: Final = 24 * 3600.0
"""A manifest that was stored this much after its backup was taken was copied here, or a clock was wrong."""

_COUNTS: Final = (
    "keep_last",
    "keep_hourly",
    "keep_daily",
    "keep_weekly",
    "keep_monthly",
    "keep_yearly",
)
_RULE: Final = re.compile(r"([a-z-]+)=(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to keep of each set of backups; a backup stays when any rule wants it.

    Attributes:
        keep_last: the newest so many.
        keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly: the newest backup of each of the
            last so many hours, days ... that have one, in UTC; weeks begin on Monday (ISO 8601).
        keep_within_s: all that are at most so much older than the set's newest one, in seconds.
        keep_tags: all that carry one of these tags.
        min_keep: at least so many, the newest ones, whatever the rules say; 1 or more.
    """

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0
    keep_within_s: float | None = None
    keep_tags: tuple[str, ...] = ()
    min_keep: int = 3

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{_spelled(name)} is {getattr(self, name)}; expected 0 or more")
        if self.min_keep < 1:
            raise ValueError("min-keep is 0; expected 1 or more: the newest backup always stays")
        if self.keep_within_s is not None and self.keep_within_s < 0:
            raise ValueError("keep-within is less than nothing")
        counts = any(getattr(self, name) for name in _COUNTS)
        if "" in self.keep_tags:
            raise ValueError("the tag to keep is empty; give one, or leave the rule out")
        if not counts and self.keep_within_s is None and not self.keep_tags:
            raise ValueError(
                "the policy keeps nothing; name at least one rule such as keep-last=7 or keep-daily=14"
            )

    @classmethod
    def parse(cls, text: str) -> Policy:
        """A policy from rules such as ``keep-last=7, keep-daily=14 keep-within=2d keep-tag=gold min-keep=3``.

        Raises:
            ValueError: a rule that is not known, or with a value that can't be.
        """
        numbers: dict[str, int] = {}
        within_s: float | None = None
        tags: list[str] = []
        known = {_spelled(name): name for name in (*_COUNTS, "min_keep")}
        for rule in text.replace(",", " ").split():
            match = _RULE.fullmatch(rule)
            name, value = (match[1], match[2]) if match else (rule, "")
            if name == "keep-within":
                within_s = parse_duration(value)
            elif name == "keep-tag" and value:
                tags.append(value)
            elif name in known and value.isascii() and value.isdigit():
                numbers[known[name]] = int(value)
            else:
                expected = ", ".join((*known, "keep-within", "keep-tag"))
                raise ValueError(f"'{rule}' is no rule; expected NAME=VALUE of {expected}")
        return cls(keep_within_s=within_s, keep_tags=tuple(tags), **numbers)


def _spelled(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A backup to be judged.

    Attributes:
        group: names the set; backups of different groups don't count for each other.
        stored: when the store took it in, seconds since the Unix epoch.
        taken: when it ended by the writer's clock: only compared with `stored`.
        full: at least one disk was read in full, as part of the chain.
        complete: no disk is missing.
    """

    backup: str
    group: tuple[str, ...]
    stored: float
    taken: float
    level: Level = Level.FULL
    full: bool = True
    tags: frozenset[str] = frozenset()
    protected: bool = False
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a backup. `reasons` is never empty."""

    backup: str
    keep: bool
    reasons: tuple[str, ...]


@dataclass(slots=True)
class _Set:
    """The backups of one set, and the reasons to keep each."""

    newest_first: Sequence[Candidate]
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, backups: Iterable[Candidate], reason: str) -> None:
        for one in backups:
            self.reasons.setdefault(one.backup, []).append(reason)


def judge(
    policy: Policy, candidates: Iterable[Candidate], *, trust_store_time: bool = False
) -> list[Verdict]:
    """What `policy` keeps and drops, in the order of `candidates`.

    Whatever the policy says there stay: the newest `min_keep` complete backups of each set, protected
    ones, the newest backup of the chain (the next incremental is counted from it), the full that the
    set's differentials are counted from, and everything of a set in which a backup was stored more than
    a day after it was taken: most likely it was copied here and all its times are that of the copying.
    `trust_store_time` says that it was not.

    A backup that lacks a disk counts for no rule; it goes when it is 31 days older than the newest
    complete one of its set, for then nobody can complete it any more.
    """
    ordered = list(candidates)
    groups: dict[tuple[str, ...], list[Candidate]] = {}
    for one in ordered:
        groups.setdefault(one.group, []).append(one)
    reasons: dict[str, list[str]] = {}
    for group in groups.values():
        newest_first = sorted(group, key=lambda one: (one.stored, one.backup), reverse=True)
        judged = _Set(newest_first)
        _judge_set(policy, judged, trust_store_time=trust_store_time)
        reasons |= judged.reasons
    return [
        Verdict(
            backup=one.backup,
            keep=one.backup in reasons,
            reasons=tuple(reasons.get(one.backup, [_why_dropped(one)])),
        )
        for one in ordered
    ]


def _why_dropped(one: Candidate) -> str:
    return "no rule keeps it" if one.complete else "lacks a disk that nobody can add any more"


def _judge_set(policy: Policy, judged: _Set, *, trust_store_time: bool) -> None:
    complete = [one for one in judged.newest_first if one.complete]
    judged.keep(complete[: policy.keep_last], f"keep-last={policy.keep_last}")
    for name, bucket in _BUCKETS.items():
        count: int = getattr(policy, f"keep_{name}")
        judged.keep(_newest_of_each(complete, bucket, count), f"keep-{name}={count}")
    if policy.keep_within_s is not None and complete:
        oldest = complete[0].stored - policy.keep_within_s
        judged.keep((one for one in complete if one.stored >= oldest), "keep-within")
    for tag in policy.keep_tags:
        judged.keep((one for one in judged.newest_first if tag in one.tags), f"keep-tag={tag}")
    judged.keep((one for one in judged.newest_first if one.protected), "protected")
    chain = [one for one in complete if one.level is not Level.COPY]
    judged.keep(chain[:1], "the next incremental is counted from it")
    judged.keep(_base_of_differentials(chain), "differentials are counted from it")
    judged.keep(complete[: policy.min_keep], f"min-keep={policy.min_keep}")
    if not trust_store_time and any(one.stored - one.taken > SKEW_S for one in complete):
        judged.keep(judged.newest_first, "a backup of its set was stored long after it was taken")
    newest = complete[0].stored if complete else 0.0
    judged.keep(
        (one for one in judged.newest_first if not one.complete and newest - one.stored <= STALE_S),
        "lacks a disk that may still come",
    )


def _newest_of_each(
    newest_first: Sequence[Candidate], bucket: Callable[[datetime], object], count: int
) -> list[Candidate]:
    kept: dict[object, Candidate] = {}
    for one in newest_first:
        kept.setdefault(bucket(datetime.fromtimestamp(one.stored, UTC)), one)
        if len(kept) > count:
            break
    return list(kept.values())[:count]


_BUCKETS: Final[dict[str, Callable[[datetime], object]]] = {
    "hourly": lambda time: (time.date(), time.hour),
    "daily": lambda time: time.date(),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: time.year,
}


def _base_of_differentials(chain: Sequence[Candidate]) -> list[Candidate]:
    """The newest full, when a differential was counted from it."""
    for at, one in enumerate(chain):
        if one.full:
            differential = any(later.level is Level.DIFFERENTIAL for later in chain[:at])
            return [one] if differential else []
    return []
