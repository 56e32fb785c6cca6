"""Freezing a real guest's file systems through its real agent, and thawing them whatever happens."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdpull
from nbdpull.source.freezer import Agent, AgentError
from tests.integration.conftest import Keeper
from tests.support.linuxguest import LinuxGuest, check_filesystem, create_ext4_disk
from tests.support.tools import QemuTools

MIB = 1 << 20


@contextlib.contextmanager
def guest_with_agent(tools: QemuTools, folder: Path) -> Iterator[tuple[LinuxGuest, Path]]:
    disks = [create_ext4_disk(folder, name, size=64 * MIB, tools=tools) for name in ("vda", "vdb")]
    path = folder / "qga"
    arguments = ["-chardev", f"socket,id=qga,path={path},server=on,wait=off"]
    arguments += ["-device", "virtio-serial", "-device"]
    arguments += ["virtserialport,chardev=qga,name=org.qemu.guest_agent.0,nr=1"]
    with LinuxGuest(disks, tools=tools, arguments=arguments) as guest:
        guest.wait_synced(3)
        deadline = time.monotonic() + 60
        while True:
            try:
                Agent(str(path)).close()
                break
            except AgentError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield guest, path


def status(path: Path) -> str:
    agent = Agent(str(path))
    try:
        return str(agent.execute("guest-fsfreeze-status"))
    finally:
        agent.close()


def goes_on(guest: LinuxGuest) -> None:
    guest.wait_synced(guest.synced + 3, timeout_s=60)


def test_a_quiesced_backup_needs_no_journal_replay(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    with guest_with_agent(qemu_tools, tmp_path) as (guest, path):
        for guest_first in (False, True):
            before = guest.synced
            agent = path if guest_first else None
            result = keeper.backup(guest.uri, quiesce=True, guest_first=guest_first, agent=agent)
            assert result.quiesced is not None
            assert result.quiesced.filesystems == 2
            assert set(result.quiesced.mountpoints) >= {"/a", "/b"}
            assert 0 < result.quiesced.frozen_s < 10
            assert result.warnings == ()
            assert status(path) == "thawed"
            goes_on(guest)
            restored = keeper.restore(result.backup)
            a, b = (check_filesystem(restored[name], tmp_path) for name in ("vda", "vdb"))
            assert not a.replayed
            assert not b.replayed
            assert a.records - b.records in {0, 1}
            assert b.records >= before
        # Without it, the same guest's file systems are as after a power cut.
        crash = keeper.backup(guest.uri)
        assert crash.quiesced is None
        restored = keeper.restore(crash.backup)
        assert check_filesystem(restored["vda"], tmp_path).replayed


def freezer(path: Path, limit_s: float = 60) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nbdpull.source.freezer", str(path), str(limit_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def frozen(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"ready": True}
    process.stdin.write("freeze\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["filesystems"] == 2


def test_whoever_dies_or_stops_the_guest_is_thawed(qemu_tools: QemuTools, tmp_path: Path) -> None:
    with guest_with_agent(qemu_tools, tmp_path) as (guest, path):
        # A client that is killed: the freezer's input ends.
        with freezer(path) as process:
            frozen(process)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0
        assert status(path) == "thawed"
        # A client that is stopped: the time is up.
        with freezer(path, 0.5) as process:
            frozen(process)
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["late"] is True
        assert status(path) == "thawed"
        # Signals that the terminal sends to all.
        with freezer(path) as process:
            frozen(process)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                process.send_signal(number)
            assert process.stdin is not None
            process.stdin.write("thaw\n")
            process.stdin.flush()
            assert process.wait(60) == 0
        assert status(path) == "thawed"
        # Somebody else froze it: not ours to thaw.
        other = Agent(str(path))
        other.execute("guest-fsfreeze-freeze", timeout_s=30)
        other.close()
        with freezer(path) as process:
            assert process.stdout is not None
            assert "frozen already" in json.loads(process.stdout.readline())["error"]
        other = Agent(str(path))
        other.execute("guest-fsfreeze-thaw", timeout_s=30)
        other.close()
        goes_on(guest)


def test_without_an_agent_the_backup_fails_and_leaves_nothing(
    qemu_tools: QemuTools, keeper: Keeper, tmp_path: Path
) -> None:
    disks = [
        create_ext4_disk(tmp_path, name, size=64 * MIB, tools=qemu_tools) for name in ("vda", "vdb")
    ]
    silent = tmp_path / "silent"
    with LinuxGuest(disks, tools=qemu_tools) as guest, socket.socket(socket.AF_UNIX) as server:
        guest.wait_synced(3)
        with pytest.raises(nbdpull.SourceError, match=r"no port .* --agent"):
            keeper.backup(guest.uri, quiesce=True)
        with pytest.raises(nbdpull.SourceError, match="no guest agent at"):
            keeper.backup(guest.uri, quiesce=True, agent=tmp_path / "nothing")
        server.bind(str(silent))
        server.listen()
        with pytest.raises(nbdpull.SourceError, match=r"is qemu-ga running"):
            keeper.backup(guest.uri, quiesce=True, agent=silent)
        assert not any(guest.leftovers().values())
        assert all(guest.bitmaps(name) == {} for name in ("vda", "vdb"))
        goes_on(guest)


class HostileAgent(threading.Thread):
    """Answers each command with what it was given; a real agent can't be made to misbehave."""

    def __init__(self, path: Path, answers: dict[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.answers = answers
        self.asked: list[str] = []
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                with client, contextlib.suppress(OSError):
                    self.serve(client)

    def serve(self, client: socket.socket) -> None:
        for line in client.makefile("rb"):
            message = json.loads(line.lstrip(b"\xff"))
            self.asked.append(message["execute"])
            if message["execute"] == "guest-sync-delimited":
                number = message["arguments"]["id"]
                client.sendall(b"junk\n\xff" + json.dumps({"return": number}).encode() + b"\n")
            else:
                client.sendall(self.answers[message["execute"]])


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        (
            {"guest-fsfreeze-freeze": b'{"error": {"desc": "no such file system"}}\n'},
            "no such file",
        ),
        ({"guest-fsfreeze-freeze": b"\x00garbage\n"}, "expected JSON"),
        ({"guest-fsfreeze-freeze": b"[1]\n"}, "expected an object"),
        ({"guest-fsfreeze-freeze": b"x" * (3 << 20)}, "without an end"),
    ],
)
def test_an_agent_that_misbehaves_is_told_to_thaw(
    tmp_path: Path, answers: dict[str, bytes], error: str
) -> None:
    good = {
        "guest-fsfreeze-status": b'{"return": "thawed"}\n',
        "guest-fsfreeze-thaw": b'{"return": 0}\n',
        "guest-get-fsinfo": b'{"error": {"desc": "not supported"}}\n',
    }
    path = tmp_path / "a"
    agent = HostileAgent(path, good | answers)
    with freezer(path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": True}
        process.stdin.write("freeze\n")
        process.stdin.flush()
        assert error in json.loads(process.stdout.readline())["error"]
        assert process.wait(60) == 1
    assert "guest-fsfreeze-thaw" in agent.asked
    agent.server.close()
