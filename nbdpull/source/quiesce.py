"""Freezes the guest's file systems around the point in time, for milliseconds, through the guest agent.

The freezing is done by a process of its own (`freezer`), which thaws when it is told to, when this
process dies, and when too much time has passed, whichever comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from nbdpull.errors import CommandError, SourceError
from nbdpull.model.results import Quiesced
from nbdpull.source.qmp import Monitor

__all__ = ["QuiesceLog", "find_agent", "quiesced"]

_PORT: Final = "org.qemu.guest_agent.0"
_HOLD_S: Final = 10.0
"""Longest time that file systems stay frozen: the point in time takes milliseconds."""
_ANSWER_S: Final = 60.0


class QuiesceLog:
    """What became of it.

    Attributes:
        result: what was frozen, once it is thawed.
        late: it was thawed before the point in time was there.
    """

    def __init__(self) -> None:
        self.result: Quiesced | None = None
        self.late = False


async def find_agent(monitor: Monitor) -> str:
    """The unix socket of the guest agent's port, as QEMU has it.

    Raises:
        SourceError: the VM has no such port, or it is no unix socket.
    """
    labels = set()
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for entry in await monitor.execute("qom-list", {"path": folder}):
            if entry["type"] != "child<virtserialport>":
                continue
            path = f"{folder}/{entry['name']}"
            with contextlib.suppress(CommandError):
                name = await monitor.execute("qom-get", {"path": path, "property": "name"})
                if name == _PORT:
                    labels.add(
                        await monitor.execute("qom-get", {"path": path, "property": "chardev"})
                    )
    for entry in await monitor.execute("query-chardev"):
        # For example "disconnected:unix:/run/web.qga,server=on".
        address = str(entry["filename"]).removeprefix("disconnected:")
        if entry["label"] in labels and address.startswith("unix:"):
            return address.removeprefix("unix:").partition(",")[0]
    raise SourceError(
        f"the VM has no port '{_PORT}' on a unix socket, which --quiesce needs (-chardev"
        " socket,id=qga,path=PATH,server=on,wait=off -device virtio-serial -device"
        f" virtserialport,chardev=qga,name={_PORT}); name the socket with --agent, or back up without"
        " --quiesce"
    )


@asynccontextmanager
async def quiesced(agent: str) -> AsyncIterator[QuiesceLog]:
    """Keep the guest's file systems frozen as long as the context lasts, 10 seconds at most.

    Raises:
        SourceError: the agent did not freeze them, or they were thawed before the context's end.
    """
    log = QuiesceLog()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nbdpull.source.freezer", agent, str(_HOLD_S)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        await _answer(process, "ready")
        _tell(process, "freeze")
        frozen = await _answer(process, "filesystems")
        yield log
        _tell(process, "thaw")
        thawed = await _answer(process, "thawed")
    finally:
        # Closing its input makes it thaw, whatever happened here.
        if process.stdin is not None:
            process.stdin.close()
        await asyncio.shield(process.wait())
    if thawed["late"]:
        raise SourceError(
            f"the guest's file systems were thawed after {_HOLD_S:g} s, before the point in time was"
            " there: QEMU is too slow to answer; try again, or back up without --quiesce"
        )
    log.result = Quiesced(
        filesystems=int(frozen["filesystems"]),
        mountpoints=tuple(map(str, frozen["mountpoints"])),
        frozen_s=float(thawed["frozen_s"]),
    )


def _tell(process: asyncio.subprocess.Process, word: str) -> None:
    if process.stdin is not None:
        process.stdin.write(word.encode() + b"\n")


async def _answer(process: asyncio.subprocess.Process, key: str) -> dict[str, Any]:
    if process.stdout is None:
        raise RuntimeError("the freezer was started without a pipe")
    try:
        async with asyncio.timeout(_ANSWER_S):
            line = await process.stdout.readline()
    except TimeoutError as exc:
        raise SourceError(f"the guest agent did not answer in {_ANSWER_S:g} s") from exc
    message = json.loads(line) if line else {"error": "the process that talks to the agent died"}
    if "error" in message:
        raise SourceError(f"{message['error']}; mend that, or back up without --quiesce")
    if key not in message:
        raise RuntimeError(f"the freezer said {message}, expected '{key}'")
    return dict(message)
