"""Finding disks: which node keeps the bitmaps, what a disk is called, and what is none."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from nbdpull.errors import SourceError, UsageError
from nbdpull.source.address import MonitorAddress
from nbdpull.source.base import Disk, Skipped, select_disks
from nbdpull.source.disks import (
    QemuDisk,
    _bitmaps,
    _device_name,
    _Graph,
    _persistent,
    _qom_path,
    check_iothreads,
    find_disks,
)
from nbdpull.source.qmp import open_monitor
from tests.source.test_qmp import answers
from tests.support.fakeqmp import FakeQmp

Chain = list[tuple[str, str, str]]
"""(node, driver, name of the edge to the next one), from the top down."""


def graph(chain: Chain, *, sizes: dict[str, int] | None = None) -> _Graph:
    nodes = {
        name: {
            "node-name": name,
            "drv": driver,
            "image": {"virtual-size": (sizes or {}).get(name, 1 << 20)},
            "file": f"/images/{name}",
        }
        for name, driver, _ in chain
    }
    children = {
        (above, edge): below for (above, _, edge), (below, _, _) in itertools.pairwise(chain)
    }
    return _Graph(nodes=nodes, children=children, has_parent=frozenset(children.values()))


@pytest.mark.parametrize(
    ("chain", "found"),
    [
        ([("a", "qcow2", "file"), ("f", "file", "")], "a"),
        ([("a", "raw", "file"), ("f", "file", "")], "a"),
        ([("a", "raw", "file"), ("f", "host_device", "")], "a"),
        ([("a", "raw", "file"), ("f", "rbd", "")], "a"),
        ([("f", "file", "")], "f"),
        ([("t", "throttle", "file"), ("a", "qcow2", "file"), ("f", "file", "")], "a"),
        (
            [
                ("c", "copy-on-read", "file"),
                ("t", "throttle", "file"),
                ("a", "luks", "file"),
                ("f", "file", ""),
            ],
            "a",
        ),
        ([("j", "copy-before-write", "file"), ("a", "qcow2", "file"), ("f", "file", "")], "a"),
        ([("j", "mirror_top", "backing"), ("a", "qcow2", "file"), ("f", "file", "")], "a"),
        ([("j", "commit_top", "backing"), ("a", "qcow2", "file"), ("f", "file", "")], "a"),
        # A raw node on another format is a handle; one that cuts a part out is not.
        ([("r", "raw", "file"), ("a", "qcow2", "file"), ("f", "file", "")], "a"),
        ([("q", "quorum", "children.0"), ("a", "qcow2", "file")], "q"),
        ([("t", "throttle", "file")], "t"),
    ],
)
def test_bitmaps_are_on_the_format_node(chain: Chain, found: str) -> None:
    assert graph(chain).format_node(chain[0][0]) == found


def test_raw_node_that_shows_a_part_of_its_child_is_the_disk() -> None:
    chain = [("r", "raw", "file"), ("a", "qcow2", "file"), ("f", "file", "")]
    assert graph(chain, sizes={"r": 512, "a": 1024}).format_node("r") == "r"


def test_endless_filters_are_an_error() -> None:
    loop = graph([("a", "throttle", "file"), ("b", "throttle", "file")])
    loop = _Graph(
        nodes=loop.nodes,
        children={("a", "file"): "b", ("b", "file"): "a"},
        has_parent=frozenset("ab"),
    )
    with pytest.raises(SourceError, match="deeper than 64"):
        loop.format_node("a")


@pytest.mark.parametrize(
    ("entry", "node", "name"),
    [
        ({"qdev": "virtio0"}, "n", "virtio0"),
        ({"qdev": "/machine/peripheral/vda/virtio-backend"}, "n", "vda"),
        ({"qdev": "/machine/peripheral/scsi0-0"}, "n", "scsi0-0"),
        ({"qdev": "/machine/peripheral-anon/device[0]", "device": "ide0-hd0"}, "n", "n"),
        (
            {"qdev": "/machine/peripheral-anon/device[0]", "device": "ide0-hd0"},
            "#block1",
            "ide0-hd0",
        ),
        (
            {"qdev": "/machine/peripheral-anon/device[0]"},
            "#block1",
            "/machine/peripheral-anon/device[0]",
        ),
        ({"qdev": None, "device": ""}, "n", "n"),
        ({}, "#block1", "#block1"),
    ],
)
def test_name_is_the_device_id_else_what_stays_longest(
    entry: dict[str, Any], node: str, name: str
) -> None:
    assert _device_name(entry, node) == name


def test_qom_path_of_an_id_and_of_a_path() -> None:
    assert _qom_path({"qdev": "vda"}) == "/machine/peripheral/vda"
    assert _qom_path({"qdev": "/machine/x"}) == "/machine/x"
    assert _qom_path({"qdev": ""}) is None
    assert _qom_path({}) is None


def test_bitmaps_without_a_name_are_passed_over() -> None:
    """QEMU 7.2 lists those that it keeps for itself."""
    sound = {"granularity": 65536, "recording": True, "busy": False, "persistent": False}
    found = _bitmaps({"dirty-bitmaps": [{"count": 1, **sound}, {"name": "b", "count": 7, **sound}]})
    assert list(found) == ["b"]
    assert (found["b"].count, found["b"].inconsistent) == (7, False)
    assert _bitmaps({}) == {}


def test_only_qcow2_version_3_keeps_bitmaps() -> None:
    def node(driver: str, **data: str) -> dict[str, Any]:
        return {"drv": driver, "image": {"format-specific": {"data": data}}}

    assert _persistent(node("qcow2", compat="1.1"))
    assert not _persistent(node("qcow2", compat="0.10"))
    assert not _persistent(node("raw"))
    assert _persistent({"drv": "qcow2", "image": {}})


@pytest.mark.parametrize(
    ("file", "temporary"),
    [
        ("/var/tmp/vl.a1B2c3", True),
        ("vl.a1B2c3", True),
        ("/images/vl.a1B2c3.qcow2", False),
        ("/images/xvl.a1B2c3", False),
        ("", False),
    ],
)
def test_overlay_of_snapshot_on_is_temporary(file: str, *, temporary: bool) -> None:
    made = graph([("a", "qcow2", "file"), ("f", "file", "")])
    made.nodes["f"]["file"] = file  # type: ignore[index]
    assert made.temporary("a") is temporary


# -- selection -------------------------------------------------------------------------------------

DISKS = [Disk(name=name, size=1) for name in ("vda", "vdb")]
SKIPPED = [Skipped(name="cd0", reason="removable medium (ide-cd)")]


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ((), (), {"vda", "vdb"}),
        (("vdb",), (), {"vdb"}),
        ((), ("vdb",), {"vda"}),
        (("vda", "vdb"), ("vdb",), {"vda"}),
        ((), ("cd0",), {"vda", "vdb"}),
    ],
)
def test_selection(include: tuple[str, ...], exclude: tuple[str, ...], chosen: set[str]) -> None:
    assert select_disks(DISKS, SKIPPED, include=include, exclude=exclude) == chosen


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        (("vdc",), (), "no disk 'vdc'; it has: vda, vdb"),
        ((), ("vdc",), "no disk 'vdc'; it has: vda, vdb"),
        (("cd0",), (), r"'cd0' can't be backed up: removable medium"),
        (("vda",), ("vda",), r"no disk to back up \(cd0: removable"),
    ],
)
def test_selection_that_can_not_be(
    include: tuple[str, ...], exclude: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        select_disks(DISKS, SKIPPED, include=include, exclude=exclude)


@pytest.mark.parametrize(
    ("version", "force", "refused"),
    [
        ((7, 2, 22), False, True),
        ((8, 2, 9), False, True),
        ((9, 0, 0), False, False),
        ((10, 0, 2), False, False),
        ((7, 2, 22), True, False),
    ],
)
def test_iothreads(version: tuple[int, int, int], *, force: bool, refused: bool) -> None:
    def disk(name: str, iothread: str | None) -> QemuDisk:
        return QemuDisk(
            name=name,
            size=1,
            node=name,
            top=name,
            top_driver="qcow2",
            driver="qcow2",
            qom_path=None,
            persistent=True,
            iothread=iothread,
        )

    check_iothreads([disk("vda", None)], version, force=force)
    both = [disk("vda", None), disk("vdb", "io0")]
    if refused:
        with pytest.raises(SourceError, match=r"'vdb' runs in iothread io0"):
            check_iothreads(both, version, force=force)
    else:
        check_iothreads(both, version, force=force)


def test_two_disks_of_one_name_are_an_error(tmp_path: Path) -> None:
    """By autogenerated drive names it can happen; a chain could not tell one from the other."""
    node = {"drv": "qcow2", "ro": False, "image": {"virtual-size": 512}}
    block = {"device": "same", "inserted": {"ro": False}}
    fake_answers = answers(
        10,
        0,
        query_iothreads=[],
        query_named_block_nodes=[{"node-name": f"#block{n}", **node} for n in (1, 2)],
        x_debug_query_block_graph={"nodes": [], "edges": []},
        query_block=[
            {**block, "inserted": {"ro": False, "node-name": f"#block{n}"}} for n in (1, 2)
        ],
    )

    async def run(path: Path) -> None:
        async with open_monitor(MonitorAddress(path=str(path))) as monitor:
            await find_disks(monitor)

    with (
        FakeQmp(tmp_path, fake_answers) as fake,
        pytest.raises(SourceError, match="2 disks are called 'same'; give each device an id"),
    ):
        asyncio.run(run(fake.path))
