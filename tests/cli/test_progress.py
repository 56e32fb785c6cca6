"""Progress as lines, events and bars."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

import nbdpull
from nbdpull import api
from nbdpull.cli import progress as module
from nbdpull.cli.console import Console, ProgressMode
from nbdpull.model.results import Progress, ProgressKind
from tests.cli.conftest import Cli, result

GIB = 1 << 30


def event(kind: ProgressKind, disk: str | None = "vda", done: int = 0, **more: Any) -> Progress:
    return Progress(kind=kind, verb="backup", disk=disk, done=done, total=GIB, **more)


EVENTS = [
    event(ProgressKind.MESSAGE, None, text="disk vda: full, it is \x1b[2Jnew"),
    event(ProgressKind.DISK_START),
    event(ProgressKind.DISK, done=GIB // 2),
    event(ProgressKind.DISK, done=GIB, fields={"read_bytes": 7, "event": "x"}),
    event(ProgressKind.DISK_END, done=GIB, fields={"read_bytes": 2048, "stored_bytes": 1024}),
]


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup that tells its progress from a thread, as the real one does."""

    def backup(*_args: Any, progress: nbdpull.ProgressCallback | None, **_options: Any) -> Any:
        def work() -> None:
            for one in EVENTS:
                if progress is not None:
                    progress(one)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return result()

    monkeypatch.setattr(api, "backup", backup)


@pytest.mark.usefixtures("working")
def test_lines_where_there_is_no_terminal(cli: Cli) -> None:
    for mode in ("auto", "plain"):
        done = cli("backup", "qmp:/s", "-r", "x", "--progress", mode, "--json")
        lines = done.stderr.splitlines()
        assert lines[0] == "nbdpull: disk vda: full, it is \\x1b[2Jnew"
        assert lines[-1] == (
            "nbdpull: vda: done, 1.00 GiB in 0.0 s, 2.00 KiB read, 1.00 KiB stored"
        )
        assert len(lines) == 2
        assert json.loads(done.stdout)["backup"] == "aa" * 8


@pytest.mark.usefixtures("working")
def test_quiet_and_none_say_nothing(cli: Cli) -> None:
    for more in (["-q"], ["--progress", "none"], ["-q", "--json"]):
        assert cli("backup", "qmp:/s", "-r", "x", *more).stderr == ""


@pytest.mark.usefixtures("working")
def test_events_one_a_line_with_the_result_last(cli: Cli) -> None:
    done = cli("backup", "qmp:/s", "-r", "x", "--progress", "json", "--json")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [one["event"] for one in events] == [
        "message",
        "disk-start",
        "disk",
        "disk",
        "disk-end",
        "result",
    ]
    assert events[0]["text"] == "disk vda: full, it is \x1b[2Jnew"
    assert events[2].items() >= {"disk": "vda", "done": GIB // 2, "total": GIB}.items()
    # A field never takes the place of one of the event's own keys.
    assert (events[3]["event"], events[3]["read_bytes"]) == ("disk", 7)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", events[1]["time"])
    assert events[-1]["result"] == json.loads(done.stdout)


def test_plain_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with module.show_progress(Console(verb="backup", mode=ProgressMode.PLAIN)) as progress:
        assert progress is not None
        progress(event(ProgressKind.DISK_START))
        for now[0] in (101.0, 109.0, 110.0, 111.0, 119.0, 120.0):
            progress(event(ProgressKind.DISK, done=int((now[0] - 100) * (10 << 20))))
    assert capsys.readouterr().err.splitlines() == [
        "nbdpull: vda: 100 MiB of 1.00 GiB, 10.0 MiB/s, 1 min 32 s left",
        "nbdpull: vda: 200 MiB of 1.00 GiB, 10.0 MiB/s, 1 min 22 s left",
    ]


def on_terminal(args: list[str], patch: str, term: str = "xterm") -> str:
    """What the command line writes to a terminal of 120 columns, without its escape codes."""
    main, side = pty.openpty()
    code = f"{patch}\nfrom nbdpull.cli.main import main\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        env={**os.environ, "TERM": term, "COLUMNS": "120"},
    )
    os.close(side)
    data = b""
    while True:
        try:
            more = os.read(main, 65536)
        except OSError:  # how Linux tells that the other side was closed
            break
        if not more:
            break
        data += more
    os.close(main)
    assert process.wait(30) == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode())


TERMINAL = """
from nbdpull import api
from tests.cli.conftest import result
from tests.cli.test_progress import EVENTS
def backup(*a, progress, **k):
    for one in EVENTS: progress(one)
    return result()
api.backup = backup
"""


def test_bars_on_a_terminal() -> None:
    text = on_terminal(["backup", "qmp:/s", "-r", "x"], TERMINAL)
    assert "disk vda: full, it is \\x1b[2Jnew" in text
    assert re.search(r"vda ━+ 100% 1\.00 GiB of 1\.00 GiB", text)
    assert "backup aaaaaaaaaaaaaaaa of web" in text


def test_lines_on_a_terminal_that_can_do_no_more() -> None:
    text = on_terminal(["backup", "qmp:/s", "-r", "x"], TERMINAL, term="dumb")
    assert "━" not in text
    assert "nbdpull: vda: done, 1.00 GiB in" in text


def test_disk_is_not_written_to_a_terminal() -> None:
    fail = TERMINAL.replace("main()", "") + (
        "import nbdpull.cli.main as m\ntry: m.program.main(['restore', 'latest', '-r', 'x', '--to', '-'],"
        " prog_name='nbdpull')\nexcept SystemExit as e: print('code', e.code)\nraise SystemExit(0)\n"
    )
    text = on_terminal([], fail)
    assert "would write a disk to this terminal" in text
    assert "code 2" in text


def many_disks() -> list[Progress]:
    return [
        Progress(kind=kind, verb="verify", disk=f"b{number}/vda", done=1, total=2)
        for number in range(500)
        for kind in (ProgressKind.DISK_START, ProgressKind.DISK_END)
    ]


def test_verify_of_many_disks_is_no_long_log(capsys: pytest.CaptureFixture[str]) -> None:
    with module.show_progress(Console(verb="verify", mode=ProgressMode.PLAIN)) as progress:
        assert progress is not None
        for one in many_disks():
            progress(one)
    assert capsys.readouterr().err == ""
