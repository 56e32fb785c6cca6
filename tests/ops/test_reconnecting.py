"""A backup whose host is lost is tried again, a few times in a row, and nothing else is."""

from __future__ import annotations

import asyncio

import pytest

from nbdpull.errors import InUseError, MonitorError, PointInTimeLostError, SourceError
from nbdpull.ops import reconnecting as module
from nbdpull.ops.reconnecting import reconnecting
from nbdpull.source.base import HostLostError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSES_S", (0.001,) * 4)


class Attempts:
    """Fails as it is told, then succeeds."""

    def __init__(self, *failures: Exception) -> None:
        self.left = list(failures)
        self.made = 0

    async def __call__(self) -> str:
        self.made += 1
        if self.left:
            raise self.left.pop(0)
        return "done"


LOST = HostLostError("lost")
AWAY = MonitorError("can't reach it")
IN_USE = InUseError("looks alive")


def run(*failures: Exception) -> int:
    attempts = Attempts(*failures)
    assert asyncio.run(reconnecting(attempts)) == "done"
    return attempts.made


def test_a_host_that_is_lost_and_seen_as_in_use_for_a_while_is_reached_again() -> None:
    assert run() == 1
    assert run(LOST) == 2
    assert run(LOST, AWAY, IN_USE, LOST) == 5


@pytest.mark.parametrize(
    "failure", [AWAY, IN_USE, SourceError("refused"), PointInTimeLostError("broke")]
)
def test_what_fails_without_a_host_that_is_lost_is_told_at_once(failure: Exception) -> None:
    attempts = Attempts(failure)
    with pytest.raises(type(failure)) as caught:
        asyncio.run(reconnecting(attempts))
    assert caught.value is failure
    assert attempts.made == 1


def test_another_failure_after_a_loss_ends_it() -> None:
    attempts = Attempts(LOST, SourceError("refused"))
    with pytest.raises(SourceError, match="refused"):
        asyncio.run(reconnecting(attempts))
    assert attempts.made == 2


@pytest.mark.parametrize(
    ("last", "told"), [(LOST, LOST), (AWAY, LOST), (IN_USE, IN_USE)], ids=["lost", "away", "in-use"]
)
def test_a_host_that_stays_away_is_given_up(last: Exception, told: Exception) -> None:
    attempts = Attempts(LOST, *[last] * 9)
    with pytest.raises(type(told)) as caught:
        asyncio.run(reconnecting(attempts))
    assert caught.value is told
    assert attempts.made == 5


def test_pauses_begin_anew_after_an_attempt_that_went_well_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_WELL_S", -1.0)
    assert run(*[LOST] * 9) == 10
    # Not after one that came to nothing.
    with pytest.raises(HostLostError):
        run(LOST, *[AWAY] * 9)
