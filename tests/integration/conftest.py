"""What the integration tests share: a repository, and backups taken and restored through the API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nbdpull


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
