"""Freezing, where a QEMU refuses what a real one can't be made to refuse by root."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdpull.errors import CommandError, SourceError
from nbdpull.source.address import MonitorAddress
from nbdpull.source.disks import QemuDisk
from nbdpull.source.fleecing import QemuOptions, QemuPlan, freeze
from nbdpull.source.names import RunNames
from nbdpull.source.qmp import open_monitor
from nbdpull.source.rundir import RunDir
from tests.source.test_qmp import answers
from tests.support.fakeqmp import FakeQmp

RUN = "0123abcd"


def try_to_freeze(tmp_path: Path, refusal: str) -> None:
    """Freeze one disk of a QEMU that refuses ``blockdev-add``."""
    disk = QemuDisk(
        name="vda",
        size=1 << 20,
        node="d0",
        top="d0",
        top_driver="qcow2",
        driver="qcow2",
        qom_path=None,
        persistent=True,
    )

    async def run(path: Path) -> None:
        rundir = RunDir.create(str(tmp_path), RUN, source="qmp:/x", chain="c", owner=None)
        try:
            async with (
                open_monitor(MonitorAddress(path=str(path))) as monitor,
                freeze(
                    monitor,
                    RunNames(RUN),
                    [QemuPlan(disk=disk, base=None, checkpoint=None)],
                    rundir,
                    options=QemuOptions(),
                    uri_of=lambda export: export,
                    on_lost=lambda _lost: None,
                    on_released=lambda _gone: None,
                ),
            ):
                raise AssertionError("it was frozen")
        finally:
            rundir.close()

    with FakeQmp(tmp_path, answers(10, 0, blockdev_add=refusal, query_jobs=[])) as fake:
        asyncio.run(run(fake.path))


def test_scratch_that_qemu_may_not_open_says_as_whom_to_run(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"which runs as user \d+, may not open .* as root"):
        try_to_freeze(tmp_path, "Could not open '/x/disk0.raw': Permission denied")
    assert not list(tmp_path.glob("nbdpull-*"))


def test_other_refusals_keep_qemus_words(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No space left"):
        try_to_freeze(tmp_path, "Could not open '/x/disk0.raw': No space left on device")
