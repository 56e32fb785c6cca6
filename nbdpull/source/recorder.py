"""What a run leaves in its folder for whoever goes on with it, should it die: a record, a journal, kept files."""

from __future__ import annotations

import threading
from contextlib import AsyncExitStack
from dataclasses import replace

from blake3 import blake3

from nbdpull.source.base import CannotGoOnError
from nbdpull.source.journal import Journal
from nbdpull.source.place import RunFolder
from nbdpull.source.rundir import FoundRun
from nbdpull.source.unfinished import Unfinished
from nbdpull.source.whole import whole

__all__ = ["Recorded", "Recorder", "kept_files"]


class Recorder:
    """Writes them; see `nbdpull.source.base.RecordedPointInTime`, whose methods these are.

    Args:
        rundir: the run's folder.
        record: what is on record there already, of a run that is gone on with.
    """

    def __init__(self, rundir: RunFolder, record: Unfinished | None = None) -> None:
        self._rundir = rundir
        self._record = record
        self._lock = threading.Lock()
        self._stack = AsyncExitStack()

    async def keep(self, record: Unfinished, machine: bytes | None) -> Journal | None:
        """Leave the record, with the digest of an archive of files, and that archive."""
        if machine is not None:
            record = replace(record, machine=blake3(machine).hexdigest())
        if not await whole(self._rundir.keep_record, record, machine):
            return None
        self._record = record
        return await self.journal(record.backup)

    def note_lie(self, disk: str, lie: str) -> None:
        """Add to the record what the audit found."""
        with self._lock:
            if self._record is not None:
                self._record = self._record.with_lie(disk, lie)
                self._rundir.replace_record(self._record)

    async def journal(self, backup: str) -> Journal | None:
        """What was noted of the reading, to go on with; None where nothing can be noted."""

        def find() -> Journal | None:
            journal = self._rundir.journal(backup)
            if journal is not None:
                # Noted here: it is closed also when this was cancelled meanwhile. In a thread: on another host it
                # may have to wait.
                self._stack.push_async_callback(whole, journal.close)
            return journal

        return await whole(find)

    async def close(self) -> None:
        """Let the journal go."""
        await self._stack.aclose()


class Recorded:
    """What every `nbdpull.source.base.RecordedPointInTime` does in the same way."""

    _recorder: Recorder

    def note_lie(self, disk: str, lie: str) -> None:
        """See `RecordedPointInTime.note_lie`."""
        self._recorder.note_lie(disk, lie)

    async def journal(self, backup: str) -> Journal | None:
        """See `RecordedPointInTime.journal`."""
        return await self._recorder.journal(backup)


async def kept_files(folder: FoundRun | None, record: Unfinished) -> bytes | None:
    """See `nbdpull.source.base.Resumable.kept_files`; `folder` is that of the run."""
    if folder is None or record.machine is None:
        return None
    try:
        return await whole(folder.machine, record.machine)
    except ValueError as exc:
        raise CannotGoOnError(str(exc)) from exc
