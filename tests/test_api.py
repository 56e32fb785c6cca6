"""The public names: blocking, async, cancellable, and quick to import."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import nbdpull
import nbdpull.ops.backup
import nbdpull.ops.init
from nbdpull import aio, api
from nbdpull.model.outcomes import InitResult
from nbdpull.ops.backup import BackupOptions
from nbdpull.ops.init import InitOptions

VERBS = (
    *("backup", "cleanup", "forget", "gc", "init", "list_backups", "protect", "repack", "restore"),
    *("show", "undo", "unprotect", "verify"),
    *("key_add", "key_export", "key_import", "key_list", "key_remove", "key_rotate"),
    *("doctor", "estimate"),
)


class SlowInit:
    """Stands in for the work of `init`: waits until it is cancelled, then tears down for a while."""

    def __init__(self, *, teardown_s: float = 0.1) -> None:
        self.started = threading.Event()
        self.torn_down = threading.Event()
        self._teardown_s = teardown_s

    async def __call__(self, options: InitOptions) -> InitResult:
        self.started.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(self._teardown_s)
            self.torn_down.set()
        return InitResult(repository=options.repository, id="")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowInit:
    work = SlowInit()
    monkeypatch.setattr(nbdpull.ops.init, "init", work)
    return work


def test_import_loads_nothing_heavy() -> None:
    code = "import nbdpull, sys; nbdpull.backup, nbdpull.Error; print(' '.join(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "nbdpull.api" in modules
    heavy = {
        "cryptography",
        "numpy",
        "nbd",
        "qemu",
        "click",
        "rich",
        "asyncio",
        "zstandard",
        "blake3",
        "cbor2",
    }
    assert heavy.isdisjoint(modules)


def test_all_names_are_there() -> None:
    for name in nbdpull.__all__:
        assert hasattr(nbdpull, name)
    assert set(VERBS) <= set(nbdpull.__all__) <= set(dir(nbdpull))
    assert not hasattr(nbdpull, "Candidate")  # of a module that has a public name
    errors = {
        name
        for name, value in vars(nbdpull.errors).items()
        if inspect.isclass(value) and issubclass(value, nbdpull.Error)
    }
    assert errors <= set(nbdpull.__all__)


def test_coroutines_need_no_import_of_their_own() -> None:
    code = "import nbdpull, inspect; print(inspect.iscoroutinefunction(nbdpull.aio.backup))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("verb", VERBS)
def test_blocking_function_has_the_signature_of_the_coroutine(verb: str) -> None:
    blocking, coroutine = getattr(api, verb), getattr(aio, verb)
    assert inspect.signature(blocking) == inspect.signature(coroutine)
    assert inspect.iscoroutinefunction(coroutine)
    assert not inspect.iscoroutinefunction(blocking)
    assert blocking.__doc__ == coroutine.__doc__


def test_repository_from_init_to_list(tmp_path: Path) -> None:
    created = nbdpull.init(tmp_path / "repo")
    assert len(created.id) == 32
    assert nbdpull.list_backups(tmp_path / "repo") == ()
    with pytest.raises(nbdpull.BackupNotFoundError):
        nbdpull.show(tmp_path / "repo", "latest")
    with pytest.raises(nbdpull.RepositoryNotFoundError):
        nbdpull.list_backups(tmp_path / "elsewhere")


def test_coroutines_run_in_the_callers_loop(tmp_path: Path) -> None:
    async def both() -> None:
        await aio.init(tmp_path / "repo")
        assert await aio.list_backups(tmp_path / "repo") == ()

    asyncio.run(both())


def test_blocking_call_in_a_running_loop_says_what_to_do(tmp_path: Path) -> None:
    async def wrong() -> None:
        nbdpull.init(tmp_path / "repo")

    with pytest.raises(RuntimeError, match=r"await nbdpull\.aio\.init\(\)"):
        asyncio.run(wrong())
    assert not (tmp_path / "repo").exists()


def test_blocking_call_leaves_the_threads_own_loop(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        nbdpull.init(tmp_path / "repo")
        assert asyncio.get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_options_reach_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[BackupOptions] = []

    async def record(options: BackupOptions, *, progress: nbdpull.ProgressCallback | None) -> str:
        seen.append(options)
        return "done"

    monkeypatch.setattr(nbdpull.ops.backup, "backup", record)
    nbdpull.backup(
        "qmp:/s", tmp_path, level="differential", include=["a"], exclude=("b",), scratch=tmp_path
    )
    nbdpull.backup("qmp:/s", "r", level=nbdpull.Level.COPY)
    nbdpull.backup("qmp:/s", "r")
    assert [options.level for options in seen] == [
        nbdpull.Level.DIFFERENTIAL,
        nbdpull.Level.COPY,
        None,
    ]
    assert (seen[0].repository, seen[0].scratch) == (str(tmp_path), str(tmp_path))
    assert (seen[0].include, seen[0].exclude) == (("a",), ("b",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "inc"}, "level is 'inc'; expected one of auto, full"),
        ({"include": "vda"}, "include is the string 'vda'; expected a list"),
        ({"exclude": "vda"}, "exclude is the string 'vda'; expected a list"),
        ({"compression_level": 0}, "compression level is 0; expected 1 to 19"),
        ({"chain": ""}, "the chain has an empty name"),
        ({"vm": ""}, "the VM has an empty name"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(nbdpull.UsageError, match=message):
        nbdpull.backup("qmp:/nowhere", "/nowhere", **arguments)  # type: ignore[arg-type]


def test_cancel_from_another_thread_waits_for_teardown(slow: SlowInit) -> None:
    with nbdpull.cancellable() as cancel:

        def stop() -> None:
            slow.started.wait(10)
            assert cancel.running
            cancel()
            cancel()  # a second time does not disturb teardown

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(concurrent.futures.CancelledError, match=r"nbdpull\.init\(\)"):
            nbdpull.init("somewhere")
        thread.join()
        assert slow.torn_down.is_set()
        assert not cancel.running
        assert cancel.cancelled


def test_cancelled_before_it_began_does_nothing(slow: SlowInit) -> None:
    with nbdpull.cancellable() as cancel:
        cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            nbdpull.init("somewhere")
    assert not slow.started.is_set()


def test_cancel_ends_with_its_block(tmp_path: Path) -> None:
    with nbdpull.cancellable() as cancel:
        cancel()
    nbdpull.init(tmp_path / "repo")


def test_one_threads_cancel_leaves_the_others_alone(slow: SlowInit, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def other() -> None:
        try:
            with nbdpull.cancellable():
                nbdpull.init("somewhere")
        except BaseException as exc:  # noqa: BLE001 - looked at below
            failures.append(exc)

    with nbdpull.cancellable() as cancel:
        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        assert slow.started.wait(10)
        cancel()
        thread.join(0.3)
        assert thread.is_alive()
        assert not failures


def test_ctrl_c_tears_down_and_is_a_keyboard_interrupt(slow: SlowInit) -> None:
    def interrupt() -> None:
        slow.started.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            nbdpull.init("somewhere")
        assert time.monotonic() - began < 10
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert slow.torn_down.is_set()
