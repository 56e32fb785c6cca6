"""Restores into targets that other programs serve, compared by other programs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdpull.errors import UsageError
from nbdpull.model.results import Progress, ProgressKind
from nbdpull.ops.restore import RestoreOptions, restore
from nbdpull.repo.repository import Repository
from tests.ops.builder import Disk, add_backup
from tests.target.helpers import MIB, allocated, disk_bytes, random_bytes, same, wait_for_socket

SIZE = 24 * MIB
Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts an NBD server and gives its URI; all are stopped at the end."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str | Path) -> str:
        socket = tmp_path / f"s{len(processes)}"
        full = [str(part).replace("SOCKET", str(socket)) for part in command]
        processes.append(subprocess.Popen(full, stdin=subprocess.DEVNULL))
        wait_for_socket(socket, processes[-1])
        return f"nbd+unix:///?socket={socket}"

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(10)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(str(tmp_path / "repo"))


@pytest.fixture
def disk() -> Disk:
    return Disk.of(disk_bytes(SIZE, 11))


@pytest.fixture
def backup(repository: Repository, disk: Disk) -> str:
    return add_backup(repository, {"d": disk})["d"].summary.backup


@pytest.fixture
def want(disk: Disk, tmp_path: Path) -> Path:
    return disk.write_to(tmp_path / "want")


def run(repository: Repository, backup: str, to: object, *, force: bool = False) -> list[Progress]:
    events: list[Progress] = []
    options = RestoreOptions(repository=repository.location, backup=backup, to=str(to), force=force)
    asyncio.run(restore(options, progress=events.append))
    return events


def test_qemu_nbd_export_full_of_garbage_becomes_the_disk(
    repository: Repository, backup: str, want: Path, serve: Serve, tmp_path: Path
) -> None:
    image = tmp_path / "image.qcow2"
    (tmp_path / "garbage").write_bytes(random_bytes(SIZE))
    garbage = str(tmp_path / "garbage")
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", garbage, str(image)]
    subprocess.run(convert, check=True)
    run(
        repository, backup, serve("qemu-nbd", "-f", "qcow2", "-t", "-e", "8", "-k", "SOCKET", image)
    )
    assert same(want, image)


def test_nbdkit_export_full_of_garbage_becomes_the_disk(
    repository: Repository, backup: str, want: Path, serve: Serve, tmp_path: Path
) -> None:
    uri = serve("nbdkit", "-f", "-U", "SOCKET", "memory", str(SIZE))
    (tmp_path / "garbage").write_bytes(random_bytes(SIZE))
    subprocess.run(["nbdcopy", tmp_path / "garbage", uri], check=True)
    run(repository, backup, uri)
    subprocess.run(["nbdcopy", uri, tmp_path / "got"], check=True)
    subprocess.run(["cmp", want, tmp_path / "got"], check=True)


def test_server_with_one_connection_and_large_blocks(
    repository: Repository, backup: str, want: Path, serve: Serve, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(random_bytes(SIZE))
    policy = ["blocksize-minimum=4096", "blocksize-maximum=128K", "blocksize-error-policy=error"]
    filters = ["--filter=blocksize-policy", "--filter=multi-conn"]
    uri = serve(
        "nbdkit", "-f", "-U", "SOCKET", *filters, "file", image, *policy, "multi-conn-mode=disable"
    )
    run(repository, backup, uri)
    subprocess.run(["cmp", want, image], check=True)


def test_what_follows_the_disk_is_left_alone_and_told(
    repository: Repository, backup: str, want: Path, serve: Serve, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    before = random_bytes(SIZE + MIB)
    image.write_bytes(before)
    events = run(
        repository, backup, serve("qemu-nbd", "-f", "raw", "-t", "-e", "8", "-k", "SOCKET", image)
    )
    assert image.read_bytes() == want.read_bytes() + before[SIZE:]
    told = [event.text for event in events if event.kind is ProgressKind.MESSAGE]
    assert any(f"bytes {SIZE} to {SIZE + MIB}" in text for text in told)


def test_standard_output_into_a_pipe(
    repository: Repository, backup: str, want: Path, tmp_path: Path
) -> None:
    code = (
        "import asyncio, sys\n"
        "from nbdpull.ops.restore import RestoreOptions, restore\n"
        "asyncio.run(restore(RestoreOptions(repository=sys.argv[1], backup=sys.argv[2], to='-')))"
    )
    with (tmp_path / "got").open("wb") as got:
        first = subprocess.Popen(
            [sys.executable, "-c", code, repository.location, backup], stdout=subprocess.PIPE
        )
        subprocess.run(
            ["dd", "bs=100000", "status=none"], stdin=first.stdout, stdout=got, check=True
        )
        if first.stdout is not None:
            first.stdout.close()
    assert first.wait() == 0
    subprocess.run(["cmp", want, tmp_path / "got"], check=True)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    backing = tmp_path / "backing"
    backing.write_bytes(random_bytes(SIZE + MIB))
    command = ["losetup", "--find", "--show", str(backing)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs loop devices: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device, backing
    subprocess.run(["losetup", "--detach", device], check=True)


def test_block_device_becomes_the_disk_and_its_zeroes_take_no_space(
    repository: Repository, backup: str, want: Path, loop: tuple[str, Path]
) -> None:
    device, backing = loop
    run(repository, backup, device)
    subprocess.run(["cmp", f"--bytes={SIZE}", want, device], check=True)
    assert backing.read_bytes()[SIZE:] == random_bytes(SIZE + MIB)[SIZE:]
    assert allocated(backing) < SIZE


def test_mounted_block_device_is_refused(
    repository: Repository, backup: str, loop: tuple[str, Path], tmp_path: Path
) -> None:
    device, backing = loop
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    mount = tmp_path / "mnt"
    mount.mkdir()
    done = subprocess.run(["mount", device, mount], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount: {done.stderr.strip()}")
    try:
        before = backing.read_bytes()
        with pytest.raises(UsageError, match="is mounted or held"):
            run(repository, backup, device)
        assert backing.read_bytes() == before
    finally:
        subprocess.run(["umount", mount], check=True)
