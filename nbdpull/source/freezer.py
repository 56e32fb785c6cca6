"""Holds a guest's file systems frozen, and thaws them whatever becomes of whoever asked for it.

A program of its own (``python -m nbdpull.source.freezer AGENT SECONDS``), because a backup that is killed or
stopped between freeze and thaw would leave a guest that hangs. It talks JSON lines:

    it says                                                  it is told on standard input
    {"ready": true}
                                                             freeze
    {"filesystems": 2, "mountpoints": ["/", "/home"]}
                                                             thaw, or anything, or the end, or
                                                             nothing for SECONDS
    {"thawed": 2, "frozen_s": 0.012, "late": false}

or {"error": "..."} and ends with 1; nothing stays frozen then either, as far as the agent can be reached.
AGENT is the agent's socket, or ``libvirt...`` as SOURCE is written: libvirt talks to the agent of its domains itself.
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
from typing import Any, Final, Protocol

from nbdpull.errors import Error
from nbdpull.source.address import parse_domain_address
from nbdpull.source.libvirtapi import LibvirtDomain

__all__ = ["Agent", "AgentError", "main"]

_SYNC: Final = b"\xff"
_REPLY_S: Final = 5.0
_FREEZE_S: Final = 30.0
_THAW_TRIES: Final = 10
_FROZEN_ALREADY: Final = (
    "the guest's file systems are frozen already, by somebody else: thaw them first"
)
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

    def check_thawed(self) -> None:
        """See that nobody has frozen the guest.

        Raises:
            AgentError: somebody has.
        """
        if self.execute("guest-fsfreeze-status") != "thawed":
            raise AgentError(_FROZEN_ALREADY)

    def mountpoints(self) -> list[str]:
        """What is mounted, for the result only: an agent that can't tell is no reason to fail."""
        try:
            found = self.execute("guest-get-fsinfo")
            return sorted({str(entry["mountpoint"]) for entry in found})
        except (AgentError, KeyError, TypeError):
            return []

    def freeze(self) -> int:
        """Freeze all file systems, and return how many."""
        return int(self.execute("guest-fsfreeze-freeze", timeout_s=_FREEZE_S))

    def thaw(self) -> int:
        """Thaw them, and return how many.

        Raises:
            AgentError: they may be frozen all the same.
        """
        thawed = int(self.execute("guest-fsfreeze-thaw", timeout_s=_FREEZE_S))
        if self.execute("guest-fsfreeze-status") != "thawed":
            raise AgentError("the guest stays frozen although its agent was told to thaw it")
        return thawed


class _DomainAgent:
    """The agent of a domain, through libvirt, which waits for each of its answers 30 s at most."""

    def __init__(self, domain: LibvirtDomain) -> None:
        self._domain = domain

    def close(self) -> None:
        self._domain.close()

    def check_thawed(self) -> None:
        # libvirt has no call for the status; but an agent refuses nearly everything while frozen.
        try:
            self._domain.filesystems()
        except Error as exc:
            raise AgentError(_FROZEN_ALREADY if "frozen" in str(exc) else str(exc)) from exc

    def mountpoints(self) -> list[str]:
        try:
            return self._domain.filesystems()
        except Error:
            return []

    def freeze(self) -> int:
        try:
            return self._domain.freeze_filesystems()
        except Error as exc:
            raise AgentError(str(exc)) from exc

    def thaw(self) -> int:
        try:
            return self._domain.thaw_filesystems()
        except Error as exc:
            raise AgentError(str(exc)) from exc


class _Freezable(Protocol):
    def close(self) -> None: ...
    def check_thawed(self) -> None: ...
    def mountpoints(self) -> list[str]: ...
    def freeze(self) -> int: ...
    def thaw(self) -> int: ...


def _connect(where: str) -> _Freezable:
    if not where.startswith(("libvirt:", "libvirt+")):
        return Agent(where)
    try:
        return _DomainAgent(LibvirtDomain(parse_domain_address(where)))
    except Error as exc:
        raise AgentError(str(exc)) from exc


def _thaw(path: str, agent: _Freezable | None) -> int:
    """Thaw, over new connections where the old one fails.

    Raises:
        AgentError: it could not be done; the file systems may be frozen.
    """
    for attempt in range(_THAW_TRIES):
        try:
            if agent is None:
                agent = _connect(path)
            return agent.thaw()
        except AgentError:
            if agent is not None:
                agent.close()
            agent = None
            if attempt == _THAW_TRIES - 1:
                raise
            time.sleep(0.5)
    raise AgentError("the guest stays frozen: its agent could not be reached")


def _hold(path: str, limit_s: float, say: Callable[[dict[str, Any]], None]) -> None:
    agent = _connect(path)
    agent.check_thawed()
    mountpoints = agent.mountpoints()
    say({"ready": True})
    if sys.stdin.readline().strip() != "freeze":
        return
    began = time.monotonic()
    try:
        count = agent.freeze()
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
