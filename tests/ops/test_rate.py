"""The rate limit, on a clock of its own."""

from __future__ import annotations

import threading

import pytest

from nbdpull.nbdio.connection import Cancelled
from nbdpull.ops.rate import RateLimit


class Clock:
    """Time that passes only in waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Waits(threading.Event):
    """An event whose waits move the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.clock.now += timeout
        return self.is_set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("nbdpull.ops.rate.time.monotonic", clock.monotonic)
    return clock


@pytest.mark.parametrize("length", [1, 4096, 1 << 20, 100 << 20])
def test_any_size_of_request_keeps_the_rate(clock: Clock, length: int) -> None:
    limit = RateLimit(10 << 20)
    cancel = Waits(clock)
    begin = clock.now
    for _ in range(50):
        limit.take(length, cancel)
    limit.take(1, cancel)  # its wait ends when the ones before are paid for
    assert clock.now - begin == pytest.approx(50 * length / (10 << 20), abs=1e-6)


def test_at_most_a_quarter_of_a_second_is_saved_up(clock: Clock) -> None:
    limit = RateLimit(1000)
    cancel = Waits(clock)
    clock.now += 3600
    begin = clock.now
    for _ in range(10):
        limit.take(100, cancel)
    limit.take(1, cancel)
    assert clock.now - begin == pytest.approx(0.75)


def test_a_wait_ends_when_it_is_cancelled() -> None:
    limit = RateLimit(1)
    cancel = threading.Event()
    limit.take(3600, cancel)
    cancel.set()
    with pytest.raises(Cancelled):
        limit.take(1, cancel)
