"""Disk images that no QEMU has open, through the programs ``qemu-img`` and ``qemu-nbd``.

An image is opened for writing only by ``qemu-img bitmap``, for some milliseconds: a program that is killed
while it has a qcow2 open for writing leaves every bitmap in it marked inconsistent.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdpull.errors import InUseError, SourceError
from nbdpull.model.chain import BitmapState
from nbdpull.nbdio.connection import Connection, RefusedError, unix_uri
from nbdpull.source.base import GRANULARITY

__all__ = ["Image", "ImageLock", "ImageServer", "add_bitmap", "look", "remove_bitmap"]

_CLIENTS: Final = 64
"""Connections to one image: more than a pull opens."""
_START_S: Final = 30.0
_STOP_S: Final = 10.0
_TICK_S: Final = 0.02
_NOT_FOUND: Final = 127
"""What a shell ends with when there is no such program."""
# QEMU's locks on an image (block/file-posix.c): byte 100 + n says that somebody has permission n, byte
# 200 + n that somebody denies it to others. Permission 1 is writing.
_WRITING: Final = 101
_NO_WRITING: Final = 201
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image as it lies on the disk.

    Attributes:
        path: absolute.
        format: as ``qemu-img -f`` takes it.
        size: bytes of the disk in it.
        records: whether it can hold bitmaps (qcow2 version 3 only).
        bitmaps: those it holds; their `count` is not known.
    """

    path: str
    format: str
    size: int
    records: bool
    bitmaps: Mapping[str, BitmapState]


def _in_use(path: str) -> InUseError:
    return InUseError(
        f"image '{path}' is in use by another process, which holds QEMU's lock on it; a running VM is"
        " backed up through its monitor (qmp:/path/to/socket), so use that, or shut the VM down"
    )


def _run(program: str, arguments: Sequence[str], path: str) -> bytes:
    try:
        done = subprocess.run(
            [program, *arguments],
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            # Ctrl-C in a terminal is for us: half a change of an image is what must not be.
            start_new_session=True,
            env=os.environ | {"LC_ALL": "C"},
        )
    except FileNotFoundError as exc:
        raise _missing(program) from exc
    if done.returncode:
        raise _failure(f"{program} {arguments[0]}", path, done.stderr)
    return done.stdout


def _missing(program: str) -> SourceError:
    return SourceError(f"'{program}' is not installed; install the Debian package qemu-utils")


def _failure(what: str, path: str, log: bytes) -> SourceError | InUseError:
    text = log.decode(errors="replace").strip()
    if "lock" in text and "another process" in text:
        return _in_use(path)
    lines = [line for line in text.splitlines() if line]
    return SourceError(f"'{what}' failed on image '{path}': {lines[0] if lines else 'no reason'}")


def _bitmaps(described: Mapping[str, Any]) -> dict[str, BitmapState]:
    return {
        entry["name"]: BitmapState(
            name=entry["name"],
            granularity=entry["granularity"],
            recording="auto" in entry["flags"],
            busy=False,
            persistent=True,
            # Nobody has the image open for writing, so one that is marked as in use was left so.
            inconsistent="in-use" in entry["flags"],
        )
        for entry in described.get("bitmaps", [])
    }


def look(path: str, image_format: str) -> Image:
    """What is in an image.

    Raises:
        InUseError: a QEMU has it open for writing.
        SourceError: it is not there, or is no such image.
    """
    # Locks of raw images don't keep qemu-img from reading them, so ask before.
    ImageLock(path).close()
    raw = _run("qemu-img", ["info", "--output=json", "-f", image_format, "--", path], path)
    info = json.loads(raw)
    specific = info.get("format-specific", {}).get("data", {})
    return Image(
        path=path,
        format=image_format,
        size=int(info["virtual-size"]),
        records=info["format"] == "qcow2" and specific.get("compat") != "0.10",
        bitmaps=_bitmaps(specific),
    )


def add_bitmap(path: str, name: str, *, recording: bool) -> None:
    """Add a bitmap to a qcow2 image.

    Raises:
        InUseError, SourceError: it was not added.
    """
    options = ["--add", "-g", str(GRANULARITY), *([] if recording else ["--disable"])]
    _run("qemu-img", ["bitmap", *options, "-f", "qcow2", "--", path, name], path)


def remove_bitmap(path: str, name: str) -> None:
    """Remove a bitmap, an inconsistent one too.

    Raises:
        InUseError, SourceError: it is still there, or was not.
    """
    _run("qemu-img", ["bitmap", "--remove", "-f", "qcow2", "--", path, name], path)


class ImageLock:
    """As long as it is held, no QEMU can open the image for writing.

    ``qemu-nbd -r`` holds such a lock on a qcow2, but none on a raw image: it would let a VM start and
    write while its disk is read.
    """

    def __init__(self, path: str) -> None:
        """Take it.

        Raises:
            InUseError: a QEMU has the image open for writing.
            SourceError: the image can't be opened.
        """
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise SourceError(f"can't open image '{path}': {exc.strerror}") from exc
        try:
            # Deny first and look then, as QEMU does: of two that come at once, one sees the other.
            self._lock(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, _NO_WRITING)
            held = self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, _WRITING)
        except BlockingIOError as exc:
            self.close()
            raise _in_use(path) from exc
        except OSError as exc:
            self.close()
            raise SourceError(
                f"can't lock image '{path}': {exc.strerror}; its file system must know file locks,"
                " or a VM could write to it meanwhile"
            ) from exc
        if held != fcntl.F_UNLCK:
            self.close()
            raise _in_use(path)

    def _lock(self, operation: int, kind: int, offset: int) -> int:
        request = _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)
        return int(_FLOCK.unpack(fcntl.fcntl(self._fd, operation, request))[0])

    def close(self) -> None:
        """Let it go; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_SERVE: Final = """
exec 3<&0 </dev/null
qemu-nbd "$@" 3<&- & server=$!
{ read -r _ <&3; kill "$server"; } & watch=$!
wait "$server"; code=$?
kill "$watch"
exit $code
"""
"""Runs qemu-nbd until it ends, or until whoever holds the other end of our standard input has gone."""


class ImageServer:
    """A ``qemu-nbd`` that serves one image read-only on a private unix socket.

    It never outlives this process, however that ends.

    Attributes:
        uri: of the export.
    """

    def __init__(self, image: Image, socket: Path, *, bitmap: str | None) -> None:
        """Describe it: `start` starts it."""
        self.uri = unix_uri(str(socket))
        self._image = image
        self._socket = socket
        self._log = socket.with_suffix(".log")
        self._options = ["--read-only", f"--format={image.format}", f"--shared={_CLIENTS}"]
        self._options += ["--persistent", f"--socket={socket}", "--allocation-depth"]
        if bitmap is not None:
            self._options.append(f"--bitmap={bitmap}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            InUseError, SourceError: it can't serve the image.
        """
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SERVE, "sh", *self._options, "--", self._image.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for us: we stop it in order
                env=os.environ | {"LC_ALL": "C"},
            )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            code = self._process.poll()
            if code == _NOT_FOUND:
                raise _missing("qemu-nbd")
            if code is not None:
                raise _failure("qemu-nbd", self._image.path, self._log.read_bytes())
            if time.monotonic() > deadline:
                raise SourceError(
                    f"qemu-nbd for '{self._image.path}' did not start in {_START_S:g} s"
                )
            time.sleep(_TICK_S)

    def _answers(self) -> bool:
        if not self._socket.is_socket():
            return False
        try:
            with Connection.open(self.uri, timeout_s=_START_S) as probe:
                size = probe.size
        except RefusedError:
            return False  # the socket is there before anybody listens
        if size != self._image.size:
            raise SourceError(
                f"qemu-nbd serves {size} bytes of image '{self._image.path}', expected"
                f" {self._image.size}; if it was resized just now, try again"
            )
        return True

    def close(self) -> None:
        """End it and wait for its end; never raises, a second call does nothing."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            # In its own session it leads the group that it and qemu-nbd are in.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
