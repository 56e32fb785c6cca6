"""What the integration tests share: a repository, and backups taken and restored through the API."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from tests.support.process import stop

GUARD_S = 120
"""Far below what a store is waited for otherwise, and by far enough on a machine that is busy."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """A repository with the scratch folder of its backups, and a place for restored disks."""

    repository: str
    scratch: Path
    restored: Path

    def backup(
        self, source: str | list[str], level: str = "auto", **options: Any
    ) -> nbdpull.BackupResult:
        """Back up, with a scratch folder of the test's own."""
        return nbdpull.backup(
            source,
            self.repository,
            level=nbdpull.Level(level) if level != "auto" else "auto",
            scratch=self.scratch,
            **options,
        )

    def restore(self, backup: str, **options: Any) -> dict[str, Path]:
        """Restore all disks of a backup; their raw files by disk name."""
        folder = self.restored / backup
        result = nbdpull.restore(self.repository, backup, folder, **options)
        return {disk.name: Path(disk.target) for disk in result.disks}

    def cleanup(self, source: str | list[str], **options: Any) -> nbdpull.CleanupResult:
        """Clean up in QEMU."""
        return nbdpull.cleanup(source, scratch=self.scratch, **options)


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    """A new, empty repository."""
    for name in ("s", "restored"):
        (tmp_path / name).mkdir()
    repository = str(tmp_path / "repo")
    nbdpull.init(repository)
    return Keeper(repository, tmp_path / "s", tmp_path / "restored")


def interrupted(
    client: subprocess.Popen[str], reached: threading.Event, signum: signal.Signals
) -> str:
    """Have a client end by a signal once its store hangs; what it said."""
    try:
        while not reached.wait(0.1):
            assert client.poll() is None, client.communicate()
        client.send_signal(signum)
        out, err = client.communicate(timeout=GUARD_S)
    finally:
        stop(client)
    assert client.returncode == 128 + signum, err
    assert out == ""
    assert err.splitlines()[-1] == f"nbdpull: ended by {signum.name}; everything was torn down"
    return err


def noise(tmp_path: Path, size: int) -> str:
    """A qemu-io command that writes what can't be compressed."""
    (tmp_path / "noise").write_bytes(random.Random(5).randbytes(size))
    return f"write -q -s {tmp_path}/noise 1M {size}"
