"""What a policy keeps and drops."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdpull.model.results import Level
from nbdpull.model.retention import STALE_S, Candidate, Policy, judge

DAY = 86400.0
START = datetime(2025, 1, 1, 12, tzinfo=UTC).timestamp()


def candidate(number: int, stored: float, **changes: object) -> Candidate:
    made = Candidate(
        backup=f"{number:016x}",
        group=("vm", "default", "disk"),
        stored=stored,
        taken=stored - 60,
        level=Level.FULL,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def daily(count: int) -> list[Candidate]:
    """One backup a day at noon, oldest first."""
    return [candidate(number, START + number * DAY) for number in range(count)]


def kept(policy: Policy, candidates: list[Candidate]) -> list[int]:
    verdicts = judge(policy, candidates)
    return [at for at, verdict in enumerate(verdicts) if verdict.keep]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("keep-last=4 min-keep=1", [26, 27, 28, 29]),
        ("keep-last=1", [27, 28, 29]),
        ("keep-daily=2 min-keep=1", [28, 29]),
        ("keep-hourly=2 min-keep=1", [28, 29]),
        # 1 January 2025 is a Wednesday: the 5th, 12th, 19th and 26th are Sundays.
        ("keep-weekly=3 min-keep=1", [18, 25, 29]),
        ("keep-monthly=12 min-keep=1", [29]),
        ("keep-yearly=9 min-keep=1", [29]),
        ("keep-within=3d min-keep=1", [26, 27, 28, 29]),
        ("keep-within=0s,min-keep=2", [28, 29]),
        ("keep-last=1 keep-weekly=2 min-keep=1", [25, 29]),
    ],
)
def test_rules_on_a_backup_a_day(policy: str, expected: list[int]) -> None:
    assert kept(Policy.parse(policy), daily(30)) == expected


def test_the_newest_of_each_month_is_kept() -> None:
    # 31 January, 28 February, and the newest in March.
    assert kept(Policy.parse("keep-monthly=3 min-keep=1"), daily(65)) == [30, 58, 64]


def test_of_two_backups_in_one_hour_the_newer_one_is_kept() -> None:
    pair = [candidate(1, START), candidate(2, START + 60)]
    assert kept(Policy.parse("keep-hourly=5 min-keep=1"), pair) == [1]


def test_each_kept_backup_says_why() -> None:
    verdicts = judge(Policy.parse("keep-last=2 keep-tag=gold min-keep=1"), [
        candidate(1, START, tags=frozenset({"gold", "x"})),
        candidate(2, START + DAY, protected=True),
        candidate(3, START + 2 * DAY),
        candidate(4, START + 3 * DAY),
        candidate(5, START + 4 * DAY),
    ])  # fmt: skip
    assert [verdict.reasons for verdict in verdicts] == [
        ("keep-tag=gold",),
        ("protected",),
        ("no rule keeps it",),
        ("keep-last=2",),
        ("keep-last=2", "the next incremental is counted from it", "min-keep=1"),
    ]


def test_sets_are_judged_apart() -> None:
    candidates = [*daily(5), *(replace(one, group=("other", "default", "disk"), backup=f"f{at}") for at, one in enumerate(daily(5)))]  # fmt: skip
    assert kept(Policy.parse("keep-last=1 min-keep=1"), candidates) == [4, 9]


def test_copies_don_t_crowd_out_what_the_chain_goes_on_from() -> None:
    chain = [
        candidate(1, START),
        candidate(2, START + DAY, level=Level.DIFFERENTIAL, full=False),
        candidate(3, START + 2 * DAY, level=Level.INCREMENTAL, full=False),
    ]
    copies = [candidate(4 + at, START + (3 + at) * DAY, level=Level.COPY) for at in range(5)]
    policy = Policy.parse("keep-last=1 min-keep=1")
    assert kept(policy, [*chain, *copies]) == [0, 2, 7]
    without_differential = [chain[0], replace(chain[1], level=Level.INCREMENTAL), chain[2]]
    assert kept(policy, [*without_differential, *copies]) == [2, 7]


def test_a_set_that_was_copied_here_is_left_alone_unless_told() -> None:
    copied = [candidate(at, START + 400 * DAY + at, taken=START + at * DAY) for at in range(9)]
    policy = Policy.parse("keep-daily=7")
    assert kept(policy, copied) == list(range(9))
    trusting = judge(policy, copied, trust_store_time=True)
    assert [verdict.keep for verdict in trusting] == [False] * 6 + [True] * 3


def test_a_clock_off_by_hours_changes_nothing() -> None:
    wrong = [
        replace(one, taken=one.taken + (-1) ** at * 10 * 3600) for at, one in enumerate(daily(9))
    ]
    assert kept(Policy.parse("keep-last=4"), wrong) == [5, 6, 7, 8]


def test_an_incomplete_backup_counts_for_nothing_and_goes_when_nobody_can_complete_it() -> None:
    complete = daily(40)
    old = candidate(99, START, complete=False)
    young = candidate(98, START + 39 * DAY - STALE_S, complete=False)
    verdicts = {
        verdict.backup: verdict.keep
        for verdict in judge(Policy.parse("keep-last=3"), [*complete, old, young])
    }
    assert [verdicts[old.backup], verdicts[young.backup]] == [False, True]
    assert sum(verdicts.values()) == 4
    assert kept(Policy.parse("keep-last=1"), [old]) == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keeps nothing"),
        ("min-keep=3", "keeps nothing"),
        ("keep-last=0", "keeps nothing"),
        ("keep-last=-1", "'keep-last=-1' is no rule"),
        ("keep-last", "'keep-last' is no rule"),
        ("keep-last=x", "no rule"),
        ("keep-tag=", "no rule"),
        ("keep-forever=1", "expected NAME=VALUE of keep-last, keep-hourly"),
        ("keep-within=3", "'3' is no duration"),
        ("keep-last=1 min-keep=0", "the newest backup always stays"),
    ],
)
def test_policies_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.parse(text)


# -- what no policy may lose ---------------------------------------------------------------------

POLICIES = st.builds(
    Policy,
    keep_last=st.integers(1, 5),
    keep_hourly=st.integers(0, 3),
    keep_daily=st.integers(0, 3),
    keep_weekly=st.integers(0, 3),
    keep_monthly=st.integers(0, 3),
    keep_yearly=st.integers(0, 3),
    keep_within_s=st.none() | st.floats(0, 30 * DAY),
    keep_tags=st.sampled_from([(), ("a",), ("a", "b")]),
    min_keep=st.integers(1, 4),
)
STORED = st.integers(0, 1000).map(lambda hours: START + hours * 3600.0)


@st.composite
def histories(draw: st.DrawFn) -> list[Candidate]:
    made = []
    for number in range(draw(st.integers(0, 25))):
        stored = draw(STORED)
        made.append(
            candidate(
                number,
                stored,
                taken=stored - draw(st.sampled_from([-40_000.0, 0.0, 60.0, 40_000.0, 90_000.0])),
                group=draw(st.sampled_from([("a",), ("b",)])),
                level=draw(st.sampled_from(list(Level))),
                full=draw(st.booleans()),
                tags=draw(st.frozensets(st.sampled_from("abc"))),
                protected=draw(st.integers(0, 9)) == 0,
                complete=draw(st.integers(0, 4)) > 0,
            )
        )
    return made


@given(POLICIES, histories(), st.booleans())
def test_safety(policy: Policy, candidates: list[Candidate], trust: bool) -> None:
    verdicts = judge(policy, candidates, trust_store_time=trust)
    assert [verdict.backup for verdict in verdicts] == [one.backup for one in candidates]
    assert all(verdict.reasons for verdict in verdicts)
    keep = {verdict.backup for verdict in verdicts if verdict.keep}
    assert keep >= {one.backup for one in candidates if one.protected}
    for group in {one.group for one in candidates}:
        whole = [one for one in candidates if one.group == group and one.complete]
        newest = sorted(whole, key=lambda one: (one.stored, one.backup))[-policy.min_keep :]
        assert keep >= {one.backup for one in newest}
        chain = [one for one in whole if one.level is not Level.COPY]
        if chain:
            assert max(chain, key=lambda one: (one.stored, one.backup)).backup in keep


@given(POLICIES, histories())
def test_judging_what_was_kept_again_drops_nothing_more(
    policy: Policy, candidates: list[Candidate]
) -> None:
    left = [
        one
        for one, verdict in zip(candidates, judge(policy, candidates), strict=True)
        if verdict.keep
    ]
    assert all(verdict.keep for verdict in judge(policy, left))
    # Nor does it depend on the order in which they are listed.
    assert all(verdict.keep for verdict in judge(policy, left[::-1]))
