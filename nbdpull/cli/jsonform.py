"""Results as JSON: an object's keys are the attributes of the result, documented in `nbdpull`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum

__all__ = ["Json", "dumps", "iso_time", "to_json"]

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


def iso_time(time: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC, to the millisecond: ``2025-01-31T09:05:00.250Z``."""
    text = datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds")
    return text.removesuffix("+00:00") + "Z"


def to_json(value: object) -> Json:
    """Dataclasses become objects, tuples arrays; ``time`` and ``*_time`` are ISO 8601, ``*_s`` has milliseconds.

    Raises:
        TypeError: something that has no place in a result.
    """
    # An Enum that is a string too must lose its type, so it comes first.
    if isinstance(value, Enum):
        return to_json(value.value)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {
            field.name: _field(field.name, getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _field(name: str, value: object) -> Json:
    if isinstance(value, int | float):
        if name == "time" or name.endswith("_time"):
            return iso_time(value)
        if name.endswith("_s"):
            return round(value, 3)
    return to_json(value)


def dumps(value: Json, *, indent: int | None = None) -> str:
    """JSON text of ASCII alone: any terminal, pipe and log takes it, whatever a disk is called."""
    return json.dumps(value, indent=indent, ensure_ascii=True)
