"""What a guest's writes wait for while its disk is backed up."""

from __future__ import annotations

import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.benchlib.domain import Domain
from scripts.benchlib.measure import measure, quiet, warm
from scripts.benchlib.rows import Bound, Results
from scripts.benchlib.setting import Setting, backup, fresh_repository, say

__all__ = ["guest"]

_BLOCK = 4096
_PACE_S = 0.01
_IDLE_S = 5.0


class _Writer:
    """Writes 4 KiB at random places, one at a time, a hundred a second, and times each.

    The writes go through the disk's device, above the filter that keeps the point in time, as the
    guest's do; they are asked for over QMP, whose own way is part of each figure, also when idle.
    """

    def __init__(self, domain: Domain, size: int) -> None:
        self._domain = domain
        self._qdev = domain.qdev
        self._random = random.Random(1)  # noqa: S311 - repeatable is what it has to be
        self._blocks = size * 3 // 4 // _BLOCK
        self._stop = threading.Event()
        self.waited: list[float] = []

    def _write(self) -> None:
        at = self._random.randrange(self._blocks) * _BLOCK
        line = f'qemu-io -d {self._qdev} "write -q -P {at // _BLOCK % 255} {at} {_BLOCK}"'
        began = time.perf_counter()
        self._domain.qmp("human-monitor-command", command_line=line)
        self.waited.append(time.perf_counter() - began)

    def _run(self) -> None:
        due = time.perf_counter()
        while not self._stop.is_set():
            self._write()
            # What is late is not made up for: the guest waited too.
            due = max(due + _PACE_S, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="guest")
        self._stop.clear()
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def _push(setting: Setting, domain: Domain) -> None:
    target = setting.fresh("push") / "disk.qcow2"
    domain.push_begin(target)
    while domain.push_runs():
        time.sleep(0.05)
    domain.push_end()


def guest(setting: Setting, results: Results) -> None:
    """Measure the latency of writes: idle, and during each program's backup."""
    disk = setting.folder / "vm.qcow2"
    shutil.copyfile(setting.disk, disk)
    pulls: list[float] = []
    sides: dict[str, Callable[[Domain], None]] = {
        "no backup": lambda _domain: time.sleep(_IDLE_S),
        "nbdpull": lambda domain: pulls.append(_pull(setting, domain)),
        "nbdpull at half that rate (--rate)": lambda domain: _pull_at(setting, domain, pulls[-1]),
        "nbdpull, --trim-scratch": lambda domain: _pull_trimming(setting, domain),
        "nbdpull at half that rate, --trim-scratch": lambda domain: _pull_at(
            setting, domain, pulls[-1], "--trim-scratch"
        ),
        "virtnbdbackup 1.9.15, lz4": lambda domain: _virtnbdbackup(setting, domain),
        "QEMU push, not compressed (as qmpbackup)": lambda domain: _push(setting, domain),
    }
    waited: dict[str, list[list[float]]] = {name: [] for name in sides}
    took: dict[str, list[float]] = {name: [] for name in sides}
    with Domain("bench", disk, setting.folder / "domain") as domain:
        warm(disk)
        for number in range(setting.rounds):
            with setting.alone():
                for name, work in sides.items():
                    writer = _Writer(domain, setting.size)
                    quiet()
                    began = time.perf_counter()
                    with writer.running():
                        work(domain)
                    took[name].append(time.perf_counter() - began)
                    waited[name].append(writer.waited)
                    say(
                        f"guest: round {number + 1}, {name}: p99"
                        f" {_quantile(writer.waited, 0.99):.1f} ms of {len(writer.waited)}"
                    )
    disk.unlink()
    for name in ("repository", "virtnbdbackup", "push"):
        with suppress(FileNotFoundError):
            shutil.rmtree(setting.folder / name)
    _report(results, waited, took)


def _pull(setting: Setting, domain: Domain, *more: str) -> float:
    """Bytes a second that it read."""
    repository = fresh_repository(setting, "repository")
    usage, result = backup(domain.uri, repository, "copy", server=None, more=more)
    return float((usage.read or 0) / result["duration_s"])


def _pull_trimming(setting: Setting, domain: Domain) -> None:
    _pull(setting, domain, "--trim-scratch")


def _pull_at(setting: Setting, domain: Domain, full_speed: float, *more: str) -> None:
    _pull(setting, domain, "--rate", str(int(full_speed / 2)), *more)


def _virtnbdbackup(setting: Setting, domain: Domain) -> None:
    target = setting.fresh("virtnbdbackup")
    line: list[str | Path] = ["virtnbdbackup", "-d", domain.name, "-l", "copy", "-z", "-n"]
    measure([*line, "-o", target, "-S", setting.folder])


def _quantile(values: list[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _report(
    results: Results, waited: dict[str, list[list[float]]], took: dict[str, list[float]]
) -> None:
    rows = []
    tails: dict[str, float] = {}
    for name, rounds in waited.items():
        every = [value for one in rounds for value in one]
        tails[name] = statistics.median(_quantile(one, 0.99) for one in rounds)
        rows.append(
            f"| {name} | {_quantile(every, 0.5):.1f} | {tails[name]:.1f} |"
            f" {1000 * max(every):.0f} | {len(every)} | {statistics.median(took[name]):.1f} s |"
        )
    results.tables["guest"] = "\n".join(
        ["| during | p50 | p99 | max | writes | for |", "|---|---|---|---|---|---|", *rows]
    )
    ours, half = tails.pop("nbdpull"), tails.pop("nbdpull at half that rate (--rate)")
    idle = tails.pop("no backup")
    tails = {name: tail for name, tail in tails.items() if not name.startswith("nbdpull")}
    best = min(tails, key=lambda name: tails[name])
    results.bounds["guest"] = [
        Bound(
            key="guest-p99",
            what=f"guest write p99 during a pull at full speed, against the best peer ({best})",
            limit=0.5,
            shown_limit="0.5 times at most",
            value=ours / tails[best],
            shown=f"{ours / tails[best]:.2f} times ({ours:.1f} against {tails[best]:.1f} ms)",
        ),
        Bound(
            key="guest-rate",
            what="guest write p99 during a pull with `--rate` at half speed, against idle",
            limit=2.0,
            shown_limit="2 times at most",
            value=half / idle,
            shown=f"{half / idle:.2f} times ({half:.1f} against {idle:.1f} ms)",
        ),
    ]
