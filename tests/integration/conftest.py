"""What the integration tests share: a repository, and backups taken and restored through the API."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nbdpull
from tests.support.process import run, stop
from tests.support.proxy import Proxy, proxy
from tests.support.stores import SeaweedFs
from tests.support.vm import Vm

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


def new_keeper(repository: str, tmp_path: Path) -> Keeper:
    """A new, empty repository at that place, with folders of the test's own."""
    for name in ("s", "restored"):
        (tmp_path / name).mkdir()
    nbdpull.init(repository)
    return Keeper(repository, tmp_path / "s", tmp_path / "restored")


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    """A new, empty repository."""
    return new_keeper(str(tmp_path / "repo"), tmp_path)


@pytest.fixture
def front(weed: SeaweedFs) -> Iterator[Proxy]:
    """A proxy before the S3 server."""
    with proxy(weed.endpoint) as made:
        yield made


@pytest.fixture
def far(s3: str, tmp_path: Path) -> Keeper:
    """A new, empty repository in the S3 server, by a way that does not hang."""
    return new_keeper(s3, tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder with little room."""
    path = tmp_path / "small"
    path.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path])
    yield path
    run(["umount", path])


def start(*arguments: str | Path, front: Proxy | None = None) -> subprocess.Popen[str]:
    """The command line, with its store behind the proxy where there is one."""
    far = {} if front is None else {"AWS_ENDPOINT_URL": front.endpoint}
    return subprocess.Popen(
        [sys.executable, "-m", "nbdpull", *map(str, arguments)],
        env={**os.environ, **far},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def out_of_scratch(
    client: subprocess.Popen[str], reached: threading.Event, vm: Vm, small: Path
) -> None:
    """Have a client's scratch, which is in `small`, fill up once its store hangs: it ends, and the guest goes on."""
    try:
        while not reached.wait(0.1):
            assert client.poll() is None, client.communicate()
        vm.cont()  # it overwrites 16 MiB, and there is room for four
        _, err = client.communicate(timeout=GUARD_S)
    finally:
        stop(client)
    assert client.returncode == 13, err
    assert "--scratch" in err.splitlines()[-1]
    assert vm.status() == "running"
    vm.wait_written(10)
    assert not any(vm.leftovers().values())
    assert list(small.iterdir()) == []


def noise(tmp_path: Path, size: int) -> str:
    """A qemu-io command that writes what can't be compressed."""
    (tmp_path / "noise").write_bytes(random.Random(5).randbytes(size))
    return f"write -q -s {tmp_path}/noise 1M {size}"
