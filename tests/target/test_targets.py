"""Every target against one disk, read back by programs that are not ours."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import threading
from pathlib import Path

import pytest

from nbdpull.errors import TargetError, UsageError
from nbdpull.nbdio.connection import Cancelled
from nbdpull.target.export import Export
from nbdpull.target.qcow2 import Qcow2File
from nbdpull.target.rawfile import RawFile
from nbdpull.target.stream import Stream
from tests.target.conftest import Serve
from tests.target.helpers import (
    MIB,
    allocated,
    disk_bytes,
    fill,
    names,
    random_bytes,
    same,
)

SIZES = [1, 4096, 64 * 1024, MIB + 1, 9 * MIB + 4096 + 512 + 3]


@pytest.fixture
def cancel() -> threading.Event:
    return threading.Event()


@pytest.mark.parametrize("size", SIZES)
def test_raw_file_has_the_disks_bytes_and_size(tmp_path: Path, size: int) -> None:
    disk = disk_bytes(size)
    path = tmp_path / "d.raw"
    fill(RawFile(path, size, force=False), disk)
    assert path.read_bytes() == disk
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path) == ["d.raw"]


def test_raw_file_keeps_zeroes_inside_data_as_holes(tmp_path: Path) -> None:
    piece = random_bytes(4096)
    disk = (piece + bytes(12 * 4096) + piece[:100] + bytes(3996)) * 64
    path = tmp_path / "d.raw"
    target = RawFile(path, len(disk), force=False)
    assert target.write(0, disk) == 2 * 64 * 4096
    target.finish()
    assert path.read_bytes() == disk
    assert allocated(path) <= 2 * 64 * 4096 + 64 * 1024


def test_a_disk_of_only_zeroes_takes_no_space(tmp_path: Path) -> None:
    path = tmp_path / "d.raw"
    target = RawFile(path, 1 << 40, force=False)
    target.zero(0, 1 << 40)
    target.finish()
    assert path.stat().st_size == 1 << 40
    assert allocated(path) <= 64 * 1024


def test_existing_file_is_only_replaced_by_force(tmp_path: Path) -> None:
    path = tmp_path / "d.raw"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists; give --force"):
        RawFile(path, 4096, force=False)
    target = RawFile(path, 4096, force=True)
    target.write(0, b"x" * 4096)
    assert path.read_bytes() == b"mine", "not before it is complete"
    target.finish()
    assert path.read_bytes() == b"x" * 4096
    assert names(tmp_path) == ["d.raw"]


def test_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "d.raw"
    target = RawFile(path, 4096, force=False)
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        target.finish()
    target.abort()
    assert path.read_bytes() == b"mine"
    assert names(tmp_path) == ["d.raw"]


def test_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "d.raw").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists"):
        RawFile(tmp_path / "d.raw", 4096, force=False)


def test_aborted_raw_file_leaves_nothing(tmp_path: Path) -> None:
    target = RawFile(tmp_path / "d.raw", MIB, force=False)
    target.write(0, b"x" * 4096)
    target.abort()
    target.abort()
    assert names(tmp_path) == []


def test_full_storage_is_a_target_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = RawFile(tmp_path / "d.raw", MIB, force=False)

    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TargetError, match=r"d\.raw.*[Nn]o space.*free some space"):
        target.write(0, b"x" * 4096)
    target.abort()
    assert names(tmp_path) == []


def test_missing_folder_is_a_target_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="No such file"):
        RawFile(tmp_path / "no" / "d.raw", 1, force=False)


@pytest.mark.parametrize("size", SIZES)
def test_qcow2_is_identical_to_the_disk(tmp_path: Path, size: int, cancel: threading.Event) -> None:
    disk = disk_bytes(size)
    # QEMU reads a raw file in sectors too: what follows the disk in its last one reads as zeroes.
    (tmp_path / "want").write_bytes(disk + bytes(-size % 512))
    path = tmp_path / "out" / "d.qcow2"
    path.parent.mkdir()
    target = Qcow2File(path, size, force=False, cancel=cancel)
    assert bool(target.note) == bool(size % 512)
    fill(target, disk)
    assert same(tmp_path / "want", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(path.parent) == ["d.qcow2"]


def test_server_whose_socket_is_there_before_it_listens_is_waited_for(
    tmp_path: Path, cancel: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bind(2) makes the file and listen(2) comes later: a connection in between is refused."""
    late = tmp_path / "qemu-nbd"
    late.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys, time\n"
        "path = next(a for a in sys.argv if a.startswith('--socket=')).split('=', 1)[1]\n"
        "socket.socket(socket.AF_UNIX).bind(path)\n"
        "time.sleep(0.3)\n"
        "os.unlink(path)\n"
        f"os.execv({shutil.which('qemu-nbd')!r}, sys.argv)\n"
    )
    late.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    disk = disk_bytes(MIB)
    fill(Qcow2File(tmp_path / "d.qcow2", MIB, force=False, cancel=cancel), disk)
    (tmp_path / "truth").write_bytes(disk)
    assert same(tmp_path / "truth", tmp_path / "d.qcow2")


def test_qcow2_keeps_zero_clusters_unallocated(tmp_path: Path, cancel: threading.Event) -> None:
    disk = (b"x" * 65536 + bytes(15 * 65536)) * 16
    path = tmp_path / "d.qcow2"
    target = Qcow2File(path, 1 << 36, force=False, cancel=cancel)
    for at in range(0, len(disk), MIB):
        assert target.write(at, disk[at : at + MIB]) == 65536
    target.finish()
    assert allocated(path) < 2 * MIB


def test_aborted_qcow2_leaves_no_file_and_no_process(
    tmp_path: Path, cancel: threading.Event
) -> None:
    target = Qcow2File(tmp_path / "d.qcow2", MIB, force=False, cancel=cancel)
    target.write(0, b"x" * 65536)
    process = target._process
    assert process.poll() is None
    target.abort()
    target.abort()
    assert process.returncode is not None
    assert names(tmp_path) == []


def test_qcow2_whose_server_dies_is_a_target_error(tmp_path: Path, cancel: threading.Event) -> None:
    target = Qcow2File(tmp_path / "d.qcow2", MIB, force=False, cancel=cancel)
    try:
        target._process.kill()
        target._process.wait()
        with pytest.raises(TargetError, match=r"can't write to '.*d\.qcow2'"):
            target.write(0, b"x" * 65536)
        with pytest.raises(TargetError):
            target.finish()
    finally:
        target.abort()
    assert names(tmp_path) == []


@pytest.mark.parametrize("program", ["qemu-img", "qemu-nbd"])
def test_missing_program_names_its_package(
    tmp_path: Path, cancel: threading.Event, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    if program == "qemu-nbd":
        (tools / "qemu-img").symlink_to("/usr/bin/qemu-img")
    monkeypatch.setenv("PATH", str(tools))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(TargetError, match=f"'{program}' is not installed.*qemu-utils"):
        Qcow2File(out / "d.qcow2", MIB, force=False, cancel=cancel)
    assert names(out) == []


def _garbage(path: Path, size: int) -> bytes:
    data = random_bytes(size)
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("size", SIZES)
def test_export_full_of_garbage_gets_the_disk_and_keeps_the_rest(
    tmp_path: Path, serve: Serve, cancel: threading.Event, size: int
) -> None:
    image = tmp_path / "image"
    room = (size + 3 * MIB) // 512 * 512
    before = _garbage(image, room)
    disk = disk_bytes(size)
    target = Export(
        serve("qemu-nbd", "-f", "raw", "-t", "-e", "8", "-k", "SOCKET", image), size, cancel=cancel
    )
    assert f"{size} to {room}" in target.note
    fill(target, disk)
    assert image.read_bytes() == disk + before[size:]


@pytest.mark.parametrize("minimum", [512, 4096, 65536])
def test_minimum_block_size_is_kept(
    tmp_path: Path, serve: Serve, cancel: threading.Event, minimum: int
) -> None:
    image = tmp_path / "image"
    before = _garbage(image, 4 * MIB)
    policy = [f"blocksize-minimum={minimum}", f"blocksize-preferred={max(minimum, 4096)}"]
    policy += ["blocksize-maximum=512K", "blocksize-error-policy=error"]
    uri = serve(
        "nbdkit", "-f", "-U", "SOCKET", "--filter=blocksize-policy", "file", image, *policy
    )  # fmt: skip
    size = 2 * MIB + 100 * 1024 + 77
    disk = disk_bytes(size)
    fill(Export(uri, size, cancel=cancel), disk)
    assert image.read_bytes() == disk + before[size:]


def test_export_that_cannot_zero_gets_zeroes_written(
    tmp_path: Path, serve: Serve, cancel: threading.Event
) -> None:
    image = tmp_path / "image"
    _garbage(image, 4 * MIB)
    uri = serve(
        "nbdkit", "-f", "-U", "SOCKET", "--filter=nozero", "file", image, "zeromode=none"
    )  # fmt: skip
    disk = disk_bytes(4 * MIB, seed=3)
    fill(Export(uri, len(disk), cancel=cancel), disk)
    assert image.read_bytes() == disk


def test_export_that_is_too_small_is_refused(serve: Serve, cancel: threading.Event) -> None:
    uri = serve("nbdkit", "-f", "-U", "SOCKET", "memory", "1M")
    with pytest.raises(UsageError, match="has 1048576 bytes, the disk has 1048577"):
        Export(uri, MIB + 1, cancel=cancel)


def test_read_only_export_is_refused(serve: Serve, cancel: threading.Event) -> None:
    uri = serve("nbdkit", "-f", "-r", "-U", "SOCKET", "memory", "1M")
    with pytest.raises(UsageError, match="is read-only"):
        Export(uri, MIB, cancel=cancel)


def test_export_that_fails_is_a_target_error(serve: Serve, cancel: threading.Event) -> None:
    uri = serve(
        "nbdkit", "-f", "-U", "SOCKET", "--filter=error", "memory", "4M", "error-pwrite-rate=1"
    )  # fmt: skip
    target = Export(uri, 4 * MIB, cancel=cancel)
    with pytest.raises(TargetError, match="write of 65536 bytes at 0"):
        target.write(0, b"x" * 65536)
    target.abort()


def test_absent_server_is_a_target_error(tmp_path: Path, cancel: threading.Event) -> None:
    with pytest.raises(TargetError, match="can't connect"):
        Export(f"nbd+unix:///?socket={tmp_path}/none", MIB, cancel=cancel)


def test_cancelled_export_write_ends_soon(serve: Serve, cancel: threading.Event) -> None:
    uri = serve("nbdkit", "-f", "-U", "SOCKET", "--filter=delay", "memory", "4M", "wdelay=3")
    target = Export(uri, 4 * MIB, cancel=cancel)
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(Cancelled):
        target.write(0, b"x" * 65536)
    target.abort()


@pytest.mark.parametrize("size", SIZES)
def test_stream_is_the_disk_in_order(cancel: threading.Event, size: int) -> None:
    disk = disk_bytes(size)
    reading, writing = os.pipe()
    got = bytearray()

    def read() -> None:
        while part := os.read(reading, 65536):
            got.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    fill(Stream(writing, cancel), disk)
    os.close(writing)
    reader.join(20)
    os.close(reading)
    assert got == disk


def test_stream_into_a_file_is_the_disk(tmp_path: Path, cancel: threading.Event) -> None:
    disk = disk_bytes(3 * MIB)
    with (tmp_path / "f").open("wb") as file:
        file.write(b"head")
        file.flush()
        fill(Stream(file.fileno(), cancel), disk)
    assert (tmp_path / "f").read_bytes() == b"head" + disk


def test_stream_whose_reader_stopped_can_be_cancelled(cancel: threading.Event) -> None:
    reading, writing = os.pipe()
    target = Stream(writing, cancel)
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(Cancelled):
        target.write(0, bytes(8 * MIB))
    target.abort()
    assert os.get_blocking(writing), "others share this descriptor"
    os.close(reading)
    os.close(writing)


def test_stream_whose_reader_left_is_a_target_error(cancel: threading.Event) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    target = Stream(writing, cancel)
    with pytest.raises(TargetError, match="closed by its reader"):
        target.write(0, bytes(MIB))
    with pytest.raises(Cancelled):
        target.write(2 * MIB, bytes(MIB))
    target.abort()
    os.close(writing)


def test_stream_to_a_terminal_is_refused(cancel: threading.Event) -> None:
    leader, terminal = os.openpty()
    with pytest.raises(UsageError, match="is a terminal"):
        Stream(terminal, cancel)
    os.close(leader)
    os.close(terminal)
