"""The command line in this process, and in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import nbdpull
from nbdpull.cli.main import program

Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command line in this process; NBDPULL_REPO is not set. A bug fails the test."""
    monkeypatch.delenv("NBDPULL_REPO", raising=False)

    def invoke(*args: str | Path, env: Mapping[str, str | None] | None = None) -> Result:
        return CliRunner().invoke(
            program, list(map(str, args)), env=env, catch_exceptions=False, prog_name="nbdpull"
        )

    return invoke


def spawn_cli(*args: str | Path, patch: str = "", **options: object) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, after the statements of `patch`."""
    code = f"{patch}\nfrom nbdpull.cli.main import main\nmain()"
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.DEVNULL,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def disk(name: str = "vda", **changes: object) -> nbdpull.DiskInfo:
    """A disk of a backup."""
    values: dict[str, object] = {
        "name": name,
        "size": 1 << 30,
        "level": nbdpull.Level.INCREMENTAL,
        "reason": "changes since the last backup",
        "changed_bytes": 3 << 20,
        "read_bytes": 2 << 20,
        "stored_bytes": 1 << 20,
    }
    return nbdpull.DiskInfo(**(values | changes))  # type: ignore[arg-type]


def info(backup: str = "aa" * 8, **changes: object) -> nbdpull.BackupInfo:
    """A backup in a repository."""
    values: dict[str, object] = {
        "backup": backup,
        "vm": "web",
        "chain": "default",
        "level": nbdpull.Level.INCREMENTAL,
        "parent": "bb" * 8,
        "time": 1735725600.25,
        "duration_s": 4.20049,
        "disks": (disk("vda"), disk("vdb", level=nbdpull.Level.FULL, reason="it is new")),
    }
    return nbdpull.BackupInfo(**(values | changes))  # type: ignore[arg-type]


def result(**changes: object) -> nbdpull.BackupResult:
    """What a backup returns."""
    known = info()
    values: dict[str, object] = {
        name: getattr(known, name)
        for name in ("backup", "vm", "chain", "level", "parent", "time", "duration_s", "disks")
    }
    values["profile"] = nbdpull.BackupProfile(
        workers=4,
        status_s=0.125,
        idle_s=0.25,
        source_s=3.5,
        hash_s=0.5,
        compress_s=10.0,
        encrypt_s=0.0,
        store_s=1.75,
        requests=1600,
    )
    return nbdpull.BackupResult(**(values | changes))  # type: ignore[arg-type]
