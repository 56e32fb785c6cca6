"""Threads below an async call: none outlives it, and the first real failure is the one that is told."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable

import pytest

from nbdpull.errors import StoreError
from nbdpull.nbdio.connection import Cancelled
from nbdpull.ops import threads
from nbdpull.ops.threads import (
    call,
    give_way,
    in_thread,
    run_all,
    store_deadline,
    wait_for_stores_again,
    worker_count,
)
from nbdpull.repo.calls import Told, abandoned_calls
from nbdpull.repo.deadline import Deadline, current, in_time

TOLD = Told("read", "/mnt/x")


def test_result_and_error_come_back() -> None:
    async def run() -> int:
        with pytest.raises(ZeroDivisionError):
            await call(lambda: 1 // 0)
        return await call(divmod, 7, 4) == (1, 3) and await in_thread(lambda _cancel: 5)

    assert asyncio.run(run()) == 5


def test_the_loop_goes_on_meanwhile() -> None:
    async def run() -> None:
        gate = threading.Event()
        task = asyncio.ensure_future(call(gate.wait, 30))
        await asyncio.sleep(0)
        gate.set()  # it would never be, were the loop held up
        assert await task

    asyncio.run(run())


def cancelled_in_the_middle(
    work: Callable[[threading.Event, threading.Event], object], *, times: int = 1
) -> BaseException:
    """What comes out of `in_thread(work)` when it is cancelled once `work` has set its first event."""
    caught: list[BaseException] = []

    async def watched(begun: threading.Event) -> None:
        try:
            await in_thread(lambda cancel: work(begun, cancel))
        except BaseException as exc:
            caught.append(exc)
            raise

    async def run() -> None:
        begun = threading.Event()
        task = asyncio.ensure_future(watched(begun))
        await asyncio.to_thread(begun.wait)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.01)
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(run())
    return caught[0]


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_call_waits_until_its_thread_has_cleaned_up(times: int) -> None:
    done: list[str] = []

    def work(begun: threading.Event, cancel: threading.Event) -> None:
        begun.set()
        assert cancel.wait(30)
        threading.Event().wait(0.05)
        done.append("cleaned up")
        raise Cancelled

    raised = cancelled_in_the_middle(work, times=times)
    assert isinstance(raised, asyncio.CancelledError)
    assert done == ["cleaned up"]
    assert all(thread.name != "nbdpull" for thread in threading.enumerate())


def test_failed_clean_up_is_the_cause_of_the_cancellation() -> None:
    def work(begun: threading.Event, cancel: threading.Event) -> None:
        begun.set()
        cancel.wait(30)
        raise OSError("not cleaned up")

    raised = cancelled_in_the_middle(work)
    assert isinstance(raised, asyncio.CancelledError)
    assert str(raised.__cause__) == "not cleaned up"


def test_result_that_came_although_cancelled_is_no_result() -> None:
    def work(begun: threading.Event, cancel: threading.Event) -> int:
        begun.set()
        cancel.wait(30)
        return 7

    assert isinstance(cancelled_in_the_middle(work), asyncio.CancelledError)


def test_each_verb_has_a_deadline_of_its_own_also_when_many_run_at_once() -> None:
    async def verb() -> Deadline:
        await call(int)
        first = store_deadline()
        assert await in_thread(lambda _cancel: current.get()) is first
        return first

    async def run() -> None:
        before = await verb()
        assert store_deadline() is before
        one, other = await asyncio.gather(verb(), verb())
        assert len({id(one), id(other), id(before)}) == 3
        before.set_in(0)
        assert store_deadline() is not before
        wait_for_stores_again(before)
        assert store_deadline() is before
        assert not before.over

    asyncio.run(run())


def test_a_cancelled_call_does_not_wait_for_a_store() -> None:
    gate = threading.Event()

    def work(begun: threading.Event, _cancel: threading.Event) -> None:
        def hang() -> None:
            begun.set()
            gate.wait(240)

        in_time(current.get(), hang, Told("read", "x"))

    try:
        raised = cancelled_in_the_middle(work)
    finally:
        gate.set()
    assert isinstance(raised, asyncio.CancelledError)
    while abandoned_calls():
        time.sleep(0.01)


def test_all_run_at_once_and_to_their_end() -> None:
    barrier = threading.Barrier(5, timeout=30)
    ended: list[int] = []

    def work() -> None:
        ended.append(barrier.wait())

    run_all([work] * 5, threading.Event())
    assert sorted(ended) == [0, 1, 2, 3, 4]


def test_first_real_failure_stops_the_others_and_is_raised() -> None:
    cancel = threading.Event()
    ended: list[bool] = []

    def waits() -> None:
        ended.append(cancel.wait(30))
        raise Cancelled

    def fails() -> None:
        raise KeyError("the reason")

    with pytest.raises(KeyError, match="the reason"):
        run_all([waits, waits, fails], cancel)
    assert ended == [True, True]


def test_cancelled_from_outside_is_told_as_that() -> None:
    cancel = threading.Event()
    cancel.set()

    def work() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        run_all([work] * 3, cancel)


@pytest.mark.parametrize(("cores", "workers"), [(1, 2), (2, 4), (8, 16), (64, 16)])
def test_workers_are_counted_by_the_cores_that_may_be_used(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    assert worker_count() == workers


def test_a_thread_that_gives_way_does_so_alone() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    seen = []

    def work() -> None:
        give_way()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    run_all([work, work], threading.Event())
    assert len(seen) == 2
    assert all(one >= max(before, 5) for one in seen)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@pytest.mark.parametrize("when", ["over", "impatient"])
def test_a_worker_that_hangs_in_a_call_to_a_store_is_left_behind_and_does_nothing_more(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_LOOK_S", 0.05)
    deadline = Deadline()
    begun, gate, ended = threading.Event(), threading.Event(), threading.Event()
    done: list[str] = []
    failures: list[str] = []

    def hang() -> None:
        done.append(threading.current_thread().name)
        begun.set()
        gate.wait(240)

    def work() -> None:
        try:
            deadline.directly(hang, Told("write", "/mnt/x", look_s=0.05, looks=3))
            done.append("went on")
        finally:
            ended.set()

    def other() -> None:
        assert begun.wait(30)
        if when == "over":
            deadline.set_in(0)

    cancel = threading.Event()
    try:
        with pytest.raises(Cancelled if when == "over" else StoreError):
            run_all(
                [other],
                cancel,
                leavable=[(work, lambda: done.append("closed"))],
                on_failure=lambda: failures.append(when),
            )
        assert cancel.is_set()
        assert done == ["nbdpull-worker", "closed"]
        assert not ended.is_set()
        assert abandoned_calls()
    finally:
        gate.set()
    assert ended.wait(30)
    for thread in threading.enumerate():
        if thread.name == "nbdpull-worker":
            thread.join(30)
    assert done == ["nbdpull-worker", "closed"]
    assert failures == [when]
    assert not abandoned_calls()


def test_a_worker_whose_calls_to_a_store_end_in_time_comes_to_its_end() -> None:
    deadline = Deadline()
    deadline.set_in(600)
    done: list[str] = []

    def work() -> None:
        for _ in range(100):
            deadline.directly(lambda: done.append(threading.current_thread().name), TOLD)

    run_all([], threading.Event(), leavable=[(work, lambda: done.append("closed"))])
    assert set(done) == {"nbdpull-worker"}
    assert len(done) == 100


def test_no_call_to_a_store_is_begun_after_the_deadline() -> None:
    deadline = Deadline()
    deadline.set_in(0)
    done: list[int] = []
    with pytest.raises(Cancelled):
        run_all(
            [],
            threading.Event(),
            leavable=[(lambda: deadline.directly(lambda: done.append(1), TOLD), lambda: None)],
        )
    assert done == []
