"""Sequences of writes, resizes and backups of all levels; `scripts/states` runs ten thousand of them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.states import DiskStates


def test_every_backup_of_any_history_restores_as_the_disk_was() -> None:
    run_state_machine_as_test(
        DiskStates,
        settings=settings(
            max_examples=40,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
