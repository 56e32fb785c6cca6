"""Calls to a store that are given up: who waits leaves at once, and what was in time is as if nothing was."""

from __future__ import annotations

import threading

import pytest

from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo.deadline import Deadline, abandoned_calls, in_time


def test_results_and_errors_come_back_in_time() -> None:
    deadline = Deadline()
    assert deadline.within(lambda: 7) == 7
    with pytest.raises(KeyError, match="the reason"):
        in_time(deadline, lambda: dict[str, int]()["the reason"])
    assert in_time(None, threading.get_ident) == threading.get_ident()


def test_who_waits_for_a_call_leaves_when_the_deadline_is_set() -> None:
    deadline = Deadline()
    begun, gate, left = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait(60)

    def wait() -> None:
        with pytest.raises(Cancelled):
            deadline.within(hang)
        left.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert begun.wait(30)
    assert not left.is_set()
    deadline.set_in(0)
    waiting.join(30)
    assert left.is_set()
    assert abandoned_calls()
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "nbdpull-store":
            thread.join(30)
    assert not abandoned_calls()


def test_nothing_is_begun_after_it_and_it_can_be_put_off() -> None:
    deadline = Deadline()
    deadline.set_in(0)
    done: list[int] = []
    with pytest.raises(Cancelled):
        deadline.within(lambda: done.append(1))
    assert deadline.over
    assert done == []
    deadline.set_in(60)
    deadline.within(lambda: done.append(2))
    deadline.set_in(0)
    deadline.clear()
    deadline.within(lambda: done.append(3))
    assert done == [2, 3]
