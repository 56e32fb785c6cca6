"""gc: delete what no backup needs: what was forgotten, and what failed runs left."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import GcResult
from nbdpull.model.results import ProgressCallback
from nbdpull.nbdio.errors import Cancelled
from nbdpull.ops.threads import in_thread
from nbdpull.repo.repository import Repository

__all__ = ["UNDO_WINDOW_S", "GcOptions", "gc"]

UNDO_WINDOW_S = 7 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GcOptions:
    """How to collect.

    Attributes:
        undo_window_s: how long what was forgotten can be brought back.
        exclusive: nothing else uses the repository; needed where the store can't tell two writers apart.
        dry_run: only tell.
        keys: what opens an encrypted repository; None looks in the environment.
    """

    repository: str
    undo_window_s: float = UNDO_WINDOW_S
    exclusive: bool = False
    dry_run: bool = False
    keys: KeySource | None = None


async def gc(
    options: GcOptions,
    *,
    progress: ProgressCallback | None = None,  # noqa: ARG001 - every verb takes one
) -> GcResult:
    """Collect; beside backups, restores and other collectors, at any time.

    Raises:
        UsageError: `exclusive` is needed.
        DamagedError: what a manifest needs can't be told, so nothing was deleted.
        StoreError: the storage failed; another run goes on where this one ended.
    """
    return await in_thread(lambda cancel: _gc(options, cancel))


def _gc(options: GcOptions, cancel: threading.Event) -> GcResult:
    def check() -> None:
        if cancel.is_set():
            raise Cancelled

    began = time.monotonic()
    repository = Repository.open(options.repository, write=not options.dry_run, keys=options.keys)
    done = repository.collector(
        undo_window_s=options.undo_window_s,
        exclusive=options.exclusive,
        dry_run=options.dry_run,
        check=check,
    ).run()
    return GcResult(
        dry_run=options.dry_run,
        packs=done.packs,
        indexes=done.indexes,
        manifests=done.manifests,
        others=done.intents + done.marks,
        freed_bytes=done.freed_bytes,
        revoked=tuple(done.revoked),
        live=tuple(done.live),
        refused=tuple(done.refused),
        unlock=done.unlock,
        duration_s=time.monotonic() - began,
    )
