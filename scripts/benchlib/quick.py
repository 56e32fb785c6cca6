"""`scripts/bench --quick`: whether a ratio fell well below what is written down."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.benchlib.rows import Results
from scripts.benchlib.setting import say

__all__ = ["compare"]

_WELL_BELOW = 0.6
"""A shared machine moves a ratio of two short runs by a fifth either way; a third is a finding."""
_WELL_ABOVE = 1.6


def compare(results: Results, path: Path, *, record: bool) -> int:
    """Compare with the figures in `path`, or write them; 1 when something got much worse."""
    ratios = {pair.key: round(pair.ratio, 3) for all_ in results.pairs.values() for pair in all_}
    values = {
        bound.key: round(bound.value, 4)
        for all_ in results.bounds.values()
        for bound in all_
        if bound.value is not None
    }
    if record:
        text = json.dumps({"ratios": ratios, "values": values}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        return 0
    if not path.exists():
        say("no figures are written down to compare with; write these down with --quick --record")
        return 2
    known = json.loads(path.read_text(encoding="utf-8"))
    worse = [
        f"{key}: the ratio is {ratio}, written down is {known['ratios'][key]}"
        for key, ratio in ratios.items()
        if ratio < known["ratios"].get(key, 0.0) * _WELL_BELOW
    ]
    worse += [
        f"{key}: {value}, written down is {known['values'][key]}"
        for key, value in values.items()
        if value > known["values"].get(key, value) * _WELL_ABOVE
    ]
    for line in worse:
        say(line)
    say("worse than written down" if worse else "as written down")
    return 1 if worse else 0
