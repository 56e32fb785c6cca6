"""No interleaving loses anything, and without any one of the rules some interleaving does."""

from __future__ import annotations

import pytest

from tests.protocol.model import ADOPTION, Config, Mutant, search


@pytest.mark.parametrize(("writers", "collectors"), [(1, 2), (2, 1)])
def test_nothing_is_lost_in_any_interleaving(writers: int, collectors: int) -> None:
    """`scripts/torture search` does two of both, which takes minutes."""
    found = search(Config(writers=writers, collectors=collectors))
    assert found.trace == ()
    assert found.states > 40_000
    assert found.deletions > 500


@pytest.mark.parametrize(("writers", "collectors"), [(1, 2), (2, 1)])
def test_nothing_is_lost_where_collectors_have_undo_windows_of_their_own(
    writers: int, collectors: int
) -> None:
    found = search(Config(writers=writers, collectors=collectors, young=True))
    assert found.trace == ()
    assert found.states > 40_000
    assert found.deletions > 500


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_the_order_of_a_listing_does_not_matter(order: tuple[int, int, int]) -> None:
    assert search(Config(writers=1, collectors=2, order=order)).trace == ()


def test_a_collector_that_runs_again_loses_nothing() -> None:
    assert search(Config(writers=1, collectors=1, rounds=3)).trace == ()


@pytest.mark.parametrize("adoption", [False, True])
def test_a_damaged_intent_loses_nothing(*, adoption: bool) -> None:
    config = Config(writers=2, collectors=1, damage=True, adoption=adoption, pins=not adoption)
    found = search(config)
    assert found.trace == ()
    assert found.deletions > 200


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
def test_nothing_is_lost_where_sessions_are_taken_over(order: tuple[int, ...]) -> None:
    """`scripts/torture search --adoption` does three writers: one takes over what another one took."""
    found = search(Config(writers=2, collectors=1, order=order, adoption=True, pins=False))
    assert found.trace == ()
    assert found.states > 15_000
    assert found.deletions > 200


@pytest.mark.parametrize("mutant", [one for one in Mutant if one in ADOPTION])
def test_without_this_rule_something_that_was_taken_over_is_lost(mutant: Mutant) -> None:
    two = mutant is Mutant.NO_REGISTER_LOOK_FOR_ADOPTER
    config = Config(
        writers=2,
        collectors=2 if two else 1,
        order=(2, 1, 0),
        adoption=True,
        pins=False,
        idle=not two,
        tombstones=0 if two else 3,
        mutant=mutant,
    )
    found = search(config)
    assert any(step.startswith("collector: C6 deletes pack") for step in found.trace)


@pytest.mark.parametrize("mutant", [one for one in Mutant if one not in ADOPTION])
def test_without_this_rule_something_is_lost(mutant: Mutant) -> None:
    damage = mutant is Mutant.DAMAGED_IS_ENDED
    found = search(Config(writers=1, collectors=2, damage=damage, mutant=mutant))
    assert found.trace != ()
    assert any(step.startswith("collector: C6 deletes pack") for step in found.trace)
