"""The QEMU versions that are tested: Debian 12's own, and the backport in its private prefix."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

__all__ = ["QEMU_10", "QEMU_72", "QEMU_VERSIONS", "QemuTools", "cache_folder"]


def cache_folder() -> Path:
    """Where `scripts/setup` keeps what it fetched."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbdpull"


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuTools:
    """The programs of one QEMU version.

    Attributes:
        id: for test ids: ``qemu-7.2`` or ``qemu-10``.
        version: (major, minor).
        bin: the folder with all five programs.
    """

    id: str
    version: tuple[int, int]
    bin: Path

    @property
    def qemu_system(self) -> Path:
        """``qemu-system-x86_64``."""
        return self.bin / "qemu-system-x86_64"

    @property
    def qemu_img(self) -> Path:
        """``qemu-img``."""
        return self.bin / "qemu-img"

    @property
    def qemu_nbd(self) -> Path:
        """``qemu-nbd``."""
        return self.bin / "qemu-nbd"

    @property
    def qemu_io(self) -> Path:
        """``qemu-io``."""
        return self.bin / "qemu-io"

    @property
    def storage_daemon(self) -> Path:
        """``qemu-storage-daemon``."""
        return self.bin / "qemu-storage-daemon"

    @property
    def installed(self) -> bool:
        """Whether all five programs are there."""
        programs = (
            self.qemu_system,
            self.qemu_img,
            self.qemu_nbd,
            self.qemu_io,
            self.storage_daemon,
        )
        return all(shutil.which(program) is not None for program in programs)


QEMU_72 = QemuTools(id="qemu-7.2", version=(7, 2), bin=Path("/usr/bin"))
# The programs in here are small wrappers that name the prefix's own firmware and modules.
QEMU_10 = QemuTools(id="qemu-10", version=(10, 0), bin=cache_folder() / "qemu-10" / "bin")
QEMU_VERSIONS = (QEMU_72, QEMU_10)
