"""SIGINT, SIGTERM and SIGHUP: teardown first, then 128+N."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from tests.cli.conftest import spawn_cli

# A verb that runs until it is cancelled, and whose teardown takes a while.
SLOW = """
import asyncio, sys
import nbdpull.ops.backup as op
async def backup(options, *, progress=None):
    print("started", file=sys.stderr, flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.5)
        print("torn down", file=sys.stderr, flush=True)
op.backup = backup
"""
FAILING = (
    SLOW
    + """
import nbdpull
async def failing(options, *, progress=None):
    print("started", file=sys.stderr, flush=True)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError as exc:
        raise exc from nbdpull.NbdError("the export did not go")
op.backup = failing
"""
)
ARGS = ("backup", "qmp:/s", "-r", "x")


def started(*args: str, patch: str = SLOW) -> subprocess.Popen[str]:
    # The tests themselves may run under nohup, whose children don't hear of SIGHUP either.
    process = spawn_cli(
        *args, patch=patch, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_tears_down_first(signum: signal.Signals) -> None:
    process = started(*ARGS)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert out == ""
    assert err.splitlines() == [
        f"nbdpull: got {signum.name}, tearing down",
        "torn down",
        f"nbdpull: ended by {signum.name}; everything was torn down",
    ]


def test_a_second_signal_does_not_break_teardown_in_qemu() -> None:
    process = started(*ARGS)
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "nbdpull: got SIGTERM, tearing down\n"
    process.send_signal(signal.SIGINT)
    assert "still tearing down" in process.stderr.readline()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[0] == "torn down"


def test_a_third_signal_ends_it_at_once() -> None:
    process = started(*ARGS, patch=SLOW.replace("sleep(0.5)", "sleep(600)"))
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "nbdpull: got SIGTERM, tearing down\n"
    process.send_signal(signal.SIGTERM)
    assert "'nbdpull cleanup' then removes what is left" in process.stderr.readline()
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + signal.SIGHUP, "")


def test_a_second_signal_ends_at_once_what_has_nothing_in_qemu() -> None:
    patch = SLOW.replace("ops.backup", "ops.verify").replace("backup", "verify")
    process = started("verify", "-r", "x", patch=patch.replace("sleep(0.5)", "sleep(600)"))
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "nbdpull: got SIGINT, tearing down\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


def test_failed_teardown_is_told() -> None:
    process = started(*ARGS, patch=FAILING)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err.splitlines()[-1] == (
        "nbdpull: ended by SIGTERM, and tearing down failed: the export did not go"
    )


def test_events_stay_events() -> None:
    process = started(*ARGS, "--progress", "json")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    lines = err.replace("torn down\n", "", 1).splitlines()
    last = [json.loads(line) for line in lines][-1]
    assert (last["event"], last["error"], last["exit_code"]) == ("error", "SIGINT", 130)


def test_sighup_is_ignored_under_nohup() -> None:
    process = spawn_cli(
        *ARGS,
        patch=SLOW.replace("sleep(60)", "sleep(1); raise SystemError"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 1
