"""Rules of the real code, each left out: the tests must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import pytest

from nbdpull.repo.collect import IDLE_S, Collector, _Session
from nbdpull.repo.reuseplan import ReusePlan

__all__ = ["MUTANTS"]


def _no_register(patch: pytest.MonkeyPatch) -> None:
    def revoke(self: Collector, sessions: list[_Session]) -> None:
        del self
        sessions[:] = [session for session in sessions if session.idle_s <= IDLE_S]

    patch.setattr(Collector, "_revoke", revoke)


def _no_recheck(patch: pytest.MonkeyPatch) -> None:
    def look(self: ReusePlan) -> list[str]:
        self._alive = set(self.pins)
        return []

    patch.setattr(ReusePlan, "look", look)


def _no_second_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Collector, "_is_current", lambda _self, _doomed: True)


def _sessions_last(patch: pytest.MonkeyPatch) -> None:
    """Sessions are listed before packs are."""
    real_objects, real_sessions = Collector._list_objects, Collector._list_sessions
    kept = {}

    def objects(self: Collector) -> Mapping[str, object]:
        kept[self] = real_sessions(self, {})
        return real_objects(self)

    patch.setattr(Collector, "_list_objects", objects)
    patch.setattr(Collector, "_list_sessions", lambda self, _objects: kept.pop(self))


MUTANTS: Final[Mapping[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "no register": _no_register,
    "no recheck": _no_recheck,
    "no second look": _no_second_look,
    "sessions before packs": _sessions_last,
}
