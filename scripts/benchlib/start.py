"""How long the command takes to start."""

from __future__ import annotations

import statistics

from scripts.benchlib.measure import measure
from scripts.benchlib.rows import Bound, Results
from scripts.benchlib.setting import NBDPULL, Setting

__all__ = ["start"]


def start(setting: Setting, results: Results) -> None:
    """Measure `nbdpull --version`."""
    with setting.alone():
        walls = [measure([NBDPULL, "--version"])[0].wall_s for _ in range(15)]
    median = statistics.median(walls)
    results.bounds["start"] = [
        Bound(
            key="start",
            what="command start, `nbdpull --version`, median of 15",
            limit=0.15,
            shown_limit="0.15 s at most",
            value=median,
            shown=f"{median:.3f} s ({min(walls):.3f} to {max(walls):.3f})",
        )
    ]
