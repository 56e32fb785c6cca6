"""What every group of measurements needs: folders, the rounds, the lock, the programs."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from scripts.benchlib.measure import Usage, folder_size, measure, quiet, run, settled

__all__ = ["NBDPULL", "Lock", "Setting", "backup", "decrypting", "fresh_repository", "say"]

_PASSWORD = "of a repository that lives seconds"  # noqa: S105
NBDPULL = Path(sys.executable).with_name("nbdpull")


def say(text: str) -> None:
    """Tell how far the bench is."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Lock:
    """A lock file that others of this machine take too, so that they keep still while we measure.

    Getting it may take long where many want it, so it is kept from one pair to the next, but for
    seven minutes at most.
    """

    _KEPT_S = 420.0

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._since = 0.0

    def take(self) -> None:
        """Have it, if there is one."""
        if self._path is None:
            return
        if self._file is not None and time.monotonic() - self._since > self._KEPT_S:
            self.release()
        if self._file is None:
            self._file = self._path.open("a", encoding="ascii")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.monotonic()

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run of the bench.

    Attributes:
        folder: for this run; removed at its end.
        disk: the test disk, which nothing may write to.
        raw: the same as a sparse raw file.
        rounds: pairs for each comparison.
        lock: held while anything is measured.
        quick: only what tells a regression.
    """

    folder: Path
    disk: Path
    raw: Path
    size: int
    rounds: int
    lock: Lock
    quick: bool

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Measure with the lock held."""
        self.lock.take()
        yield

    def alternate(
        self,
        ours: Callable[[], Usage],
        peer: Callable[[], Usage],
        *,
        rounds: int | None = None,
        between: Callable[[int], None] = lambda _round: None,
    ) -> tuple[list[Usage], list[Usage]]:
        """Run both so often, ours first and last in turn; `between` comes before each pair."""
        own: list[Usage] = []
        theirs: list[Usage] = []
        sides = [(ours, own), (peer, theirs)]
        for number in range(rounds or self.rounds):
            with self.alone():
                between(number)
                for work, kept in sides if number % 2 == 0 else reversed(sides):
                    quiet()
                    kept.append(work())
        return own, theirs

    def fresh(self, name: str) -> Path:
        """A folder of that name with nothing in it."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def same(self, image: Path, of: str) -> None:
        """Check that an image reads as the test disk does.

        Raises:
            RuntimeError: it does not.
        """
        run(["qemu-img", "compare", "-U", "-f", of, "-F", "raw", settled(image), self.raw])


def fresh_repository(setting: Setting, name: str, *, key: Path | None = None) -> Path:
    """A new repository; with `key` an encrypted one, whose writer's key goes into that file."""
    path = setting.fresh(name)
    if key is None:
        run([NBDPULL, "init", "-r", path])
        return path
    key.unlink(missing_ok=True)
    run([*decrypting(), NBDPULL, "init", "--encrypt", "-r", path])
    run([*decrypting(), NBDPULL, "key", "export", "--writer", "-r", path, key])
    return path


def decrypting() -> list[str]:
    """What to put before a command that reads such a repository."""
    return ["env", f"NBDPULL_PASSWORD={_PASSWORD}"]


def backup(
    uri: str,
    repository: Path,
    level: str,
    *,
    server: int | None,
    more: tuple[str, ...] = (),
    key: Path | None = None,
) -> tuple[Usage, dict[str, Any]]:
    """One `nbdpull backup`, and its result. `key` is the key file of an encrypted repository."""
    before = folder_size(repository)
    line: list[str | Path] = [
        *([] if key is None else ["env", f"NBDPULL_KEY_FILE={key}"]),
        NBDPULL,
        "backup",
        uri,
        "-r",
        repository,
        "-l",
        level,
        "--json",
        "-q",
        *more,
    ]
    usage, text = measure(line, server=server)
    result: dict[str, Any] = json.loads(text)
    return (
        replace(
            usage,
            read=sum(disk["read_bytes"] for disk in result["disks"]),
            stored=folder_size(repository) - before,
            requests=result.get("profile", {}).get("requests"),
        ),
        result,
    )
