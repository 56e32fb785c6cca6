"""A file that has its final name only when it is whole and durable."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from nbdpull.errors import TargetError, UsageError

__all__ = ["PartFile", "failed"]

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def failed(what: str, name: str, exc: OSError) -> TargetError:
    """The error for a system call on a target that failed."""
    message = f"can't {what} '{name}': {exc.strerror or exc}"
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        message += "; free some space or restore elsewhere"
    return TargetError(message)


class PartFile:
    """A new file under a temporary name in the folder it will stay in.

    Disks hold secrets, so only the owner may read it, whatever the umask.

    Attributes:
        final: the name it gets in `publish`.
        path: the temporary name.
        fd: open for reading and writing until `publish` or `remove`.
    """

    def __init__(self, final: Path, *, force: bool) -> None:
        """Create the temporary file.

        Raises:
            UsageError: `final` exists and not `force`.
            TargetError: the file can't be created.
        """
        self.final = final
        self._force = force
        self._check_free()
        self.path = final.with_name(f".{final.name[:200]}.{secrets.token_hex(8)}.part")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self.fd = os.open(self.path, flags, 0o600)
        except OSError as exc:
            raise failed("create", str(self.path), exc) from exc

    def _check_free(self) -> None:
        if self._force:
            if self.final.is_dir():
                raise UsageError(f"'{self.final}' is a folder; remove it, or restore elsewhere")
        elif os.path.lexists(self.final):
            raise UsageError(
                f"'{self.final}' exists; give --force to replace it, or restore elsewhere"
            )

    def publish(self) -> None:
        """Make the bytes durable, then the name.

        Raises:
            UsageError: somebody else made a file of that name meanwhile.
            TargetError: the storage failed.
        """
        try:
            os.fsync(self.fd)
            self._rename()
            os.close(self.fd)
            self.fd = -1
            folder = os.open(self.final.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as exc:
            raise failed("finish", str(self.final), exc) from exc

    def _rename(self) -> None:
        if not self._force:
            try:
                # Unlike rename(2), link(2) never replaces a file that appeared meanwhile.
                os.link(self.path, self.final)
            except FileExistsError:
                self._check_free()
                raise
            except OSError as exc:
                if exc.errno not in _NO_HARD_LINKS:
                    raise
                self._check_free()
            else:
                self.path.unlink()
                return
        self.path.rename(self.final)

    def remove(self) -> None:
        """Remove the temporary file, if it still has that name. Never raises."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(OSError):
            self.path.unlink()
