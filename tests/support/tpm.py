"""A real swtpm, a VM's TPM, and enough of a TPM's commands to leave something in it and to read that again."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.process import spawn, stop

__all__ = ["nv_read", "nv_write", "tpm_of_a_vm"]

_INDEX = 0x01500001
_OWNER = 0x40000001
# An area of one session: TPM_RS_PW, and the owner's password, which is empty.
_PASSWORD = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
# Read and written by the owner or with the index's own, empty password; no dictionary attack protection.
_ATTRIBUTES = 0x02060006


@contextmanager
def tpm_of_a_vm(state: Path, path: Path) -> Iterator[list[str]]:
    """A TPM 2.0 with its state in the folder `state`, as QEMU's arguments; it listens on `path` and ends with QEMU."""
    process = _swtpm(state, ["--ctrl", f"type=unixio,path={path}", "--terminate"], path)
    try:
        yield [
            *("-chardev", f"socket,id=tpmsocket,path={path}"),
            *("-tpmdev", "emulator,id=tpmdev,chardev=tpmsocket"),
            *("-device", "tpm-tis,tpmdev=tpmdev"),
        ]
    finally:
        stop(process)


def nv_write(state: Path, data: bytes) -> None:
    """Define an index in the TPM's non-volatile memory, with `data` in it; no VM may have the TPM."""
    public = struct.pack(">IHIHH", _INDEX, 0x000B, _ATTRIBUTES, 0, len(data))
    with _commands(state) as tpm:
        define = struct.pack(">I", _OWNER) + _PASSWORD + struct.pack(">HH", 0, len(public))
        _run(tpm, 0x12A, define + public)
        where = struct.pack(">II", _OWNER, _INDEX)
        _run(tpm, 0x137, where + _PASSWORD + struct.pack(">H", len(data)) + data + b"\0\0")
        _run(tpm, 0x145, b"\0\0", tag=0x8001)


def nv_read(state: Path, size: int) -> bytes:
    """What `nv_write` has left there; no VM may have the TPM."""
    with _commands(state) as tpm:
        where = struct.pack(">II", _OWNER, _INDEX)
        answer = _run(tpm, 0x14E, where + _PASSWORD + struct.pack(">HH", size, 0))
    (length,) = struct.unpack_from(">H", answer, 4)
    return answer[6 : 6 + length]


def _swtpm(state: Path, options: Sequence[str], path: Path) -> subprocess.Popen[bytes]:
    path.unlink(missing_ok=True)
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", *options]
    process = spawn(command, log=path.with_suffix(".log"))
    deadline = time.monotonic() + 20
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            said = path.with_suffix(".log").read_text(errors="replace")
            raise AssertionError(f"swtpm did not start: {said}")
        time.sleep(0.01)
    return process


@contextmanager
def _commands(state: Path) -> Iterator[socket.socket]:
    """A TPM that has been started up and takes commands."""
    path = state.parent / "tpm.sock"
    options = ["--server", f"type=unixio,path={path}", "--flags", "not-need-init,startup-clear"]
    process = _swtpm(state, options, path)
    try:
        with socket.socket(socket.AF_UNIX) as tpm:
            tpm.settimeout(20)
            tpm.connect(str(path))
            yield tpm
    finally:
        stop(process)


def _run(tpm: socket.socket, code: int, body: bytes, *, tag: int = 0x8002) -> bytes:
    """Send a command and return its response behind the header."""
    tpm.sendall(struct.pack(">HII", tag, 10 + len(body), code) + body)
    answer = tpm.recv(4096)
    _, size, result = struct.unpack_from(">HII", answer)
    if result != 0 or size != len(answer):
        raise AssertionError(f"TPM command {code:#x} failed: {answer.hex()}")
    return answer[10:]
