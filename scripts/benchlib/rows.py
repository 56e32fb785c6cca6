"""What was measured: pairs of runs, bounds, and what each target makes of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.benchlib.measure import Usage

__all__ = ["Bound", "Pair", "Results", "Side", "ratio_of"]


@dataclass(slots=True)
class Side:
    """One program's runs of one comparison."""

    name: str
    runs: list[Usage] = field(default_factory=list)

    def median(self, of: Callable[[Usage], float | None]) -> float | None:
        """The median, or None when it was not measured."""
        values = [value for run in self.runs if (value := of(run)) is not None]
        return statistics.median(values) if values else None


@dataclass(slots=True, kw_only=True)
class Pair:
    """nbdpull against a peer doing the same work, run alternately.

    Attributes:
        key: names the row for `--quick`.
        least: the smallest ratio (the peer's seconds to ours) that meets the target; None where
            there is no target.
    """

    key: str
    what: str
    ours: Side
    peer: Side
    least: float | None = None

    @property
    def ratio(self) -> float:
        """How many times as long the peer takes: the median over the pairs."""
        return ratio_of(self.ours.runs, self.peer.runs)


def ratio_of(ours: Sequence[Usage], peer: Sequence[Usage]) -> float:
    """The median of the pairs' ratios: each pair ran back to back, under the same load."""
    return statistics.median(
        theirs.wall_s / own.wall_s for own, theirs in zip(ours, peer, strict=True)
    )


@dataclass(slots=True, kw_only=True)
class Bound:
    """A figure with a limit: at most, or with `least` at least.

    Attributes:
        value: None where it was not measured; `note` then says why.
        shown: the value as a reader wants it.
    """

    key: str
    what: str
    limit: float | None
    shown_limit: str
    value: float | None = None
    shown: str = ""
    least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none, or nothing was measured."""
        if self.value is None or self.limit is None:
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit


@dataclass(slots=True)
class Results:
    """Everything that was measured, by group, with tables that stand for themselves."""

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    bounds: dict[str, list[Bound]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    times: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        data = {
            "pairs": {
                group: [_pair_json(pair) for pair in all_] for group, all_ in self.pairs.items()
            },
            "bounds": {
                group: [{name: getattr(bound, name) for name in Bound.__slots__} for bound in all_]
                for group, all_ in self.bounds.items()
            },
            "tables": self.tables,
            "times": self.times,
        }
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote; nothing where there is no such file."""
        if not path.exists():
            return cls()
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            pairs={group: [_pair(one) for one in all_] for group, all_ in data["pairs"].items()},
            bounds={
                group: [Bound(**one) for one in all_] for group, all_ in data["bounds"].items()
            },
            tables=data["tables"],
            times=data["times"],
        )


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {
        "key": pair.key,
        "what": pair.what,
        "least": pair.least,
        "ours": {"name": pair.ours.name, "runs": [run.to_json() for run in pair.ours.runs]},
        "peer": {"name": pair.peer.name, "runs": [run.to_json() for run in pair.peer.runs]},
    }


def _pair(data: dict[str, Any]) -> Pair:
    def side(one: dict[str, Any]) -> Side:
        return Side(one["name"], [Usage(**run) for run in one["runs"]])

    return Pair(
        key=data["key"],
        what=data["what"],
        least=data["least"],
        ours=side(data["ours"]),
        peer=side(data["peer"]),
    )
