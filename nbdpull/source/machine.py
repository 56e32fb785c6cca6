"""What QMP tells of a VM's devices: what somebody needs who starts it again elsewhere.

Kept are the machine's type, processors, memory, devices, disks and channels, as QEMU names them. Left out is what
changes while it runs (counters, threads), and whatever may be secret: of objects that hold secrets only their
names, of addresses no passwords. So the same VM gives the same text, and nothing is stored twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from nbdpull.errors import CommandError
from nbdpull.source.qmp import Monitor

__all__ = ["describe"]

_QUERIES: Final = (
    "query-version",
    "query-name",
    "query-uuid",
    "query-kvm",
    "query-memory-size-summary",
    "query-memdev",
    "query-cpus-fast",
    "query-iothreads",
    "query-tpm",
    "query-chardev",
    "query-pci",
)
_PLACES: Final = ("/machine/peripheral", "/machine/peripheral-anon", "/objects")
_SCALARS: Final = re.compile(
    r"bool|str|string|size|u?int(8|16|32|64)?|OnOffAuto|OnOffSplit|link<.*>"
)
_SECRET: Final = re.compile(r"secret|tls-creds|authz", re.IGNORECASE)
_PRIVATE: Final = re.compile(r"pass(word)?|secret|token|(^|-)key$", re.IGNORECASE)
_USER: Final = re.compile(r"(?<=://)[^/@\s\"]*@")
# What is another thing each time that QEMU is asked or started.
_PASSING: Final = frozenset(
    {"thread-id", "frontend-open", "qom-path", "hotplugged", "realized", "legacy-instance"}
)


async def describe(monitor: Monitor) -> dict[str, Any]:
    """The VM's configuration, as JSON can hold it; what this QEMU can't tell is left out.

    Raises:
        MonitorError: the session broke.
    """
    found: dict[str, Any] = {"nbdpull": "machine", "version": 1}
    for query in _QUERIES:
        answer = await _ask(monitor, query)
        if answer is not None:
            found[query] = _lasting(answer)
    found["machine"] = await _properties(monitor, "/machine")
    for place in _PLACES:
        found[place] = {
            name: await _device(monitor, f"{place}/{name}", kind)
            for name, kind in sorted((await _children(monitor, place)).items())
        }
    found["query-block"] = [_drive(one) for one in await _ask(monitor, "query-block") or []]
    return found


async def _ask(
    monitor: Monitor, command: str, arguments: Mapping[str, object] | None = None
) -> Any:
    try:
        return await monitor.execute(command, arguments)
    except CommandError:
        return None  # an older or a smaller QEMU


async def _children(monitor: Monitor, path: str) -> dict[str, str]:
    """Types by name of what stands below a path."""
    listed = await _ask(monitor, "qom-list", {"path": path}) or []
    return {
        entry["name"]: entry["type"][len("child<") : -1]
        for entry in listed
        if entry["type"].startswith("child<")
    }


async def _device(monitor: Monitor, path: str, kind: str) -> dict[str, Any]:
    # What holds secrets is named, so that it is missed, and not looked into.
    return {"type": kind} if _SECRET.search(kind) else await _properties(monitor, path)


async def _properties(monitor: Monitor, path: str) -> dict[str, Any]:
    found = {}
    for entry in sorted(await _ask(monitor, "qom-list", {"path": path}) or [], key=_name):
        name = entry["name"]
        if name in _PASSING or _PRIVATE.search(name) or not _SCALARS.fullmatch(entry["type"]):
            continue
        value = await _ask(monitor, "qom-get", {"path": path, "property": name})
        if value is not None:
            found[name] = _lasting(value)
    return found


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["name"])


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _lasting(part)
            for name, part in sorted(value.items())
            if name not in _PASSING and not _PRIVATE.search(name)
        }
    if isinstance(value, list):
        return [_lasting(part) for part in value]
    if isinstance(value, str):
        return _USER.sub("", value.removeprefix("disconnected:"))
    return value


def _drive(entry: Mapping[str, Any]) -> dict[str, Any]:
    inserted = entry.get("inserted") or {}
    image = inserted.get("image") or {}
    found = {name: entry.get(name) for name in ("device", "qdev", "removable")}
    found |= {name: inserted.get(name) for name in ("node-name", "drv", "ro", "cache")}
    found |= {name: image.get(name) for name in ("filename", "format", "virtual-size")}
    found["backing-filename"] = image.get("backing-filename")
    lasting: dict[str, Any] = _lasting(
        {name: one for name, one in found.items() if one is not None}
    )
    return lasting
