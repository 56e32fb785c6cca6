"""Holds a guest's file systems frozen, and thaws them whatever becomes of whoever asked for it.

A program of its own (``python -m nbdpull.source.freezer SOCKET SECONDS``), because a backup that is killed or
stopped between freeze and thaw would leave a guest that hangs. It talks JSON lines:

    it says                                                  it is told on standard input
    {"ready": true}
                                                             freeze
    {"filesystems": 2, "mountpoints": ["/", "/home"]}
                                                             thaw, or anything, or the end, or
                                                             nothing for SECONDS
    {"thawed": 2, "frozen_s": 0.012, "late": false}

or {"error": "..."} and ends with 1; nothing stays frozen then either, as far as the agent can be reached.
The agent's commands are those of qemu-ga (QEMU, qga/qapi-schema.json).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Agent", "AgentError", "main"]

_SYNC: Final = b"\xff"
_REPLY_S: Final = 5.0
_FREEZE_S: Final = 30.0
_THAW_TRIES: Final = 10
_LINE_MAX: Final = 1 << 20


class AgentError(Exception):
    """The guest's agent did not do what it was asked; the message says why."""


class Agent:
    """A connection to a guest agent's socket."""

    def __init__(self, path: str) -> None:
        """Connect and synchronise: what an earlier client left unread is thrown away.

        Raises:
            AgentError: no agent answers there.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._rest = b""
        try:
            self._socket.settimeout(_REPLY_S)
            self._socket.connect(path)
            number = int.from_bytes(os.urandom(4), "big")
            # Ends whatever line a client before us left unfinished; the agent may complain of it, and that
            # is thrown away with the rest.
            self._socket.sendall(_SYNC)
            self._send("guest-sync-delimited", {"id": number})
            answer = self._receive(_REPLY_S, after=_SYNC).get("return")
        except OSError as exc:
            self.close()
            reason = exc.strerror or "no answer; is qemu-ga running in the guest?"
            raise AgentError(f"no guest agent at {path}: {reason}") from exc
        except AgentError:
            self.close()
            raise
        if answer != number:
            self.close()
            raise AgentError(f"the guest agent at {path} is out of step")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def execute(self, command: str, *, timeout_s: float = _REPLY_S) -> Any:
        """What the command returned.

        Raises:
            AgentError: it was refused, or no answer came.
        """
        try:
            self._send(command, {})
            reply = self._receive(timeout_s)
        except OSError as exc:
            raise AgentError(f"no answer to {command} in {timeout_s:g} s") from exc
        if "error" in reply:
            error = reply["error"]
            raise AgentError(f"{command} failed in the guest: {error.get('desc', error)}")
        return reply.get("return")

    def _send(self, command: str, arguments: dict[str, Any]) -> None:
        message = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, timeout_s: float, *, after: bytes = b"") -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                if after and after not in line:
                    continue
                try:
                    reply = json.loads(line.rpartition(_SYNC)[2])
                except ValueError as exc:
                    raise AgentError(f"the guest agent said {line[:80]!r}, expected JSON") from exc
                if not isinstance(reply, dict):
                    raise AgentError(f"the guest agent said {line[:80]!r}, expected an object")
                return reply
            if len(self._rest) > _LINE_MAX:
                raise AgentError("the guest agent sent a line without an end")
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data:
                raise AgentError("the guest agent's socket was closed")
            self._rest += data


def _mountpoints(agent: Agent) -> list[str]:
    """What is mounted, for the result only: an agent that can't tell is no reason to fail."""
    try:
        found = agent.execute("guest-get-fsinfo")
        return sorted({str(entry["mountpoint"]) for entry in found})
    except (AgentError, KeyError, TypeError):
        return []


def _thaw(path: str, agent: Agent | None) -> int:
    """Thaw, over new connections where the old one fails.

    Raises:
        AgentError: it could not be done; the file systems may be frozen.
    """
    for attempt in range(_THAW_TRIES):
        try:
            if agent is None:
                agent = Agent(path)
            thawed = agent.execute("guest-fsfreeze-thaw", timeout_s=_FREEZE_S)
            if agent.execute("guest-fsfreeze-status") == "thawed":
                return int(thawed)
        except AgentError:
            if agent is not None:
                agent.close()
            agent = None
            if attempt == _THAW_TRIES - 1:
                raise
            time.sleep(0.5)
    raise AgentError("the guest stays frozen although its agent was told to thaw it")


def _hold(path: str, limit_s: float, say: Callable[[dict[str, Any]], None]) -> None:
    agent = Agent(path)
    if agent.execute("guest-fsfreeze-status") != "thawed":
        raise AgentError(
            "the guest's file systems are frozen already, by somebody else: thaw them first"
        )
    mountpoints = _mountpoints(agent)
    say({"ready": True})
    if sys.stdin.readline().strip() != "freeze":
        return
    began = time.monotonic()
    try:
        count = agent.execute("guest-fsfreeze-freeze", timeout_s=_FREEZE_S)
        say({"filesystems": count, "mountpoints": mountpoints})
        told, _, _ = select.select([sys.stdin], [], [], limit_s)
    except BaseException:
        # Some may be frozen although the command failed or nobody listens.
        _thaw(path, agent)
        raise
    thawed = _thaw(path, agent)
    say({"thawed": thawed, "frozen_s": time.monotonic() - began, "late": not told})


def main(arguments: list[str]) -> int:
    """Run the program."""
    path, limit_s = arguments[0], float(arguments[1])
    # Whoever ends the backup by a signal must not end this: it ends when its standard input does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)

    def say(message: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    try:
        _hold(path, limit_s, say)
    except AgentError as exc:
        say({"error": str(exc)})
        return 1
    except BrokenPipeError:
        return 1  # nobody listens any more; the guest is thawed
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
