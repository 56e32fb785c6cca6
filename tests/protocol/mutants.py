"""Rules of the real code, each left out: the tests must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import pytest

from nbdpull.repo import adopt
from nbdpull.repo.adopt import Adoption
from nbdpull.repo.alive import IDLE_S
from nbdpull.repo.collect import Collector, _Session
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


def _adopts_without_register(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Adoption, "_claim", lambda self, _sid: self._own)


def _no_look_at_what_is_adopted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adopt, "there", lambda _store, _key: False)


def _adopted_is_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Collector, "_adopted", lambda *_: frozenset())


def _no_look_for_adopter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Collector, "_lives", lambda *_: False)


MUTANTS: Final[Mapping[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "no register": _no_register,
    "no recheck": _no_recheck,
    "no second look": _no_second_look,
    "sessions before packs": _sessions_last,
    "adopts without a register": _adopts_without_register,
    "no look at what is adopted": _no_look_at_what_is_adopted,
    "adopted is ended": _adopted_is_ended,
    "no look for an adopter": _no_look_for_adopter,
}
