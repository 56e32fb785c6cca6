"""docs/performance.md: what is generated stands between two marks, the words around it are kept."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

from nbdpull.version import __version__
from scripts.benchlib.rows import Pair, Results, Side

__all__ = ["machine", "page", "targets"]

_BEGIN = "<!-- written by scripts/bench: begin -->"
_END = "<!-- written by scripts/bench: end -->"


def _said(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if lines else "?"


def machine(folder: Path) -> str:
    """What it was measured on, as a list."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    cores = len(
        re.findall(r"^processor", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    )
    system = _said("stat", "-f", "-c", "%T", str(folder))
    return "\n".join(
        [
            (
                f"- nbdpull {__version__}, Python {platform.python_version()},"
                f" {_said('qemu-img', '--version')}"
            ),
            (
                f"- {_said('nbdcopy', '--version')}, {_said('zstd', '--version').strip('* ')},"
                f" virtnbdbackup {_said('virtnbdbackup', '--version')}, {_said('restic', 'version')},"
                f" {_said('borg', '--version')}"
            ),
            (
                f"- {cores} cores ({cpu[1] if cpu else '?'}),"
                f" {int(memory[1]) >> 20 if memory else 0} GiB of memory, Linux {platform.release()},"
                f" {system} on the virtual disk of a shared machine"
            ),
        ]
    )


def _verdict(met: bool | None) -> str:  # noqa: FBT001 - None is the third
    return {True: "met", False: "**not met**", None: "-"}[met]


def targets(results: Results) -> str:
    """Each target with what was measured."""
    lines = ["| what | target | measured | |", "|---|---|---|---|"]
    for pairs in results.pairs.values():
        lines += [
            f"| {pair.what} against {pair.peer.name} | {pair.least:g} times as fast at least |"
            f" {pair.ratio:.2f} | {_verdict(pair.ratio >= pair.least)} |"
            for pair in pairs
            if pair.least is not None
        ]
    for bounds in results.bounds.values():
        lines += [
            f"| {bound.what} | {bound.shown_limit} | {bound.shown} | {_verdict(bound.met)} |"
            for bound in bounds
        ]
    return "\n".join(lines)


def _span(side: Side) -> str:
    walls = [run.wall_s for run in side.runs]
    median = side.median(lambda run: run.wall_s) or 0.0
    return f"{median:.1f} ({min(walls):.1f} to {max(walls):.1f})"


def _number(value: float | None, unit: int = 1, digits: int = 0) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _cells(side: Side) -> str:
    mib = 1 << 20
    return " | ".join(
        [
            side.name,
            _span(side),
            _number(side.median(lambda run: run.client_cpu_s), digits=1),
            _number(side.median(lambda run: run.server_cpu_s), digits=1),
            _number(side.median(lambda run: run.rss), mib),
            _number(side.median(lambda run: run.read), mib),
            _number(side.median(lambda run: run.stored), mib),
            _number(side.median(lambda run: run.requests)),
        ]
    )


def _pair_rows(pair: Pair) -> list[str]:
    return [
        f"| {pair.what} | {_cells(pair.ours)} | |",
        f"| | {_cells(pair.peer)} | {pair.ratio:.2f} |",
    ]


def page(path: Path, results: Results, head: str) -> None:
    """Write the generated part of the page anew.

    Raises:
        RuntimeError: the page has lost its marks.
    """
    lines = [head, "", "### Targets", "", targets(results), "", "### Pairs", ""]
    lines += [
        (
            "Seconds are medians, then minimum and maximum. Memory and bytes are MiB. The ratio is the"
            " median of the pairs'"
        ),
        "ratios: how many times as long the peer takes.",
        "",
        (
            "| what | program | seconds | client CPU s | server CPU s | peak RSS | read | stored |"
            " NBD requests | ratio |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pairs in results.pairs.values():
        for pair in pairs:
            lines += _pair_rows(pair)
    profiles = [
        results.tables.get(f"profile-{name}", "") for name in ("full", "encrypted", "incremental")
    ]
    if any(profiles):
        lines += [
            "",
            "### Where a backup's time goes, by its own account (`--json`, `profile`)",
            "",
            "Seconds of all workers together.",
            "",
            "| backup | duration s | workers | source | hash | compress | encrypt | store | NBD requests |",
            "|---|---|---|---|---|---|---|---|---|",
            *filter(None, profiles),
        ]
    for key, title in (
        ("scale", "Cost grows with the change, not with the disk"),
        ("guest", "Writes of the guest meanwhile (4 KiB, 100 a second at most, milliseconds)"),
    ):
        if key in results.tables:
            lines += ["", f"### {title}", "", results.tables[key]]
    text = path.read_text(encoding="utf-8")
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise RuntimeError(f"{path} has lost its marks '{_BEGIN}' and '{_END}'")
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    path.write_text(
        f"{before}{_BEGIN}\n\n" + "\n".join(lines) + f"\n\n{_END}{after}", encoding="utf-8"
    )
