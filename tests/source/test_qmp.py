"""Monitors that can't be used: each is one clear error, soon, and says what to do."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdpull.errors import CommandError, MonitorError, MonitorInUseError, SourceError
from nbdpull.source import qmp
from nbdpull.source.address import MonitorAddress
from nbdpull.source.qmp import open_monitor
from tests.support.fakeqmp import FakeQmp


def answers(major: int, minor: int, micro: int = 0, **more: Any) -> dict[str, Any]:
    """A QEMU of that version, with `more` commands (`_` stands for `-`)."""
    named = {name.replace("_", "-"): value for name, value in more.items()}
    commands = [{"name": name} for name in ("query-status", *named)]
    return {
        "query-version": {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": ""},
        "query-commands": commands,
        **named,
    }


def ask(path: Path | str, command: str = "query-version", *, timeout_s: float = 60.0) -> Any:
    async def run() -> Any:
        async with open_monitor(MonitorAddress(path=str(path))) as monitor:
            return await monitor.execute(command, timeout_s=timeout_s)

    return asyncio.run(run())


@pytest.mark.parametrize("version", [(7, 1, 99), (6, 2, 0), (2, 10, 0)])
def test_qemu_below_7_2_is_refused_and_nothing_is_touched(
    tmp_path: Path, version: tuple[int, int, int]
) -> None:
    with FakeQmp(tmp_path, answers(*version)) as fake:
        with pytest.raises(SourceError, match=r"expected 7\.2 or later") as caught:
            ask(fake.path)
        assert ".".join(map(str, version)) in str(caught.value)
        assert set(fake.commands) == {"qmp_capabilities", "query-version", "query-commands"}


@pytest.mark.parametrize("version", [(7, 2, 0), (8, 0, 0), (10, 0, 2), (11, 0, 0)])
def test_qemu_from_7_2_on_is_taken(tmp_path: Path, version: tuple[int, int, int]) -> None:
    with FakeQmp(tmp_path, answers(*version)) as fake:
        assert ask(fake.path)["qemu"]["major"] == version[0]


def test_old_qemu_is_refused_by_the_command_line(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    command = [sys.executable, "-m", "nbdpull"]
    subprocess.run([*command, "init", "-r", repository], check=True, capture_output=True)
    with FakeQmp(tmp_path, answers(6, 2, 0)) as fake:
        done = subprocess.run(
            [*command, "backup", fake.uri, "-r", repository],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "is 6.2.0, expected 7.2 or later; upgrade QEMU (10 is best)"
    )


def test_questions_are_taken_in_their_order_and_one_refusal_spoils_no_later_one(
    tmp_path: Path,
) -> None:
    async def run(path: str) -> None:
        async with open_monitor(MonitorAddress(path=path)) as monitor:
            again, status = await monitor.ask(("query-version", {"x": 1}), "query-status")
            assert (again["qemu"]["major"], status) == (10, {"status": "running"})
            with pytest.raises(CommandError, match="'query-jobs': not now"):
                await monitor.ask("query-status", "query-jobs", "query-block")
            assert await monitor.execute("query-status") == {"status": "running"}

    known: dict[str, Any] = {
        "query_jobs": "not now",
        "query_block": [],
        "query_status": {"status": "running"},
    }
    with FakeQmp(tmp_path, answers(10, 0, **known)) as fake:
        asyncio.run(run(str(fake.path)))
    assert fake.commands[-6:] == [
        *("query-version", "query-status"),
        *("query-status", "query-jobs", "query-block"),
        "query-status",
    ]


def test_refused_command_carries_qemus_words(tmp_path: Path) -> None:
    with (
        FakeQmp(tmp_path, answers(10, 0, blockdev_add="No space left")) as fake,
        pytest.raises(CommandError, match="'blockdev-add': No space left") as caught,
    ):
        ask(fake.path, "blockdev-add")
    assert (caught.value.command, caught.value.description) == ("blockdev-add", "No space left")


def test_monitor_that_breaks_off_says_during_what(tmp_path: Path) -> None:
    with (
        FakeQmp(tmp_path, answers(10, 0, transaction=None)) as fake,
        pytest.raises(MonitorError, match=r"lost the QMP monitor .* during 'transaction'"),
    ):
        ask(fake.path, "transaction")


def test_command_without_an_answer_is_an_error(tmp_path: Path) -> None:
    class Busy(FakeQmp):
        def _answer(self, command: str) -> dict[str, Any] | None:
            if command == "stop":  # an event instead of the answer, which never comes
                return {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}
            return super()._answer(command)

    with (
        Busy(tmp_path, answers(10, 0)) as fake,
        pytest.raises(MonitorError, match=r"did not answer 'stop' .* in 0\.3 s"),
    ):
        ask(fake.path, "stop", timeout_s=0.3)


@pytest.mark.parametrize("greeting", [b"220 mail ESMTP\n", b'{"hello": 1}\n', b"[]\n", b"\xff\n"])
def test_server_that_is_no_monitor_is_told(tmp_path: Path, greeting: bytes) -> None:
    with (
        FakeQmp(tmp_path, {}, greeting=greeting) as fake,
        pytest.raises(MonitorError, match="does not speak QMP"),
    ):
        ask(fake.path)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "_GREETING_S", 0.3)


@pytest.mark.usefixtures("hurried")
def test_monitor_without_a_greeting_is_in_use(tmp_path: Path) -> None:
    with (
        FakeQmp(tmp_path, {}, greeting=b"") as fake,
        pytest.raises(MonitorInUseError, match=r"another client .*-qmp unix:PATH"),
    ):
        ask(fake.path)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A socket whose queue of connections is full, as a busy monitor's is after its second client."""
    path = tmp_path / "full"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        yield path


@pytest.mark.usefixtures("hurried")
def test_monitor_with_a_full_queue_is_in_use(full: Path) -> None:
    with pytest.raises(MonitorInUseError, match="another client"):
        ask(full)


def test_missing_socket_says_how_to_make_one(tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(MonitorError, match=rf"no QMP socket at {path}; start QEMU with -qmp unix:"):
        ask(path)


def test_missing_folder_is_a_missing_socket(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match="no QMP socket"):
        ask(tmp_path / "a" / "b")


def test_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    path = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with pytest.raises(MonitorError, match=r"nobody listens at .*; is QEMU running"):
        ask(path)


def test_file_that_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(MonitorError, match=f"{path} is no socket; expected"):
        ask(path)


def test_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match="can't connect"):
        ask(tmp_path / ("x" * 120))


def test_tcp_port_where_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def run() -> None:
        async with open_monitor(MonitorAddress(host="127.0.0.1", port=port)):
            pass

    with pytest.raises(MonitorError, match=f"nobody listens at qmp.tcp://127.0.0.1:{port}"):
        asyncio.run(run())


def test_no_permission_says_as_whom_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "private"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        if os.geteuid() == 0:  # who is refused nothing

            def refuse(_self: socket.socket, _address: object) -> None:
                raise PermissionError(13, "Permission denied")

            monkeypatch.setattr(socket.socket, "connect", refuse)
        with pytest.raises(
            MonitorError, match=r"no permission .* run as the user that QEMU runs as"
        ):
            ask(path)


def test_events_without_data_and_of_odd_shape_reach_their_handlers(tmp_path: Path) -> None:
    lines = [
        {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}},
        {"event": "JOB", "data": {"id": "x"}, "timestamp": {"seconds": 1, "microseconds": 2}},
    ]
    got: list[tuple[str, dict[str, Any]]] = []

    async def run(path: Path) -> None:
        async with open_monitor(MonitorAddress(path=str(path))) as monitor:
            stop = monitor.on_event(lambda name, data: got.append((name, dict(data))))
            await monitor.execute("query-version")
            for _ in range(100):
                await asyncio.sleep(0.01)
                if len(got) == 2:
                    break
            stop()

    class Chatty(FakeQmp):
        def _answer(self, command: str) -> dict[str, Any] | None:
            if command == "query-version" and "query-commands" in self.commands:
                assert self._client is not None
                for line in lines:
                    self._client.sendall(json.dumps(line).encode() + b"\n")
            return super()._answer(command)

    with Chatty(tmp_path, answers(10, 0)) as fake:
        asyncio.run(run(fake.path))
    assert got == [("STOP", {}), ("JOB", {"id": "x"})]
