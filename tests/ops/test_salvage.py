"""A restore that leaves out what is lost: the rest is right, and what is not is told to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nbdpull
from nbdpull.errors import DamagedError
from nbdpull.model.grain import GRAIN
from tests.cli.conftest import Cli, cli  # noqa: F401 - a fixture
from tests.ops.retained import SIZE, Retained, retained


@pytest.fixture
def repo(tmp_path: Path) -> Retained:
    return retained(tmp_path / "repo")


def spoil_frames(repo: Retained, count: int) -> list[tuple[int, int]]:
    """Damage frames that the newest backup of vda needs; where on the disk these are."""
    manifest = repo.manifests[2]["vda"]
    rows = [row for row in repo.repository.reader(manifest).segment(0) if row.n == row.flen]
    for row in rows[:count]:
        path = repo.store.path(f"d/{manifest.sessions[row.session].sid}/{row.seq:08x}")
        raw = bytearray(path.read_bytes())
        raw[row.offset + 64 + 9] ^= 1
        path.write_bytes(raw)
    return [(row.start * GRAIN, min((row.start + row.n) * GRAIN, SIZE)) for row in rows[:count]]


def holed(content: bytes, lost: tuple[tuple[int, int], ...]) -> bytes:
    raw = bytearray(content)
    for start, end in lost:
        raw[start:end] = bytes(end - start)
    return bytes(raw)


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_what_is_not_lost_is_restored_and_what_is_lost_is_told(
    repo: Retained, tmp_path: Path, format_: str
) -> None:
    expected = spoil_frames(repo, 3)
    out = tmp_path / "out"
    with pytest.raises(DamagedError, match="--salvage restores the rest"):
        nbdpull.restore(repo.path, "latest", out)
    done = nbdpull.restore(repo.path, "latest", out, salvage=True, format=format_)  # type: ignore[arg-type]
    vda, vdb = done.disks
    assert vdb.lost == ()
    assert sum(end - start for start, end in vda.lost) == sum(
        end - start for start, end in expected
    )
    assert all(any(a <= start and end <= b for a, b in vda.lost) for start, end in expected)
    for name, lost in (("vda", vda.lost), ("vdb", ())):
        path = out / f"{name}.{format_}"
        if format_ == "qcow2":
            raw = out / f"{name}.raw"
            subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
            path = raw
        assert path.read_bytes()[:SIZE] == holed(repo.states[2][name].content(), lost)
    # It is on record, so that the next full heals it.
    assert len(nbdpull.verify(repo.path).damaged) > 0
    assert repo.objects("b")


def test_a_map_that_is_lost_takes_its_segment_along(repo: Retained, tmp_path: Path) -> None:
    manifest = repo.manifests[2]["vdb"]
    ref = manifest.segments[0]
    assert ref is not None
    path = repo.store.path(f"d/{manifest.sessions[ref.session].sid}/{ref.seq:08x}")
    raw = bytearray(path.read_bytes())
    raw[ref.offset + 64 + 9] ^= 1
    path.write_bytes(raw)
    done = nbdpull.restore(repo.path, "latest", tmp_path / "out", salvage=True)
    assert [one.lost for one in done.disks] == [(), ((0, SIZE),)]
    assert (tmp_path / "out" / "vdb.raw").read_bytes() == bytes(SIZE)
    assert (tmp_path / "out" / "vda.raw").read_bytes() == repo.states[2]["vda"].content()


def test_a_pack_that_is_gone_takes_its_own_frames_along(repo: Retained, tmp_path: Path) -> None:
    manifest = repo.manifests[0]["vda"]
    repo.store.path(f"d/{manifest.sessions[0].sid}/00000000").unlink()
    done = nbdpull.restore(repo.path, repo.ids[2], tmp_path / "out", salvage=True)
    (lost,) = (one.lost for one in done.disks if one.name == "vda")
    assert 0 < sum(end - start for start, end in lost) < SIZE
    content = (tmp_path / "out" / "vda.raw").read_bytes()
    assert content == holed(repo.states[2]["vda"].content(), lost)


def test_the_command_line_tells_each_range_and_ends_with_3(
    cli: Cli,  # noqa: F811
    repo: Retained,
    tmp_path: Path,
) -> None:
    spoil_frames(repo, 2)
    done = cli(
        "restore", "latest", "-r", repo.path, "--to", tmp_path / "out", "--salvage", "--json"
    )
    assert done.exit_code == 3
    (lost,) = (one["lost"] for one in json.loads(done.stdout)["disks"] if one["lost"])
    for start, end in lost:
        assert f"{start}-{end}" in done.stderr
    assert "bytes are lost, and zeroes in" in done.stderr


def test_a_stream_has_zeroes_in_the_place_of_what_is_lost(repo: Retained) -> None:
    spoil_frames(repo, 2)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nbdpull", "restore", "latest", "-r", repo.path, "--to", "-"),
            *("--disk", "vda", "--salvage", "--progress", "json"),
        ],
        check=False,
        capture_output=True,
    )
    assert done.returncode == 3
    result = json.loads(done.stderr.splitlines()[-1])
    lost = tuple((start, end) for start, end in result["result"]["disks"][0]["lost"])
    assert done.stdout == holed(repo.states[2]["vda"].content(), lost)
