"""The host that QEMU runs on, as far as a run needs it: folders for scratch images, and QEMU's unix sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

from nbdpull.errors import MonitorError
from nbdpull.source.journal import Journal
from nbdpull.source.rundir import FoundRun, RunDir, find_run, find_runs
from nbdpull.source.unfinished import Unfinished

__all__ = ["HERE", "Place", "RunFolder"]


class RunFolder(Protocol):
    """The folder of one run: see `RunDir`, of which it has all that is used while the run lasts."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def socket(self) -> str: ...  # noqa: D102
    @property
    def life(self) -> str: ...  # noqa: D102
    @property
    def here(self) -> bool: ...  # noqa: D102
    def make_scratch(self, index: int, size: int) -> str: ...  # noqa: D102
    def room(self) -> tuple[int, int]: ...  # noqa: D102
    def pace_s(self, spare: int) -> float: ...  # noqa: D102
    def hold_back(self, size: int) -> None: ...  # noqa: D102
    def let_go(self) -> None: ...  # noqa: D102
    def mark_server(self) -> None: ...  # noqa: D102
    def mark_paused(self, *, paused: bool) -> None: ...  # noqa: D102
    def keep_record(self, record: Unfinished, machine: bytes | None) -> bool: ...  # noqa: D102
    def replace_record(self, record: Unfinished) -> None: ...  # noqa: D102
    def journal(self, backup: str) -> Journal | None: ...  # noqa: D102
    def keep(self) -> None: ...  # noqa: D102
    def remove_scratch(self) -> None: ...  # noqa: D102
    def leave(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Place(Protocol):
    """One host. All but `reach` and `lost` block."""

    def create(
        self,
        parent: str | None,
        run: str,
        *,
        source: str,
        chain: str,
        owner: tuple[int, int] | None,
        sizes: Sequence[int],
    ) -> RunFolder:
        """Make a run's folder, as `RunDir.create` does.

        `sizes` are the bytes of the scratch images that will be made in it, by number.
        """

    def take_over(self, path: Path, *, source: str, chain: str) -> RunFolder:
        """Go on with the folder of a run that died, as `RunDir.take_over` does."""

    def find(self, path: Path) -> FoundRun | None:
        """What is known of the run whose folder is `path`; see `find_run`."""

    def find_all(self, parent: str | None) -> Iterable[FoundRun]:
        """All runs whose folders are in `parent` (None: where they are by default)."""

    async def reach(self, path: str) -> str:
        """Where the unix socket at `path` there is for this process, made or not."""

    async def lost(self) -> MonitorError:
        """Wait until the host can't be reached any more, and say why."""


class _Here:
    """This host."""

    def create(
        self,
        parent: str | None,
        run: str,
        *,
        source: str,
        chain: str,
        owner: tuple[int, int] | None,
        sizes: Sequence[int],  # noqa: ARG002 - made one by one
    ) -> RunDir:
        return RunDir.create(parent, run, source=source, chain=chain, owner=owner)

    def take_over(self, path: Path, *, source: str, chain: str) -> RunDir:
        return RunDir.take_over(path, source=source, chain=chain)

    def find(self, path: Path) -> FoundRun | None:
        return find_run(path)

    def find_all(self, parent: str | None) -> Iterable[FoundRun]:
        return find_runs(parent)

    async def reach(self, path: str) -> str:
        return path

    async def lost(self) -> MonitorError:
        await asyncio.Event().wait()
        raise AssertionError


HERE: Final[Place] = _Here()
"""This host."""
