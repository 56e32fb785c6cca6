"""Calls to a store that are given up: who waits leaves at once, and what was in time is as if nothing was."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nbdpull.errors import StoreError
from nbdpull.nbdio.errors import Cancelled
from nbdpull.repo import deadline as under_test
from nbdpull.repo.calls import Told, abandoned_calls
from nbdpull.repo.deadline import Deadline, in_time

TOLD = Told("read", "/mnt/x")


@contextmanager
def hanging(deadline: Deadline, told: Told = TOLD) -> Iterator[list[BaseException]]:
    """While a call hangs, that another thread waits for; holds what that one gets, once it has ended."""
    begun, gate = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def hang() -> None:
        begun.set()
        gate.wait(240)

    def wait() -> None:
        try:
            deadline.within(hang, told)
        except (Cancelled, StoreError) as exc:
            raised.append(exc)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert begun.wait(30)
    try:
        yield raised
        waiting.join(30)
        assert raised
    finally:
        gate.set()
        waiting.join(30)


def all_ended() -> None:
    for thread in threading.enumerate():
        if thread.name == "nbdpull-store":
            thread.join(30)
    assert not abandoned_calls()


def test_results_and_errors_come_back_in_time() -> None:
    deadline = Deadline()
    assert deadline.within(lambda: 7, TOLD) == 7
    with pytest.raises(KeyError, match="the reason"):
        in_time(deadline, lambda: dict[str, int]()["the reason"], TOLD)
    assert in_time(None, threading.get_ident, TOLD) == threading.get_ident()


def test_who_waits_for_a_call_leaves_when_the_deadline_is_set() -> None:
    deadline = Deadline()
    begun, gate, left = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait(60)

    def wait() -> None:
        with pytest.raises(Cancelled):
            deadline.within(hang, TOLD)
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
        deadline.within(lambda: done.append(1), TOLD)
    assert deadline.over
    assert done == []
    deadline.set_in(60)
    deadline.within(lambda: done.append(2), TOLD)
    deadline.set_in(0)
    deadline.clear()
    deadline.within(lambda: done.append(3), TOLD)
    assert done == [2, 3]


def test_calls_one_after_the_other_share_a_thread_and_more_at_once_do_not() -> None:
    deadline = Deadline()
    assert len({deadline.within(threading.get_ident, TOLD) for _ in range(100)}) == 1
    both = threading.Barrier(2, timeout=30)
    calls = [
        threading.Thread(target=lambda: deadline.within(both.wait, TOLD), daemon=True)
        for _ in range(2)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join(30)
    assert not both.broken
    all_ended()  # those that wait for a call end soon


def test_a_thread_that_is_left_behind_makes_no_other_call() -> None:
    deadline = Deadline()
    with hanging(deadline) as raised:
        deadline.set_in(0)
        while not raised:
            time.sleep(0.01)
        deadline.clear()
        assert deadline.within(lambda: 1, TOLD) == 1
        assert abandoned_calls()
    all_ended()


def test_a_call_is_as_nice_as_whoever_waits_for_it() -> None:
    deadline = Deadline()

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = deadline.within(niceness, TOLD)
    seen: list[int] = []

    def nicer() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        seen.append(deadline.within(niceness, TOLD))

    thread = threading.Thread(target=nicer)
    thread.start()
    thread.join(30)
    assert seen == [15]
    assert deadline.within(niceness, TOLD) == before


def test_what_lets_go_of_something_is_done_after_the_deadline_too_and_not_waited_for_if_it_hangs() -> (
    None
):
    deadline = Deadline()
    deadline.set_in(0)
    done: list[int] = []
    deadline.end(lambda: done.append(1), TOLD)
    assert done == [1]
    assert not abandoned_calls()
    gate = threading.Event()
    deadline.end(lambda: done.append(int(gate.wait(240))), TOLD)
    assert abandoned_calls()
    gate.set()
    all_ended()
    assert done == [1, 1]


def test_the_call_that_hangs_the_longest_is_told_once_when_it_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(under_test, "_SLOW_S", 0.0)
    deadline = Deadline()
    with hanging(deadline, Told("write", "/mnt/first")), hanging(deadline, Told("read", "/mnt/b")):
        deadline.set_in(0)
    [told] = caplog.messages
    assert told.startswith("the repository hangs: 'write /mnt/first' has not come to an end for ")
    assert caplog.records[0].levelno == logging.WARNING


def test_what_took_only_a_moment_is_not_said_to_hang(caplog: pytest.LogCaptureFixture) -> None:
    deadline = Deadline()
    with hanging(deadline):
        deadline.set_in(0)
    assert caplog.messages == []


def test_a_call_that_never_ends_is_told_and_fails_in_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    deadline = Deadline()
    with hanging(deadline, Told("write", "/mnt/x", look_s=0.05, looks=3)) as raised:
        pass
    assert isinstance(raised[0], StoreError)
    assert str(raised[0]).startswith("can't write /mnt/x: ")
    assert "'write /mnt/x' has not come to an end" in caplog.text
    assert len(caplog.messages) == 1
