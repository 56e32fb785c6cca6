"""No interleaving loses anything, and without any one of the rules some interleaving does."""

from __future__ import annotations

import pytest

from tests.protocol.model import Config, Mutant, search


@pytest.mark.parametrize(("writers", "collectors"), [(1, 2), (2, 1)])
def test_nothing_is_lost_in_any_interleaving(writers: int, collectors: int) -> None:
    """`scripts/search-protocol` does two of both, which takes minutes."""
    found = search(Config(writers=writers, collectors=collectors))
    assert found.trace == ()
    assert found.states > 40_000
    assert found.deletions > 500


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_the_order_of_a_listing_does_not_matter(order: tuple[int, int, int]) -> None:
    assert search(Config(writers=1, collectors=2, order=order)).trace == ()


def test_a_collector_that_runs_again_loses_nothing() -> None:
    assert search(Config(writers=1, collectors=1, rounds=3)).trace == ()


@pytest.mark.parametrize("mutant", list(Mutant))
def test_without_this_rule_something_is_lost(mutant: Mutant) -> None:
    found = search(Config(writers=1, collectors=2, mutant=mutant))
    assert found.trace != ()
    assert any(step.startswith("collector: C6 deletes pack") for step in found.trace)
